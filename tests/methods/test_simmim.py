import math

import pytest
import torch
from torch import Tensor

from sslbook import rng
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import simmim
from sslbook.methods.simmim import enlarge, hidden_l1, num_hidden, random_squares
from sslbook.nn import ResNet, VisionTransformer, timm_model, vit_base
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer
from tests.nn.test_mask_tokens import swin

CASE = Case(
    options={"view": VIEW, "mask_size": 4},
    command={"method.backbone": TRANSFORMER},
    learned=lambda method, batch, out: bool(out["loss"] < 0.6),  # 0.8 for who knows nothing: the images are noise
    backbone=transformer,
    full_scale="vit_base",
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4)},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {"mask_size": 8, "mask_ratio": 0.2})],
    other_backbones=[swin],
)


@pytest.mark.parametrize(("units", "ratio", "hidden"), [(36, 0.6, 22), (49, 0.6, 30), (5, 0.6, 3), (100, 0.55, 55)])
def test_how_many_are_hidden(units: int, ratio: float, hidden: int) -> None:
    assert num_hidden(units, ratio) == hidden


def test_masks_are_keyed_and_fair() -> None:
    index, clock = torch.arange(4000), Clock(step=7, steps_per_epoch=2, seed=5)
    mask = random_squares(index, 16, 0.5, clock)
    assert torch.equal(mask.sum(dim=1), torch.full((4000,), 8))
    torch.testing.assert_close(mask.float().mean(dim=0), torch.full((16,), 0.5), rtol=0, atol=0.04)
    noise = rng.uniform(5, 3, index[:1], rng.METHOD, 16)[0].tolist()
    assert mask[0].nonzero()[:, 0].tolist() == sorted(sorted(range(16), key=noise.__getitem__)[:8])
    assert torch.equal(random_squares(index[37:38], 16, 0.5, clock)[0], mask[37])
    assert not torch.equal(random_squares(index, 16, 0.5, Clock(step=8, steps_per_epoch=2, seed=5)), mask)


def test_squares_on_a_finer_grid() -> None:
    mask = torch.rand(2, 6) < 0.5
    fine = enlarge(mask, 2, 4)
    assert fine.shape == (2, 8, 12)
    for row in range(8):
        for column in range(12):
            assert torch.equal(fine[:, row, column], mask[:, row // 4 * 3 + column // 4])


def literal(drawn: Tensor, images: Tensor, hidden: Tensor) -> float:
    distances = [
        abs(float(drawn[i, c, y, x]) - float(images[i, c, y, x]))
        for i in range(len(images))
        for y in range(images.shape[2])
        for x in range(images.shape[3])
        for c in range(3)
        if hidden[i, y, x]
    ]
    return sum(distances) / len(distances)


@pytest.mark.parametrize("backbone", [transformer, swin])
@pytest.mark.parametrize(("n", "size"), [(3, 4), (1, 8)])
def test_the_loss_is_the_papers(backbone, n: int, size: int) -> None:
    method = make("simmim", backbone=backbone(), mask_size=size).double()
    batch = make_batch(method, n)
    batch = batch._replace(views=(batch.views[0].double(),))
    squares = random_squares(batch.index, (SIZE // size) ** 2, 0.6, Clock())
    assert squares.sum() == n * math.ceil(0.6 * (SIZE // size) ** 2)
    drawn = method.draw(batch.views[0], squares).detach()
    expected = literal(drawn, batch.views[0], enlarge(squares, SIZE // size, size))
    assert float(method(batch, Clock())["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert float(hidden_l1(drawn, batch.views[0], enlarge(squares, SIZE // size, size))) == pytest.approx(expected)


@pytest.mark.parametrize("backbone", [transformer, swin])
def test_the_network_knows_nothing_of_hidden_pixels(backbone) -> None:
    method = make("simmim", backbone=backbone())
    images = torch.randn(2, 3, SIZE, SIZE)
    squares = torch.rand(2, 16) < 0.5
    other = images.masked_fill(enlarge(squares, 4, 4)[:, None], 9.0)
    assert torch.equal(method.draw(other, squares), method.draw(images, squares))


def test_every_pixel_is_drawn_by_its_own_cell(monkeypatch) -> None:
    method = make("simmim")
    maps = torch.randn(2, 16, 4, 4)
    monkeypatch.setattr(simmim, "masked_map", lambda *inputs: maps)
    drawn = method.draw(torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2, 16, dtype=torch.bool))
    for c in range(3):
        for y in range(SIZE):
            for x in range(SIZE):
                weight = method.head.weight[(c * 4 + y % 4) * 4 + x % 4]
                bias = method.head.bias[(c * 4 + y % 4) * 4 + x % 4]
                torch.testing.assert_close(drawn[:, c, y, x], maps[:, :, y // 4, x // 4] @ weight + bias)


def test_the_paper_scale() -> None:
    pytest.importorskip("timm", reason="needs timm")
    with torch.device("meta"):
        network = timm_model("swin_base_patch4_window7_224", img_size=192, window_size=6)
        method = simmim.SimMIM(network, View(size=192))
        assert sum(p.numel() for p in network.parameters()) == 86_725_176  # 88 M with a classifier and windows of 7
        assert method.head.weight.shape == (3 * 32**2, 1024)
        assert method.draw(torch.empty(2, 3, 192, 192), torch.zeros(2, 36, dtype=torch.bool)).shape == (2, 3, 192, 192)
        vit = simmim.SimMIM(vit_base())
        assert vit.head.weight.shape == (3 * 16**2, 768)
        assert vit.rows == 7


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"SimMIM .* cannot use a ResNet: choose .*VisionTransformer"):
        make("simmim", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("simmim", mask_ratio=0.0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("simmim", mask_ratio=0.99)
    with pytest.raises(UserError, match=r"leaves nothing to see: .*smaller mask_size"):
        make("simmim", mask_size=16)
    with pytest.raises(UserError, match=r"nearest view\.size that works is 224"):
        make("simmim", view=View(size=230), mask_size=32)
    with pytest.raises(UserError, match="whole patches: use mask_size 4"):
        make("simmim", mask_size=2)


def loss_after_training() -> float:
    torch.manual_seed(0)
    method = make("simmim", backbone=VisionTransformer(8, 4, 32, 1, 4), view=View(size=8), mask_ratio=0.5)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for _ in range(100):
        patches = torch.randn(16, 3, 2, 2).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        loss = method(make_batch(method, 16)._replace(views=(patches,)), Clock())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def test_without_the_mask_it_copies(monkeypatch) -> None:
    """Squares whose colors have nothing to do with each other: only who sees one can draw it."""
    assert loss_after_training() > 0.5
    monkeypatch.setattr(simmim, "hidden_l1", lambda drawn, images, hidden: hidden_l1(drawn, images, ~hidden))
    assert loss_after_training() < 0.2, "what is visible can be copied"
    monkeypatch.undo()
    real = simmim.masked_map
    monkeypatch.setattr(simmim, "masked_map", lambda net, x, mask, token: real(net, x, mask & False, token))
    assert loss_after_training() < 0.2, "with nothing hidden, all can be copied"
