"""Files that somebody has altered are refused in one line that names file and entry, or they do no harm."""

import copy
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sslbook import checkpoint, files, results
from sslbook.cli.recipes import resolve
from sslbook.data.datasets.coco import load_coco
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.engine.hooks import read_metrics
from sslbook.engine.loop import pretrain
from sslbook.errors import UserError
from sslbook.evaluate import own_data, view_of
from sslbook.methods.simclr import SimCLR
from sslbook.nn import ConvNet, ResNet, VisionTransformer
from sslbook.nn.backbones import build, describe
from sslbook.weights.backbone import load_backbone

ADAMW = partial(torch.optim.AdamW, lr=1e-3)
CONFIG = {
    "method": {"class_path": "sslbook.methods.simclr.SimCLR", "init_args": {"projector_dim": 4, "temperature": 0.5}},
    "data": {"name": "shapes", "shapes": {"num_train": 16, "num_test": 4, "size": 16}},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "betas": [0.9, 0.99]}},
    "batch_size": 8,
    "hooks": [],
}
RESULT = {
    "values": {"SimCLR": {"kNN": [1.0, 2.0]}},
    **{"command": "python x.py", "commit": "abc", "date": "2026-01-01", "hardware": {"cores": 2, "processor": "x"}},
    **{"versions": {"torch": "2"}, "seeds": [0, 1], "settings": {}},
}


def train(folder: Path, steps: int, resume: Path | None = None) -> Any:
    method = SimCLR(ConvNet(4), View(size=16), projector_dim=4)
    data = Data(shapes=Shapes(num_train=16, num_test=4, size=16))
    options = {"out_dir": folder} if resume is None else {"resume": resume}
    return pretrain(method, data, ADAMW, batch_size=8, device="cpu", progress=False, steps=steps, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(folder, 2)
    return folder


def refusal(function: Any, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


LAUGHS = "a: &a [1, 1]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghijklmnopq", "bcdefghijklmnopqr")
)


# -- what a schema says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ([], "f: is a list, not a mapping"),
        ({"view": 3, "n": 0}, "f: view: is 3, not a mapping"),
        ({"view": {"size": -3}, "n": 0}, "f: view.size: is -3, not a whole number of at least 1"),
        ({"view": {"size": True}, "n": 0}, "f: view.size: is True, not a whole number of at least 1"),
        ({"view": {"size": 1, "mean": [0, "x"]}, "n": 0}, "f: view.mean[1]: is 'x', not a finite number"),
        ({"view": {"size": 1, "mean": [float("nan")]}, "n": 0}, "f: view.mean[0]: is nan, not a finite number"),
        ({"view": {"mean": []}, "n": 0}, "f: view: lacks size"),
        ({1: 2, "n": 0}, "f: is 1, not a text that names an entry"),
        ({"n": "x"}, "f: n: is 'x', not null or 0 or a mapping"),
        ({"n": {"a": {"b": [{2: 3}]}}}, "f: n.a.b[0]: is 2, not a text that names an entry"),
    ],
)
def test_a_schema_names_the_first_entry_that_does_not_fit(value: Any, answer: str) -> None:
    schema = {"view?": {"size": files.Whole(1), "mean?": [float]}, "n": (None, 0, {str: object})}
    assert refusal(files.check, "f", value, schema) == answer


def test_what_fits_is_left_as_it_is() -> None:
    schema = {"view?": {"size": files.Whole(1)}, "n": (None, 0, {str: object}), "t?": torch.Tensor}
    for value in ({"n": None}, {"n": 0, "other": 1}, {"n": {"a": [1, {"b": None}]}, "t": torch.ones(1)}):
        assert files.check("f", value, schema) is value


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a: &a [*a]", "contains it, or grows"),
        ("a: &a {b: *a}", "contains it, or grows"),
        ("[" * 10_000, "nested more than"),
        (LAUGHS, "grows"),
        ("a: !!python/object/apply:os.system [x]", "not valid YAML"),
        ("a: 2001-99-99", "not valid YAML"),
        ("- 1", "is a list, not a mapping"),
        ("\x00", "not valid YAML"),
    ],
)  # fmt: skip
def test_yaml_that_grows_or_nests_is_refused(text: str, answer: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    message = refusal(files.read_yaml, path)
    assert message.startswith(f"{path}: ")
    assert answer in message


def test_aliases_that_do_not_grow_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\n")
    assert files.read_yaml(path)["c"] == {"x": 1, "y": 2}
    path.write_text("")
    assert files.read_yaml(path) == {}


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "backbone.json")
        os.mkfifo(tmp_path / "checkpoint-00000001.pt")
        assert "no file" in refusal(files.read_json, tmp_path / "backbone.json", dict)
        assert "no file" in refusal(checkpoint.load, tmp_path / "checkpoint-00000001.pt")
    (tmp_path / "big.json").write_bytes(b" " * (files.MAX_BYTES + 1))
    assert "larger than" in refusal(files.read_json, tmp_path / "big.json", dict)
    (tmp_path / "deep.json").write_text("[" * 100_000)
    assert "not valid JSON" in refusal(files.read_json, tmp_path / "deep.json", dict)


# -- runs --------------------------------------------------------------------------------------------------------------


def altered(run: Path, folder: Path, **entries: Any) -> Path:
    path = folder / "checkpoint-00000002.pt"
    state = {**torch.load(checkpoint.find(run), weights_only=True), **entries}
    torch.save({name: value for name, value in state.items() if value is not ...}, path)
    return path


@pytest.mark.parametrize(
    ("entries", "answer"),
    [
        ({"step": -3}, "step: is -3, not a whole number of at least 0"),
        ({"step": 2.5}, "step: is 2.5, not a whole number"),
        ({"steps_per_epoch": 0}, "steps_per_epoch: is 0"),
        ({"method": [1]}, "method: is a list, not a mapping"),
        ({"method": {"a": 1}}, "method.a: is 1, not a Tensor"),
        ({"evaluations": {"knn": "x"}}, "evaluations.knn: is 'x'"),
        ({"best": "x"}, "best: is 'x', not a finite number or -inf"),
        ({"seconds": float("nan")}, "seconds: is nan"),
        ({"random": [{"cpu": 3}]}, "random[0].cpu: is 3, not a Tensor"),
        ({"random": [{"cpu": torch.zeros(3)}]}, "does not fit this run"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "does not fit this run"),
        ({"optimizer": {"state": {0: {"step": 2.0, "exp_avg": torch.zeros(5)}}, "param_groups": ...}}, "exp_avg of another"),
        ({"scaler": {"scale": "x"}}, "scaler.scale: is 'x'"),
        ({"description": {"view": {"size": 0}}}, "description.view.size: is 0"),
        ({"seed": ...}, "holds no seed"),
    ],
)  # fmt: skip
def test_an_altered_checkpoint_is_refused(entries: dict, answer: str, run: Path, tmp_path: Path) -> None:
    whole = torch.load(checkpoint.find(run), weights_only=True)
    optimizer = entries.get("optimizer")
    if optimizer and optimizer["param_groups"] is ...:
        entries = {"optimizer": {**optimizer, "param_groups": whole["optimizer"]["param_groups"]}}
    path = altered(run, tmp_path, **entries)
    message = refusal(train, tmp_path, 4, path)
    assert message.startswith(f"{path}: ")
    assert answer in message
    assert path.exists()  # under its name


def test_options_that_changed_are_in_force_after_a_resume(run: Path, tmp_path: Path) -> None:
    path = altered(run, tmp_path)
    method = SimCLR(ConvNet(4), View(size=16), projector_dim=4)
    kept: list[Any] = []

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        kept.append(torch.optim.AdamW(groups, lr=1e-3, betas=(0.5, 0.6)))
        return kept[0]

    data = Data(shapes=Shapes(num_train=16, num_test=4, size=16))
    pretrain(method, data, optimizer, batch_size=8, device="cpu", progress=False, steps=3, resume=path)
    assert {group["betas"] for group in kept[0].param_groups} == {(0.5, 0.6)}


@pytest.mark.parametrize(
    ("facts", "answer"),
    [
        ([], "is a list, not a mapping"),
        ({"view": {"size": "x"}}, "view.size: is 'x'"),
        ({"backbone": {"class_path": "sslbook.nn.ConvNet", "init_args": {"width": 10**9}}}, "backbone"),
        ({"backbone": {"class_path": "sslbook.nn.ConvNet", "init_args": {"width": "x"}}}, "cannot be built"),
        ({"backbone": {"class_path": "sslbook.nn.ConvNet", "init_args": {"width": -1}}}, "cannot be built"),
        ({"backbone": {"class_path": "sslbook.nn.VisionTransformer", "init_args": {"depth": 10**9}}}, "depth: is 1000000000"),
        ({"backbone": {"class_path": "sslbook.nn.VisionTransformer", "init_args": {}}}, "do not fit the backbone"),
    ],
)  # fmt: skip
def test_an_altered_description_is_refused(facts: Any, answer: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "backbone.safetensors").write_bytes((run / "backbone.safetensors").read_bytes())
    (tmp_path / "backbone.json").write_text(json.dumps(facts))
    assert answer in refusal(load_backbone, tmp_path)


@pytest.mark.parametrize("backbone", [ConvNet(4), ResNet(18, 4, "small"), VisionTransformer(16, 8, 8, 1, 1)])
def test_every_backbone_is_measured_without_memory(backbone: torch.nn.Module) -> None:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build(describe(backbone)).state_dict().items()}
    assert shapes == {name: value.shape for name, value in backbone.state_dict().items()}


def test_arguments_of_a_class_are_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": True}}))
    assert "init_args is 'True', not a mapping of options" in refusal(resolve, ["--config", str(path)], pretrain)


def test_lines_that_are_no_metrics_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 2.0}\n[]\n3\n{"loss": 1}\n{"step": "x"}\n{"step": 2, "loss": [1]}\n\xff\n{"st'
    )
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


# -- fuzzing -----------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(
    ["", "step", "view", "size", "class_path", "init_args", "name", "data", "<<", "sslbook.nn.ConvNet"]
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([-3, 0, 1, 2**40, 10**30, 1e308, -0.0]), st.floats(),
    st.text(max_size=8), NAMES,
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES | st.text(max_size=4), v, max_size=3),
    max_leaves=6,
)
FEW = settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(FEW, max_examples=2500)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in places(part, (*path, key)))]


@st.composite
def changed(draw: Any, whole: Any) -> Any:
    """A value with some of its entries replaced, removed or renamed."""
    box = [copy.deepcopy(whole)]
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(box)[1:]))
        owner: Any = box
        for key in place[:-1]:
            owner = owner[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "remove" and isinstance(owner, dict):
            del owner[place[-1]]
        elif kind == "add" and isinstance(owner, dict):
            owner[draw(NAMES)] = draw(VALUES)
        else:
            owner[place[-1]] = draw(VALUES)
    return box[0]


def harmless(function: Any, *arguments: Any) -> None:
    """It works, or says in one line what is wrong."""
    try:
        function(*arguments)
    except UserError as error:
        message = str(error)
    else:
        return
    assert "\n" not in message
    assert len(message) < 900


def spoiled(draw: Any, content: bytes) -> bytes:
    """Bytes of which some were changed, or the end is missing."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


class Fuzz:
    """What is done with each kind of file; `tests` below run it a few times, and in the slow tier many times."""

    def __init__(self, run: Path, folder: Path) -> None:
        self.run, self.folder = run, folder
        for name in ("backbone.safetensors", "metrics.jsonl"):
            (folder / name).write_bytes((run / name).read_bytes())

    def description(self, data: Any) -> None:
        facts = data.draw(changed(json.loads((self.run / "backbone.json").read_text())))
        text = json.dumps(facts).encode()
        (self.folder / "backbone.json").write_bytes(spoiled(data.draw, text) if data.draw(st.booleans()) else text)
        harmless(lambda: view_of(load_backbone(self.folder)[1], None))
        harmless(own_data, str(self.folder))

    def config(self, data: Any) -> None:
        text = yaml.safe_dump(data.draw(changed(CONFIG)), allow_unicode=True).encode()
        path = self.folder / "config.yaml"
        path.write_bytes(spoiled(data.draw, text) if data.draw(st.booleans()) else text)
        harmless(resolve, ["--config", str(path)], pretrain)

    def checkpoint(self, data: Any) -> None:
        path = self.folder / "checkpoint-00000002.pt"
        if data.draw(st.booleans()):
            path.write_bytes(spoiled(data.draw, checkpoint.find(self.run).read_bytes()))
        else:
            torch.save(data.draw(changed(torch.load(checkpoint.find(self.run), weights_only=True))), path)
        harmless(load_backbone, path)
        harmless(checkpoint.load, path, "step")

    def result(self, data: Any) -> None:
        text = json.dumps(data.draw(changed(RESULT))).encode()
        path = results.folder() / "x.json"
        path.write_bytes(spoiled(data.draw, text) if data.draw(st.booleans()) else text)
        harmless(lambda: repr(results.show("x")))
        (self.folder / "metrics.jsonl").write_bytes(spoiled(data.draw, (self.run / "metrics.jsonl").read_bytes()))
        harmless(read_metrics, self.folder / "metrics.jsonl")


def fuzz(kind: str, how: settings, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "book" / "results").mkdir(parents=True)
    monkeypatch.chdir(folder)
    subject = getattr(Fuzz(run, folder), kind)
    how(given(st.data())(lambda data: subject(data)))()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["description", "config", "checkpoint", "result"])
def test_altered_files_do_no_harm(kind: str, run: Path, tmp_path: Path, monkeypatch) -> None:
    fuzz(kind, FEW, run, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.skipif("SSLBOOK_FUZZ" not in os.environ, reason="takes minutes: set SSLBOOK_FUZZ=1")
@pytest.mark.parametrize("kind", ["description", "config", "checkpoint", "result"])
def test_ten_thousand_altered_files_do_no_harm(kind: str, run: Path, tmp_path: Path, monkeypatch) -> None:
    fuzz(kind, MANY, run, tmp_path, monkeypatch)


def test_every_reader_of_the_package_checks_what_it_reads() -> None:
    """No other place parses JSON, YAML or torch's files of a run."""
    package = Path(files.__file__).parent
    found = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if re.search(r"json\.loads?\(|yaml\.(safe_)?load\(|torch\.load\(", path.read_text(encoding="utf-8"))
    }
    own = {"files.py", "checkpoint.py", "engine/hooks.py"}  # the readers; metrics.jsonl is read line by line
    # These read what they or the command line have written.
    others = {"cli/parser.py", "cli/values.py", "compare.py", "engine/heartbeat.py", "evaluate.py"}
    assert {name for name in found if not name.startswith(("notebook/", "data/", "evaluation/"))} <= own | others


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Wherever a text is read: nobody writes to this one."""
    (tmp_path / "annotations").mkdir()
    for name in ("list.txt", "list.json", "annotations/instances_train2017.json", "options.yaml"):
        os.mkfifo(tmp_path / name)
    for read in (
        lambda: Data(list=tmp_path / "list.txt"),
        lambda: Data(list=tmp_path / "list.json"),
        lambda: load_coco(tmp_path),
        lambda: files.read_yaml(tmp_path / "options.yaml"),
    ):
        with pytest.raises(UserError, match="no file that can be read to its end"):
            read()
