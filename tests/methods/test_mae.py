import pytest
import torch
from torch import Tensor

from sslbook import rng
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import mae
from sslbook.methods.mae import MAE, num_visible, random_mask, reconstruction_loss
from sslbook.nn import ResNet, VisionTransformer
from sslbook.nn.mask_tokens import gather_tokens
from sslbook.nn.patches import normalize_patches, patchify, unpatchify
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={"view": VIEW, "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    command={"method.backbone": TRANSFORMER, "method.decoder_dim": 16, "method.decoder_num_heads": 2},
    learned=lambda method, batch, out: bool(out["loss"] < 0.8),  # 47/48 for a constant prediction: the images are noise
    backbone=transformer,
    full_scale="vit_base",
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4), "decoder_dim": 64, "decoder_num_heads": 4},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {})],
)


def test_masks_are_uniform_and_depend_only_on_image_and_epoch() -> None:
    index, clock = torch.arange(4000), Clock(step=7, steps_per_epoch=2, seed=5)
    visible, masked = random_mask(index, 16, 0.75, clock)
    assert (visible.shape, masked.shape) == ((4000, 4), (4000, 12))
    assert torch.equal(torch.cat([visible, masked], dim=1).sort(dim=1).values, torch.arange(16).expand(4000, -1))
    frequency = visible.flatten().bincount(minlength=16) / 4000
    torch.testing.assert_close(frequency, torch.full((16,), 0.25), rtol=0, atol=0.03)
    # The definition: the patches with the smallest random numbers.
    noise = rng.uniform(5, 3, index[:1], rng.METHOD, 16)[0].tolist()
    assert visible[0].tolist() == sorted(range(16), key=noise.__getitem__)[:4]
    alone, _ = random_mask(index[37:38], 16, 0.75, clock)
    assert torch.equal(alone[0], visible[37])
    assert not torch.equal(random_mask(index, 16, 0.75, Clock(step=8, steps_per_epoch=2, seed=5))[0], visible)


@pytest.mark.parametrize(("patches", "ratio", "visible"), [(196, 0.75, 49), (16, 0.75, 4), (10, 0.9, 1), (5, 0.5, 2)])
def test_number_of_visible_patches(patches: int, ratio: float, visible: int) -> None:
    assert num_visible(patches, ratio) == visible


def literal(method: mae.MAE, images: Tensor, index: Tensor, prediction: Tensor, masked: Tensor) -> float:
    """Mean over masked patches and their values of the squared error, one at a time."""
    size = method.backbone.patch_size
    columns = images.shape[3] // size
    errors = []
    for i in range(len(images)):
        for j, patch in enumerate(masked[i].tolist()):
            top, left = patch // columns * size, patch % columns * size
            target = [
                float(images[i, c, top + p, left + q]) for p in range(size) for q in range(size) for c in range(3)
            ]
            if method.norm_pix_loss:
                mean = sum(target) / len(target)
                variance = sum((t - mean) ** 2 for t in target) / (len(target) - 1)
                target = [(t - mean) / (variance + 1e-6) ** 0.5 for t in target]
            errors += [(a - b) ** 2 for a, b in zip(prediction[i, j].tolist(), target)]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize(("n", "ratio"), [(3, 0.75), (1, 0.5)])
def test_loss_matches_literal_formula(norm_pix_loss: bool, n: int, ratio: float) -> None:
    method = make("mae", norm_pix_loss=norm_pix_loss, mask_ratio=ratio).double()
    batch = make_batch(method, n)
    batch = batch._replace(views=(batch.views[0].double(),))
    prediction, masked = method.predict(batch.views[0], batch.index, Clock())
    expected = literal(method, batch.views[0], batch.index, prediction, masked)
    loss = float(method(batch, Clock())["loss"].detach())
    assert loss == pytest.approx(expected, rel=1e-5)  # the loss is computed in float32
    target = torch.zeros_like(prediction)
    assert float(reconstruction_loss(prediction, target).detach()) == pytest.approx(
        float(prediction.detach().square().mean()), rel=1e-5
    )


def test_prediction_does_not_depend_on_masked_patches() -> None:
    method = make("mae")
    batch = make_batch(method, 2)
    prediction, masked = method.predict(batch.views[0], batch.index, Clock())
    patches = patchify(batch.views[0], 4)
    other = patches.scatter(1, masked[:, :, None].expand(-1, -1, patches.shape[2]), 99.0)
    again, _ = method.predict(unpatchify(other, 4, (4, 4)), batch.index, Clock())
    torch.testing.assert_close(again, prediction)


def test_reconstruction_keeps_visible_patches() -> None:
    for norm_pix_loss in (True, False):
        method = make("mae", norm_pix_loss=norm_pix_loss)
        images = torch.randn(2, 3, 16, 16) + 1
        zeroed, reconstructed = method.reconstruct(images, torch.arange(2))
        masked = zeroed == 0
        assert masked.float().mean() == 0.75
        assert torch.equal(zeroed[~masked], images[~masked])
        assert torch.equal(reconstructed[~masked], images[~masked])
        assert (reconstructed - images)[masked].abs().max() > 0


def test_perfect_prediction_reconstructs_the_image(monkeypatch) -> None:
    method = make("mae")
    images = torch.randn(2, 3, 16, 16)
    monkeypatch.setattr(
        mae.Decoder,
        "forward",
        lambda self, tokens, visible, masked: gather_tokens(normalize_patches(patchify(images, 4)), masked),
    )
    torch.testing.assert_close(method.reconstruct(images, torch.arange(2))[1], images)
    assert float(method(make_batch(method, 2)._replace(views=(images,)), Clock())["loss"]) < 1e-10


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose .*VisionTransformer"):
        make("mae", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("mae", mask_ratio=0.0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("mae", mask_ratio=0.99)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("mae", mask_ratio=1.0)
    with pytest.raises(UserError, match="nearest size that works is 20x20"):
        make("mae", view=View(size=18 + 1))


def loss_after_training() -> float:
    """One quarter of each image is black or white at random, the rest gray: a constant prediction has a loss of 1."""
    method = make(
        "mae",
        backbone=VisionTransformer(8, 4, 32, 1, 4),
        view=View(size=8),
        mask_ratio=0.5,
        norm_pix_loss=False,
        decoder_dim=32,
        decoder_num_heads=4,
    )
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for step in range(70):
        x = torch.zeros(16, 3, 8, 8)
        x[:, :, :4, :4] = 2 * torch.randn(16, 3, 1, 1, generator=generator).sign()
        loss = method(make_batch(method, 16, seed=step)._replace(views=(x,)), Clock(step, 70))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


@pytest.mark.slow
def test_without_masking_it_copies(monkeypatch) -> None:
    assert loss_after_training() > 0.7
    monkeypatch.setattr(
        mae, "random_mask", lambda index, n, ratio, clock: 2 * (torch.arange(n).expand(len(index), -1),)
    )
    assert loss_after_training() < 0.4


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = MAE(VisionTransformer())
        tokens, visible, masked = torch.empty(2, 50, 768), torch.zeros(2, 49).long(), torch.zeros(2, 147).long()
        assert method.decoder(tokens, visible, masked).shape == (2, 147, 16 * 16 * 3)
    encoder = 12 * (12 * 768**2 + 13 * 768) + (16 * 16 * 3 * 768 + 768) + 768 + 2 * 768
    decoder = 8 * (12 * 512**2 + 13 * 512) + (768 * 512 + 512) + 512 + 2 * 512 + (512 * 768 + 768)
    assert sum(p.numel() for p in method.parameters()) == encoder + decoder
    # The authors' mae_vit_base_patch16, where the fixed positions of class token and patches count too.
    assert encoder + decoder + 197 * (768 + 512) == 111_907_840
