"""Protocols in general: found by name, refused where something lacks, measured once on features extracted once."""

import pytest
import torch
from torch import nn

from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation import base, controls
from sslbook.evaluation.protocols.knn import KNN

VIEW = View.center(16)


class NumChannels(base.Protocol):
    """Of the backbone's maps: what pixels cannot serve."""

    needs = "maps"

    def run(self, model: base.Representation, data: Data) -> base.Metrics:
        return {"channels": float(model.backbone.forward_map(torch.zeros(1, 3, 16, 16)).shape[1])}


class Pooled(nn.Module):
    def forward_map(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_map(x).flatten(1)


@pytest.fixture
def data() -> Data:
    return Data(shapes=Shapes(num_train=60, num_test=30))


def test_every_protocol_of_the_package_is_found_by_its_file_name() -> None:
    assert set(base.DEFAULT) <= set(base.available())
    for name in base.available():
        protocol = base.find(name)()
        assert protocol.name == name
        assert (protocol.__doc__ or "").strip()


@pytest.mark.parametrize(
    ("name", "message"),
    [("knm", "did you mean knn"), ("no.such.Thing", "cannot be imported"), ("torch.nn.Linear", "is not a subclass")],
)
def test_rejects_names_that_are_no_protocols(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        base.find(name)


@pytest.mark.slow
def test_tables_hold_every_model_and_chance_last(data: Data) -> None:
    models = {"mean": base.Representation(Pooled(), data, VIEW, progress=False)}
    models["pixels"] = controls.pixels(data, VIEW, progress=False)
    protocols = base.chosen(None, Pooled(), data)
    tables = base.measure(models, protocols)
    assert list(tables) == ["summary", "factors"]
    for rows in tables.values():
        assert list(rows) == ["mean", "pixels", "chance"]
        assert len({tuple(row) for row in rows.values()}) == 1  # the same metrics
    assert tables["summary"]["mean"] == {
        **KNN().run(models["mean"], data),
        "linear": tables["factors"]["mean"]["shape"],
    }
    counts = data.labels("train").bincount()
    expected = 100 * (data.labels("test") == counts.argmax()).double().mean().item()
    assert tables["summary"]["chance"]["kNN"] == pytest.approx(expected)
    text = base.format_tables(tables, protocols, data)
    assert "Metrics in %, on 30 test images" in text
    assert "\nhue " in text  # a line for every factor


def test_features_are_extracted_once(data: Data) -> None:
    calls = []
    backbone = Pooled()
    backbone.register_forward_hook(lambda *_: calls.append(1))
    model = base.Representation(backbone, data, VIEW, batch_size=60, progress=False)
    base.measure({"mean": model}, [KNN(), KNN(k=1), *base.chosen(["linear"], backbone, data)])
    assert len(calls) == 2  # one batch for each split


def test_images_without_a_label_are_no_rows_of_a_probe() -> None:
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, -1, 1, 0, -1])
    data = Data.from_images(images[:6], labels, images[6:], labels.roll(1), class_names=("a", "b"))
    model = base.Representation(Pooled(), data, VIEW, progress=False)
    x, y, new_x, new_y = model.labeled()
    assert (y.tolist(), new_y.tolist()) == ([0, 1, 1, 0], [0, 1, 1, 0])
    assert torch.equal(x, model.features("train").x[labels >= 0])
    assert torch.equal(new_x, model.features("test").x[labels.roll(1) >= 0])


def test_controls_that_cannot_serve_a_protocol_are_left_out_and_the_model_is_refused(data: Data) -> None:
    pixels, model = (
        controls.pixels(data, VIEW, progress=False),
        base.Representation(Pooled(), data, VIEW, progress=False),
    )
    tables = base.measure({"mean": model, "pixels": pixels}, [NumChannels()])
    assert tables == {"summary": {"mean": {"channels": 3.0}}}
    with pytest.raises(
        UserError, match=r"numchannels needs a backbone with maps \(a method forward_map\), which Flatten"
    ):
        base.measure({"pixels": pixels}, [NumChannels()])


def test_online_metrics_are_those_of_a_subset(data: Data) -> None:
    small = Data(shapes=data.shapes, limit=20)
    expected = KNN(5).run(base.Representation(Pooled(), small, VIEW, progress=False), small)
    assert base.measure_online(Pooled(), data, VIEW, [KNN(5)], 20, torch.device("cpu")) == expected
    assert len(data.labels("train")) == 60
