"""From the command line to constructor calls.

The constructors are the configuration: their signatures are the options, their docstrings the help. A run is set up from
a recipe (`recipes/<method>/<recipe>.yaml`), then every `--config FILE` in order, then the options given by hand.
"""

import difflib
import importlib
import inspect
import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from sslbook.data.loader import Data
from sslbook.errors import UserError, nearest

RECIPES = Path(__file__).parent / "recipes"
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")  # the last are those that a constructor takes as **kwargs


# -- a parser that answers in one line ---------------------------------------------------------------------------------


class Parser(ArgumentParser):
    """A jsonargparse parser whose errors are one line with the nearest right name, and whose help fits a screen."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("exit_on_error", False)
        kwargs.setdefault("allow_abbrev", False)  # --recip would be taken for --recipe here and passed over elsewhere
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> None:  # pyrefly: ignore
        raise UserError(self._one_line(message))

    def parse(self, argv: list[str]) -> Namespace:
        """Parse, or raise `UserError`."""
        try:
            return self.parse_args(argv)
        except ArgumentError as error:
            raise UserError(self._one_line(str(error))) from None

    def construct(self, config: Namespace) -> Namespace:
        """Call the constructors that the parsed configuration names."""
        try:
            return self.instantiate(config)
        except UserError:
            raise
        except ValueError as error:  # what a constructor in a list, or one that may be null, has raised
            if not str(error).startswith("Does not validate"):
                raise
            raise UserError(self._one_line(str(error))) from error

    def check_groups(self, values: dict[str, Any]) -> None:
        """Refuse something else than a mapping where a group of options stands, such as `data: PHOTOS`."""
        for option in self._option_string_actions:
            place: Any = values
            path = option.removeprefix("--").split(".")
            for depth, name in enumerate(path[:-1] if path[-1] != "help" else (), start=1):
                place = place.get(name, {})
                if not isinstance(place, dict):
                    raise UserError(f"{'.'.join(path[:depth])}: holds options, such as {path[depth]}, and not {place}")

    def plain(self, config: Namespace) -> dict[str, Any]:
        """The parsed options as plain values, nulls included: a default may be something else."""
        return yaml.safe_load(self.dump(config, skip_validation=True, skip_unset=False))

    def format_help(self) -> str:  # pyrefly: ignore
        text = super().format_help()
        own = "resnet18, resnet50, vit_tiny, vit_base, ... of sslbook.nn; timm/NAME; or the import path of a module)"
        text = re.sub(
            r"type:\s+(?:<class\s+'Module'>|Module\s+\|\s+null,\s+default:\s+null),\s+known\s+subclasses:[^)]*\)",
            lambda _: ("\n" + " " * 24).join(_wrap(own, 55)),
            text,
        )
        return re.sub(r",\s+known\s+subclasses:\s+([^)]*)\)", _short_names, text)

    def _one_line(self, message: str) -> str:
        options = [name for name in self._option_string_actions if name.startswith("--")]
        if found := re.search(r"unrecognized arguments: (.*)", message, re.S):
            word = next((w for w in shlex.split(found[1]) if w.startswith("-")), None)
            if word is None:
                return f"unexpected {found[1].strip()}: but for the first word all are --OPTION VALUE"
            return f"unknown option {word}{_nearest_option(word.split('=')[0], options)}"
        if found := re.search(r"Option '(\w+)' is not accepted", message):
            owner = re.search(r"class_path[= ]*'([\w.]+)'", message)
            places = re.findall(r'Parser key "([\w.]+)"', message)
            place = [name for name in places if name != "config"][-1:]
            if not owner and not place:
                return f"unknown key {found[1]}{_nearest_option('--' + found[1], options).replace('--', '')}"
            words = _parameters(owner[1]) if owner else []
            where = f"{place[0]}: " if place else ""
            who = f" of {owner[1]}" if owner else ""
            return f"{where}unknown option {found[1]!r}{who}{nearest(found[1], words)}"
        if found := re.search(r"Group '([\w.]*)' does not accept option '([\w.]+)'", message):
            group = f"--{found[1]}." if found[1] else "--"
            return f"unknown key {group[2:]}{found[2]}{_nearest_option(group + found[2], options).replace('--', '')}"
        if found := re.search(r"does not accept (?:nested )?key '?\"?([\w.]+)", message):
            return f"unknown key {found[1]}{_nearest_option('--' + found[1], options).replace('--', '')}"
        message = re.sub(r"<class '([\w.]+)'>", lambda m: m[1].split(".")[-1], message)
        message = re.sub(r'Parser key "([\w.]+)":\s*', r"--\1: ", message)
        message = " ".join(message.split())
        message = re.sub(r"Does not validate against any of the Union subtypes Subtypes: .*? Errors: - ", "", message)
        message = re.sub(r" - Expected a NoneType( Given value type: \w+)? Given value: ", ". Got value: ", message)
        message = re.sub(r"Expected a dot import path string: (\w+)(\. Got value: .*)?$", _no_class, message)
        return message.replace("Literal[", "one of [").replace("typing.", "")[:400]


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width)


def _short_names(found: re.Match) -> str:
    names = [path.strip().split(".")[-1] for path in found[1].replace("\n", " ").split(",")]
    return ", one of: " + ", ".join(n for n in names if n not in ("Schedule", "Optimizer", "Hook")) + ")"


def _no_class(found: re.Match) -> str:
    """There is no such class, and which one may be meant: an optimizer, a schedule or a hook."""
    from torch.optim import Optimizer

    from sslbook.engine.hooks import Hook
    from sslbook.schedules import Schedule

    kinds: list[type] = [Optimizer, Schedule, Hook]
    for kind in kinds:  # which grows: AdamW is an Adam
        kinds += kind.__subclasses__()
    names = [kind.__name__ for kind in kinds[3:]]
    return f"there is no {found[1]}{nearest(found[1], names)} (a name, or the import path of your own)"


def _nearest_option(word: str, options: list[str]) -> str:
    tail = word.lstrip("-").split(".")[-1]
    same_tail = [o for o in options if o.split(".")[-1].lstrip("-") == tail]
    found = difflib.get_close_matches(word, same_tail or options, n=1, cutoff=0.0 if same_tail else 0.5)
    if not found:
        tails = {o.split(".")[-1].lstrip("-"): o for o in options}
        found = [tails[t] for t in difflib.get_close_matches(tail, list(tails), n=1, cutoff=0.5)]
    return f"; did you mean {found[0]}?" if found else ""


def _parameters(path: str) -> list[str]:
    try:
        module, _, name = path.rpartition(".")
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError):
        return []


def run(main: Callable[[], object]) -> None:
    """Call a command's main function; what the user can mend becomes one line and status 2."""
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


def cli(function: Callable, argv: list[str] | None = None, *, prog: str) -> object:
    """Call `function` with what the command line says; its signature and docstring are the options and the help.

    The first word may be the function's first argument without its name: `python -m sslbook.evaluate RUN`.
    """
    parser = Parser(prog=prog, description=(inspect.getdoc(function) or "").split("Args:")[0].strip())
    parser.add_argument("--config", action="config", help="a YAML file with options")
    parser.add_function_arguments(function)
    argv = [str(a) for a in (sys.argv[1:] if argv is None else argv)]
    if argv and not argv[0].startswith("-"):
        argv[0] = f"--{next(iter(inspect.signature(function).parameters))}={argv[0]}"
    values = parser.construct(parser.parse(_expand_names(argv)))
    values.pop("config", None)
    return function(**{key: value for key, value in vars(values).items()})


# -- the command line of training --------------------------------------------------------------------------------------


def method_class(name: str) -> type:
    """The class of a method: a name such as `simclr`, or the import path of your own."""
    from sslbook import methods
    from sslbook.methods.base import Method

    if "." not in name:
        return methods.load(name)
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"method {name}: cannot be imported ({error})") from None
    if not isinstance(found, type) or not issubclass(found, Method):
        raise UserError(f"method {name}: is not a subclass of sslbook.methods.base.Method")
    return found


def recipe_path(method: str, recipe: str) -> Path:
    """The file of a recipe: a name such as `cifar10`, or a path."""
    if recipe.endswith((".yaml", ".yml")):
        if not Path(recipe).is_file():
            raise UserError(f"recipe {recipe}: no such file")
        return Path(recipe)
    folder = RECIPES / (method if (RECIPES / method).is_dir() else "simclr")
    path = folder / f"{recipe}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise UserError(f"recipe {recipe}: {method} has {', '.join(names)}{nearest(recipe, names)}")
    return path


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A configuration file as a dictionary, its method flattened to the method's own options."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a configuration is a mapping of options")
    return values


def merge(base: dict, over: dict) -> dict:
    """`over` laid upon `base`, mapping by mapping; a change of `class_path` drops the old arguments."""
    if "class_path" in over and over["class_path"] != base.get("class_path"):
        return over
    if "class_path" in base and (astray := [str(key) for key in over if key not in CLASS_KEYS]):
        raise UserError(f"{', '.join(astray)}: options of {base['class_path']} stand below init_args")
    out = dict(base)
    for key, value in over.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def _expand_names(argv: list[str]) -> list[str]:
    """Short names of backbones, spelled out: `resnet18`, `timm/convnext_tiny`."""
    out: list[str] = []
    for i, word in enumerate(argv):
        key, has_value, value = word.partition("=")
        if has_value and key.startswith("--") and key.endswith("backbone"):
            out.append(f"{key}={_backbone(value)}")
        elif i and argv[i - 1].startswith("--") and argv[i - 1].endswith("backbone"):
            out.append(_backbone(word))
        else:
            out.append(word)
    return out


def _backbone(name: str) -> str:
    from sslbook import nn

    if name.startswith(("timm/", "timm:")):
        return json.dumps({"class_path": "sslbook.nn.timm_model", "init_args": {"name": name[5:]}})
    if "." in name or "{" in name or "/" in name:
        return name
    if not hasattr(nn, name):
        known = [
            n for n in dir(nn) if n.startswith(("resnet", "wide_", "vit_")) or n in ("ResNet", "VisionTransformer")
        ]
        raise UserError(f"unknown backbone {name}{nearest(name, known)}; known: {', '.join(known)}, timm/NAME")
    return f"sslbook.nn.{name}"


def _take(argv: list[str], flag: str, bare: str | None = None) -> tuple[list[str], list[str]]:
    """All values of an option, and the command line without it; `bare` stands for the option without a value."""
    values, rest, i = [], [], 0
    while i < len(argv):
        word = argv[i]
        if word == flag:
            follows = i + 1 < len(argv) and not argv[i + 1].startswith("--")
            if follows:
                values.append(argv[i + 1])
                i += 1
            elif bare is not None:
                values.append(bare)
            else:
                raise UserError(f"{flag}: expects a value")
        elif word.startswith(flag + "="):
            values.append(word.partition("=")[2])
        else:
            rest.append(word)
        i += 1
    return values, rest


def train_parser(method: type, engine: Callable, prog: str, description: str) -> Parser:
    """The parser of `python -m sslbook.train METHOD`."""
    usage = f"{prog} [--recipe NAME] [--config FILE ...] [--OPTION VALUE ...]"
    parser = Parser(prog=prog, description=description, usage=usage)
    parser.add_argument("--config", action="config", help="a YAML file with options; may be given several times")
    parser.add_argument(
        "--recipe", type=str, help="shapes, folder, cifar10, imagenet, or a file; the options to begin with"
    )
    parser.add_class_arguments(method, "method")
    parser.add_class_arguments(Data, "data")
    parser.add_function_arguments(engine, skip={"method", "data", "config"})
    parser.add_argument(
        "--report",
        type=Literal["quick", "full", "none"],
        default="quick",
        help="what is measured and plotted at the end; full also trains the supervised control",
    )
    return parser


def resolve(argv: list[str], engine: Callable) -> tuple[Parser, Namespace, dict[str, Any]]:
    """What a command line of training means.

    Returns:
        The parser, the parsed options, and the resolved configuration as plain values: what is written to the run's
        folder, and what `--config` accepts back.
    """
    argv = list(argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if any(word in ("-h", "--help") for word in argv):
        method = method_class(name or "simclr")
        prog = f"python -m sslbook.train {name or '[METHOD]'}"
        train_parser(method, engine, prog, _overview(name, method)).print_help()
        sys.exit(0)
    config_files, argv = _take(argv, "--config")
    recipes, argv = _take(argv, "--recipe")
    resumes, argv = _take(argv, "--resume", bare="auto")
    folders, _ = _take(argv, "--data.folder")
    outs, _ = _take(argv, "--out_dir")

    files = list(config_files)
    written = _config_of_run(resumes[-1], outs) if resumes else None
    if written is not None:
        files.insert(0, str(written))
    layers = [read_yaml(path) for path in files]
    if written is not None:
        layers[0].pop("init_from", None)  # the run has begun from them already
    for path, layer in zip(files, layers):
        name = _own_method(path, layer, name)
    if name and name.startswith("sslbook.methods."):
        name = name.split(".")[2]
    name = name or "simclr"
    method = method_class(name)
    merged: dict[str, Any] = {}
    if recipes or not (resumes and layers):
        of_files = any(isinstance(data := layer.get("data"), dict) and data.get("folder") for layer in layers)
        recipe = recipes[-1] if recipes else ("folder" if folders or of_files else "shapes")
        path = recipe_path(name, recipe)
        merged = read_yaml(path)
        _own_method(str(path), merged, name)
        if "." in name:
            accepted = inspect.signature(method).parameters
            merged["method"] = {k: v for k, v in merged.get("method", {}).items() if k in accepted}
    for layer in layers:
        merged = merge(merged, layer)
    merged.pop("recipe", None)
    argv = _expand_names(argv)
    _drop_replaced(merged, argv)

    parser = train_parser(method, engine, f"python -m sslbook.train {name}", "")
    parser.check_groups(merged)
    if isinstance(backbone := merged.get("method", {}).get("backbone"), str):
        merged["method"]["backbone"] = yaml.safe_load(_backbone(backbone))
    resume = [f"--resume={resumes[-1]}"] if resumes else []
    config = parser.parse([f"--config={json.dumps(merged)}", *argv, *resume])
    resolved = parser.plain(config)
    for key in ("config", "recipe", "resume", "out_dir"):
        resolved.pop(key, None)
    path = f"{method.__module__}.{method.__qualname__}"
    resolved = {"method": {"class_path": path, "init_args": resolved.pop("method", {})}, **resolved}
    _refuse_impossible_numbers("method", resolved["method"])
    for key in ("optimizer", "schedule", "weight_decay_schedule", "epochs", "clip_grad_norm", "layer_decay"):
        _refuse_impossible_numbers("", {key: resolved.get(key)})
    return parser, config, resolved


# What cannot be 0 in any class of ours; other counts can (a queue of none, a decoder without blocks).
POSITIVE = re.compile(
    r"(.+_)?(dim|heads|every|temperature|temperature_start|groups|temperature_end|sharpening|mask_size|mask_grid"
    r"|pool_size|teacher_size|patch_size|image_size|num_targets|num_slices|num_permutations|num_outputs)"
)


def _refuse_impossible_numbers(path: str, values: dict[str, Any]) -> None:
    """No number may be NaN or infinite; counts that a class of ours takes are not below 0, some not 0 either."""
    ours = values.get("class_path", "sslbook.").startswith("sslbook.")
    for key, value in (values.get("init_args", values) or {}).items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict):
            _refuse_impossible_numbers(name, value)
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"--{name} is {number}: give a number")
        if not ours or isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if value <= 0 and path.startswith("method") and POSITIVE.fullmatch(key):
            raise UserError(f"--{name} is {value}: give {'1 or more' if isinstance(value, int) else 'more than 0'}")
        if isinstance(value, int) and value < 0:
            raise UserError(f"--{name} is {value}: give 0 or more")


def _own_method(path: str, layer: dict[str, Any], name: str | None) -> str | None:
    """Flatten a file's method to its options; the name of the method, which may be the file's."""
    own = layer.get("method")
    if not isinstance(own, dict) or "class_path" not in own:
        return name
    layer["method"] = own.get("init_args") or {}
    kind = method_class(str(own["class_path"]))
    if name is not None and not issubclass(method_class(name), kind):
        raise UserError(f"{path}: sets options of the method {kind.__name__}; leave out {name}, or this file")
    return name or own["class_path"]


def _drop_replaced(merged: dict[str, Any], argv: list[str]) -> None:
    """Forget the arguments of a class that the command line replaces: a ResNet-50 must not get a ResNet-18's width."""
    for i, word in enumerate(argv):
        key, has_value, value = word.partition("=")
        if not has_value:
            value = argv[i + 1] if i + 1 < len(argv) else ""
        *path, last = key.removeprefix("--").split(".")
        place: Any = merged
        for name in path:
            place = place.get(name) if isinstance(place, dict) else None
        old = place.get(last) if isinstance(place, dict) else None
        if not (key.startswith("--") and isinstance(place, dict) and isinstance(old, dict) and "class_path" in old):
            continue
        new = re.search(r'"class_path": "([\w.]+)"', value)
        if (new[1] if new else value).split(".")[-1] != old["class_path"].split(".")[-1]:
            place.pop(last)


def _config_of_run(resume: str, outs: list[str]) -> Path | None:
    path = Path(outs[-1]) if resume == "auto" and outs else Path(resume)
    if resume != "auto" and not path.exists():
        raise UserError(f"--resume {resume}: no such run folder or checkpoint")
    written = (path if path.is_dir() else path.parent) / "config.yaml"
    return written if written.is_file() else None


def _overview(name: str | None, method: type) -> str:
    from sslbook import methods

    doc = " ".join((inspect.getdoc(sys.modules[method.__module__]) or "").split("\n\n")[0].split())
    if name:
        recipes = ", ".join(sorted(p.stem for p in (RECIPES / name).glob("*.yaml"))) or "none of its own"
        return (
            f"{doc} -- Recipes: {recipes}; without --recipe it is shapes, or folder when --data.folder is given. "
            f"`python -m sslbook.train {name} --print_config` shows what a recipe sets; the defaults below are the paper's."
        )
    return (
        "Learn features from images without labels. "
        f"METHOD is one of {', '.join(methods.METHODS)}, or the import path of your own; the options below are those of "
        "simclr, and `python -m sslbook.train METHOD --help` shows another's. Examples: `python -m sslbook.train` "
        "(two minutes on a CPU, no data needed); `python -m sslbook.train mae --data.folder PHOTOS --epochs 5`; "
        "`python -m sslbook.train byol --recipe cifar10`; `torchrun --nproc-per-node 8 -m sslbook.train moco "
        "--recipe imagenet --data.root data`; `python -m sslbook.train --resume runs/simclr-shapes`."
    )
