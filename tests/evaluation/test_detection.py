"""Detection: boxes follow their images, metrics are pycocotools' and a literal VOC, detectors learn, processes agree."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sslbook.data.datasets.boxes import Boxes, BoxList, box_list
from sslbook.data.datasets.coco import load_coco
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation import detectors
from sslbook.evaluation.base import Representation
from sslbook.evaluation.boxes import Detections, coco_metrics, voc_metrics
from sslbook.evaluation.detectors import DetectionTask, KeyedSampler
from sslbook.evaluation.protocols.detection import Detection
from sslbook.evaluation.target_data import BoxData
from sslbook.nn import ConvNet, VisionTransformer
from sslbook.nn.feature_pyramid import FeaturePyramid, SimpleFeaturePyramid
from sslbook.nn.resnet import ResNet
from sslbook.schedules import Clock
from tests.data.test_annotations import write_voc

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of pycocotools, with numpy 2

OPTIONS = {"size": 32, "channels": 8, "train_batch_size": 4, "lr": 3e-3, "optimizer": "adamw", "scale": (0.9, 1.1)}


def write_squares(folder: Path, count: int = 8, seed: int = 0, masks: bool = True) -> Path:
    """A bright square on a dark, noisy background in each image, in the layout of COCO."""
    random = np.random.default_rng(seed)
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / f"{split}2017").mkdir()
        images, annotations = [], []
        for i in range(count):
            height, width, side = 24, 32, int(random.integers(10, 16))
            x, y = int(random.integers(0, width - side)), int(random.integers(0, height - side))
            pixels = random.integers(0, 60, (height, width, 3))
            pixels[y : y + side, x : x + side] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{split}2017" / f"{i}.png")
            images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
            entry = {"id": i + 1, "image_id": i, "category_id": 4, "bbox": [x, y, side, side], "area": side**2}
            if masks:
                entry["segmentation"] = [[x, y, x + side, y, x + side, y + side, x, y + side]]
            annotations.append(entry)
        categories = [{"id": 4, "name": "square"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("coco") / "coco")


def representation(backbone: nn.Module, **options) -> Representation:
    return Representation(backbone, Data(workers=0), View.center(32), "cpu", progress=False, **options)


# -- data --------------------------------------------------------------------------------------------------------------


def test_boxes_and_masks_follow_their_images_and_their_key(squares: Path) -> None:
    data = BoxData(*load_coco(squares, masks=True), (0.7, 1.5), True, 0, "squares")
    view = View(32, crop=None, flip=0.5, mean=(0.0,) * 3, std=(1.0,) * 3)
    seen = 0
    for epoch in range(3):
        (batch,) = data.batches((view,), 8, seed=1, epoch=epoch)
        assert batch.label.shape == (8, 1, 5 + 28 * 28)
        for x, rows in zip(batch.views[0], batch.label):
            for row in rows[rows[:, 4] >= 0]:
                inside = torch.zeros(32, 32, dtype=torch.bool)
                x1, y1, x2, y2 = (round(v) for v in row[:4].tolist())
                inside[y1:y2, x1:x2] = True
                bright = x.mean(0) > 0.5
                overlap = (inside & bright).sum() / (inside | bright).sum()
                assert overlap > 0.75  # edges are interpolated
                target = detectors.target(row[None], 32)
                assert (target["masks"][0] > 0.5).double().sub(inside.double()).abs().mean() < 0.08
                seen += 1
    assert seen > 12
    halves = [next(data.batches((view,), 8, seed=1, epoch=2, rank=r, world_size=2)) for r in (0, 1)]
    assert torch.equal(torch.cat([half.label for half in halves]), batch.label)


def test_rows_are_filled_up_and_ignored_boxes_not_learned(squares: Path) -> None:
    train, test = load_coco(squares)
    train.rows[0, 5] = 1
    data = BoxData(train, test, (1.0, 1.0), False, 0, "squares")
    assert data.num_train == 7
    (batch,) = data.batches((View(32, crop=None, flip=0.0),), 7, seed=0, epoch=0)
    rows = train.rows[1:].clone()
    torch.testing.assert_close(batch.label[batch.index.argsort(), 0, :4], rows[:, :4])


# -- metrics -----------------------------------------------------------------------------------------------------------


def hand_made() -> tuple[BoxList, list[Detections]]:
    """Three images, two classes, a crowd; detections that are right, shifted, doubled, of a wrong class and invented."""
    box = [(10.0, 10.0, 50.0, 60.0), (60.0, 20.0, 90.0, 90.0), (5.0, 5.0, 25.0, 25.0), (0.0, 0.0, 100.0, 30.0)]
    images = [
        Boxes("a.png", (100, 100), box[:2], [0, 1], [False, False]),
        Boxes("b.png", (100, 100), box[2:], [0, 1], [False, True]),
        Boxes("c.png", (100, 100), box[1:3], [1, 0], [False, False]),
    ]
    found = [
        (0, [(10, 10, 50, 60), (12, 10, 50, 60), (62, 25, 92, 90)], [0, 0, 1], [0.9, 0.8, 0.7]),
        (1, [(5, 5, 24, 27), (70, 70, 90, 90), (5, 0, 95, 28)], [0, 1, 1], [0.6, 0.95, 0.5]),
        (2, [(60, 20, 90, 80), (5, 5, 25, 25)], [0, 0], [0.4, 0.3]),
    ]
    detections = [
        Detections(i, torch.tensor(boxes, dtype=torch.float32), torch.tensor(labels), torch.tensor(scores))
        for i, boxes, labels, scores in found
    ]
    for image in images:
        image.file = Path(__file__).name  # metrics read no pixels, but a file must be there
    return box_list(Path(__file__).parent, images, ["x", "y"]), detections


def test_coco_metrics_are_those_of_pycocotools_on_the_same_predictions(tmp_path: Path) -> None:
    truth, found = hand_made()
    ours = coco_metrics(truth, found)
    # Written by hand in COCO's form, from the numbers above.
    boxes = [(1, 0, 10, 10, 40, 50), (1, 1, 60, 20, 30, 70), (2, 0, 5, 5, 20, 20), (2, 1, 0, 0, 100, 30)]
    boxes += [(3, 1, 60, 20, 30, 70), (3, 0, 5, 5, 20, 20)]
    annotations = [
        {"id": n, "image_id": i, "category_id": c + 11, "bbox": b, "area": b[2] * b[3], "iscrowd": int(n == 4)}
        for n, (i, c, *b) in enumerate(boxes, start=1)
    ]
    images = [{"id": i, "width": 100, "height": 100} for i in (1, 2, 3)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 11}, {"id": 12}]}
    (tmp_path / "gt.json").write_text(json.dumps(content))
    entries = [
        {"image_id": one.position + 1, "category_id": int(c) + 11, "score": s, "bbox": [a, b, x - a, y - b]}
        for one in found
        for (a, b, x, y), c, s in zip(one.boxes.tolist(), one.classes, one.scores.tolist())
    ]
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(tmp_path / "gt.json"))
        evaluation = COCOeval(gt, gt.loadRes(entries), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = {name: 100 * v for name, v in zip(("AP", "AP50", "AP75"), evaluation.stats)}
    assert {name: ours[name] for name in expected} == pytest.approx(expected)
    assert 0 < ours["AP"] < ours["AP50"] < 100
    perfect = [
        Detections(i, truth.rows[truth.slice(i), :4], truth.rows[truth.slice(i), 4].long(), torch.ones(2))
        for i in range(3)
    ]
    assert coco_metrics(truth, perfect)["AP"] == pytest.approx(100)
    assert coco_metrics(truth, [])["AP"] == 0


def test_voc_metrics_are_a_literal_count() -> None:
    truth, found = hand_made()
    # Class x by falling score: right (0.9), a second box of the same object (0.8), right (0.6), of another class (0.4),
    # right (0.3); three objects. Precision 1/1 at recall 1/3, 2/3 at 2/3, 3/5 at 1.
    # Class y: invented (0.95), right (0.7), and 0.5 lies on the difficult box: neither. Two objects, the second missed.
    x11, y11 = (4 * 1 + 3 * (2 / 3) + 4 * (3 / 5)) / 11, 6 * (1 / 2) / 11
    assert voc_metrics(truth, found)["AP50"] == pytest.approx(100 * (x11 + y11) / 2)
    x, y = (1 + 2 / 3 + 3 / 5) / 3, 0.5 * 0.5
    assert voc_metrics(truth, found, points=False)["AP50"] == pytest.approx(100 * (x + y) / 2)


# -- networks ----------------------------------------------------------------------------------------------------------


def test_pyramids_have_the_resolutions_of_their_papers() -> None:
    x = torch.zeros(1, 3, 64, 64)
    levels = FeaturePyramid(ResNet(18, 4), 8).eval()(x)
    assert [level.shape[1:] for level in levels.values()] == [(8, side, side) for side in (16, 8, 4, 2, 1)]
    levels = SimpleFeaturePyramid(VisionTransformer(64, 16, 32, 1, 2), 8)(x)
    assert [level.shape[1:] for level in levels.values()] == [(8, side, side) for side in (16, 8, 4, 2, 1)]
    with pytest.raises(UserError, match="feature maps of several resolutions"):
        FeaturePyramid(VisionTransformer(64, 16, 32, 1, 2))


def test_sampler_keeps_torchvisions_numbers_and_depends_on_the_image_alone() -> None:
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

    matched = [torch.tensor([1] * 30 + [0] * 50 + [-1] * 20), torch.tensor([2] * 3 + [0] * 97)]
    ours, theirs = KeyedSampler(16, 0.25, 0), BalancedPositiveNegativeSampler(16, 0.25)
    ours.key = (0, 0, torch.tensor([5, 8]))
    chosen = ours(matched)
    for mine, other in zip(chosen, theirs(matched)):
        assert [int(mask.sum()) for mask in mine] == [int(mask.sum()) for mask in other]
    assert ours.sampled == 32
    ours.key = (0, 0, torch.tensor([8]))
    assert torch.equal(ours(matched[1:])[1][0], chosen[1][1])
    ours.key = (0, 1, torch.tensor([8]))
    assert not torch.equal(ours(matched[1:])[1][0], chosen[1][1])


def make_backbone(kind: str) -> nn.Module:
    return VisionTransformer(32, 8, 16, 1, 2) if kind == "simple" else ResNet(18, 4, "small")


def make_task(squares: Path, kind: str, masks: bool) -> tuple[DetectionTask, BoxData]:
    torch.manual_seed(0)
    data = BoxData(*load_coco(squares, masks), (0.9, 1.1), masks, 0, "squares")
    backbone = make_backbone(kind)
    network = detectors.detector(backbone, kind, 1, 32, masks=masks, channels=8)  # pyrefly: ignore
    return DetectionTask(backbone, network, View(32, crop=None)), data


@pytest.mark.slow
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("kind", ["c4", "fpn", "simple"])
def test_every_detector_has_torchvisions_losses_and_gradients_everywhere(squares: Path, kind: str, masks: bool) -> None:
    task, data = make_task(squares, kind, masks)
    task.train()
    (batch,) = data.batches(task.views(), 8, seed=0, epoch=0)
    losses = task(batch, Clock())
    names = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", *(["loss_mask"] * masks)}
    assert set(losses) == {"loss", *names}
    assert losses["loss"].item() == pytest.approx(sum(losses[name].item() for name in names))
    losses["loss"].backward()
    unused = {"cls_token"}  # of a transformer that gives maps
    without = [n for n, p in task.named_parameters() if p.grad is None and n.rpartition(".")[2] not in unused]
    assert without == []
    again = task(batch, Clock())["loss"]
    assert task.training
    torch.testing.assert_close(again, losses["loss"], rtol=0.02, atol=0)  # nothing random but by its key


@pytest.mark.slow
def test_a_detector_learns_the_squares_and_prints_cocos_metrics(squares: Path) -> None:
    torch.manual_seed(0)
    backbone = ConvNet(8)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    protocol = Detection(coco=squares, steps=60, **OPTIONS)
    model = representation(backbone)
    assert protocol.lacks(backbone, model.data) is None
    found = protocol.run(model, model.data)
    assert set(found) >= {"AP", "AP50", "AP75"}
    assert found["AP50"] > 20  # without training it is 0
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert model.details["detection"]["last losses"]["loss"] < 1.5
    assert set(protocol.figures()) == {"images"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["c4", "fpn", "simple"])
def test_training_in_bf16(squares: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = representation(make_backbone(kind))
    options = {**OPTIONS, "steps": 2, "detector": kind, "masks": True, "precision": "bf16"}
    found = Detection(coco=squares, **options).run(model, model.data)
    assert set(found) >= {"AP", "mask AP"}


def _trained(squares: Path, kind: str) -> tuple[dict[str, float], Tensor]:
    torch.manual_seed(0)
    backbone = make_backbone(kind)
    protocol = Detection(coco=squares, steps=2, detector=kind, masks=kind == "simple", **OPTIONS)
    model = representation(backbone)
    found = protocol.run(model, model.data)
    return found, torch.tensor(list(model.details["detection"]["last losses"].values()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["simple", "c4"])
def test_two_processes_are_one(squares: Path, kind: str, pool) -> None:
    alone, losses = _trained(squares, kind)
    for found, others in pool.run(_trained, squares, kind):
        torch.testing.assert_close(others, losses, rtol=2e-3, atol=2e-3)
        assert found == pytest.approx(alone, abs=1.0)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_rejects_options_and_backbones_that_do_not_fit(squares: Path, tmp_path: Path) -> None:
    data = Data(workers=0)
    empty = Path(shutil.copytree(squares, tmp_path / "empty"))
    file = empty / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    for options, message in (
        ({}, "--coco FOLDER or --voc FOLDER"),
        ({"coco": squares, "voc": squares}, "--coco FOLDER or --voc FOLDER"),
        ({"voc": squares, "masks": True}, "VOC has no outlines"),
        ({"voc": squares}, "holds neither VOC2007 nor VOC2012"),
        ({"coco": tmp_path}, "instances_train2017.json: cannot be read"),
        ({"coco": empty}, r"no image of .*val2017 has a box that counts"),  # else there is nothing to find
    ):
        with pytest.raises(UserError, match=message):
            Detection(**options).lacks(ConvNet(4), data)
    vit = VisionTransformer(32, 8, 16, 1, 2)
    assert "take simple" in (Detection(coco=squares, detector="fpn").lacks(vit, data) or "")
    assert "take fpn" in (Detection(coco=squares, detector="c4").lacks(ConvNet(4), data) or "")
    assert "a multiple of 8, and 100 is not" in (Detection(coco=squares, size=100).lacks(vit, data) or "")
    assert "forward_map" in (Detection(coco=squares).lacks(nn.Flatten(), data) or "")
    with pytest.raises(UserError, match="scale"):
        Detection(scale=(1.0, 0.5))


def test_outlines_that_are_missing_are_reported_before_training(tmp_path: Path) -> None:
    folder = write_squares(tmp_path / "coco", count=2, masks=False)
    with pytest.raises(UserError, match=r"annotations\[0\] \(id 1\): segmentation is neither .* give --masks false"):
        Detection(coco=folder, masks=True).lacks(ConvNet(4), Data(workers=0))


@pytest.mark.slow
def test_loss_falls_on_photographs(shared_data: Path) -> None:
    """Real boxes of many sizes: 16 photographs to learn from, 8 to measure on."""
    torch.manual_seed(0)
    train, test = load_coco(shared_data / "coco-mini")
    options = {**OPTIONS, "size": 64, "train_batch_size": 2, "scale": (1.0, 1.0)}
    protocol = Detection(coco=shared_data / "coco-mini", steps=40, **options)
    protocol._lists = (train.subset(torch.arange(16)), test.subset(torch.arange(8)))
    model = representation(ConvNet(8))
    found = protocol.run(model, model.data)
    losses = {name: loss for name, loss in model.details["detection"].items() if name.startswith("loss at step")}
    print(losses, found)
    first, last = losses.values()
    assert last < 0.8 * first
    assert set(found) >= {"AP", "AP50", "AP75", "AP small"}


@pytest.mark.slow
def test_voc_is_measured_by_its_own_metrics(tmp_path: Path) -> None:
    write_voc(tmp_path, "VOC2007", "trainval", "abcd")
    write_voc(tmp_path, "VOC2007", "test", "ef")
    torch.manual_seed(0)
    model = representation(ConvNet(4))
    found = Detection(voc=tmp_path, steps=2, **OPTIONS).run(model, model.data)
    assert set(found) == {"AP", "AP50", "AP75"}
    assert model.details["detection"]["data"].endswith("4 training images, 20 classes, 2 test images")
