import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from sslbook import checkpoint
from sslbook.errors import UserError
from sslbook.nn import ResNet, VisionTransformer
from sslbook.nn.backbones import describe
from sslbook.weights.backbone import export_backbone, load_backbone
from sslbook.weights.load import load_weights


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    checkpoint.write_text(path, "old")

    def broken(part: Path) -> None:
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(UserError, match=r"x.txt: cannot be written \(disk full\); nothing was changed"):
        checkpoint.write_atomically(path, broken)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_round_trip_and_order(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        checkpoint.save(tmp_path / f"checkpoint-{step:08d}.pt", {"step": step, "w": torch.arange(3)})
    assert checkpoint.load(checkpoint.find(tmp_path))["step"] == 100
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(_empty(tmp_path))


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


@pytest.mark.parametrize("keep", [0, 1, 50, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "checkpoint-00000001.pt"
    checkpoint.save(path, {"w": torch.randn(1000)})
    whole = path.read_bytes()
    path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        checkpoint.load(path)


def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-00000001.pt"
    weights = torch.full((1000,), 0.125)
    checkpoint.save(path, {"w": weights})
    whole = bytearray(path.read_bytes())
    whole[whole.index(weights.numpy().tobytes()) + 1234] ^= 4
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"is not what was saved\); take an older one"):
        checkpoint.load(path)


def test_a_checkpoint_without_what_is_needed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-00000001.pt"
    checkpoint.save(path, {"step": 3})
    assert checkpoint.load(path, "step")["step"] == 3
    with pytest.raises(UserError, match="holds no method, description; take another"):
        checkpoint.load(path, "step", "method", "description")
    with pytest.raises(UserError, match="holds no method, description"):
        load_backbone(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    path = tmp_path / "checkpoint-00000001.pt"
    torch.save({"format": checkpoint.FORMAT, "step": Bomb(mark)}, path)
    for read in (checkpoint.load, lambda p: load_weights(nn.Linear(1, 1), p)):
        with pytest.raises(UserError, match="could execute code"):
            read(path)
    path.write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(UserError):
        checkpoint.load(path)
    assert not mark.exists()


def test_a_foreign_checkpoint_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "moco.pt"
    torch.save({"state_dict": {"w": torch.ones(2)}}, path)
    with pytest.raises(UserError, match="--init_from"):
        checkpoint.load(path)


def test_weights_from_many_kinds_of_files(tmp_path: Path) -> None:
    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(3, 2)
            self.head = nn.Linear(2, 2)

    source = Method()
    torch.save(source.state_dict(), tmp_path / "plain.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "ddp.pth")
    torch.save(source.backbone.state_dict(), tmp_path / "backbone.pt")
    for name, missing in (("plain.pt", 0), ("ddp.pth", 0), ("backbone.pt", 2)):
        target = Method()
        loaded = load_weights(target, tmp_path / name)
        assert (len(loaded.missing), loaded.unused) == (missing, [])
        assert torch.equal(target.backbone.weight, source.backbone.weight)
    with pytest.raises(UserError, match=r"0 of the 2 tensors .* weight is \(2, 2\) there and \(1, 1, 1, 1\) here"):
        load_weights(nn.Conv2d(1, 1, 1), tmp_path / "plain.pt")


@pytest.mark.parametrize(
    "backbone", [ResNet(18, 4, "small"), VisionTransformer(16, 4, 16, 2, 2, pool="mean")], ids=["resnet", "vit"]
)
def test_an_exported_backbone_comes_back(tmp_path: Path, backbone: nn.Module) -> None:
    path = tmp_path / "backbone.safetensors"
    export_backbone(path, backbone, {"view": {"size": 16}})
    again, facts = load_backbone(path)
    x = torch.randn(3, 3, 16, 16)
    assert facts["view"]["size"] == 16
    assert torch.equal(again.eval()(x), backbone.eval()(x))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="truncated"):
        load_backbone(path)


@pytest.mark.parametrize("class_path", ["os.system", "subprocess.Popen", "sslbook.nn.nothing", "torch.hub.load", ""])
def test_a_description_cannot_choose_what_code_is_run(tmp_path: Path, class_path: str) -> None:
    path = tmp_path / "backbone.safetensors"
    export_backbone(path, nn.Linear(2, 2), {})
    facts = {"backbone": {"class_path": class_path, "init_args": {"command": f"touch {tmp_path}/executed"}}}
    path.with_suffix(".json").write_text(json.dumps(facts))
    with pytest.raises(UserError):
        load_backbone(path)
    assert not (tmp_path / "executed").exists()


def test_your_own_backbone_is_filled_when_you_pass_it(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    own = nn.Linear(2, 2)
    export_backbone(path, own, {})
    with pytest.raises(UserError, match="--backbone"):
        load_backbone(path)
    again, _ = load_backbone(path, nn.Linear(2, 2))
    assert torch.equal(again.weight, own.weight)


def test_old_checkpoints_give_their_weights_but_are_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-00000001.pt"
    vit = VisionTransformer(16, 4, 16, 2, 2)
    old = {**describe(vit), "init_args": {**describe(vit)["init_args"]}}
    old["init_args"]["heads"] = old["init_args"].pop("num_heads")
    state = {f"backbone.{name}": value for name, value in vit.state_dict().items()}
    contents = {"format": "sslbook checkpoint 1", "method": state, "description": {"backbone": old}, "figures": {}}
    torch.save(contents, path)
    again, _ = load_backbone(path)
    assert torch.equal(again.norm.weight, vit.norm.weight)
    with pytest.raises(UserError, match=r"sslbook 0\.1.*--init_from"):
        checkpoint.load(path, "method", "optimizer")


def test_a_mask_token_without_singleton_axes_is_reshaped(tmp_path: Path) -> None:
    class Method(nn.Module):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.mask_token = nn.Parameter(torch.randn(*shape))

    old, new = Method(5), Method(1, 1, 5)
    torch.save(old.state_dict(), tmp_path / "old.pt")
    load_weights(new, tmp_path / "old.pt")
    assert torch.equal(new.mask_token[0, 0], old.mask_token)
