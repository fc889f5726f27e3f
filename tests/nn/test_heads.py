import pytest
import torch
from torch import nn

from sslbook.nn import MLP, DINOHead


def test_mlp_layers_in_order() -> None:
    head = MLP(5, 7, 3, num_layers=3)
    assert [type(m) for m in head] == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    assert [m.weight.shape for m in head if isinstance(m, nn.Linear)] == [(7, 5), (7, 7), (3, 7)]
    assert [m.bias is not None for m in head if isinstance(m, nn.Linear)] == [False, False, True]


def test_one_layer_mlp_is_linear() -> None:
    (layer,) = MLP(5, 7, 3, num_layers=1, batch_norm=False)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (3, 5)


def test_without_batch_norm_every_layer_has_a_bias() -> None:
    head = MLP(5, 7, 3, batch_norm=False)
    assert [type(m) for m in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(m.bias is not None for m in head if isinstance(m, nn.Linear))
    assert MLP(5, 7, 3, last_bias=False)[-1].bias is None


@pytest.mark.parametrize(("last", "trained"), [("plain", set()), ("scale", {"weight"}), ("affine", {"weight", "bias"})])
def test_last_batch_norm(last: str, trained: set[str]) -> None:
    head = MLP(5, 7, 3, last_batch_norm=last)
    assert {name for name, p in head[-1].named_parameters() if p.requires_grad} == trained
    assert head[-2].bias is None
    z = head(torch.randn(64, 5))
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(3), rtol=0, atol=1e-5)


def test_dino_head_returns_cosines_to_prototypes() -> None:
    head = DINOHead(5, 7, 3, 4)
    assert [type(m) for m in head.mlp] == [nn.Linear, nn.GELU] * 2 + [nn.Linear]
    with torch.no_grad():
        head.prototypes *= torch.tensor([[1.0], [2.0], [0.1], [5.0]])  # their lengths do not matter
    x = torch.randn(2, 6, 5)
    expected = torch.cosine_similarity(head.mlp(x)[:, :, None], head.prototypes, dim=-1)
    torch.testing.assert_close(head(x), expected)


def test_prototypes_start_as_torchs_linear_layer() -> None:
    torch.manual_seed(0)
    ours, linear = DINOHead(5, 7, 16, 3000).prototypes.detach(), nn.Linear(16, 3000).weight.detach()
    assert float(ours.abs().max()) <= 0.25
    assert float(ours.norm(dim=1).mean()) == pytest.approx(float(linear.norm(dim=1).mean()), rel=0.01)  # about 3**-0.5


def test_dino_head_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        head = DINOHead(384, 2048, 256, 65536)
    mlp = 384 * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256
    assert sum(p.numel() for p in head.parameters()) == mlp + 65536 * 256
