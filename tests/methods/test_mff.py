import math

import pytest
import torch
from torch import Tensor

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import mff
from sslbook.methods.mae import random_mask
from sslbook.methods.mff import Fusion
from sslbook.nn import ResNet, VisionTransformer, vit_base
from sslbook.nn.mask_tokens import gather_tokens
from sslbook.nn.patches import patchify
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={"view": VIEW, "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "layers": (0,)},
    command={
        "method.backbone": TRANSFORMER,
        "method.decoder_dim": 16,
        "method.decoder_num_heads": 2,
        "method.layers": "[0]",
    },
    learned=lambda method, batch, out: bool(out["loss"] < 0.8),  # 47/48 for a constant prediction: the images are noise
    backbone=transformer,
    full_scale="vit_base",
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4), "decoder_dim": 64, "decoder_num_heads": 4},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {})],
)


def literal_fusion(fusion: Fusion, layers: list[Tensor]) -> Tensor:
    exponentials = [math.exp(w) for w in fusion.weights.tolist()]
    result = torch.zeros_like(layers[0])
    for i in range(len(layers[0])):
        for j in range(layers[0].shape[1]):
            for level, tokens in enumerate(layers):
                token = tokens[i, j]
                if level < len(layers) - 1:
                    layer = fusion.projections[level]
                    token = torch.stack([w @ token + b for w, b in zip(layer.weight, layer.bias)])
                result[i, j] += exponentials[level] / sum(exponentials) * token
    return result


def test_fusion_matches_equations_2_and_3() -> None:
    torch.manual_seed(0)
    fusion = Fusion(8, 3).double().requires_grad_(False)
    torch.testing.assert_close(fusion.weights.softmax(dim=0), torch.full((4,), 0.25, dtype=torch.float64))
    fusion.weights.copy_(torch.randn(4))
    layers = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(4)]
    torch.testing.assert_close(fusion(layers), literal_fusion(fusion, layers))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("n", [3, 1])
def test_loss_matches_literal_formula(norm_pix_loss: bool, n: int) -> None:
    method = make("mff", norm_pix_loss=norm_pix_loss).double()
    batch = make_batch(method, n)
    images = batch.views[0].double()
    visible, masked = random_mask(batch.index, 16, 0.75, Clock())
    first, last = method.backbone.layers(gather_tokens(method.backbone.embed(images), visible))
    with torch.no_grad():
        fused = method.backbone.norm(literal_fusion(method.fusion, [first, last]))
        prediction = method.decoder(fused, visible, masked)
    patches = patchify(images, 4)
    errors = []
    for i in range(n):
        for j, patch in enumerate(masked[i].tolist()):
            target = patches[i, patch].tolist()
            if norm_pix_loss:
                mean = sum(target) / 48
                std = (sum((t - mean) ** 2 for t in target) / 47 + 1e-6) ** 0.5
                target = [(t - mean) / std for t in target]
            errors += [(a - b) ** 2 for a, b in zip(prediction[i, j].tolist(), target)]
    loss = method(batch._replace(views=(images,)), Clock())["loss"]
    assert float(loss.detach()) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


def test_gradients_reach_the_fused_layers() -> None:
    method = make("mff", backbone=VisionTransformer(SIZE, 4, 16, 4, 2), layers=(0, 2))
    torch.nn.init.normal_(method.fusion.weights)
    tokens = method.backbone.embed(make_batch(method, 2).views[0])
    first, _, third, last = method.backbone.layers(tokens)
    project, w = method.fusion.projections, method.fusion.weights.softmax(dim=0)
    literal = method.backbone.norm(w[0] * project[0](first) + w[1] * project[1](third) + w[2] * last)
    encoded = method.encode(tokens)
    torch.testing.assert_close(encoded, literal)
    weights, weight = list(method.backbone.blocks.parameters()), torch.randn(literal.shape)
    expected = torch.autograd.grad((literal * weight).sum(), weights)
    torch.testing.assert_close(torch.autograd.grad((encoded * weight).sum(), weights), expected)


@pytest.mark.slow
def test_without_fusion_the_last_layer_must_keep_the_detail(monkeypatch) -> None:
    """The last block outputs zeros: with fusion the decoder still learns to reconstruct, without it it cannot."""

    def loss_after_training() -> float:
        torch.manual_seed(0)
        method = make(
            "mff",
            backbone=VisionTransformer(8, 4, 32, 3, 4),
            view=View(size=8),
            layers=(0, 1),
            mask_ratio=0.5,
            norm_pix_loss=False,
            decoder_dim=32,
            decoder_num_heads=4,
        )
        last = method.backbone.blocks[-1]
        monkeypatch.setattr(last, "forward", lambda x, bias=None: torch.zeros_like(x))
        optimizer = torch.optim.AdamW(method.parameters(), lr=5e-3)
        for _ in range(100):
            images = torch.randn(16, 3, 1, 1).expand(-1, -1, 8, 8).contiguous()
            loss = method(make_batch(method, 16)._replace(views=(images,)), Clock())["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    assert loss_after_training() < 0.3
    monkeypatch.setattr(Fusion, "forward", lambda self, layers: layers[-1])
    assert loss_after_training() > 0.7


@pytest.mark.slow
def test_without_fusion_it_is_mae(monkeypatch) -> None:
    method, parent = make("mff"), make("mae")
    parent.load_state_dict({key: value for key, value in method.state_dict().items() if "fusion" not in key})
    batch = make_batch(method, 4)
    assert not torch.equal(method(batch, Clock())["loss"], parent(batch, Clock())["loss"])
    monkeypatch.setattr(Fusion, "forward", lambda self, layers: layers[-1])
    assert torch.equal(method(batch, Clock())["loss"], parent(batch, Clock())["loss"])


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = mff.MFF(vit_base())
    assert method.layers == (0, 2, 4, 6, 8)
    assert sum(p.numel() for p in method.fusion.parameters()) == 5 * (768 * 768 + 768) + 6


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"MFF .* cannot use a ResNet: choose .*VisionTransformer"):
        make("mff", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("mff", mask_ratio=0.0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("mff", mask_ratio=0.99)
    for layers in [(0, 1), (), (0, 0), (-1, 0)]:
        with pytest.raises(UserError, match="the last: give increasing numbers from 0 to 0, such as"):
            make("mff", layers=layers)
