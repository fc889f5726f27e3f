"""`extract --what tokens|maps`: what the backbone's own methods return, in both formats; refused where it has none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from torch import nn

from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.evaluation.features import extract_features
from sslbook.extract import extract
from sslbook.nn import ConvNet, VisionTransformer
from sslbook.weights.backbone import export_backbone

VIEW = View.center(16)


@pytest.fixture
def data() -> Data:
    images = torch.randint(0, 256, (7, 3, 16, 16), dtype=torch.uint8)
    return Data.from_images(images, torch.arange(7) % 2, class_names=("a", "b"))


def exported(folder: Path, backbone: nn.Module) -> str:
    view = {"size": 16, "mean": list(VIEW.mean), "std": list(VIEW.std)}
    export_backbone(folder / "backbone.safetensors", backbone.eval(), {"view": view, "method": "Test"})
    return str(folder / "backbone.safetensors")


def test_tokens_and_maps_are_the_backbones_own(data: Data, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    vit = VisionTransformer(16, 4, 8, 1, 2)
    run = exported(tmp_path, vit)
    x = next(data.evaluation_batches("train", VIEW, 7)).views[0]
    found = extract(run, data, str(tmp_path / "tokens.npz"), what="tokens", batch_size=3, progress=False)
    assert "7 images, tokens of 16 x 8 each" in capsys.readouterr().out
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found["tokens"]), vit.forward_tokens(x)[:, 1:])
    with np.load(tmp_path / "tokens.npz") as table:
        assert np.array_equal(table["tokens"], found["tokens"])
        assert table["labels"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    extract(run, data, str(tmp_path / "maps.safetensors"), what="maps", batch_size=3, progress=False)
    maps = load_file(tmp_path / "maps.safetensors")["maps"]
    assert maps.shape == (7, 8, 4, 4)
    assert np.array_equal(maps.reshape(7, 8, 16).transpose(0, 2, 1), found["tokens"])


def test_the_mean_of_a_map_is_the_feature(data: Data, tmp_path: Path) -> None:
    backbone = ConvNet(4)
    found = extract(exported(tmp_path, backbone), data, str(tmp_path / "maps.npz"), what="maps", progress=False)
    features, _ = extract_features(backbone, data, "train", VIEW, progress=False)
    torch.testing.assert_close(torch.from_numpy(found["maps"]).mean((2, 3)), features)


def test_rejects_a_backbone_without_tokens(data: Data, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--what tokens needs patches .* and cannot use a ConvNet"):
        extract(exported(tmp_path, ConvNet(4)), data, str(tmp_path / "x.npz"), what="tokens", progress=False)
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_several_classes_and_numbers_are_written(tmp_path: Path, suffix: str) -> None:
    """The targets of each image that was read stand in its row; classes alone need no such column."""
    run = exported(tmp_path, ConvNet(4))
    for i in range(6):
        Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    rows = {
        "labels": lambda i: "a,b" if i % 2 else "b",
        "target": lambda i: i / 4,
        "label": lambda i: "ab"[i % 2],
    }
    for column, value in rows.items():
        entries = [{"image": f"{i}.png", column: value(i), "split": "test" if i > 3 else "train"} for i in range(6)]
        (tmp_path / "list.json").write_text(json.dumps(entries))
        data, out = Data(list=tmp_path / "list.json", workers=0), tmp_path / f"{column}{suffix}"
        extract(run, data, str(out), progress=False)
        table = load_file(out) if suffix == ".safetensors" else np.load(out)
        if column == "label":
            assert "targets" not in table
            continue
        read = [0, 1, 2, 4, 5]
        wanted = [[i % 2 == 1, True] for i in read] if column == "labels" else [i / 4 for i in read]
        assert table["targets"].tolist() == wanted
        assert (table["labels"] == -1).all()
