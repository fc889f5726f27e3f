"""The Shapes data set: the same on every machine; options and factors describe what the images show."""

import dataclasses

import pytest
import torch

from sslbook.data.datasets.shapes import BACKGROUNDS, NUISANCES, SHAPES, Shapes
from sslbook.errors import UserError

OFF = dict.fromkeys(NUISANCES, 0.0)
FULL = dict.fromkeys(NUISANCES, 1.0)
# which factors an option changes; the others change pixels only
CHANGES = {
    "hue": {"hue"},
    "position": {"x", "y"},
    "scale": {"scale"},
    "orientation": {"orientation"},
    "lighting": {"light_red", "light_green", "light_blue"},
    "background": {"background"},
    "texture": {"wave_x", "wave_y"},
    "clutter": set(),
    "noise": set(),
}

STORED_SHAPES = [5, 0, 0, 7, 5, 9, 4, 1, 7, 7, 7, 4]
STORED_BACKGROUNDS = [1, 4, 4, 4, 7, 7, 1, 6, 7, 2, 3, 7]
STORED_X = [0.368682, 0.284287, -0.241549, 0.174152]
STORED_MEAN = [125.594, 126.323, 123.238]  # red, green, blue over 200 images
STORED_IMAGES = [125.104, 152.907, 148.716, 162.511, 61.84, 49.285]


def small(**changes) -> Shapes:
    return Shapes(**{"num_train": 64, "num_test": 32, **changes})


def varied(factors: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, values in factors.items() if len(values.unique()) > 1}


@pytest.mark.parametrize("size", [16, 33, 96])
def test_shapes_and_types(size):
    images, factors = small(size=size).render("test")
    assert images.shape == (32, 3, size, size)
    assert images.dtype == torch.uint8
    assert tuple(factors) == Shapes.factor_names
    for name, values in factors.items():
        assert values.shape == (32,)
        if name in Shapes.categories:
            assert values.dtype == torch.int64
            assert values.min() >= 0
            assert values.max() < len(Shapes.categories[name])
        else:
            assert values.dtype == torch.float32
    assert Shapes.class_names == Shapes.categories["shape"]
    assert len(Shapes.class_names) == 10


def test_stored_images():
    """Stored once: images rendered on another machine or by a later version must equal these."""
    images, factors = Shapes(**FULL, num_train=200, size=32).render("train")
    assert factors["shape"][:12].tolist() == STORED_SHAPES
    assert factors["background"][:12].tolist() == STORED_BACKGROUNDS
    torch.testing.assert_close(factors["x"][:4], torch.tensor(STORED_X), atol=1e-6, rtol=0)
    torch.testing.assert_close(images.float().mean((0, 2, 3)), torch.tensor(STORED_MEAN), atol=0.02, rtol=0)
    torch.testing.assert_close(images[:6].float().mean((1, 2, 3)), torch.tensor(STORED_IMAGES), atol=0.02, rtol=0)


def test_image_depends_on_its_index_alone(monkeypatch):
    images, factors = Shapes(**FULL, num_train=100).render("train")
    few, few_factors = Shapes(**FULL, num_train=7).render("train")
    assert torch.equal(few, images[:7])
    assert all(torch.equal(few_factors[name], factors[name][:7]) for name in factors)
    monkeypatch.setattr("sslbook.data.datasets.shapes._PIXELS", 3 * 16 * 16)  # chunks of three images
    assert torch.equal(Shapes(**FULL, num_train=100).render("train")[0], images)


def test_same_image_at_every_size():
    (coarse, f16), (fine, f96) = small(size=16, noise=0.0).render("train"), small(size=96, noise=0.0).render("train")
    assert all(torch.equal(f16[name], f96[name]) for name in f16)
    shrunk = torch.nn.functional.avg_pool2d(fine.float(), 6)
    assert (shrunk - coarse.float()).abs().mean() < 5  # an antialiased edge is the mean of what it covers, nearly


@pytest.mark.slow
def test_splits_and_seeds_differ():
    images = {row.numpy().tobytes() for split in ("train", "test") for row in Shapes(noise=0.0).render(split)[0]}
    assert len(images) == 4000
    assert not torch.equal(small().render("train")[0], small(seed=1).render("train")[0])


def test_categories_are_uniformly_distributed():
    for name, values in Shapes().render("train")[1].items():
        if name in Shapes.categories:
            counts = values.bincount(minlength=len(Shapes.categories[name]))
            assert (counts - counts.float().mean()).abs().max() < 0.2 * counts.float().mean()


def test_without_nuisances_there_is_one_image_per_shape():
    images, factors = small(**OFF).render("train")
    assert varied(factors) == {"shape"}
    for label in range(len(SHAPES)):
        same = images[factors["shape"] == label]
        assert len(same) > 0
        assert torch.equal(same, same[:1].expand_as(same))
    assert len({image.numpy().tobytes() for image in images}) == len(SHAPES)


@pytest.mark.parametrize("option", NUISANCES)
def test_option_changes_its_own_factor_only(option):
    (_, full), (_, without) = small(**FULL).render("train"), small(**{**FULL, option: 0.0}).render("train")
    assert varied(full) - varied(without) == CHANGES[option]
    assert all(torch.equal(full[name], without[name]) for name in full if name not in CHANGES[option])
    # alone, it changes the images of one shape, and nothing else varies
    images, only = Shapes(**{**OFF, option: 1.0}, num_train=200).render("train")
    assert varied(only) == CHANGES[option] | {"shape"}
    stars = images[only["shape"] == Shapes.class_names.index("star")]
    assert len(stars) > 1
    assert not torch.equal(stars, stars[:1].expand_as(stars))


def test_half_an_option_is_half_the_range():
    (_, full), (_, half) = small(**FULL).render("train"), small(**dict.fromkeys(NUISANCES, 0.5)).render("train")
    for name in ("x", "y", "orientation"):
        torch.testing.assert_close(half[name], full[name] / 2)
    assert half["hue"].max() < full["hue"].max()


def test_factors_locate_the_shape():
    """The centroid of the pixels that differ from the background follows x and y; their area follows the scale."""
    images, factors = Shapes(**{**OFF, "position": 1.0, "scale": 0.5}, num_train=400, size=48).render("train")
    hearts = (factors["shape"] == Shapes.class_names.index("heart")).nonzero()[:, 0]
    sky = torch.tensor(BACKGROUNDS["sky"])[:, None, None] * 255
    ink = (images[hearts].float() - sky).abs().amax(1) > 40
    grid = (torch.arange(48) + 0.5) / 24 - 1
    area = ink.sum((1, 2)).float()
    x = (ink * grid).sum((1, 2)) / area
    y = -(ink * grid[:, None]).sum((1, 2)) / area
    for found, factor in ((x, "x"), (y, "y"), (area.sqrt(), "scale")):
        assert torch.corrcoef(torch.stack([found, factors[factor][hearts]]))[0, 1] > 0.97


@pytest.mark.slow
def test_orientation_is_counter_clockwise():
    images, factors = Shapes(**{**OFF, "orientation": 1.0}, num_train=3000, size=48).render("train")
    upright = Shapes(**OFF, num_train=100, size=48).render("train")
    cat = Shapes.class_names.index("cat")
    quarter = ((factors["orientation"] - 90).abs() < 1.5) & (factors["shape"] == cat)
    assert quarter.any()
    rotated = upright[0][upright[1]["shape"] == cat][0].rot90(1, (1, 2)).float()  # rot90 is counter-clockwise
    for image in images[quarter]:
        assert (image.float() - rotated).abs().mean() < 6 < (image.float() - rotated.flip(2)).abs().mean()


def test_rotations_and_shapes_can_be_classified():
    images, factors = Shapes(**OFF, num_train=200, size=48).render("train")
    one = torch.stack([images[factors["shape"] == label][0] for label in range(len(SHAPES))]).float()
    for turns in (1, 2, 3):  # no shape equals itself rotated
        assert (one.rot90(turns, (2, 3)) - one).abs().mean((1, 2, 3)).min() > 5
    difference = (one[:, None] - one.flip(3)[None]).abs().mean((2, 3, 4))
    assert torch.equal(difference.argmin(1), torch.arange(len(SHAPES)))  # a flip keeps the class


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"size": 15}, "from 16 to 96"),
        ({"size": 97}, "shapes.size"),
        ({"texture": 1.5}, "shapes.texture"),
        ({"hue": -0.1}, "from 0 to 1"),
        ({"noise": float("nan")}, "shapes.noise"),
    ],
)
def test_rejects_invalid_options(changes, cure):
    with pytest.raises(UserError, match=cure) as error:
        Shapes(**changes)
    assert "\n" not in str(error.value)


def test_nuisances_are_fields():
    assert set(NUISANCES) < {field.name for field in dataclasses.fields(Shapes)}
