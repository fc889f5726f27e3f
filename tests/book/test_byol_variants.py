"""The parts that the chapter *BYOL* removes or replaces are what it says they are."""

import pytest
import torch
from torch import Tensor, nn

from sslbook.book.chapters.byol.variants import (
    Constant,
    NoStopGradient,
    convnet,
    direct_predictor,
    mlp,
    standardize_weights,
)
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.nn import ConvNet
from sslbook.schedules import Clock

VIEW = View(size=16)


def images(n: int) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_only_batch_norm_looks_at_other_images(norm: str):
    network = nn.Sequential(convnet(8, norm), mlp(32, 16, 8, norm))
    x = images(6)
    alone = torch.allclose(network(x)[:2], network(x[:2]), atol=1e-5)
    assert alone == (norm != "batch")


def test_standardized_weights_do_not_pass_what_all_inputs_share():
    layer, x = nn.Linear(12, 5, bias=False), torch.randn(3, 12)
    assert not torch.allclose(layer(x), layer(x + 7), atol=1e-4)
    standardize_weights(layer)
    torch.testing.assert_close(layer(x), layer(x + 7), atol=1e-4, rtol=0)


def test_the_direct_predictor_is_a_root():
    z = torch.randn(40, 6, dtype=torch.float64)
    correlation = z.T @ z / 40
    root = direct_predictor(correlation, boost=0.0)
    torch.testing.assert_close(root @ root, correlation)
    added = direct_predictor(correlation, boost=0.1) - root
    torch.testing.assert_close(added, added[0, 0] * torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_a_constant_momentum_copies_or_keeps_the_target(momentum: float):
    method = Constant(ConvNet(8), VIEW, VIEW, 16, 8, momentum)
    before = [p.clone() for p in method.target_backbone.parameters()]
    with torch.no_grad():
        for p in method.backbone.parameters():
            p += 1
    method.after_step(Clock(1, 10))
    want = before if momentum == 1 else list(method.backbone.parameters())
    for p, q in zip(method.target_backbone.parameters(), want, strict=True):
        torch.testing.assert_close(p, q.detach())


def test_without_stop_gradient_the_other_view_gets_a_gradient():
    torch.manual_seed(0)
    method = NoStopGradient(ConvNet(8), VIEW, VIEW, 16, 8, predictor=nn.Identity())
    x, other = images(8), images(8).flip(3)
    batch = Batch((x, other), torch.arange(8), torch.full((8,), -1))
    loss = method(batch, Clock(0, 10))["loss"]
    z_1, z_2 = (method.projector(method.backbone(v)) for v in (x, other))
    both = 4 - 4 * torch.nn.functional.cosine_similarity(z_1, z_2).mean()
    torch.testing.assert_close(loss, both)
    weight = method.projector[0].weight  # pyrefly: ignore
    torch.testing.assert_close(*(torch.autograd.grad(each, weight)[0] for each in (loss, both)))
