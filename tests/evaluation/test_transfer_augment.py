"""Augmentations of supervised training: timm's operations, keyed numbers, targets that match the pixels."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import AutoAugment, AutoAugmentPolicy

from sslbook.errors import UserError
from sslbook.evaluation import augment, rand_augment
from sslbook.evaluation.augment import Augmentation
from sslbook.evaluation.rand_augment import OPERATIONS
from sslbook.schedules import Clock

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = (124, 116, 104)
NAMES = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd"),
    *("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing"),
    *("ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)


def smooth_images(n: int = 4, size: int = 24) -> Tensor:
    small = torch.randint(20, 236, (n, 3, 5, 5)).float()
    return F.interpolate(small, (size, size), mode="bilinear").round().to(torch.uint8)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("number", "name"), list(enumerate(NAMES)), ids=NAMES)
def test_operations_are_those_of_timm(number: int, name: str, sign: int, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm.data.auto_augment")
    monkeypatch.setattr(timm, "_randomly_negate", lambda value: sign * value)
    x, level = smooth_images(), torch.tensor([0.2, 0.5, 0.83, 0.9])
    ours = OPERATIONS[number](x, level, sign * level, tuple(c / 255 for c in FILL))
    for image, strength, got in zip(x, level.tolist(), ours):
        arguments = timm.LEVEL_TO_ARG[name](10 * strength, timm._HPARAMS_DEFAULT) if timm.LEVEL_TO_ARG[name] else ()
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        options = {"fillcolor": FILL, "resample": Image.Resampling.BILINEAR}
        expected = np.asarray(timm.NAME_TO_OP[name](picture, *arguments, **options)).astype(int)
        off = np.abs(expected - got.permute(1, 2, 0).numpy().astype(int))
        geometric = name[:5] in ("Rotat", "Shear", "Trans")
        # at the border ours blends with the fill color where PIL cuts; equalize and the gray of contrast round otherwise
        limit = {"Equalize": 6, "ContrastIncreasing": 2, "SharpnessIncreasing": 2, "ColorIncreasing": 2}.get(name, 1)
        assert np.quantile(off, 0.85 if geometric else 1.0) <= (3 if geometric else limit), f"{name}: {off.max()}"


def test_rand_augment_chooses_as_timm_does() -> None:
    """15 kinds alike, each applied with probability one half, magnitude 9 with a deviation of one half below 10."""
    calls: list[int] = []
    levels: list[float] = []
    u = torch.rand(4000, 8)
    before = rand_augment.OPERATIONS
    try:
        rand_augment.OPERATIONS = tuple(
            (lambda x, level, signed, fill, i=i: (calls.extend([i] * len(x)), levels.extend(level.tolist()), x)[-1])
            for i in range(15)
        )
        rand_augment.rand_augment(torch.zeros(4000, 3, 1, 1, dtype=torch.uint8), 9.0, u)
    finally:
        rand_augment.OPERATIONS = before
    assert len(calls) == pytest.approx(4000, abs=200)  # of two layers, half
    assert np.bincount(calls, minlength=15).min() > 4000 / 15 * 0.7
    assert np.median(levels) == pytest.approx(0.9, abs=0.005)
    assert np.std([v for v in levels if v < 0.9]) == pytest.approx(0.03, abs=0.005)  # of half a normal distribution
    assert max(levels) <= 1


@pytest.mark.parametrize("what", [{"padding": 3}, {"auto_augment": "cifar10"}, {"rand_augment": 9.0}, {"erasing": 0.7}])
def test_an_image_is_augmented_by_its_key_alone(what: dict) -> None:
    options = Augmentation(**what)
    x, index = torch.randn(8, 3, 16, 16), torch.arange(100, 108)

    def run(rows: Tensor, epoch: int = 0, seed: int = 0) -> Tensor:
        return augment.augment(options, x[rows], MEAN, STD, Clock(10 * epoch, 100, 10, seed), index[rows])

    whole = run(torch.arange(8))
    assert torch.equal(whole[torch.tensor([5, 2])], run(torch.tensor([5, 2])))
    assert not torch.equal(whole, run(torch.arange(8), epoch=1))
    assert not torch.equal(whole, run(torch.arange(8), seed=1))


def test_auto_augment_is_torchvision_s_policy_of_8_bit_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image goes through the policy once, as it was before normalization; torch's generator is left alone."""
    seen = []

    def policy(self: AutoAugment, image: Tensor) -> Tensor:
        seen.append((self.policy, torch.rand(1).item()))
        return 255 - image

    monkeypatch.setattr(AutoAugment, "forward", policy)
    levels = smooth_images(6)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    before = torch.random.get_rng_state()
    what = Augmentation(auto_augment="svhn")
    out = augment.augment(what, (levels / 255 - mean) / std, MEAN, STD, Clock(), torch.arange(6))
    torch.testing.assert_close((out * std + mean) * 255, 255.0 - levels, atol=1e-3, rtol=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert {used for used, _ in seen} == {AutoAugmentPolicy.SVHN}
    assert len({number for _, number in seen}) == 6  # of each image's own key


def test_padded_crop_is_a_shift_with_a_border_of_zeros() -> None:
    x, seen = torch.randn(200, 1, 6, 5), set()
    out = augment.augment(Augmentation(padding=2), x, (0.5,), (0.5,), Clock(), torch.arange(200))
    for image, got in zip(x, out):
        padded = F.pad(image, [2] * 4)
        found = [(i, j) for i in range(5) for j in range(5) if torch.equal(padded[:, i : i + 6, j : j + 5], got)]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) == 25


def test_erasing_replaces_a_rectangle_by_noise() -> None:
    x = torch.full((600, 3, 32, 32), 7.0)
    out = augment.augment(Augmentation(erasing=0.25), x, MEAN, STD, Clock(), torch.arange(600))
    changed = (out != 7).any(1)
    which = changed.flatten(1).any(1)
    assert float(which.float().mean()) == pytest.approx(0.25, abs=0.06)
    for mask in changed[which]:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns  # a rectangle
        assert 0.015 < float(mask.float().mean()) < 0.36
    noise = out[which][changed[which][:, None].expand(-1, 3, -1, -1)]
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)


def flat_images(n: int) -> tuple[Tensor, Tensor]:
    """Images of one value each, which is also their class."""
    label = torch.arange(n)
    return label.float().view(-1, 1, 1, 1).expand(-1, 3, 20, 20).contiguous(), label


@pytest.mark.parametrize("what", [{"mixup": 0.8}, {"cutmix": 1.0}, {"resizemix": 1.0}], ids=str)
def test_targets_match_the_mixed_pixels(what: dict) -> None:
    mixed = 0
    for step in range(20):
        x, label = flat_images(6)
        x, target = augment.mix(Augmentation(**what), x, label, 6, Clock(step))
        assert target.sum(1) == pytest.approx(torch.ones(6).numpy())
        assert torch.allclose(x.mean((1, 2, 3)), target @ torch.arange(6.0), atol=1e-4)
        mixed += int((target.max(1).values < 0.999).any())
    assert mixed > 10


def test_processes_mix_alike() -> None:
    options = Augmentation(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    x, label = torch.randn(8, 3, 12, 12), torch.arange(8)
    for step in range(6):
        whole = augment.mix(options, x, label, 8, Clock(step))
        halves = [augment.mix(options, x[i : i + 4], label[i : i + 4], 8, Clock(step)) for i in (0, 4)]
        for i in (0, 1):
            assert torch.equal(whole[i], torch.cat([half[i] for half in halves]))


def test_probabilities_of_mixing() -> None:
    x, label = flat_images(4)
    kinds = {"mixup": 0, "cutmix": 0, "none": 0}
    options = Augmentation(mixup=1.0, cutmix=1.0, mix_probabilities=(0.3, 0.2, 0.0))
    for step in range(400):
        made, target = augment.mix(options, x, label, 4, Clock(step, seed=random.randrange(2)))
        flat = all(float(image.std()) < 1e-6 for image in made)
        kinds["none" if bool((target.max(1).values == 1).all()) and flat else "mixup" if flat else "cutmix"] += 1
    assert kinds["mixup"] == pytest.approx(120, abs=40)
    assert kinds["cutmix"] == pytest.approx(80, abs=35)


def test_label_smoothing_is_torch_s() -> None:
    logits, label = torch.randn(8, 5), torch.randint(5, (8,))
    _, target = augment.mix(Augmentation(label_smoothing=0.1), torch.randn(8, 3, 4, 4), label, 5, Clock())
    assert F.cross_entropy(logits, target) == pytest.approx(
        float(F.cross_entropy(logits, label, label_smoothing=0.1)), abs=1e-6
    )


def test_what_does_not_work_is_refused() -> None:
    x, label = flat_images(3)
    with pytest.raises(UserError, match="even number of images"):
        augment.mix(Augmentation(mixup=0.8), x, label, 3, Clock())
    with pytest.raises(UserError, match="3 channels"):
        augment.augment(Augmentation(rand_augment=9), x[:, :1], (0.5,), (0.5,), Clock(), label)
    with pytest.raises(UserError, match="auto_augment to null"):
        augment.augment(Augmentation(auto_augment="svhn"), x[:, :1], (0.5,), (0.5,), Clock(), label)
    for wrong in ({"erasing": 2.0}, {"mixup": -1.0}, {"rand_augment": 11.0}, {"mix_probabilities": (0.5, 0.0, 0.0)}):
        with pytest.raises(UserError, match="augmentation"):
            Augmentation(**wrong)
