"""Segmentation: crops of image and mask agree, the mIoU is a literal count, masks keep their size, heads learn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sslbook import evaluate
from sslbook.data.datasets.masks import find_layout, load_masks, read_mask
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.base import Representation
from sslbook.evaluation.dense import Dense, resized
from sslbook.evaluation.protocols import segmentation
from sslbook.evaluation.protocols.segmentation import Segmentation
from sslbook.evaluation.target_data import PairData
from sslbook.nn import ConvNet, VisionTransformer
from sslbook.nn.resnet import ResNet
from sslbook.weights.backbone import export_backbone

OPTIONS = {"train_batch_size": 4, "size": 16, "steps": 30, "lrs": (0.03,)}


def write_pairs(folder: Path, count: int = 8, side: tuple[int, int] = (24, 20), seed: int = 0) -> dict[str, Path]:
    """Images of a bright square (value 2) on a dark background (value 1), with a border of 255 in each mask."""
    random = np.random.default_rng(seed)
    options = {}
    for split in ("", "test_"):
        for what in ("images", "masks"):
            options[split + what] = folder / (split + what)
            options[split + what].mkdir(parents=True)
        for i in range(count):
            mask = np.ones(side, np.uint8)
            top, left = random.integers(0, side[0] - 12), random.integers(0, side[1] - 12)
            mask[top : top + 12, left : left + 12] = 2
            image = random.integers(0, 60, (*side, 3)) + np.where(mask == 2, 180, 10)[:, :, None]
            Image.fromarray(image.astype(np.uint8)).save(options[f"{split}images"] / f"{i}.png")
            mask[:, 0] = 255
            Image.fromarray(mask).save(options[f"{split}masks"] / f"{i}.png")
    return options


def representation(backbone: nn.Module, **options) -> Representation:
    return Representation(backbone, Data(workers=0), View.center(16), "cpu", progress=False, **options)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pairs(tmp_path_factory.mktemp("squares"))


def test_image_and_mask_are_cropped_and_flipped_alike_and_by_their_key(squares: dict[str, Path]) -> None:
    found = load_masks((squares["images"], squares["masks"]), (squares["test_images"], squares["test_masks"]))
    data = PairData(found.train, found.test, found.class_names)
    data.workers = 0
    view = View(16, crop=(0.3, 0.6), mean=(0.0,) * 3, std=(1.0,) * 3)
    (batch,) = data.batches((view,), 8, seed=3, epoch=1)
    bright = batch.views[0].mean(1) > 0.5
    known = batch.label >= 0
    agree = (bright == (batch.label == 1))[known].double().mean()
    assert agree > 0.95  # all but pixels on an edge, where the image is interpolated
    mirrored = (bright.flip(-1) == (batch.label == 1))[known].double().mean()
    assert mirrored < agree - 0.1  # the property would fail if one of them was not flipped
    (again,) = data.batches((view,), 8, seed=3, epoch=1)
    assert torch.equal(again.label, batch.label)
    halves = [next(data.batches((view,), 8, seed=3, epoch=1, rank=r, world_size=2)) for r in (0, 1)]
    assert torch.equal(torch.cat([half.label for half in halves]), batch.label)
    (other,) = data.batches((view,), 8, seed=4, epoch=1)
    assert not torch.equal(other.label, batch.label)


def literal(masks: Tensor, predictions: Tensor, classes: int) -> dict[str, float]:
    """Pixel by pixel, in plain Python."""
    pairs = [(t, p) for t, p in zip(masks.flatten().tolist(), predictions.flatten().tolist()) if t >= 0]
    ious, accuracies = [], []
    for c in range(classes):
        both = sum(t == c and p == c for t, p in pairs)
        union = sum(t == c or p == c for t, p in pairs)
        there = sum(t == c for t, _ in pairs)
        ious += [both / union] if union else []
        accuracies += [both / there] if there else []
    pixels = sum(t == p for t, p in pairs) / len(pairs)
    return {
        "mIoU": 100 * sum(ious) / len(ious),
        "class accuracy": 100 * sum(accuracies) / len(accuracies),
        "pixel accuracy": 100 * pixels,
    }


def test_metrics_are_a_literal_count(squares: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    protocol = Segmentation(**squares)
    data = protocol.pairs
    data._splits.class_names = ("a", "b", "c", "never")
    dense = Dense(representation(ConvNet(4)), data, 16, (0.2, 1.0))
    scores = {p: torch.randn(1, 4, 3, 3) - torch.tensor([0.0, 0.0, 0.0, 99.0]).view(1, 4, 1, 1) for p in range(8)}
    queue = list(scores.values())
    counts = segmentation.confusion(dense, data, lambda x: queue.pop(0))
    masks = torch.stack([data._source("test").open(p)[1] for p in scores])
    predictions = torch.stack([resized(scores[p], masks[0]).argmax(1)[0] for p in scores])
    assert segmentation.metrics(counts) == pytest.approx(literal(masks, predictions, 4))
    assert int((masks < 0).sum()) > 0  # and what is ignored was there


def test_mask_keeps_its_resolution(squares: dict[str, Path]) -> None:
    """A prediction of the true mask, given at half the resolution, is not perfect; against a smaller mask it would be."""
    protocol = Segmentation(**squares)
    dense = Dense(representation(ConvNet(4)), protocol.pairs, 16, (0.2, 1.0))
    masks = [protocol.pairs._source("test").open(p)[1] for p in range(8)]
    small = [nn.functional.one_hot(mask[::4, ::4].clamp(min=0), 2).permute(2, 0, 1)[None].float() for mask in masks]
    counts = segmentation.confusion(dense, protocol.pairs, lambda x: small.pop(0))
    assert int(counts.sum()) == sum(int((mask >= 0).sum()) for mask in masks)  # every known pixel was judged
    assert 50 < segmentation.metrics(counts)["mIoU"] < 99


@pytest.mark.slow
@pytest.mark.parametrize("head", ["knn", "linear"])
def test_frozen_maps_find_the_squares(squares: dict[str, Path], head: str) -> None:
    torch.manual_seed(0)
    backbone = ConvNet(8)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    protocol = Segmentation(**squares, head=head, **{**OPTIONS, "lrs": (0.03, 1e-9)})
    model = representation(backbone)
    found = protocol.run(model, model.data)
    assert found["mIoU"] > protocol.chance(model.data)["mIoU"] + 10
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    details = model.details["segmentation"]
    assert set(details["classes"]) == {"1", "2"}
    if head == "linear":
        chosen = details["chosen on a tenth of the training images"]
        assert chosen["lr"] == 0.03  # a head that never moves is not chosen
        assert chosen["mIoU"][0] > chosen["mIoU"][1]
    assert set(protocol.figures()) == {"images"}


def test_knn_of_cells_is_a_literal_vote() -> None:
    mask = torch.tensor([[0, 0, 1, -1], [0, 1, 1, -1], [-1, -1, 2, 2], [-1, -1, 2, 0]])
    expected = [[3 / 4, 1 / 4, 0], [0, 1, 0], [0, 0, 0], [1 / 4, 0, 3 / 4]]
    torch.testing.assert_close(segmentation.cell_labels(mask, 2, 2, 3), torch.tensor(expected))


@pytest.mark.slow
@pytest.mark.parametrize("make", ["resnet", "vit"])
def test_fcn_trains_the_whole_network(squares: dict[str, Path], make: str) -> None:
    torch.manual_seed(0)
    backbone = ResNet(18, 4, "small") if make == "resnet" else VisionTransformer(16, 4, 16, 2, 2)
    protocol = Segmentation(**squares, head="fcn", **OPTIONS)
    model = representation(backbone)
    assert protocol.run(model, model.data)["mIoU"] > protocol.chance(model.data)["mIoU"] + 10


def test_dilated_resnet_has_an_eighth_of_the_resolution_and_the_same_weights() -> None:
    network = ResNet(18, 4)
    before = network.state_dict()
    segmentation.dilate(network)
    assert network.forward_map(torch.zeros(1, 3, 64, 64)).shape[2:] == (8, 8)
    network.load_state_dict(before)
    import torchvision

    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    ours = ResNet(50)
    segmentation.dilate(ours)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    x = torch.randn(1, 3, 32, 32)
    expected = nn.Sequential(*list(theirs.eval().children())[:-2])(x)
    torch.testing.assert_close(ours.eval().forward_map(x), expected)


def _measured(options: dict[str, Path], head: str) -> tuple[dict[str, float], Tensor]:
    torch.manual_seed(0)
    protocol = Segmentation(**options, head=head, **{**OPTIONS, "steps": 3})
    model = representation(ConvNet(4))
    found = protocol.run(model, model.data)
    return found, torch.tensor(list(found.values()))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["knn", "linear", "fcn"])
def test_two_processes_are_one(squares: dict[str, Path], head: str, pool) -> None:
    alone, _ = _measured(squares, head)
    for found, _ in pool.run(_measured, squares, head):
        assert found == pytest.approx(alone, abs=0.2)  # a pixel on an edge may fall to the other side
        assert head != "knn" or found == alone


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_rejects_a_mask_of_another_size(tmp_path: Path) -> None:
    options = write_pairs(tmp_path, count=4)
    Image.fromarray(np.ones((5, 7), np.uint8)).save(options["test_masks"] / "2.png")
    model = representation(ConvNet(4))
    with pytest.raises(UserError, match=r"test_masks/2.png has 7x5 and its image 20x24 pixels"):
        Segmentation(**options, head="knn").run(model, model.data)
    Image.fromarray(np.ones((5, 7), np.uint8)).save(options["masks"] / "1.png")
    with pytest.raises(UserError, match=r"masks/1.png has 7x5 and its image 20x24 pixels"):
        Segmentation(**options, **OPTIONS).run(model, model.data)


def test_images_without_masks_are_counted_and_masks_without_images_refused(tmp_path: Path) -> None:
    options = write_pairs(tmp_path, count=4)
    (options["masks"] / "1.png").unlink()
    with pytest.warns(UserWarning, match=r"1 of 4 images have no file in .* left out \(1\)"):
        assert Segmentation(**options).pairs.num_train == 3
    (options["test_images"] / "3.png").unlink()
    with (
        pytest.warns(match="left out"),
        pytest.raises(UserError, match=r"test_masks: 1 files have no image in .*\(3\)"),
    ):
        _ = Segmentation(**options).pairs


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    options = write_pairs(tmp_path, count=6)
    (options["images"] / "2.png").write_bytes(b"no image")
    model = representation(ConvNet(4))
    with pytest.warns(UserWarning, match="skipped the unreadable image"):
        Segmentation(**options, **{**OPTIONS, "steps": 2}).run(model, model.data)
    assert [Path(name).name for name in model.data.unreadable] == ["2.png"]
    (options["test_images"] / "3.png").write_bytes(b"no image")
    Segmentation(**options, head="knn").run(model, model.data)
    assert [Path(name).name for name in model.data.unreadable] == ["2.png", "3.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_masks": None}, "needs --folder, or --images, --masks"),
        ({"masks": Path("no-such-folder")}, "no-such-folder does not exist"),
        ({"ignore": (1, 255)}, r"hold 1 class\(es\) beside those to ignore"),
        ({"ignore": (1, 2, 255)}, r"hold only values to ignore, \[1, 2, 255\]: check --ignore"),
        ({"lrs": []}, "lrs is empty"),
        ({"images": "empty"}, "have no image in"),
    ],
)
def test_rejects_folders_that_do_not_fit(squares: dict[str, Path], tmp_path: Path, change: dict, message: str) -> None:
    change = {key: tmp_path if value == "empty" else value for key, value in change.items()}
    with pytest.raises(UserError, match=message):
        _ = Segmentation(**{**squares, **change}).pairs


def test_rejects_colored_masks_broken_masks_and_unknown_values(tmp_path: Path) -> None:
    table = torch.arange(3)
    Image.new("RGB", (4, 4)).save(tmp_path / "color.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    Image.fromarray(np.full((4, 4), 9, np.uint8)).save(tmp_path / "nine.png")
    for name, message in (("color", "holds colors"), ("broken", "cannot read the mask"), ("nine", "the value 9")):
        with pytest.raises(UserError, match=message):
            read_mask(tmp_path / f"{name}.png", table)


def test_rejects_a_backbone_without_maps_and_sizes_that_do_not_fit(squares: dict[str, Path]) -> None:
    class Vectors(nn.Module):
        dim = 3

    assert "forward_map" in (Segmentation(**squares).lacks(Vectors(), Data()) or "")
    model = representation(VisionTransformer(16, 4, 16, 1, 2))
    with pytest.raises(UserError, match="a multiple of the patches' 4"):
        Segmentation(**squares, size=18).run(model, model.data)
    with pytest.raises(UserError, match="one learning rate"):
        Segmentation(head="fcn", lrs=(0.1, 0.2))
    with pytest.raises(UserError, match=r"train_batch_size 16: .* has 8 training images"):
        Segmentation(**squares, lrs=(0.1,)).run(model, model.data)


# -- layouts -----------------------------------------------------------------------------------------------------------


def _image(path: Path, value: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if value is None:
        Image.new("RGB", (6, 4)).save(path)
    else:
        Image.fromarray(np.full((4, 6), value, np.uint8)).save(path)


def test_reads_voc_with_the_masks_of_sbd(tmp_path: Path) -> None:
    top = tmp_path / "VOCdevkit" / "VOC2012"
    for name in "abc":
        _image(top / "JPEGImages" / f"{name}.jpg")
        _image(top / "SegmentationClassAug" / f"{name}.png", 20)
    _image(top / "SegmentationClass" / "a.png", 1)
    _image(top / "SegmentationClass" / "c.png", 255)
    lists = top / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("c\n")
    found = find_layout(tmp_path)
    assert (len(found.train), len(found.test), len(found.class_names)) == (1, 1, 21)
    assert found.train.open(0)[1].unique().tolist() == [1]
    assert found.test.open(0)[1].unique().tolist() == [-1]
    (lists / "train_aug.txt").write_text("/JPEGImages/a.jpg /SegmentationClassAug/a.png\nb\n")
    found = find_layout(tmp_path)
    assert len(found.train) == 2
    assert found.train.open(1)[1].unique().tolist() == [20]
    (lists / "val.txt").write_text("c\nd\n")
    with pytest.raises(UserError, match=r"JPEGImages: 1 files are listed and not there \(d\)"):
        find_layout(tmp_path)


def test_reads_ade20k_and_cityscapes(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        _image(tmp_path / "ade" / "images" / split / "x.jpg")
        _image(tmp_path / "ade" / "annotations" / split / "x.png", 150)
    for split in ("train", "val"):
        _image(tmp_path / "city" / "leftImg8bit" / split / "bonn" / "bonn_1_leftImg8bit.png")
        _image(tmp_path / "city" / "gtFine" / split / "bonn" / "bonn_1_gtFine_labelIds.png", 26)  # car
        _image(tmp_path / "city" / "gtFine" / split / "bonn" / "bonn_1_gtFine_color.png")
    found = find_layout(tmp_path / "ade")
    assert (len(found.class_names), found.test.open(0)[1].unique().tolist()) == (150, [149])
    found = find_layout(tmp_path / "city")
    assert (len(found.class_names), found.test.open(0)[1].unique().tolist()) == (19, [13])
    assert found.class_names[13] == "car"
    with pytest.raises(UserError, match="is not laid out as VOC"):
        find_layout(tmp_path)


@pytest.mark.slow
def test_photographs(shared_data: Path, tmp_path: Path) -> None:
    """Real masks: every one has its image's size, and a head learns more than the most frequent class."""
    torch.manual_seed(0)
    options = {}
    for split, prefix in (("train2017", ""), ("val2017", "test_")):
        for what, source in (("images", split), ("masks", f"semantic_{split}")):
            options[prefix + what] = tmp_path / (prefix + what)
            options[prefix + what].mkdir()
            for path in sorted((shared_data / "coco-mini" / f"semantic_{split}").glob("*.png"))[:16]:
                name = path.name if what == "masks" else f"{path.stem}.jpg"
                (options[prefix + what] / name).symlink_to(shared_data / "coco-mini" / source / name)
    model = representation(ConvNet(8))
    chosen = {"ignore": (0, 255), "size": 32, "steps": 40, "train_batch_size": 4, "lrs": (0.03,)}
    protocol = Segmentation(**options, **chosen)
    found, level = protocol.run(model, model.data), protocol.chance(model.data)
    losses = {name: loss for name, loss in model.details["segmentation"].items() if name.startswith("loss at step")}
    print(losses, found, level)
    first, last = losses.values()
    assert last < 0.8 * first
    assert found["mIoU"] > level["mIoU"]


@pytest.mark.slow
def test_a_kept_run_goes_on_only_with_its_own_options(squares: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = ConvNet(4)

    def measured(**options) -> tuple[dict[str, float], int]:
        model = representation(backbone, folder=tmp_path)
        found = Segmentation(**squares, **{**OPTIONS, "steps": 2, **options}).run(model, model.data)
        return found, len(list(tmp_path.iterdir()))

    first, _ = measured()
    (log,) = tmp_path.glob("*/metrics.jsonl")
    steps = log.read_text()
    assert measured() == (first, 1)
    assert log.read_text() == steps  # nothing was trained again
    assert measured(lrs=(0.5,))[1] == 2
    backbone.layers[0].weight.data += 1
    assert measured()[1] == 3  # another network's run is not taken for this one's


@pytest.mark.slow
def test_training_in_bf16(squares: dict[str, Path]) -> None:
    torch.manual_seed(0)
    for head in ("linear", "fcn"):
        model = representation(ConvNet(8))
        found = Segmentation(**squares, head=head, **OPTIONS, precision="bf16").run(model, model.data)
        assert found["mIoU"] > 20


@pytest.mark.slow
def test_the_command_writes_result_and_figure(squares: dict[str, Path], tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    view = {"size": 16, "mean": [0.5] * 3, "std": [0.2] * 3}
    export_backbone(tmp_path / "backbone.safetensors", ConvNet(8).eval(), {"view": view, "method": "Mine"})
    words = [f"--{key}={value}" for key, value in squares.items()]
    words += ["--head=knn", "--size=16", "--data.workers=0", "--progress=false", f"--out={tmp_path / 'result.json'}"]
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["evaluate", "segmentation", str(tmp_path / "backbone.safetensors"), *words])
        evaluate.main()
    content = json.loads((tmp_path / "result.json").read_text())
    assert list(content["values"]) == ["Mine", "random weights", "chance"]
    assert content["values"]["Mine"]["mIoU"] > content["values"]["chance"]["mIoU"]
    assert content["settings"]["details"]["Mine"]["segmentation"]["size"] == 16
    assert (tmp_path / "result-segmentation-images.png").stat().st_size > 1000
    assert "mIoU" in capsys.readouterr().out
