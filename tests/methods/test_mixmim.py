import pytest
import torch

from sslbook.data.masks import uniform_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import mixmim
from sslbook.methods.mixmim import MixMIM, dual_loss, other_images
from sslbook.nn import ResNet, VisionTransformer, vit_base
from sslbook.nn.patches import patchify
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
    corners=[(2, 0.05, {}), (6, 0.05, {}), (8, 0.05, {"num_mix_groups": 4})],
)


@pytest.mark.parametrize("normalize", [True, False])
def test_loss_matches_literal_formula(normalize: bool) -> None:
    prediction, target = torch.randn(2, 3, 5, 12).double(), torch.randn(2, 3, 5, 12).double()
    mask = torch.rand(3, 5) < 0.5
    errors = []
    for i in range(3):
        for j in range(5):
            which = 0 if mask[i, j] else 1  # where the mask is true, the first image is masked
            values = target[which, i, j].tolist()
            if normalize:
                mean = sum(values) / 12
                std = (sum((v - mean) ** 2 for v in values) / 11 + 1e-6) ** 0.5
                values = [(v - mean) / std for v in values]
            errors += [(p - v) ** 2 for p, v in zip(prediction[which, i, j].tolist(), values)]
    assert float(dual_loss(prediction, target, mask, normalize)) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_loss_is_over_both_images() -> None:
    method = make("mixmim")
    batch, clock = make_batch(method, 5), Clock(seed=2)
    images = batch.views[0]
    others = images[other_images(batch.index, 1, clock)]
    assert torch.equal(method.others(images, batch.index, clock), others)
    mask = uniform_mask(batch.index, 16, 8, clock)
    target = torch.stack([patchify(images, 4), patchify(others, 4)])
    expected = dual_loss(method.predict(images, others, mask), target, mask, normalize=True)
    torch.testing.assert_close(method(batch, clock)["loss"], expected)
    assert patchify(images, 4)[1, 6].view(4, 4, 3).permute(2, 0, 1).equal(images[1, :, 4:8, 8:12])


@pytest.mark.parametrize(("count", "groups"), [(8, 1), (7, 1), (1, 1), (12, 2), (6, 3)])
def test_pairs_are_mutual_within_a_group_and_depend_only_on_the_images(count: int, groups: int) -> None:
    index = torch.randperm(1000)[:count]
    found = other_images(index, groups, Clock(seed=1))
    assert torch.equal(found[found], torch.arange(count))
    size = count // groups
    assert torch.equal(found // size, torch.arange(count) // size)
    assert int((found == torch.arange(count)).sum()) == groups * (size % 2)
    if groups == 1:  # the pairs do not depend on the order of the images
        order = torch.randperm(count)
        again = other_images(index[order], 1, Clock(seed=1))
        assert torch.equal(index[order][again], index[found][order])
    if count == 12:
        assert not torch.equal(other_images(index, groups, Clock(seed=2)), found)
    # A group by itself has the same pairs, so that a process needs only its own images.
    alone = other_images(index[:size], 1, Clock(seed=1))
    assert torch.equal(alone, found[:size])


def leak() -> float:
    """Change of an image's reconstruction when the other image changes, relative to that of the other's."""
    method = make("mixmim")
    batch = make_batch(method, 4)
    images, others = batch.views[0], batch.views[0].flip(0)
    mask = uniform_mask(batch.index, 16, 8, Clock())
    before = method.predict(images, others, mask)
    after = method.predict(images, others + 1, mask)
    own, other = (after - before).abs().amax(dim=(1, 2, 3)).tolist()
    assert other > 1e-3
    return own / other


@pytest.mark.slow
def test_without_attention_bias_the_images_leak_into_each_other(monkeypatch) -> None:
    assert leak() < 1e-5
    real = mixmim.attention_bias
    monkeypatch.setattr(mixmim, "attention_bias", lambda mask: torch.zeros_like(real(mask)))
    assert leak() > 1e-2


def test_each_image_is_encoded_as_if_it_were_alone() -> None:
    method = make("mixmim")
    images, others = torch.randn(2, 3, 3, SIZE, SIZE)
    mask = uniform_mask(torch.arange(3), 16, 6, Clock())
    pixels = mask.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    encoded = method.encode(torch.where(pixels, others, images), mask)
    backbone = method.backbone
    for i in range(3):
        for own, cls, visible in ((images, 0, ~mask[i]), (others, 1, mask[i])):
            alone = backbone.encode(backbone.embed(own[i : i + 1])[:, visible])[0]
            together = torch.cat([encoded[i, cls : cls + 1], encoded[i, 2:][visible]])
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_each_image_is_reconstructed_from_its_own_patches_and_mask_tokens() -> None:
    method = make("mixmim")
    images, others, weight = torch.randn(3, 3, 3, SIZE, SIZE)
    mask = uniform_mask(torch.arange(3), 16, 6, Clock())
    backbone, literal = method.backbone, torch.empty(2, 3, 16, 48)
    torch.nn.init.normal_(method.mask_token)
    for i in range(3):
        for which, own, visible in ((0, images, ~mask[i]), (1, others, mask[i])):
            encoded = method.decoder_embed(backbone.encode(backbone.embed(own[i : i + 1])[:, visible]))[0]
            patches = method.mask_token[0].repeat(16, 1)
            patches[visible] = encoded[1:]
            x = method.decoder(torch.cat([encoded[:1], patches + method.positions])[None])[0, 1:]
            literal[which, i] = method.predict_pixels(method.decoder_norm(x))
    prediction = method.predict(images, others, mask)
    torch.testing.assert_close(prediction, literal, rtol=1e-4, atol=1e-5)
    weights, weight = list(method.parameters()), torch.randn(prediction.shape)
    expected = torch.autograd.grad((literal * weight).sum(), weights)
    torch.testing.assert_close(
        torch.autograd.grad((prediction * weight).sum(), weights), expected, rtol=1e-3, atol=1e-4
    )


def test_prediction_does_not_depend_on_masked_patches() -> None:
    method = make("mixmim")
    images, others = torch.randn(2, 3, 3, SIZE, SIZE)
    mask = uniform_mask(torch.arange(3), 16, 8, Clock())
    pixels = mask.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    before = method.predict(images, others, mask)
    after = method.predict(torch.where(pixels, 9.0, images), torch.where(pixels, others, -9.0), mask)
    assert torch.equal(after, before)


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = MixMIM(vit_base())
        shape = method.predict(
            torch.zeros(2, 3, 224, 224), torch.zeros(2, 3, 224, 224), torch.zeros(2, 196, dtype=torch.bool)
        ).shape
    assert shape == (2, 2, 196, 768)
    assert method.num_masked == 98


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose .*VisionTransformer"):
        make("mixmim", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="positions sincos or learned"):
        make("mixmim", backbone=VisionTransformer(SIZE, 4, 16, 1, 2, positions="relative"))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("mixmim", mask_ratio=0.0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("mixmim", mask_ratio=1.0)
    with pytest.raises(UserError, match="nearest size that works is 20x20"):
        make("mixmim", view=View(size=19))
    method = make("mixmim", num_mix_groups=3)
    with pytest.raises(UserError, match="a batch of 8 cannot be divided into 3 groups: change num_mix_groups"):
        method(make_batch(method, 8), Clock())
