"""Recipes, and what a command line of training means.

A run's options are laid one upon the other: a base (`recipes/_shapes.yaml`), the recipe (`recipes/METHOD/shapes.yaml`),
every `--config FILE` in order, and the options of the command line.
"""

import importlib.util
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jsonargparse import Namespace

from sslbook import methods
from sslbook.cli.bounds import check_numbers
from sslbook.cli.help import answer, is_question
from sslbook.cli.parser import Parser, class_named
from sslbook.cli.renamed import RENAMED
from sslbook.cli.slurm import Slurm
from sslbook.cli.values import Values, from_words, merge, read_yaml, split_words, with_classes
from sslbook.data.loader import Data, relocated
from sslbook.errors import UserError, import_attribute, nearest
from sslbook.files import read_json
from sslbook.methods.base import Method

RECIPES = Path(__file__).parents[1] / "recipes"
# Options that say where and how a run is started, not what it is.
NOT_WRITTEN = ("config", "recipe", "resume", "out_dir", "trust", "launcher", "slurm")


def method_class(name: str) -> type[Method]:
    """The class of a method: a name such as `simclr`, or the import path of your own.

    Raises:
        UserError: there is no such method, or it cannot be imported.
    """
    if "." not in name:
        return methods.load(name)
    found = import_attribute(name, "method")
    if not isinstance(found, type) or not issubclass(found, Method):
        raise UserError(f"method {name}: is not a subclass of sslbook.methods.base.Method")
    return found


def recipe_path(method: str, recipe: str) -> Path:
    """The file of a recipe: a name such as `cifar10`, or a path.

    Raises:
        UserError: there is no such recipe.
    """
    if recipe.endswith((".yaml", ".yml")):
        return Path(recipe)
    folder = RECIPES / (method if method in methods.METHODS else "simclr")  # a method of one's own begins with SimCLR's
    path = folder / f"{recipe}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        hint = f"; write {RENAMED[recipe]}" if RENAMED.get(recipe) in names else nearest(recipe, names)
        raise UserError(f"recipe {recipe}: {method} has {', '.join(names)}{hint}")
    return path


def read_recipe(path: Path, accepted: set[str], shared: bool = False) -> Values:
    """A recipe laid upon its base.

    The base is what its key `base` names (`_shapes_masked`, `mae/imagenet`, or a path from the recipe's folder), or else
    `recipes/_NAME.yaml` for the first word of the recipe's name, if there is such a file.

    Args:
        path: the recipe.
        accepted: options of the method.
        shared: other options of the method are left out: a base is for several methods, and SimCLR's recipe is also for
            a method of one's own.

    Raises:
        UserError: a file cannot be read.
    """
    values = read_yaml(path)
    if shared and isinstance(values.get("method"), dict):
        values["method"] = {key: value for key, value in values["method"].items() if key in accepted}
    default = RECIPES / f"_{path.stem.partition('_')[0]}.yaml"
    base = values.pop("base", default.stem if path.parent.parent == RECIPES and default.is_file() else None)
    if base is None:
        return values
    named = RECIPES / f"{base}.yaml"
    return merge(read_recipe(named if named.is_file() else path.parent / base, accepted, shared=True), values)


@cache
def train_parser(method: type[Method], engine: Callable, prog: str) -> Parser:
    """The parser of `python -m sslbook.train METHOD`."""
    parser = Parser(prog=prog, usage=f"{prog} [--recipe NAME] [--config FILE ...] [--OPTION VALUE ...]")
    parser.add_argument("--recipe", type=str, help="shapes, folder, cifar10, imagenet, or a file")
    parser.add_argument("--config", type=str, help="a YAML file with options; may be given several times")
    parser.add_class_arguments(method, "method")
    parser.add_class_arguments(Data, "data", skip={"train", "test"})
    parser.add_function_arguments(engine, skip={"method", "data", "config"})
    parser.add_argument(
        "--report",
        type=Literal["quick", "full", "none"],
        default="quick",
        help="what is measured and plotted at the end; full also trains a supervised control, as long as the run took",
    )
    parser.add_argument(
        "--protocols",
        type=list[str] | None,
        help="what the report measures: names such as knn, or import paths; by default what suits the data",
    )
    parser.add_argument(
        "--trust",
        type=bool,
        default=False,
        help="let the config.yaml of a resumed run import code from outside sslbook, such as a method of your own",
    )
    parser.add_argument(
        "--launcher", type=Literal["slurm"] | None, help="submit the run as a job of SLURM, by submitit, instead"
    )
    parser.add_class_arguments(Slurm, "slurm")
    return parser


OWN_CODE = ("sslbook.", "torch.nn.", "torch.optim.")


def require_own_code(config: Path, named: str = "") -> None:
    """Refuse a run's configuration that names code outside the package: whoever gave you the run could run anything.

    Args:
        config: the file.
        named: text with the import paths that the user has given himself.

    Raises:
        UserError: it names code outside the package, torch's layers and optimizers.
    """
    if foreign := foreign_code(read_yaml(config), named):
        raise UserError(f"{config}: names {foreign[0]}, code outside sslbook; if you know it, give --trust true")


def foreign_code(values: Any, named: str = "") -> list[str]:
    """The import paths in values that lead out of the package and do not stand in the text `named`."""
    known = set(re.findall(r"[\w.]+", named))
    return [path for path in _import_paths(values) if not path.startswith(OWN_CODE) and path not in known]


def _import_paths(values: Any) -> Iterator[str]:
    """All texts that name something in a module that is there."""
    if isinstance(values, dict | list):
        for value in [*values.values(), *values] if isinstance(values, dict) else values:
            yield from _import_paths(value)
    elif isinstance(values, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", values):
        top = values.partition(".")[0]
        if top in sys.modules or importlib.util.find_spec(top) is not None:  # which imports nothing
            yield values


def resolve(argv: list[str], engine: Callable) -> tuple[Parser, Namespace, Values]:
    """What a command line of training means.

    Args:
        argv: the words after `python -m sslbook.train`.
        engine: the function whose parameters are the options besides those of method and data.

    Returns:
        The parser, the parsed options, and the resolved configuration as plain values: what is written to the run's
        folder, and what `--config` accepts back.

    Raises:
        UserError: an option, a file or a value that does not exist or does not suit.
        SystemExit: after `--help`, `--print_config` or `--method.backbone.help`.
    """
    name = argv[0] if argv and not argv[0].startswith("-") else None
    pairs = split_words(argv if name is None else argv[1:])
    given = {key: value for key, value in pairs}
    if "resume" in given:
        pairs = [(key, "auto" if key == "resume" and value is None else value) for key, value in pairs]
    files = [value for key, value in pairs if key == "config" and value]
    resumed = _config_of_run(given["resume"] or "auto", given.get("out_dir")) if "resume" in given else None
    layers = [_read_layer(path) for path in ([resumed] if resumed else []) + files]
    if resumed:
        if given.get("trust") not in ("true", "True"):
            named = [*argv, *(path for file in files for path in _import_paths(read_yaml(file)))]
            require_own_code(resumed, " ".join(named))
        layers[0].values.pop("init_from", None)  # the run has begun from them already
        if isinstance(data := layers[0].values.get("data"), dict):
            layers[0].values["data"] = relocated(data, _began_in(resumed.parent))
    name = name or next((layer.method for layer in reversed(layers) if layer.method), "simclr")
    name = next((short for short, path in methods.METHODS.items() if path == name), name)
    method = method_class(name)
    parser = train_parser(method, engine, f"python -m sslbook.train {name}")

    if "recipe" in given or not (resumed or ("resume" in given and layers)):
        in_files = [data for layer in layers if isinstance(data := layer.values.get("data"), dict)]
        keys = ("folder", "list")
        folder = any(given.get(f"data.{key}") or any(data.get(key) for data in in_files) for key in keys)
        path = recipe_path(name, given.get("recipe") or ("folder" if folder else "shapes"))
        accepted = {option.split(".")[1] for option in parser.options if option.startswith("method.")}
        layers.insert(0, _read_layer(path, read_recipe(path, accepted, shared="." in name)))
    values: Values = {}
    for source, named, layer in layers:
        if named and not issubclass(method, method_class(named)):
            raise UserError(
                f"{source}: sets options of the method {named.rpartition('.')[2]}; leave out {name}, or this file"
            )
        if layer.get("method") == {}:
            layer.pop("method")  # a method of one's own may have no options
        layer = with_classes(layer, parser)
        parser.refuse_unknown(layer, source)
        values = merge(values, layer)
    question = next((pair for pair in pairs if is_question(pair[0])), None)
    pairs = [pair for pair in pairs if pair[0] not in ("config", "recipe") and not is_question(pair[0])]
    values = _with_channels(from_words(pairs, values, parser))
    config = parser.parse(values)

    plain = parser.plain(config)
    check_numbers(plain["slurm"], Slurm, prefix="slurm.")
    resolved = {key: value for key, value in plain.items() if key not in NOT_WRITTEN}
    path = f"{method.__module__}.{method.__qualname__}"
    resolved = {"method": {"class_path": path, "init_args": resolved.pop("method", {})}, **resolved}
    check_numbers(resolved, engine)
    if question:
        answer(*question, parser=parser, resolved=resolved, description=_overview(name, method, source))
    return parser, config, resolved


def _with_channels(values: Values) -> Values:
    """`data.channels` is also what the backbone takes, where it has the option and nothing else was said."""
    channels = (values.get("data") or {}).get("channels")
    spec = (values.get("method") or {}).get("backbone")
    if channels in (None, "null") or not isinstance(spec, dict) or "class_path" not in spec:
        return values
    kind = class_named(str(spec["class_path"]))
    given = spec.get("init_args") or {}
    if kind is None or "in_channels" not in inspect.signature(kind).parameters or "in_channels" in given:
        return values
    return merge(values, {"method": {"backbone": {"init_args": {"in_channels": channels}}}})


class Layer(NamedTuple):
    """Options in a file, with the import path of the method it names, if it names one."""

    source: str
    method: str | None
    values: Values


def _read_layer(path: str | Path, values: Values | None = None) -> Layer:
    """A file whose method's options stand directly below `method`, where the command line has them."""
    values = read_yaml(path) if values is None else values
    values.pop("recipe", None)
    method = values.get("method")
    if not isinstance(method, dict) or "class_path" not in method:
        return Layer(str(path), None, values)
    return Layer(str(path), str(method["class_path"]), {**values, "method": method.get("init_args") or {}})


def _config_of_run(resume: str, out_dir: str | None) -> Path | None:
    path = Path(out_dir) if resume == "auto" and out_dir else Path(resume)
    if resume != "auto" and not path.exists():
        raise UserError(f"--resume {resume}: no such run folder or checkpoint")
    written = (path if path.is_dir() else path.parent) / "config.yaml"
    return written if written.is_file() else None


def _began_in(folder: Path) -> str:
    """The working folder in which a run began, if its description says so."""
    try:
        return read_json(folder / "initial.json", {"cwd": str})["cwd"]
    except UserError:
        return ""


def _overview(name: str, method: type[Method], recipe: str) -> str:
    """The first lines of the help: what the method does, which recipes there are, examples."""
    doc = " ".join((inspect.getdoc(sys.modules[method.__module__]) or "").split("\n\n")[0].split())
    recipes = ", ".join(sorted(path.stem for path in (RECIPES / name).glob("*.yaml"))) or "none of its own"
    return f"""{doc}
Recipes: {recipes} (without --recipe: shapes, or folder with --data.folder).
{textwrap.fill(f"Methods: {', '.join(methods.METHODS)}, or the import path of your own.", 118)}

Examples:
  python -m sslbook.train                                              SimCLR on Shapes, two minutes on a CPU
  python -m sslbook.train simclr --data.folder PHOTOS --epochs 50      your own images
  python -m sslbook.train byol --recipe cifar10 --data.root data       a data set of torchvision
  torchrun --nproc-per-node 8 -m sslbook.train moco --recipe imagenet --data.root data
  python -m sslbook.train --resume runs/simclr-shapes                  go on with a run

Values below are those in force under {Path(recipe).name}; they change with --recipe, --config and every option given."""
