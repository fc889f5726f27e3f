import math

import pytest
import torch
from torch import Tensor

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import maskfeat
from sslbook.methods.maskfeat import hog, masked_mse
from sslbook.nn import ResNet, VisionTransformer, vit_base
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, swin, transformer

CASE = Case(
    options={"view": VIEW, "cell_size": 4, "min_block": 2},
    command={"method.backbone": TRANSFORMER},
    learned=lambda method, batch, out: bool(out["loss"] < 0.012),  # about 0.022 for the mean of all cells
    backbone=transformer,
    full_scale="vit_base",
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4)},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {"cell_size": 2})],
    other_backbones=[swin],
)


def literal_hog(image: Tensor, row: int, column: int, cell: int) -> list[float]:
    """One cell of one image: a pixel at a time, from the definition."""
    _, height, width = image.shape

    def at(c: int, y: int, x: int) -> float:
        y, x = abs(y), abs(x)  # reflection at the first pixel ...
        y, x = height - 1 - abs(height - 1 - y), width - 1 - abs(width - 1 - x)  # ... and at the last
        return float(image[c, y, x])

    values = []
    for c in range(3):
        counts = [0.0] * 9
        for y in range(row * cell, (row + 1) * cell):
            for x in range(column * cell, (column + 1) * cell):
                weights = ((-1, 1), (0, 2), (1, 1))
                across = sum(w * (at(c, y + d, x - 1) - at(c, y + d, x + 1)) for d, w in weights)
                along = sum(w * (at(c, y - 1, x + d) - at(c, y + 1, x + d)) for d, w in weights)
                angle = math.degrees(math.atan2(across, along)) % 180
                counts[min(8, int(angle // 20))] += math.hypot(across, along)
        length = math.sqrt(sum(count**2 for count in counts))
        values += [count / length for count in counts]
    return values


@pytest.mark.parametrize("cell", [4, 8])
def test_hog_matches_literal_definition(cell: int) -> None:
    images = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    cells = hog(images, cell)
    assert cells.shape == (2, 16 // cell, 8 // cell, 27)
    for i in range(2):
        for row in range(16 // cell):
            for column in range(8 // cell):
                expected = torch.tensor(literal_hog(images[i], row, column, cell), dtype=torch.float64)
                torch.testing.assert_close(cells[i, row, column], expected)


def test_hog_ignores_brightness_and_contrast() -> None:
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    cells = hog(images, 8)
    torch.testing.assert_close(hog(images + 0.7, 8), cells)
    torch.testing.assert_close(hog(images * torch.tensor([0.1, 3.0, 40.0])[:, None, None], 8), cells)
    torch.testing.assert_close(hog(1 - images, 8), cells)  # directions are unsigned
    assert (hog(images.flip(3), 8).flip(2) - cells).abs().max() > 0.05  # but not invariant to reflection
    gentle = torch.linspace(0, 1e-9, 16, dtype=torch.float64).expand(1, 3, 16, 16)
    assert hog(gentle, 8).max() < 1e-3  # rounding errors are no edges


@pytest.mark.parametrize("degrees", [10, 50, 130, 170])
def test_edge_falls_into_its_bin(degrees: int) -> None:
    angle = math.radians(degrees)
    row, column = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    ramp = -(math.sin(angle) * column + math.cos(angle) * row)
    cells = hog(ramp.expand(1, 3, 24, 24), 8)[0, 1, 1].unflatten(0, (3, 9))
    assert cells.argmax(dim=1).tolist() == [degrees // 20] * 3
    torch.testing.assert_close(cells.amax(dim=1), torch.ones(3))


def test_target_of_a_patch() -> None:
    method = make("maskfeat", cell_size=2)
    images = torch.randn(2, 3, SIZE, SIZE)
    target, cells = method.target(images), hog(images, 2)
    assert target.shape == (2, 4, 4, 108)  # as in the paper: 2 x 2 cells, 3 colors, 9 bins
    for row in range(8):
        for column in range(8):
            start = (row % 2 * 2 + column % 2) * 27
            assert torch.equal(target[:, row // 2, column // 2, start : start + 27], cells[:, row, column])


def test_loss_matches_literal_formula() -> None:
    prediction, target = torch.randn(3, 2, 3, 5), torch.randn(3, 2, 3, 5)
    mask = torch.rand(3, 2, 3) < 0.5
    mask[0, 0, 0] = True
    errors = [
        (float(prediction[i, y, x, k]) - float(target[i, y, x, k])) ** 2
        for i in range(3)
        for y in range(2)
        for x in range(3)
        for k in range(5)
        if mask[i, y, x]
    ]
    assert float(masked_mse(prediction, target, mask)) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


@pytest.mark.parametrize("backbone", [transformer, swin])
def test_prediction_does_not_depend_on_masked_patches(backbone) -> None:
    method = make("maskfeat", backbone=backbone())
    images = torch.randn(2, 3, SIZE, SIZE)
    mask = torch.rand(2, 4, 4) < 0.5
    pixels = mask.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    other = images.masked_fill(pixels[:, None], 9.0)
    assert torch.equal(method.predict(other, mask), method.predict(images, mask))


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = maskfeat.MaskFeat(vit_base())
    assert method.head.weight.shape == (108, 768)
    assert (method.num_masked, method.rows) == (78, 14)


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"MaskFeat needs .* cannot use a ResNet: choose .*VisionTransformer"):
        make("maskfeat", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("maskfeat", mask_ratio=0.0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("maskfeat", mask_ratio=0.99)
    with pytest.raises(UserError, match="nearest size that works is 20x20"):
        make("maskfeat", view=View(size=19))
    with pytest.raises(UserError, match="whole cells of 8: use cell_size 4"):
        make("maskfeat", cell_size=8)
    with pytest.raises(UserError, match="whole cells of 3: use cell_size 2"):
        make("maskfeat", cell_size=3)


def loss_after_training() -> float:
    """Horizontal or vertical stripes in every quarter of the image, of random color and contrast."""
    torch.manual_seed(0)
    method = make("maskfeat", backbone=VisionTransformer(16, 8, 32, 2, 4), cell_size=8, mask_ratio=0.5, min_block=1)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    x = torch.arange(8.0)
    losses = []
    for _ in range(40):
        vertical = (torch.rand(16, 1, 2, 2, 1, 1) < 0.5).float()
        wave = vertical * torch.sin(1.5 * x)[None, :] + (1 - vertical) * torch.sin(1.5 * x)[:, None]
        wave = wave * (0.2 + torch.rand(16, 3, 2, 2, 1, 1)) + torch.randn(16, 3, 2, 2, 1, 1)
        images = wave.transpose(3, 4).reshape(16, 3, 16, 16)
        loss = method(make_batch(method, 16)._replace(views=(images,)), Clock())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


@pytest.mark.slow
def test_without_masking_it_copies(monkeypatch) -> None:
    """The quarters are independent: the directions in one can be predicted only if it is visible."""
    masked = loss_after_training()
    forward_tokens = VisionTransformer.forward_tokens
    monkeypatch.setattr(
        VisionTransformer, "forward_tokens", lambda self, x, mask, token: forward_tokens(self, x, mask & False, token)
    )
    assert loss_after_training() < 0.5 * masked
