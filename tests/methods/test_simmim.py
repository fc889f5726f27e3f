import math

import pytest
import torch
from torch import Tensor

from sslbook.data.masks import uniform_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import simmim
from sslbook.methods.simmim import masked_l1, num_masked, upsample_mask
from sslbook.nn import ResNet, VisionTransformer, timm_model, vit_base
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, swin, transformer

CASE = Case(
    options={"view": VIEW, "mask_size": 4},
    command={"method.backbone": TRANSFORMER},
    learned=lambda method, batch, out: bool(out["loss"] < 0.6),  # 0.8 for a constant prediction: the images are noise
    backbone=transformer,
    full_scale="vit_base",
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4)},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {"mask_size": 8, "mask_ratio": 0.2})],
    other_backbones=[swin],
)


@pytest.mark.parametrize(
    ("num_squares", "ratio", "masked"), [(36, 0.6, 22), (49, 0.6, 30), (5, 0.6, 3), (100, 0.55, 55)]
)
def test_number_of_masked_squares(num_squares: int, ratio: float, masked: int) -> None:
    assert num_masked(num_squares, ratio) == masked


def test_upsample_mask() -> None:
    mask = torch.rand(2, 6) < 0.5
    fine = upsample_mask(mask, 2, 4)
    assert fine.shape == (2, 8, 12)
    for row in range(8):
        for column in range(12):
            assert torch.equal(fine[:, row, column], mask[:, row // 4 * 3 + column // 4])


def literal(prediction: Tensor, images: Tensor, mask: Tensor) -> float:
    errors = [
        abs(float(prediction[i, c, y, x]) - float(images[i, c, y, x]))
        for i in range(len(images))
        for y in range(images.shape[2])
        for x in range(images.shape[3])
        for c in range(3)
        if mask[i, y, x]
    ]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("backbone", [transformer, swin])
@pytest.mark.parametrize(("n", "size"), [(3, 4), (1, 8)])
def test_loss_matches_literal_formula(backbone, n: int, size: int) -> None:
    method = make("simmim", backbone=backbone(), mask_size=size).double()
    batch = make_batch(method, n)
    batch = batch._replace(views=(batch.views[0].double(),))
    num_squares = (SIZE // size) ** 2
    squares = uniform_mask(batch.index, num_squares, math.ceil(0.6 * num_squares), Clock())
    prediction = method.predict(batch.views[0], squares).detach()
    expected = literal(prediction, batch.views[0], upsample_mask(squares, SIZE // size, size))
    assert float(method(batch, Clock())["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert float(masked_l1(prediction, batch.views[0], upsample_mask(squares, SIZE // size, size))) == pytest.approx(
        expected
    )


@pytest.mark.parametrize("backbone", [transformer, swin])
def test_prediction_does_not_depend_on_masked_pixels(backbone) -> None:
    method = make("simmim", backbone=backbone())
    images = torch.randn(2, 3, SIZE, SIZE)
    squares = torch.rand(2, 16) < 0.5
    other = images.masked_fill(upsample_mask(squares, 4, 4)[:, None], 9.0)
    assert torch.equal(method.predict(other, squares), method.predict(images, squares))


def test_every_pixel_is_predicted_by_its_own_cell(monkeypatch) -> None:
    method = make("simmim")
    tokens = torch.randn(2, 1 + 16, 16)
    monkeypatch.setattr(method.backbone, "forward_tokens", lambda *inputs: tokens)
    prediction = method.predict(torch.zeros(2, 3, SIZE, SIZE), torch.zeros(2, 16, dtype=torch.bool))
    for c in range(3):
        for y in range(SIZE):
            for x in range(SIZE):
                weight = method.head.weight[(c * 4 + y % 4) * 4 + x % 4]
                bias = method.head.bias[(c * 4 + y % 4) * 4 + x % 4]
                torch.testing.assert_close(prediction[:, c, y, x], tokens[:, 1 + y // 4 * 4 + x // 4] @ weight + bias)


@pytest.mark.slow
def test_paper_scale() -> None:
    pytest.importorskip("timm", reason="needs timm")
    with torch.device("meta"):
        network = timm_model("swin_base_patch4_window7_224", img_size=192, window_size=6)
        method = simmim.SimMIM(network, View(size=192))
        assert sum(p.numel() for p in network.parameters()) == 86_725_176  # 88 M with a classifier and windows of 7
        assert method.head.weight.shape == (3 * 32**2, 1024)
        assert method.predict(torch.empty(2, 3, 192, 192), torch.zeros(2, 36, dtype=torch.bool)).shape == (
            2,
            3,
            192,
            192,
        )
        vit = simmim.SimMIM(vit_base())
        assert vit.head.weight.shape == (3 * 16**2, 768)
        assert vit.rows == 7


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"SimMIM needs .* cannot use a ResNet: choose .*VisionTransformer"):
        make("simmim", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("simmim", mask_ratio=0.0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("simmim", mask_ratio=0.99)
    with pytest.raises(UserError, match=r"leaves nothing to see: .*smaller patches"):
        make("simmim", mask_size=16)
    with pytest.raises(UserError, match=r"sizes that work are mask_size 32 and view\.size 224"):
        make("simmim", view=View(size=230), mask_size=32)
    with pytest.raises(UserError, match="patches of 4: the nearest sizes that work are mask_size 4"):
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


@pytest.mark.slow
def test_without_masking_it_copies(monkeypatch) -> None:
    """Squares with independent colors: the color of a square can be predicted only if it is visible."""
    assert loss_after_training() > 0.5
    monkeypatch.setattr(simmim, "masked_l1", lambda prediction, images, mask: masked_l1(prediction, images, ~mask))
    assert loss_after_training() < 0.2, "what is visible can be copied"
    monkeypatch.undo()
    forward_tokens = VisionTransformer.forward_tokens
    monkeypatch.setattr(
        VisionTransformer, "forward_tokens", lambda self, x, mask, token: forward_tokens(self, x, mask & False, token)
    )
    assert loss_after_training() < 0.2, "with nothing masked, all can be copied"
