import pytest
import torch

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import mixmim
from sslbook.methods.mixmim import MixMIM, dual_loss, partner_mask, partners, patchify
from sslbook.nn import ResNet, VisionTransformer, vit_base
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={"view": VIEW, "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    command={"method.backbone": TRANSFORMER, "method.decoder_dim": 16, "method.decoder_num_heads": 2},
    learned=lambda method, batch, out: bool(out["loss"] < 0.8),  # 47/48 for who knows nothing: the images are noise
    backbone=transformer,
    full_scale="vit_base",
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4), "decoder_dim": 64, "decoder_num_heads": 4},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {}), (6, 0.05, {}), (8, 0.05, {"partner_groups": 4})],
)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_is_the_papers(normalize: bool) -> None:
    prediction, target = torch.randn(2, 3, 5, 12).double(), torch.randn(2, 3, 5, 12).double()
    mask = torch.rand(3, 5) < 0.5
    errors = []
    for i in range(3):
        for j in range(5):
            which = 0 if mask[i, j] else 1  # where the mask is true, the first image is hidden
            values = target[which, i, j].tolist()
            if normalize:
                mean = sum(values) / 12
                deviation = (sum((v - mean) ** 2 for v in values) / 11 + 1e-6) ** 0.5
                values = [(v - mean) / deviation for v in values]
            errors += [(p - v) ** 2 for p, v in zip(prediction[which, i, j].tolist(), values)]
    assert float(dual_loss(prediction, target, mask, normalize)) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_the_methods_loss_is_of_both_images() -> None:
    method = make("mixmim")
    batch, clock = make_batch(method, 5), Clock(seed=2)
    images = batch.views[0]
    others = images[partners(batch.index, 1, clock)]
    assert torch.equal(method.partners(images, batch.index, clock), others)
    mask = partner_mask(batch.index, 16, 8, clock)
    target = torch.stack([patchify(images, 4), patchify(others, 4)])
    expected = dual_loss(method.predict(images, others, mask), target, mask, normalize=True)
    torch.testing.assert_close(method(batch, clock)["loss"], expected)
    assert patchify(images, 4)[1, 6].view(4, 4, 3).permute(2, 0, 1).equal(images[1, :, 4:8, 8:12])


@pytest.mark.parametrize(("count", "groups"), [(8, 1), (7, 1), (1, 1), (12, 2), (6, 3)])
def test_partners_are_mutual_keyed_and_in_the_same_group(count: int, groups: int) -> None:
    index = torch.randperm(1000)[:count]
    found = partners(index, groups, Clock(seed=1))
    assert torch.equal(found[found], torch.arange(count))
    size = count // groups
    assert torch.equal(found // size, torch.arange(count) // size)
    assert int((found == torch.arange(count)).sum()) == groups * (size % 2)
    if groups == 1:  # who is with whom depends on the images and not on their order
        order = torch.randperm(count)
        again = partners(index[order], 1, Clock(seed=1))
        assert torch.equal(index[order][again], index[found][order])
    if count == 12:
        assert not torch.equal(partners(index, groups, Clock(seed=2)), found)
    # A group by itself has the same partners, so that a process needs only its own images.
    alone = partners(index[:size], 1, Clock(seed=1))
    assert torch.equal(alone, found[:size])


def test_masks_are_keyed_and_fair() -> None:
    index = torch.arange(2000)
    mask = partner_mask(index, 9, 4, Clock(seed=5))
    assert mask.sum(dim=1).tolist() == [4] * 2000
    torch.testing.assert_close(mask.float().mean(dim=0), torch.full((9,), 4 / 9), rtol=0, atol=0.05)
    assert torch.equal(partner_mask(index[3:4], 9, 4, Clock(seed=5))[0], mask[3])
    assert not torch.equal(partner_mask(index, 9, 4, Clock(seed=6)), mask)


def noticed() -> float:
    """How much the drawing of an image's hidden patches changes with its partner, beside the partner's own."""
    method = make("mixmim")
    batch = make_batch(method, 4)
    images, others = batch.views[0], batch.views[0].flip(0)
    mask = partner_mask(batch.index, 16, 8, Clock())
    before = method.predict(images, others, mask)
    after = method.predict(images, others + 1, mask)
    own, partner = (after - before).abs().amax(dim=(1, 2, 3)).tolist()
    assert partner > 1e-3
    return own / partner


def test_attention_keeps_the_two_images_apart(monkeypatch) -> None:
    assert noticed() < 1e-5
    real = mixmim.apart
    monkeypatch.setattr(mixmim, "apart", lambda mask: torch.zeros_like(real(mask)))
    assert noticed() > 1e-2  # without it each leaks into the other


def test_each_image_is_encoded_as_if_it_were_alone() -> None:
    method = make("mixmim")
    images, others = torch.randn(2, 3, 3, SIZE, SIZE)
    mask = partner_mask(torch.arange(3), 16, 6, Clock())
    place = mask.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    encoded = method.encode(torch.where(place, others, images), mask)
    backbone = method.backbone
    for i in range(3):
        for own, cls, seen in ((images, 0, ~mask[i]), (others, 1, mask[i])):
            alone = backbone.encode(backbone.embed(own[i : i + 1])[:, seen])[0]
            together = torch.cat([encoded[i, cls : cls + 1], encoded[i, 2:][seen]])
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_each_image_is_drawn_from_its_own_patches_and_mask_tokens() -> None:
    method = make("mixmim")
    images, others, weight = torch.randn(3, 3, 3, SIZE, SIZE)
    mask = partner_mask(torch.arange(3), 16, 6, Clock())
    backbone, literal = method.backbone, torch.empty(2, 3, 16, 48)
    torch.nn.init.normal_(method.mask_token)
    for i in range(3):
        for which, own, seen in ((0, images, ~mask[i]), (1, others, mask[i])):
            encoded = method.decoder_embed(backbone.encode(backbone.embed(own[i : i + 1])[:, seen]))[0]
            patches = method.mask_token.repeat(16, 1)
            patches[seen] = encoded[1:]
            x = method.decoder(torch.cat([encoded[:1], patches + method.positions])[None])[0, 1:]
            literal[which, i] = method.predict_pixels(method.decoder_norm(x))
    drawn = method.predict(images, others, mask)
    torch.testing.assert_close(drawn, literal, rtol=1e-4, atol=1e-5)
    weights, weight = list(method.parameters()), torch.randn(drawn.shape)
    expected = torch.autograd.grad((literal * weight).sum(), weights)
    torch.testing.assert_close(torch.autograd.grad((drawn * weight).sum(), weights), expected, rtol=1e-3, atol=1e-4)


def test_hidden_patches_are_not_seen() -> None:
    method = make("mixmim")
    images, others = torch.randn(2, 3, 3, SIZE, SIZE)
    mask = partner_mask(torch.arange(3), 16, 8, Clock())
    place = mask.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    before = method.predict(images, others, mask)
    after = method.predict(torch.where(place, 9.0, images), torch.where(place, others, -9.0), mask)
    assert torch.equal(after, before)


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = MixMIM(vit_base())
        shape = method.predict(
            torch.zeros(2, 3, 224, 224), torch.zeros(2, 3, 224, 224), torch.zeros(2, 196, dtype=torch.bool)
        ).shape
    assert shape == (2, 2, 196, 768)
    assert method.num_hidden(196) == 98


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot use this ResNet: choose .*VisionTransformer"):
        make("mixmim", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="positions sincos or learned"):
        make("mixmim", backbone=VisionTransformer(SIZE, 4, 16, 1, 2, positions="relative"))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("mixmim", mask_ratio=0.0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("mixmim", mask_ratio=1.0)
    with pytest.raises(UserError, match="nearest size that works is 20x20"):
        make("mixmim", view=View(size=19))
    method = make("mixmim", partner_groups=3)
    with pytest.raises(UserError, match="a batch of 8 does not fall into 3 groups: change partner_groups"):
        method(make_batch(method, 8), Clock())
