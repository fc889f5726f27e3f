import math

import pytest
import torch
from torch import Tensor

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import maskfeat
from sslbook.methods.maskfeat import hidden_mse, hog
from sslbook.nn import ResNet, VisionTransformer, vit_base
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer
from tests.nn.test_mask_tokens import swin

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
        y, x = abs(y), abs(x)  # the mirror at the first pixel ...
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
def test_hog_from_its_definition(cell: int) -> None:
    images = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    cells = hog(images, cell)
    assert cells.shape == (2, 16 // cell, 8 // cell, 27)
    for i in range(2):
        for row in range(16 // cell):
            for column in range(8 // cell):
                expected = torch.tensor(literal_hog(images[i], row, column, cell), dtype=torch.float64)
                torch.testing.assert_close(cells[i, row, column], expected)


def test_hog_does_not_see_light() -> None:
    images = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    cells = hog(images, 8)
    torch.testing.assert_close(hog(images + 0.7, 8), cells)
    torch.testing.assert_close(hog(images * torch.tensor([0.1, 3.0, 40.0])[:, None, None], 8), cells)
    torch.testing.assert_close(hog(1 - images, 8), cells)  # directions have no sign
    assert (hog(images.flip(3), 8).flip(2) - cells).abs().max() > 0.05  # but it sees which way things are turned
    gentle = torch.linspace(0, 1e-9, 16, dtype=torch.float64).expand(1, 3, 16, 16)
    assert hog(gentle, 8).max() < 1e-3  # rounding errors are no edges


@pytest.mark.parametrize("degrees", [10, 50, 130, 170])
def test_an_edge_falls_into_its_bin(degrees: int) -> None:
    angle = math.radians(degrees)
    row, column = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    ramp = -(math.sin(angle) * column + math.cos(angle) * row)
    cells = hog(ramp.expand(1, 3, 24, 24), 8)[0, 1, 1].unflatten(0, (3, 9))
    assert cells.argmax(dim=1).tolist() == [degrees // 20] * 3
    torch.testing.assert_close(cells.amax(dim=1), torch.ones(3))


def test_the_target_of_a_patch() -> None:
    method = make("maskfeat", cell_size=2)
    images = torch.randn(2, 3, SIZE, SIZE)
    target, cells = method.target(images), hog(images, 2)
    assert target.shape == (2, 4, 4, 108)  # as in the paper: 2 x 2 cells, 3 colors, 9 bins
    for row in range(8):
        for column in range(8):
            start = (row % 2 * 2 + column % 2) * 27
            assert torch.equal(target[:, row // 2, column // 2, start : start + 27], cells[:, row, column])


def test_the_loss_is_the_papers() -> None:
    prediction, target = torch.randn(3, 2, 3, 5), torch.randn(3, 2, 3, 5)
    hidden = torch.rand(3, 2, 3) < 0.5
    hidden[0, 0, 0] = True
    errors = [
        (float(prediction[i, y, x, k]) - float(target[i, y, x, k])) ** 2
        for i in range(3)
        for y in range(2)
        for x in range(3)
        for k in range(5)
        if hidden[i, y, x]
    ]
    assert float(hidden_mse(prediction, target, hidden)) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


@pytest.mark.parametrize("backbone", [transformer, swin])
def test_the_network_knows_nothing_of_hidden_patches(backbone) -> None:
    method = make("maskfeat", backbone=backbone())
    images = torch.randn(2, 3, SIZE, SIZE)
    hidden = torch.rand(2, 4, 4) < 0.5
    pixels = hidden.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    other = images.masked_fill(pixels[:, None], 9.0)
    assert torch.equal(method.predict(other, hidden), method.predict(images, hidden))


def test_the_paper_scale() -> None:
    with torch.device("meta"):
        method = maskfeat.MaskFeat(vit_base())
    assert method.head.weight.shape == (108, 768)
    assert (method.num_masked, method.rows) == (78, 14)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"MaskFeat .* cannot use a ResNet: choose .*VisionTransformer"):
        make("maskfeat", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("maskfeat", mask_ratio=0.0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("maskfeat", mask_ratio=0.99)
    with pytest.raises(UserError, match=r"nearest view\.size that works is 20"):
        make("maskfeat", view=View(size=19))
    with pytest.raises(UserError, match="whole cells of 8: use cell_size 4"):
        make("maskfeat", cell_size=8)
    with pytest.raises(UserError, match="whole cells of 3: use cell_size 2"):
        make("maskfeat", cell_size=3)


def loss_after_training() -> float:
    """Stripes of any direction in every quarter of the image, of any color and strength."""
    torch.manual_seed(0)
    method = make("maskfeat", backbone=VisionTransformer(16, 8, 32, 2, 4), cell_size=8, mask_ratio=0.5, min_block=1)
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    place = torch.arange(8.0)
    losses = []
    for _ in range(40):
        upright = (torch.rand(16, 1, 2, 2, 1, 1) < 0.5).float()
        wave = upright * torch.sin(1.5 * place)[None, :] + (1 - upright) * torch.sin(1.5 * place)[:, None]
        wave = wave * (0.2 + torch.rand(16, 3, 2, 2, 1, 1)) + torch.randn(16, 3, 2, 2, 1, 1)
        images = wave.transpose(3, 4).reshape(16, 3, 16, 16)
        loss = method(make_batch(method, 16)._replace(views=(images,)), Clock())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


def test_without_the_mask_it_copies(monkeypatch) -> None:
    """What one quarter shows has nothing to do with the others: only who sees it can say its directions."""
    masked = loss_after_training()
    real = maskfeat.masked_map
    monkeypatch.setattr(maskfeat, "masked_map", lambda net, x, mask, token: real(net, x, mask & False, token))
    assert loss_after_training() < 0.5 * masked
