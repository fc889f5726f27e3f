"""How good a backbone is, by evaluation protocols, beside its controls.

python -m sslbook.evaluate runs/simclr-shapes
python -m sslbook.evaluate runs/simclr-shapes --protocols knn linear --out result.json
python -m sslbook.evaluate runs/mae-photos/backbone.safetensors --data.folder PHOTOS
python -m sslbook.evaluate timm:vit_small_patch16_224.dino --data.name imagenet
python -m sslbook.evaluate moco_v2_800ep_pretrain.pth.tar --backbone resnet50 --data.name imagenet
python -m sslbook.evaluate knn runs/simclr-shapes --k 200 --temperature 0.1
python -m sslbook.evaluate finetune runs/mae-photos --recipe mae_vit_b --data.folder PHOTOS

A protocol that is named before the run has its options on the command line; `evaluate PROTOCOL --help` lists them.
"""

import copy
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sslbook import checkpoint, distributed, results
from sslbook.cli.recipes import foreign_code
from sslbook.data.loader import Data, relocated
from sslbook.data.views import View
from sslbook.errors import UserError, at_least_one, explained, nearest
from sslbook.evaluation.base import (
    DEFAULT,
    SUMMARY,
    Protocol,
    Representation,
    available,
    chosen,
    find,
    format_tables,
    measure,
)
from sslbook.evaluation.controls import pixels
from sslbook.evaluation.features import center_view
from sslbook.files import read_json
from sslbook.nn.backbones import build
from sslbook.weights.backbone import is_ours, load_backbone
from sslbook.weights.models import is_named, open_named

RECIPES = Path(__file__).parent / "recipes" / "protocols"


def evaluate(
    run: str,
    data: Data,
    protocols: list[Protocol] | None = None,
    controls: bool = True,
    resize: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: str | None = None,
    backbone: nn.Module | None = None,
    out: str | None = None,
    keep: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a trained backbone on labeled images.

    RUN is a run folder, an exported backbone.safetensors or a checkpoint. Without --data.folder, list, name or shapes
    the images are those that the run learned from.

    Args:
        run: run folder, exported backbone or checkpoint; `timm:NAME` or `torchvision:NAME`; or weights of another library
            with their `--backbone`. `--run` may be left out if it comes first.
        data: labeled images.
        protocols: names such as knn and linear, import paths of your own, or classes with their options; by default kNN,
            linear probe, and the factors of the Shapes data set. `evaluate PROTOCOL RUN` takes the options of one.
        controls: also measure pixels and random weights.
        resize: the image's shorter side before the center is cropped; by default 8/7 of the view, below 128 pixels all.
        batch_size: images at a time.
        seed: of what protocols sample, and of the random weights where the run did not keep those it began with.
        device: cpu, cuda, cuda:1; a GPU if there is one.
        backbone: the module to fill, for backbones that are not from sslbook.nn.
        out: a new JSON file for the result, with its origin (command, commit, versions, hardware, date); plots are
            written beside it.
        keep: a folder for the runs of protocols that train, which go on there after a stop; by default nothing is kept.
        progress: show progress bars.

    Returns:
        What `out` holds as values: metrics by row, and tables of their own under the name of their protocol.

    Raises:
        UserError: something the caller can mend.
    """
    target = None if out is None else _new_file(out)
    at_least_one(batch_size=batch_size)
    where = choose_device(device)
    main = distributed.is_main()
    module, facts = load_backbone(run, backbone)
    view = view_of(facts, resize)
    if not protocols:  # where the data allow none, the first says what is missing
        protocols = chosen(None, module, data) or chosen(DEFAULT[:1], module, data)
    protocols = [find(given)() if isinstance(given, str) else given for given in protocols]
    uses_data = any(protocol.uses_data for protocol in protocols)
    if uses_data and main:
        print(data.describe())
        tell_unseen(data)
    name = str(facts.get("method", Path(run).name))
    backbones = {name: module}
    if controls and (start := _start(run, facts, seed, backbone)) is not None:
        backbones["random weights"] = start
    options: dict[str, Any] = {"device": where, "batch_size": batch_size, "progress": progress and main, "seed": seed}
    models = {
        row: Representation(network, data, view, folder=None if keep is None else Path(keep) / row, **options)
        for row, network in backbones.items()
    }
    if controls and uses_data:  # between the two
        start = models.pop("random weights", None)
        models["pixels"] = pixels(data, view, **options)
        models |= {} if start is None else {"random weights": start}
    with quiet_about_skipped():
        tables = measure(models, protocols, None if target is None or not main else partial(_draw, target))
    values = {**tables.get(SUMMARY, {}), **{table: rows for table, rows in tables.items() if table != SUMMARY}}
    if not main:
        return values
    print(f"\n{format_tables(tables, protocols, data)}")
    tell_skipped(data)
    if target is not None:
        settings = {
            "run": run,
            "data": data.describe() if uses_data else None,
            "view": {"size": view.size, "resize": view.resize, "mean": list(view.mean), "std": list(view.std)},
            "protocols": {p.name: _plain(vars(p)) for p in protocols},
            "details": {row: _plain(model.details) for row, model in models.items() if model.details},
        }
        results.save(target.stem, values, seeds=[seed], settings=settings, to=target.parent)
        print(f"\nwritten to {target}")
    return values


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """What a result file can hold of an object's values."""
    return json.loads(json.dumps({key: value for key, value in values.items() if key[0] != "_"}, default=str))


def _draw(target: Path, name: str, figure: Any) -> None:
    path = target.with_name(f"{target.stem}-{name}.png")
    checkpoint.write_atomically(
        path, lambda part: figure.savefig(part, format="png", dpi=144, facecolor="white", bbox_inches="tight")
    )
    print(f"written to {path}")


def _start(run: str, facts: dict[str, Any], seed: int, backbone: nn.Module | None) -> nn.Module | None:
    """The backbone before training: as the run kept it, else one with fresh weights, else none."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    if (kept := folder / "initial.safetensors").is_file():
        module, own = load_backbone(kept, copy.deepcopy(backbone))
        if own.get("backbone") == facts.get("backbone"):
            return module
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(facts.get("backbone", {}))
    except UserError:  # a backbone from elsewhere, whose initial weights nobody knows
        return open_named(run, pretrained=False)[0] if is_named(run) else None


# -- what extraction shares --------------------------------------------------------------------------------------------


def choose_device(device: str | None) -> torch.device:
    """The device of that name; by default a GPU if there is one. UserError if it cannot be used."""
    if device is None or "RANK" in os.environ:
        return distributed.setup(device)
    with explained(f"--device {device}", RuntimeError, AssertionError):
        named = torch.device(device)
        torch.empty(0, device=named)
    return named


def view_of(facts: dict[str, Any], resize: int | None) -> View:
    """The view that suits an exported backbone; UserError if its description does not say."""
    at_least_one(resize=1 if resize is None else resize)
    kinds, cure = (KeyError, TypeError, ValueError), "export it again"
    with explained("the backbone's description does not say its view with size, mean and std", *kinds, cure=cure):
        view = facts["view"]
        mean, std = (tuple(float(value) for value in view[key]) for key in ("mean", "std"))
        made = center_view(int(view["size"]), mean, std, resize=resize or view.get("resize"))
        return replace(made, interpolation=view.get("interpolation", "bilinear"))


def own_data(run: str) -> tuple[str, dict[str, Any]]:
    """The file that says which images a run learned from, and the options of data that choose them.

    Raises:
        UserError: the run is not there, does not say, or learned from a class of one's own: a description is data, and
            must not choose what code is run.
    """
    path = Path(run)
    description = (path / "backbone.json") if path.is_dir() else path.with_suffix(".json")
    if is_named(run) or (path.is_file() and not is_ours(path)):
        raise UserError(f"{run}: which images? Give --data.folder or --data.name")
    if not path.exists():
        raise UserError(f"{path}: no such run folder, exported backbone or checkpoint")
    if description.is_file():
        facts = read_json(description, checkpoint.DESCRIPTION)
    else:
        description = checkpoint.find(path)
        facts = checkpoint.load(description, "description")["description"]
    data = facts.get("data")
    options = data.get("init_args", data) if isinstance(data, dict) else None
    if not isinstance(options, dict) or not options:
        raise UserError(f"{run}: does not say which images it learned from; give --data.folder or --data.name")
    name = str(options.get("name", ""))
    if foreign := [*([name] if "." in name else []), *foreign_code(options)]:
        raise UserError(f"{run}: learned from {foreign[0]}, a class of your own; give it again as --data.name")
    return str(description), {"data": relocated(options, str(facts.get("cwd", "")))}


def protocols_as_classes(argv: list[str]) -> list[str]:
    """The words of a command, with protocols given by name, `--protocols knn linear`, written as a list of classes."""
    if "--protocols" not in argv:
        return argv
    first = argv.index("--protocols")
    last = next((i for i in range(first + 1, len(argv)) if argv[i].startswith("-")), len(argv))
    if any("{" in word for word in argv[first + 1 : last]):
        return argv
    names = [w for word in argv[first + 1 : last] for w in word.strip("[]").replace(",", " ").split()]
    classes = [f"{found.__module__}.{found.__qualname__}" for found in map(find, names)]
    return [*argv[:first], f"--protocols={json.dumps(classes)}", *argv[last:]]


def with_recipe(protocol: type[Protocol], words: list[str]) -> list[str]:
    """The words of a command, with `--recipe NAME` written as the `--config` of a published setting's file.

    Raises:
        UserError: the protocol has no setting of that name.
    """
    out: list[str] = []
    names = iter(words)
    for word in names:
        option, has_value, value = word.partition("=")
        if option != "--recipe":
            out.append(word)
            continue
        name = value if has_value else next(names, "")
        folder = RECIPES / protocol.name
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        if name not in known:
            raise UserError(f"recipe {name}: {protocol.name} has {', '.join(known) or 'none'}{nearest(name, known)}")
        out.append(f"--config={folder / name}.yaml")
    return out


@contextmanager
def quiet_about_skipped() -> Iterator[None]:
    """Without the warning at the first unreadable image: `tell_skipped` names them all at the end."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="skipped the unreadable image")
        yield


def tell_unseen(data: Data) -> None:
    """Name, on standard error, the classes of test images that have no training image."""
    train, test = (data.labels(split).unique().tolist() if data.num_test else [] for split in ("train", "test"))
    if other := [data.class_names[i] for i in test if i >= 0 and i not in train]:
        shown = ", ".join(other[:3]) + (f", ... ({len(other)})" if len(other) > 3 else "")
        print(f"classes of test images without a training image: {shown}", file=sys.stderr)


def tell_skipped(data: Data, most: int = 20) -> None:
    """Name the images that could not be read, on standard error."""
    for name, reason in list(data.unreadable.items())[:most]:
        text = f"skipped {name} ({reason})"
        print(text.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    if data.skipped > most:
        print(f"skipped {data.skipped - most} more", file=sys.stderr)


def require_writable(target: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a file that cannot be written, before the work and not after it.

    Raises:
        UserError: its name ends in something else than `suffixes`, or it cannot be written.
    """
    if target.suffix not in suffixes:
        raise UserError(f"--out {target}: end its name in {' or '.join(suffixes)}")
    with explained(f"--out {str(target)[:200]}: cannot be made", OSError, cure="choose another place"):
        target.parent.mkdir(parents=True, exist_ok=True)
        forbidden = not os.access(target.parent, os.W_OK) or target.is_dir()
    if forbidden:
        raise UserError(f"--out {target}: cannot be written there; choose another place")


def _new_file(out: str) -> Path:
    target = Path(out).expanduser()
    require_writable(target, (".json",))
    if target.exists():
        raise UserError(f"--out {out}: exists already; choose another name, nothing is overwritten")
    return target


def main() -> None:
    """`python -m sslbook.evaluate RUN`; what the user can mend is said in one line."""
    from sslbook.cli.common import cli

    words = sys.argv[1:]
    protocol = None
    first, second = [*words, "-", "-"][:2]
    if first.lower() in available() or not (second.startswith("-") or Path(first).exists()):
        protocol = find(words.pop(0))
    for word in words:
        if protocol is None and word.split("=")[0] in ("--k", "--temperature"):
            raise UserError(
                f"{word.split('=')[0]} is an option of a protocol: python -m sslbook.evaluate knn RUN {word} ..."
            )
    if protocol is not None:
        words = with_recipe(protocol, words)
        about = f"python -m sslbook.evaluate {protocol.name} RUN"
        own = own_data if protocol.uses_data else None
        cli(evaluate, words, prog=about, own_data=own, protocol=protocol)
    else:
        cli(evaluate, protocols_as_classes(words), prog="python -m sslbook.evaluate RUN", own_data=own_data)


if __name__ == "__main__":
    from sslbook.cli.common import run as run_command

    run_command(main)
