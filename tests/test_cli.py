"""The command line of training: layers of options, recipes and their bases, help, and answers to wrong names."""

import re
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from sslbook import evaluate, tools
from sslbook.cli.common import run
from sslbook.cli.recipes import RECIPES, method_class, resolve, train_parser
from sslbook.cli.renamed import RENAMED, RENAMED_CLASSES
from sslbook.engine.loop import pretrain
from sslbook.errors import UserError
from sslbook.methods import METHODS

FILES = sorted(RECIPES.glob("*/*.yaml"))
BASES = sorted(RECIPES.glob("*.yaml"))


def refusal(*words: str) -> str:
    """The message with which a command line is refused; it must be one line."""
    with pytest.raises(UserError) as caught:
        resolve(list(words), pretrain)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 450
    return message


def printed(capsys, *words: str) -> str:
    """What a command line prints instead of training."""
    with pytest.raises(SystemExit) as caught:
        resolve(list(words), pretrain)
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["simclrr"], "did you mean simclr?"),
        (["SimCLR"], "did you mean simclr?"),
        (["simclr", "mae"], "unexpected mae"),
        ([".x"], "cannot be imported"),
        (["my_module.Nothing"], "cannot be imported"),
        (["os.path"], "not a subclass"),
        (["simclr", "--method.temprature=0.1"], "did you mean --method.temperature?"),
        (["simclr", "--temperature=0.1"], "did you mean --method.temperature?"),
        (["simclr", "--bacth_size=8"], "did you mean --batch_size?"),
        (["simclr", "--recip=cifar10"], "unknown option --recip; did you mean --recipe?"),
        (["simclr", "--epoch=3"], "unknown option --epoch; did you mean --epochs?"),
        (["simclr", "--data.fold=x"], "unknown option --data.fold; did you mean --data.folder?"),
        (["simclr", "--epochs"], "--epochs: expects a value"),
        (["simclr", "--epochs=many"], "--epochs: Expected a float. Got value: many"),
        (["simclr", "--steps=x"], "--steps: Expected a int. Got value: x"),
        (["simclr", "--optimizer.lr=a"], "--optimizer.lr: Expected a float. Got value: a"),
        (["simclr", "--method.temperature=hot"], "--method.temperature: Expected a float"),
        (["simclr", "--precision=int8"], "--precision: Expected a Literal['float32', 'bf16', 'fp16']"),
        (["simclr", "--schedule.then=Step"], "--schedule.then: the following arguments are required: milestones"),
        (["simclr", "--method.backbone=resnet19"], "did you mean resnet18?"),
        (["simclr", "--method.backbone=ResNet", "--method.backbone.dpth=18"], "did you mean depth?"),
        (["simclr", "--method.backbone=nowhere.Net"], "nowhere.Net; it cannot be imported"),
        (["simclr", "--optimizer.lrr=1"], "did you mean lr?"),
        (["simclr", "--optimizer=Adamw2"], "did you mean AdamW?"),
        (["simclr", "--schedule=Cosin"], "did you mean Cosine?"),
        (["simclr", "--hooks=[OnlineKN]"], "did you mean OnlineKNN?"),
        (["simclr", "--hooks=[OnlineKNN"], "not valid YAML"),
        (["simclr", '--rules=[{"patern": "a"}]'], "did you mean pattern?"),
        (["simclr", "--recipe=cifar"], "did you mean cifar10?"),
        (["simclr", "--recipe=nowhere.yaml"], "cannot be read"),
        (["simclr", "--config=nowhere.yaml"], "cannot be read"),
        (["simclr", "--resume=nowhere"], "no such run folder"),
        (["simclr", "--seed=99999999999999999999"], "64 bits"),
        (["simclr", "--keep_last=-1"], "--keep_last is -1: give 0 or more"),
        (["simclr", "--launcher=slurm", "--slurm.nodes=0"], "--slurm.nodes is 0: give 1 or more"),
        (["simclr", "--log_every=0"], "--log_every is 0: give 1 or more"),
        (["simclr", "--clip_grad_norm=0"], "--clip_grad_norm is 0.0: give more than 0"),
        (["simclr", "--layer_decay=-1"], "--layer_decay is -1.0: give more than 0"),
        (["simclr", "--method.temperature=0"], "--method.temperature is 0.0: give more than 0"),
        (["mae", "--method.decoder_num_heads=0"], "--method.decoder_num_heads is 0: give 1 or more"),
        (["densecl", "--method.temperature=0"], "--method.temperature is 0.0: give more than 0"),  # an option of MoCo
        (["interclr", "--method.centroids_every=0"], "--method.centroids_every is 0: give 1 or more"),
        (["simclr", "--method.backbone=ResNet", "--method.backbone.width=0"], "backbone.width is 0: give 1 or more"),
        (["dino", "--method.num_local=-1"], "--method.num_local is -1: give 0 or more"),
        (["mae", "--method.decoder_depth=-2"], "--method.decoder_depth is -2: give 0 or more"),
        (["mae", "--method.mask_ratio=.nan"], "--method.mask_ratio is nan: give a number"),
        (["ijepa", "--method.target_scale=[.nan,0.2]"], "--method.target_scale is nan: give a number"),
        (["simclr", "--epochs=.inf"], "--epochs is inf: give a number"),
    ],
    ids=lambda value: "_".join(value)[:60] if isinstance(value, list) else None,
)
def test_rejects_wrong_options(words: list[str], answer: str) -> None:
    assert answer in refusal(*words)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["linear", "R", "--validation=1"], "--validation is 1.0: give less than 1"),
        (["finetune", "R", "--validation=0"], "--validation is 0.0: give more than 0"),
        (["finetune", "R", "--training.epochs=.nan"], "--training.epochs is nan: give a number"),
        (["R", "--batch_size=-1"], "--batch_size is -1: give 0 or more"),
        (["R", "--data.workers=-2"], "--data.workers is -2: give 0 or more"),
    ],
)
def test_numbers_have_bounds_in_every_command(words: list[str], answer: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", *words, "--data.name=shapes"])
    with pytest.raises(UserError, match=re.escape(answer)):
        evaluate.main()


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["simclr", "--lr=1"], "write --optimizer.lr"),
        (["simclr", "--learning_rate=1"], "write --optimizer.lr"),
        (["simclr", "--wd=1"], "write --optimizer.weight_decay"),
        (["simclr", "--image_size=32"], "write --method.view.size"),
        (["byol", "--image_size=32"], "write --method.view_1.size and --method.view_2.size"),
        (["simclr", "--gpus=8"], "torchrun --nproc-per-node"),
        (["simclr", "--output=x"], "write --out_dir"),
        (["simclr", "--workers=2"], "write --data.workers"),
        (["simclr", "--out=x"], "write --out_dir"),
        (["simclr", "--weights=x"], "write --init_from"),
        (["simclr", "--accumulate=2"], "write --grad_accum_steps"),
        (["simclr", "--best=knn"], "write --monitor"),
        (["simclr", "--keep=1"], "write --keep_last"),
        (["simclr", "--clip=1"], "write --clip_grad_norm"),
        (["simclr", "--decay_vectors=true"], "write --decay_bias_and_norm"),
        (["simclr", "--lr_reference_batch=256"], "write --base_batch_size"),
        (["simclr", "--data.world.size=24"], "write --data.shapes"),
        (["mae", "--method.decoder_heads=3"], "write --method.decoder_num_heads"),
        (["mae", "--method.backbone.heads=3"], "write num_heads"),
        (["simclr", "--recipe=world"], "write shapes"),
        (["simclr", "--hooks=[Pictures]"], "write sslbook.loggers.Plots"),
        (["simclr", '--hooks=[{"class_path": "sslbook.hooks.OnlineKNN"}]'], "write sslbook.loggers.OnlineKNN"),
        (["simclr", "--backend=gloo"], "leave it out"),
    ],
    ids=lambda value: "_".join(value)[:60] if isinstance(value, list) else None,
)
def test_answers_other_names_with_ours(words: list[str], answer: str) -> None:
    assert answer in refusal(*words)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("method: {temprature: 0.1}", "did you mean method.temperature?"),
        ("bacth_size: 4", "did you mean batch_size?"),
        ("method: [1, 2", "not valid YAML"),
        ("- a list", "mapping"),
        ("method: {backbone: {class_path: sslbook.nn.ResNet, init_args: {dept: 18}}}", "did you mean depth?"),
        ("data: {shaps: {size: 32}}", "did you mean data.shapes"),
        ("data: photos", "data: holds options"),
        ("method: {view: null}", "method.view: holds options"),
        ("method: {backbone: resnet19}", "did you mean resnet18?"),
        ("optimizer: {class_path: torch.optim.SGD, lr: 1}", "below init_args"),
        ("method: {class_path: sslbook.methods.mae.MAE, init_args: {mask_ratio: 0.5}}", "options of the method MAE"),
        ("weights: x.pt", "unknown option weights; write init_from"),
    ],
)
def test_rejects_wrong_files(text: str, answer: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert answer in refusal("simclr", f"--config={tmp_path / 'mine.yaml'}")


def test_names_all_new_keys_of_an_old_configuration(tmp_path: Path) -> None:
    old = {"data": {"world": {"size": 16}}, "accumulate": 1, "cudnn_benchmark": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    message = refusal("--resume", str(tmp_path))
    for part in ("config.yaml: ", "write data.shapes", "write grad_accum_steps", "cudnn_benchmark; leave it out"):
        assert part in message


@cache
def options_of(method: str) -> list[str]:
    return train_parser(method_class(method), pretrain, "").options


@pytest.mark.slow
def test_new_names_exist() -> None:
    options = {option for method in METHODS for option in options_of(method)}
    ends = {option.rpartition(".")[2] for option in options} | {"shapes"}
    ends |= {"lr", "weight_decay", "num_heads", "num_codes"}  # arguments of an optimizer or a backbone
    for old, new in RENAMED.items():
        assert new.startswith("torchrun") or new.rpartition(".")[2] in ends, (old, new)
        assert old not in options


@pytest.mark.parametrize("path", [path for path in RENAMED_CLASSES.values() if not path.endswith(".")])
def test_new_classes_exist(path: str) -> None:
    from sslbook.cli.parser import class_named

    assert class_named(path) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
@pytest.mark.slow
def test_every_recipe_parses(path: Path) -> None:
    _, _, resolved = resolve([path.parent.name, "--recipe", path.stem], pretrain)
    module, _, name = METHODS[path.parent.name].rpartition(".")
    assert resolved["method"]["class_path"] == f"{module}.{name}"
    assert resolved["optimizer"]["class_path"]


@pytest.mark.parametrize("base", BASES, ids=lambda path: path.stem)
def test_every_base_is_used_and_so_is_what_it_holds(base: Path) -> None:
    """A base's options of methods are left out for those that have no such option; at least one has it."""
    methods = {path.parent.name for path in FILES if base in bases_of(path)}
    assert methods
    for name in yaml.safe_load(base.read_text()).get("method", {}):
        assert any(option.startswith(f"method.{name}") for method in methods for option in options_of(method)), name


def bases_of(path: Path) -> list[Path]:
    """All files below a recipe."""
    default = f"_{path.stem.partition('_')[0]}" if path in FILES else None
    named = yaml.safe_load(path.read_text()).get("base", default)
    below = RECIPES / f"{named}.yaml"
    return [below, *bases_of(below)] if named and below.is_file() else []


@pytest.mark.slow
def test_a_recipe_overrides_its_base_and_is_overridden(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text(
        "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 1.0, momentum: 0.9}}"
    )
    (tmp_path / "mine.yaml").write_text("base: below.yaml\noptimizer: {lr: 0.5}\nbatch_size: 8")
    (tmp_path / "more.yaml").write_text("batch_size: 16\nepochs: 3")
    words = ["simclr", f"--recipe={tmp_path / 'mine.yaml'}", f"--config={tmp_path / 'more.yaml'}", "--epochs=4"]
    _, _, resolved = resolve([*words, "--method.backbone=resnet18"], pretrain)
    assert resolved["optimizer"]["class_path"] == "torch.optim.SGD"
    assert (resolved["optimizer"]["init_args"]["lr"], resolved["optimizer"]["init_args"]["momentum"]) == (0.5, 0.9)
    assert (resolved["batch_size"], resolved["epochs"]) == (16, 4.0)


@pytest.mark.slow
def test_a_recipe_may_have_the_recipe_of_another_method_as_base(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: mae/imagenet\nepochs: 1600")
    _, _, resolved = resolve(["mae", f"--recipe={tmp_path / 'mine.yaml'}"], pretrain)
    _, _, base = resolve(["mae", "--recipe=imagenet"], pretrain)
    assert resolved == {**base, "epochs": 1600.0}


def test_options_for_a_list_are_appended() -> None:
    _, _, resolved = resolve(["simclr", "--hooks+", "Plots"], pretrain)
    assert [hook["class_path"] for hook in resolved["hooks"]] == ["sslbook.loggers.OnlineKNN", "sslbook.loggers.Plots"]


@pytest.mark.parametrize("words", [["--help"], ["mae", "--help"], ["byol", "--recipe", "cifar10", "-h"]])
@pytest.mark.slow
def test_help_shows_every_option_once_with_its_value_in_force(words: list[str], capsys) -> None:
    text = printed(capsys, *words)
    resolved = resolve([word for word in words if word not in ("--help", "-h")], pretrain)[2]
    heads = [line.split()[:2] for line in text.splitlines() if line.startswith("  --")]
    names = [name for name, *_ in heads]
    assert len(names) == len(set(names))
    assert names[:3] == ["--optimizer.lr", "--optimizer.weight_decay", "--method.backbone"]
    assert names[3].startswith("--method.")
    assert names[3].endswith(".size")
    assert {"--batch_size", "--epochs", "--data.folder", "--report"} <= set(names)
    shown = dict(head for head in heads if len(head) == 2)
    assert float(shown["--optimizer.lr"]) == resolved["optimizer"]["init_args"]["lr"]
    assert shown["--method.backbone"] == resolved["method"]["init_args"]["backbone"]["class_path"].rpartition(".")[2]
    assert int(shown["--batch_size"]) == resolved["batch_size"]
    assert "required" not in text
    assert "for experts:" in text


def test_help_on_backbones_lists_them_with_their_parameters(capsys) -> None:
    text = printed(capsys, "simclr", "--method.backbone.help")
    row = next(line for line in text.splitlines() if line.split()[:1] == ["resnet50"])
    assert row.split()[1] == "23.5"
    assert "vit_small" in text
    assert "timm/NAME" in text


def test_print_config_is_accepted_back(capsys, tmp_path: Path) -> None:
    text = printed(capsys, "mae", "--epochs", "3", "--print_config")
    (tmp_path / "mine.yaml").write_text(text)
    _, _, resolved = resolve([f"--config={tmp_path / 'mine.yaml'}"], pretrain)
    assert resolved == resolve(["mae", "--epochs", "3"], pretrain)[2]


def test_the_list_of_commands_says_what_each_is_for() -> None:
    script = "import sys; sys.argv = ['sslbook']; from sslbook.__main__ import main; main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    for command in ("train", "evaluate", "extract", "compare", "tools"):
        assert f"  {command} " in done.stdout
    assert "torch" not in done.stdout.split()


class Pinned(torch.nn.Module):
    """A backbone outside the package."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.dim, self.width = 3, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3))


def test_a_backbone_outside_the_package() -> None:
    words = ["simclr", "--method.backbone=tests.test_cli.Pinned", "--method.backbone.width=8"]
    parser, config, resolved = resolve(words, pretrain)
    assert resolved["method"]["init_args"]["backbone"] == {
        "class_path": "tests.test_cli.Pinned",
        "init_args": {"width": 8},
    }
    assert parser.construct(config).method.backbone.width == 8


def main(argv: list[str]) -> None:
    """A tool outside the package."""
    print("words", *argv)


def test_a_tool_is_found_by_its_name_or_import_path(capsys) -> None:
    tools.main([])
    assert "  replay " in capsys.readouterr().out
    tools.main(["tests.test_cli", "a", "--b"])
    assert capsys.readouterr().out == "words a --b\n"
    with pytest.raises(UserError, match=r"no tool replya; did you mean replay\?"):
        tools.main(["replya"])
    with pytest.raises(UserError, match="cannot be imported"):
        tools.main(["nowhere.tool"])


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    usual = warnings.formatwarning
    try:
        run(lambda: None)
        assert (
            warnings.formatwarning(UserWarning("left out 2"), UserWarning, "a.py", 3, "code()")
            == "warning: left out 2\n"
        )
        assert "a.py:3" in warnings.formatwarning(FutureWarning("soon"), FutureWarning, "a.py", 3, "code()")
    finally:
        warnings.formatwarning = usual
