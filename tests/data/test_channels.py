"""Images of other than three channels of 8 bits: every band and bit is used, or it is said that it is not."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from sslbook import train
from sslbook.data.executors import apply_batch, apply_one
from sslbook.data.images import NOTE, UnreadableImage, open_bands, open_image
from sslbook.data.loader import Data
from sslbook.data.views import BYOL_2, SIMCLR, View
from sslbook.errors import UserError
from sslbook.evaluate import evaluate, own_data
from sslbook.evaluation.protocols.knn import KNN
from sslbook.extract import extract
from sslbook.methods import METHODS, load
from sslbook.nn import ConvNet, ResNet, VisionTransformer, timm_model
from sslbook.schedules import Clock
from sslbook.tools.measure_mean_std import measure_mean_std
from sslbook.weights.backbone import load_backbone
from tests.methods.cases import SIZE, case, make, make_batch

RAW = {"mean": (0.0,) * 5, "std": (1.0,) * 5}


def values(channels: int, dtype: type = np.uint16, size: tuple[int, int] = (9, 8)) -> np.ndarray:
    """Random values over the whole range of their type, bands last."""
    random = np.random.default_rng(channels)
    if np.issubdtype(dtype, np.floating):
        return (random.random((*size, channels)) * 5000 - 100).astype(dtype)
    return random.integers(np.iinfo(dtype).max, size=(*size, channels), dtype=dtype, endpoint=True)


def png16(path: Path, array: np.ndarray) -> None:
    """A PNG of 16 bits a channel, which Pillow cannot write in color."""
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write(path: Path, array: np.ndarray, form: str) -> Path:
    """One image with its bands last, in a file of some form; the file."""
    bands_first = np.ascontiguousarray(array.transpose(2, 0, 1))
    if form.startswith("npy"):
        np.save(path.with_suffix(".npy"), bands_first if form == "npy first" else array)
        return path.with_suffix(".npy")
    if form == "png":
        png16(path.with_suffix(".png"), array)
        return path.with_suffix(".png")
    options: dict[str, Any] = {"photometric": "minisblack"}
    if array.shape[2] == 1:
        tifffile.imwrite(path.with_suffix(".tif"), array[:, :, 0], **options)
    elif form == "tiff pixels":
        tifffile.imwrite(path.with_suffix(".tif"), array, planarconfig="contig", **options)
    elif form == "tiff planes":
        tifffile.imwrite(path.with_suffix(".tif"), bands_first, planarconfig="separate", **options)
    else:
        tifffile.imwrite(path.with_suffix(".tif"), bands_first, **options)
    return path.with_suffix(".tif")


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["npy first", "npy last", "tiff pixels", "tiff planes", "tiff pages", "png"])
@pytest.mark.parametrize("channels", [1, 3, 4, 5, 13])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32, np.float64])
def test_every_band_and_bit_is_kept(form: str, channels: int, dtype: type, tmp_path: Path) -> None:
    if form == "png" and (dtype is not np.uint16 or channels in (5, 13)):
        pytest.skip("PNG has no such images")
    array = values(channels, dtype)
    opened = open_bands(write(tmp_path / "image", array, form), channels)
    if isinstance(opened, Image.Image):
        opened = torch.from_numpy(np.array(opened)).permute(2, 0, 1)
    scale = 65535 if dtype is np.uint16 else 1
    assert opened.shape == (channels, 9, 8)
    assert opened.dtype == (torch.uint8 if dtype is np.uint8 else torch.float32)
    kept = opened.double().numpy().transpose(1, 2, 0) * scale
    assert np.array_equal(np.round(kept) if scale > 1 else kept.astype(dtype), array.astype(np.float32).astype(dtype))


def test_gray_serves_as_three_equal_channels_and_no_other_number_is_made_up(tmp_path: Path) -> None:
    gray = write(tmp_path / "gray", values(1), "tiff pixels")
    assert torch.equal(open_bands(gray, 3), open_bands(gray, 1).expand(3, -1, -1))
    for channels in (2, 4):
        with pytest.raises(UnreadableImage, match=rf"1 bands .* data\.channels is {channels}"):
            open_bands(gray, channels)
    five = write(tmp_path / "five", values(5), "npy last")
    with pytest.raises(UnreadableImage, match=r"5 bands \(its shape is \(9, 8, 5\)\), and data\.channels is 4"):
        open_bands(five, 4)
    color = Image.new("RGB", (8, 9), (1, 2, 3))
    color.save(tmp_path / "color.png")
    with pytest.raises(UnreadableImage, match=r"3 bands .* data\.channels is 1"):
        open_bands(tmp_path / "color.png", 1)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.full((5, 4, 4), np.nan, np.float32), "NaN or infinite values: fill them"),
        (np.full((5, 4, 4), 1e300), "NaN or infinite values"),
        (np.full((5, 4, 4), 2**30, np.int32), r"integers beyond 2\^24"),
        (np.zeros((5, 4, 4), complex), "is no image"),
        (np.zeros((5, 4, 4, 2)), "is no image"),
        (np.zeros((5, 0, 4)), "is no image"),
        (np.array([{}]), "allow_pickle=False"),
    ],
)
def test_values_that_cannot_be_kept_are_refused(array: np.ndarray, match: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    with np.errstate(over="ignore"), pytest.raises(UnreadableImage, match=match) as caught:
        open_bands(tmp_path / "x.npy", 5)
    assert "\n" not in str(caught.value)


def test_without_tifffile_the_extra_is_named(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "a", values(5), "tiff pixels")
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(UserError, match=r"tifffile is not installed: .*sslbook\[bands\]"):
        open_bands(path, 5)


# Without channels: told, never dropped without a word ----------------------------------------------------------------


@pytest.mark.parametrize("extra", [["unspecified"], ["unspecified"] * 2])
def test_bands_beyond_three_are_refused(extra: list[str], tmp_path: Path) -> None:
    array = values(3 + len(extra), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="rgb", extrasamples=extra)
    with pytest.raises(UnreadableImage, match=rf"{3 + len(extra)} bands, .* give data\.channels {3 + len(extra)}"):
        open_image(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", values(5), photometric="minisblack", planarconfig="contig")
    with pytest.raises(UnreadableImage, match=r"cannot identify it as a photograph; give the number of its bands"):
        open_image(tmp_path / "b.tif")


def test_alpha_is_no_band(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4, 4), np.uint8), photometric="rgb", extrasamples=["unassalpha"])
    image = open_image(tmp_path / "a.tif")
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert NOTE not in image.info


@pytest.mark.parametrize("workers", [0, 1])
def test_bits_beyond_eight_give_one_warning(workers: int, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    for i in range(6):
        if i % 3 == 2:
            png16(tmp_path / "d" / f"{i}.png", values(3))
        else:
            Image.new("RGB", (8, 9)).save(tmp_path / "d" / f"{i}.png")
    data = Data(folder=tmp_path / "d", workers=workers)

    def epochs() -> None:
        for epoch in range(2):
            assert len(list(data.batches((View(size=4),), 2, seed=0, epoch=epoch))) == 3

    with pytest.warns(
        UserWarning, match="more than 8 bits a channel, of which 8 are used; all .* data.channels"
    ) as caught:
        epochs()
    assert sum("8 bits" in str(warning.message) for warning in caught) == 1  # Python 3.12 also warns of forks
    png16(tmp_path / "gray.png", values(1))
    tifffile.imwrite(tmp_path / "color.tif", values(3))
    for name in ("gray.png", "color.tif"):
        assert "8 bits" in open_image(tmp_path / name).info[NOTE]
    tifffile.imwrite(tmp_path / "pages.tif", values(3, np.uint8).transpose(2, 0, 1), photometric="minisblack")
    assert "several pages" in open_image(tmp_path / "pages.tif").info[NOTE]
    for name in ("a.png", "a.jpg", "a.tif", "a.bmp", "a.gif"):
        Image.new("RGB", (8, 9)).save(tmp_path / name)
        assert NOTE not in open_image(tmp_path / name).info


# Views ---------------------------------------------------------------------------------------------------------------

VIEWS = {
    "center": View.center(12, resize=14, **RAW),
    "crop": View(size=12, crop=(0.3, 1.0), **RAW),
    "bicubic": View(size=12, crop=(0.3, 1.0), interpolation="bicubic", **RAW),
    "simclr": replace(SIMCLR, size=12, color_jitter=(0.8, 0.8, 0.0, 0.0), grayscale=0.0, **RAW),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_both_executors_make_the_same_view_of_any_bands(view: str, dtype: torch.dtype) -> None:
    images = torch.rand(6, 5, 20, 17) if dtype.is_floating_point else torch.randint(256, (6, 5, 20, 17), dtype=dtype)
    batch = apply_batch(VIEWS[view], images, 3, 1, torch.arange(6), 0)
    assert batch.shape == (6, 5, 12, 12)
    for i, image in enumerate(images):
        one = apply_one(VIEWS[view], image, 3, 1, i, 0)
        # Pillow rounds 8 bits after the rows and after the columns, and of bicubic clips the overshoots there.
        atol = 1e-4 if dtype.is_floating_point else 0.35 if VIEWS[view].interpolation == "bicubic" else 0.02
        torch.testing.assert_close(one, batch[i], atol=atol, rtol=1e-4)


def test_a_band_is_treated_as_it_would_be_alone() -> None:
    images = torch.rand(4, 5, 20, 17) * 1000 - 300
    for view in (VIEWS["crop"], VIEWS["bicubic"]):
        together = apply_batch(view, images, 0, 0, torch.arange(4), 0)
        for band in range(5):
            alone = apply_batch(
                replace(view, mean=(0.0,), std=(1.0,)), images[:, band : band + 1], 0, 0, torch.arange(4), 0
            )
            assert torch.equal(together[:, band : band + 1], alone)


def test_ordinary_images_are_as_before() -> None:
    """Three channels of 8 bits, given as such or by `channels=3`, make the same views to the bit."""
    images = torch.randint(256, (8, 3, 20, 20), dtype=torch.uint8)
    plain, bands = Data.from_images(images, torch.zeros(8).long()), Data.from_images(images, torch.zeros(8).long())
    bands.channels = bands._splits.train.channels = 3
    view = replace(SIMCLR, size=16, solarize=0.3)
    one, two = (next(data.batches((view,), 8, seed=0, epoch=0)) for data in (plain, bands))
    assert torch.equal(one.views[0], two.views[0])
    assert plain.adapted(view) is view


def test_16_bits_and_floats_are_not_clamped_and_8_bits_are() -> None:
    view = View(size=4, crop=None, flip=0, color_jitter=(0.9, 0, 0, 0), color_jitter_p=1, **RAW)
    eight = apply_batch(view, torch.full((64, 5, 4, 4), 250, dtype=torch.uint8), 0, 0, torch.arange(64), 0)
    more = apply_batch(view, torch.full((64, 5, 4, 4), 3.0), 0, 0, torch.arange(64), 0)
    assert eight.max() == 1
    assert more.max() > 3
    torch.testing.assert_close(more / 3, apply_batch(view, torch.ones(64, 5, 4, 4), 0, 0, torch.arange(64), 0))


def test_precision_of_16_bits_survives_a_view(tmp_path: Path) -> None:
    array = (np.arange(64 * 5).reshape(8, 8, 5) + 30_000).astype(np.uint16)  # one hue of 8 bits, 320 of 16
    (tmp_path / "d").mkdir()
    np.save(tmp_path / "d" / "a.npy", array)
    data = Data(folder=tmp_path / "d", channels=5, **RAW, workers=0)
    [batch] = data.evaluation_batches("train", View.center(8))
    assert torch.equal(
        (batch.views[0][0] * 65535).round().long(), torch.from_numpy(array.astype(np.int64)).permute(2, 0, 1)
    )


def test_colors_that_make_no_sense_are_left_out_with_a_warning() -> None:
    data = Data.from_images(torch.rand(8, 5, 8, 8), torch.zeros(8).long(), **RAW)
    view = replace(BYOL_2, size=8)
    with pytest.warns(UserWarning, match="5 channels have no saturation, hue and grayscale: left out"):
        with pytest.warns(UserWarning, match="solarize inverts values of 8 bits"):
            adapted = data.adapted(view)
    assert (adapted.color_jitter, adapted.grayscale, adapted.solarize) == ((0.4, 0.4, 0.0, 0.0), 0.0, 0.0)
    assert (adapted.blur, adapted.flip, adapted.mean) == (view.blur, view.flip, (0.0,) * 5)
    assert data.adapted(view) == adapted  # told once
    three = Data.from_images(torch.rand(8, 3, 8, 8), torch.zeros(8).long())
    assert three.adapted(replace(SIMCLR, size=8)) == replace(SIMCLR, size=8)  # three channels may be colors
    gray = Data.from_images(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.zeros(8).long())
    assert next(gray.batches((replace(BYOL_2, size=8),), 8, seed=0, epoch=0)).views[0].shape == (8, 3, 8, 8)


def test_unknown_mean_of_other_channels_says_how_to_measure_it() -> None:
    data = Data.from_images(torch.rand(8, 5, 8, 8), torch.zeros(8).long())
    with pytest.raises(
        UserError, match=r"5 channels .* set data\.mean and data\.std; .*measure_mean_std .* prints them"
    ):
        next(data.batches((View(size=8),), 8, seed=0, epoch=0))
    for options in (
        {"mean": (0.0,) * 5},
        {"mean": (0.0,) * 4, "std": (1.0,) * 5},
        {"mean": (0.0,) * 3, "std": (1.0,) * 3},
    ):
        with pytest.raises(UserError, match="give both, 5 numbers each, or none"):
            Data(channels=5, **options)
    with pytest.raises(UserError, match="give positive numbers"):
        Data(channels=1, mean=(0.0,), std=(0.0,))
    with pytest.raises(UserError, match=r"have 3 channels, and data\.channels is 5"):
        Data(channels=5, **RAW).num_train  # noqa: B018 (Shapes is rendered when it is asked for)


def test_files_of_8_and_of_16_bits_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "a", values(5, np.uint8), "npy last")
    write(tmp_path / "d" / "b", values(5, np.uint16), "npy last")
    data = Data(folder=tmp_path / "d", channels=5, **RAW, workers=0)
    with pytest.raises(UserError, match="some images have 8 bits a channel, and others of the same batch more"):
        list(data.evaluation_batches("train", View.center(8)))


# Sources -------------------------------------------------------------------------------------------------------------


class Bands:
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> tuple[Any, int]:
        array = np.full((6, 7, 5), i, np.uint16)
        return {"array": array, "tensor": torch.from_numpy(array).permute(2, 0, 1)}[self.kind], i % 2


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_a_dataset_of_bands(kind: str) -> None:
    data = Data(train=Bands(kind), channels=5, **RAW, workers=0)
    [batch] = data.evaluation_batches("train", View.center(4))
    assert torch.equal((batch.views[0][:, :, 0, 0] * 65535).round(), torch.arange(8.0)[:, None].expand(8, 5))
    with pytest.raises(UserError, match=r"dataset yields 5 bands .* data\.channels is 4"):
        list(
            Data(train=Bands(kind), channels=4, mean=(0.0,) * 4, std=(1.0,) * 4, workers=0).evaluation_batches("train")
        )


def test_measured_mean_and_std_are_those_of_all_pixels(tmp_path: Path, capsys) -> None:
    arrays = [values(5, np.float32, (6 + i, 7)) for i in range(12)]
    (tmp_path / "d").mkdir()
    for i, array in enumerate(arrays):
        np.save(tmp_path / "d" / f"{i:02}.npy", array)
    mean, std = measure_mean_std(Data(folder=tmp_path / "d", channels=5), progress=False)
    pixels = np.concatenate([array.reshape(-1, 5) for array in arrays]).astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-4)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-4)
    words = capsys.readouterr().out.split("'")
    assert words[0] == "--data.mean "
    assert words[2] == " --data.std "
    color = Data.from_images(torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8), torch.zeros(9).long())
    mean, std = measure_mean_std(color, progress=False)
    pixels = color._splits.train.images.double() / 255
    np.testing.assert_allclose(
        [*mean, *std], [*pixels.mean((0, 2, 3)), *pixels.std((0, 2, 3), correction=0)], rtol=1e-4
    )
    (tmp_path / "flat").mkdir()
    np.save(tmp_path / "flat" / "00.npy", np.zeros((4, 4, 5)))
    with pytest.raises(UserError, match="channel 0 is the same everywhere"):
        measure_mean_std(Data(folder=tmp_path / "flat", channels=5), progress=False)


# Networks and runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda n: ConvNet(4, in_channels=n),
        lambda n: ResNet(18, 4, "small", in_channels=n),
        lambda n: VisionTransformer(16, 4, 16, 1, 2, in_channels=n),
        lambda n: timm_model("resnet18", in_channels=n),
    ],
)
def test_backbones_of_any_channels(make: Any) -> None:
    for channels in (1, 5):
        backbone = make(channels).eval()
        assert backbone.in_channels == channels
        assert backbone(torch.randn(2, channels, 16, 16)).shape == (2, backbone.dim)


def folder_of_bands(root: Path, channels: int, form: str) -> None:
    """A class whose bands are bright and one whose bands are dark, to train and to test."""
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for number, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                array = (random.random((12, 12, channels)) * 20_000 + 40_000 * number).astype(np.uint16)
                write(root / split / name / str(i), array, form)


def words(folder: Path, channels: int, *more: str) -> list[str]:
    """The command of a tiny run on a folder of bands."""
    mean, std = measure_mean_std(Data(folder=folder, channels=channels), progress=False)
    images = [f"--data.folder={folder}", f"--data.channels={channels}", f"--data.mean={mean}", f"--data.std={std}"]
    sizes = ["--batch_size=8", "--steps=2", "--method.view.size=12", "--method.backbone=ConvNet", "--data.workers=0"]
    return [*images, *sizes, "--report=none", "--progress=false", "--device=cpu", *more]


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "form"), [(5, "npy last"), (13, "tiff pixels")])
def test_bands_from_the_first_layer_on(channels: int, form: str, tmp_path: Path) -> None:
    """Train, go on, evaluate and extract."""
    folder_of_bands(tmp_path / "d", channels, form)
    told = f"{channels} channels have no saturation"
    with pytest.warns(UserWarning, match=told):
        train.main(["simclr", *words(tmp_path / "d", channels, f"--out_dir={tmp_path / 'run'}")])
    with pytest.warns(UserWarning, match=told):
        train.main(["--resume", str(tmp_path / "run"), "--steps=3"])
    module, facts = load_backbone(tmp_path / "run")
    assert module.layers[0].weight.shape[1] == len(facts["view"]["mean"]) == channels
    data = Data(folder=tmp_path / "d", channels=channels, workers=0)
    values = evaluate(str(tmp_path / "run"), data, [KNN()], progress=False, device="cpu")
    assert values["SimCLR"]["kNN"] == 100  # bright against dark
    assert {"pixels", "random weights"} <= set(values)
    table = extract(str(tmp_path / "run"), data, str(tmp_path / "f.npz"), progress=False, device="cpu")
    assert table["features"].shape[0] == 24
    assert own_data(str(tmp_path / "run"))[1]["data"]["channels"] == channels


def test_channels_that_disagree_are_one_line(tmp_path: Path) -> None:
    folder_of_bands(tmp_path / "d", 5, "npy last")
    given = words(tmp_path / "d", 5, f"--out_dir={tmp_path / 'run'}")
    with pytest.raises(UserError, match="the images have 5 channels and the backbone takes 4: give it in_channels 5"):
        train.main(["simclr", *given, "--method.backbone.in_channels=4"])
    with pytest.raises(UserError, match="Colorization is about red, green and blue, and the images have 5 channels"):
        train.main(["colorization", *given])
    with pytest.raises(UserError, match=r"5 channels are normalized by 5 numbers: set data\.mean and data\.std"):
        train.main(["simclr", *(word for word in given if "data.mean" not in word and "data.std" not in word)])


@pytest.mark.parametrize("name", METHODS)
def test_methods_learn_from_two_channels_or_say_that_they_cannot(name: str) -> None:
    if load(name).rgb_only:
        pytest.skip("it is about colors")
    is_transformer = isinstance(case(name).backbone(), VisionTransformer)
    backbone = VisionTransformer(SIZE, 4, 16, 2, 2, in_channels=2) if is_transformer else ConvNet(4, in_channels=2)
    method = make(name, backbone=backbone)
    if method.rgb_only:
        pytest.skip("it is about colors")
    batch = make_batch(method, 8)
    batch = batch._replace(views=tuple(view[:, :2] for view in batch.views))
    loss = method(batch, Clock(0, 10, 5, 0))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert next(method.backbone.parameters()).grad is not None
