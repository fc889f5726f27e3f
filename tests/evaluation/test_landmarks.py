"""Landmarks: rankings by hand, the files of ROxford and RParis, and pickles that would run code."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.base import Representation
from sslbook.evaluation.protocols.landmarks import Landmarks, prepared, read_truth, scores


class Colors(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def truth() -> dict[str, Any]:
    return {
        "imlist": [f"image{i}" for i in range(6)],
        "qimlist": ["query0", "query1"],
        "gnd": [
            {"bbx": [0, 0, 40.2, 60.0], "easy": [0, 1], "hard": [2], "junk": [3]},
            {"bbx": [0, 0, 64, 32], "easy": [], "hard": [4], "junk": []},
        ],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "jpg").mkdir()
    colors = {f"image{i}": (40 * i, 255 - 40 * i, 100) for i in range(6)} | {
        "query0": (20, 235, 100),
        "query1": (160, 95, 100),
    }
    for i, (name, color) in enumerate(colors.items()):
        picture = Image.new("RGB", (64 + 10 * i, 100), (0, 0, 255) if "query" in name else color)
        if "query" in name:  # outside the region it is blue
            picture.paste(color, (0, 0, 48, 68) if name == "query0" else (0, 0, 72, 40))
        picture.save(tmp_path / "jpg" / f"{name}.jpg", quality=100, subsampling=0)
    (tmp_path / "gnd_test.json").write_text(json.dumps(truth()))
    return tmp_path


def model(backbone: nn.Module | None = None) -> Representation:
    return Representation(backbone or Colors(), Data(), View.center(32), progress=False)


def test_scores_by_hand() -> None:
    ranking = torch.tensor([5, 0, 3, 1, 4, 2])
    # Without 3: positives at ranks 1 and 2 (from 0). Trapezoids: (0/1 + 1/2) / 2 and (1/2 + 2/3) / 2, each times 1/2.
    found = scores(ranking, [0, 1], [3], [1, 2, 10])
    assert found == pytest.approx([100 * (1 / 4 + 7 / 12) / 2, 0, 50, 100 * 2 / 3])
    assert scores(torch.tensor([0, 1, 2]), [0], [], [1, 5]) == [100, 100, 100]
    assert scores(torch.tensor([2, 1, 0]), [0, 2], [], [1])[0] == pytest.approx(100 * (1 + (1 / 2 + 2 / 3) / 2) / 2)


def test_setups_differ_in_what_counts(folder: Path) -> None:
    one = model()
    metrics = Landmarks(folder, size=64).run(one, one.data)
    # The region of query 0 is nearest to images 1, 0, 2, ...; of query 1 to image 4, and it has no easy image.
    assert metrics["Easy, mAP"] == 100
    assert metrics["Medium, mAP"] == 100
    assert metrics["Hard, mP@1"] == 100
    assert set(metrics) == {f"{s}, {m}" for s in ("Easy", "Medium", "Hard") for m in ("mAP", "mP@1", "mP@5", "mP@10")}
    assert one.details["landmarks"] == {"database": 6, "queries": 2, "longer side": 64}
    wrong = truth()
    wrong["gnd"][0] |= {"easy": [5], "hard": [0, 1]}
    (folder / "gnd_test.json").write_text(json.dumps(wrong))
    metrics = Landmarks(folder, size=64).run(one, one.data)
    assert metrics["Hard, mAP"] == 100
    assert metrics["Easy, mAP"] < 60


def test_images_keep_their_shape() -> None:
    picture = Image.new("RGB", (300, 200), (255, 0, 0))
    assert prepared(picture, None, 96, View.center(32)).shape == (3, 64, 96)
    assert prepared(picture, [10, 20, 110, 220.4], 96, View.center(32)).shape == (3, 96, 32)
    x = prepared(picture, None, 64, View.center(32, mean=(0.5, 0, 0), std=(0.25, 1, 1)))
    assert x[:, 3, 4].tolist() == [2, 0, 0]


def test_pickles_of_the_authors_form_are_read(folder: Path) -> None:
    content = truth()
    for entry in content["gnd"]:
        entry |= {kind: np.array(entry[kind], dtype=np.int64) for kind in ("easy", "hard", "junk")}
        entry["bbx"] = [np.float64(v) for v in entry["bbx"]]
    expected = read_truth(folder)
    (folder / "gnd_test.json").unlink()
    for protocol in (2, 4):
        (folder / "gnd_test.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        assert read_truth(folder) == expected


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil",)


def test_a_pickle_runs_no_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "gnd_test.json").unlink()
    (folder / "gnd_test.pkl").write_bytes(pickle.dumps({**truth(), "more": Evil()}))
    with pytest.raises(UserError, match="no list, number or array"):
        read_truth(folder)
    assert not (folder / "evil").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("gnd"), "lacks gnd"),
        (lambda c: c["gnd"].pop(), "gnd has 1 entries for 2 queries"),
        (lambda c: c["gnd"][1].pop("hard"), r"gnd\[1\]: lacks hard"),
        (lambda c: c["gnd"][1].update(bbx=[5, 5, 5, 9]), r"gnd\[1\].bbx is"),
        (
            lambda c: c["gnd"][0].update(easy=[6]),
            r"gnd\[0\]\.easy\[0\]: is 6, not a whole number of at least 0, at most 5",
        ),
    ],
)
def test_wrong_entries_are_named(folder: Path, change: Any, message: str) -> None:
    content = truth()
    change(content)
    (folder / "gnd_test.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_truth(folder)


def test_queries_that_cannot_be_asked(folder: Path) -> None:
    content = truth()
    content["gnd"][1].update(bbx=[900, 900, 950, 950])
    (folder / "gnd_test.json").write_text(json.dumps(content))
    one = model()
    with pytest.raises(UserError, match=r"region \[900.* of a query lies outside its 1\d\dx100 image"):
        Landmarks(folder, size=64).run(one, one.data)
    content = truth()
    for entry in content["gnd"]:
        entry |= {"easy": [], "hard": []}
    (folder / "gnd_test.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="no query has an easy or a hard image"):
        Landmarks(folder, size=64).run(one, one.data)


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    one = model()
    (folder / "jpg" / "image3.jpg").unlink()
    with pytest.raises(UserError, match=r"image3\.jpg"):
        Landmarks(folder).run(one, one.data)
    (folder / "gnd_test.json").write_text("{")
    with pytest.raises(UserError, match="not readable"):
        Landmarks(folder).run(one, one.data)
    with pytest.raises(UserError, match="no gnd_"):
        Landmarks(folder / "jpg").run(one, one.data)
    with pytest.raises(UserError, match="size is 8"):
        Landmarks(folder, size=8)


def test_a_network_of_one_size_is_refused(folder: Path) -> None:
    fixed = model(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)))
    with pytest.raises(UserError, match="does not take images of any shape"):
        Landmarks(folder, size=64).run(fixed, fixed.data)
