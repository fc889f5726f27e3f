import pytest
import torch
from torch import Tensor, nn

from sslbook import nn as nets
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.context_encoder import (
    ChannelwiseLinear,
    ContextEncoder,
    central_mask,
    pixel_weights,
    reconstruction_loss,
)
from sslbook.nn import ConvNet
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, Convolutions, make, make_batch, transformer

CASE = Case(
    options={"view": VIEW, "mask_grid": 4, "overlap": 1, "decoder_dim": 16},
    command={"method.backbone": CONVNET, "method.mask_grid": 4, "method.overlap": 1, "method.decoder_dim": 16},
    learned=lambda method, batch, out: bool(out["loss"] < 0.8),  # predicting the mean gives 1: the images are noise
    backbone=lambda: ConvNet(4),
    overfit={"backbone": ConvNet(16), "decoder_dim": 64, "overlap": 0},
    corners=[(2, 0.05, {}), (8, 0.05, {"mask": "center"})],
    other_backbones=[transformer],
)


def test_masks_are_whole_cells_at_the_given_ratio() -> None:
    method = make("context_encoder")
    masks = method.sample_masks(torch.arange(500), Clock(seed=3))
    assert masks.shape == (500, 16, 16)
    assert torch.equal(masks.float().mean(dim=(1, 2)), torch.full((500,), 0.25))
    cells = masks.unflatten(2, (4, 4)).unflatten(1, (4, 4))
    assert torch.equal(cells.all(dim=4).all(dim=2), cells.any(dim=4).any(dim=2))  # whole cells
    assert masks.float().mean(dim=0).min() > 0.1  # anywhere
    assert torch.equal(method.sample_masks(torch.tensor([41]), Clock(seed=3))[0], masks[41])
    assert not torch.equal(method.sample_masks(torch.arange(500), Clock(1, seed=3)), masks)


def test_central_mask_of_the_paper() -> None:
    mask = central_mask(128, 7)
    assert mask.sum() == (64 - 2 * 7) ** 2
    assert mask[39:89, 39:89].all()
    weights = pixel_weights(mask[None], 7, 10.0)[0]
    assert weights[32:96, 32:96].min() == 1  # 64 x 64 pixels are predicted, half of the side
    assert weights.sum() == (64 - 14) ** 2 + 10 * (64**2 - (64 - 14) ** 2)


def literal(prediction: Tensor, images: Tensor, mask: Tensor, overlap: int, overlap_weight: float) -> float:
    total = mass = 0.0
    n, _, height, width = images.shape
    for i in range(n):
        for y in range(height):
            for x in range(width):
                around = mask[i, max(0, y - overlap) : y + overlap + 1, max(0, x - overlap) : x + overlap + 1]
                weight = 1.0 if mask[i, y, x] else overlap_weight if around.any() else 0.0
                error = sum(float(prediction[i, c, y, x] - images[i, c, y, x]) ** 2 for c in range(3)) / 3
                total, mass = total + weight * error, mass + weight
    return total / mass


@pytest.mark.parametrize(("n", "overlap", "weight"), [(3, 1, 10.0), (1, 2, 3.0), (2, 0, 10.0)])
def test_loss_is_equation_1(n: int, overlap: int, weight: float) -> None:
    images, prediction = torch.randn(2, n, 3, 9, 7, dtype=torch.float64)
    mask = torch.rand(n, 9, 7) < 0.15
    weights = pixel_weights(mask, overlap, weight)
    loss = float(reconstruction_loss(prediction, images, weights))
    assert loss == pytest.approx(literal(prediction, images, mask, overlap, weight), rel=1e-5)


def test_channelwise_linear_layer() -> None:
    layer = ChannelwiseLinear(3, 2)
    x = torch.randn(5, 3, 2, 2)
    y = torch.empty(5, 3, 4)
    for c in range(3):
        y[:, c] = x[:, c].flatten(1) @ layer.weight[c] + layer.bias[c]
    y = layer.mix(y.relu().view(5, 3, 2, 2))
    torch.testing.assert_close(layer(x), y)
    before = layer.weight.detach().clone()
    layer.mix = nn.Identity()
    x[:, 1] += 1.0
    changed = layer(x) - torch.stack([x[:, c].flatten(1) @ before[c] for c in range(3)], 1).relu().view(5, 3, 2, 2)
    torch.testing.assert_close(changed, torch.zeros_like(changed))


def test_encoder_input_is_masked() -> None:
    method = make("context_encoder").eval()
    images = make_batch(method, 2).views[0]
    mask = method.sample_masks(torch.arange(2), Clock())
    prediction = method.predict(images, mask)
    torch.testing.assert_close(method.predict(images.masked_fill(mask[:, None], 99.0), mask), prediction)


def test_reconstruction_keeps_visible_pixels() -> None:
    for mask in ("blocks", "center"):
        method = make("context_encoder", mask=mask).eval()
        images = torch.randn(2, 3, 16, 16) + 1
        masked, filled = method.reconstruct(images, torch.arange(2))
        mask = (masked == 0).all(dim=1, keepdim=True).expand_as(images)
        assert torch.equal(mask[:, 0], method.sample_masks(torch.arange(2), Clock()))
        assert torch.equal(masked[~mask], images[~mask])
        assert torch.equal(filled[~mask], images[~mask])
        assert (filled - images)[mask].abs().max() > 0


class Cells(nn.Module):
    """Encodes every cell of 4 x 4 pixels alone."""

    dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.forward_map = nn.Conv2d(3, self.dim, 4, stride=4)


def loss_after_training() -> float:
    """On images with independent cells, where a masked cell cannot be predicted from the others."""
    torch.manual_seed(0)
    method = make("context_encoder", backbone=Cells(), view=View(size=8), mask_grid=2, overlap=0)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-2)
    losses = []
    for step in range(80):
        x = torch.randn(32, 3, 2, 2).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        loss = method(make_batch(method, 32, seed=step)._replace(views=(x,)), Clock())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


@pytest.mark.slow
def test_without_a_mask_it_copies(monkeypatch) -> None:
    assert loss_after_training() > 0.8
    predict = ContextEncoder.predict
    monkeypatch.setattr(ContextEncoder, "predict", lambda self, x, mask: predict(self, x, torch.zeros_like(mask)))
    assert loss_after_training() < 0.6


def test_full_scale_sizes() -> None:
    with torch.device("meta"):
        method = ContextEncoder(nets.resnet50())
        assert tuple(method.across.weight.shape) == (2048, 49, 49)
        assert method.decoder(torch.empty(1, 2048, 7, 7)).shape == (1, 3, 224, 224)


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("context_encoder", mask_ratio=0.01)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("context_encoder", mask_ratio=1.0)
    with pytest.raises(UserError, match=r"mask_grid 5 does not divide 16 pixels: change it or view\.size"):
        make("context_encoder", mask_grid=5)
    with pytest.raises(UserError, match="set overlap to at least 0 and at most 3"):
        make("context_encoder", mask="center", overlap=4)
    with pytest.raises(UserError, match="context encoder needs a feature map and cannot use a Convolutions"):
        make("context_encoder", backbone=Convolutions())
    assert make("context_encoder", view=View(size=20)).across.weight.shape[1] == 25
