"""How good a backbone is, by the field's protocols, beside its controls.

python -m sslbook.evaluate runs/simclr-shapes
python -m sslbook.evaluate runs/simclr-shapes --protocols knn linear factors --out result.json
python -m sslbook.evaluate runs/mae-photos/backbone.safetensors --data.folder PHOTOS
"""

import copy
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from sslbook import checkpoint
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError, at_least_one
from sslbook.evaluation import factors
from sslbook.evaluation.controls import pixels
from sslbook.evaluation.features import center_view, extract_features
from sslbook.evaluation.table import Row, chance_row, format_factors, format_table, require_labels, score, to_json
from sslbook.nn.backbones import build
from sslbook.weights.backbone import load_backbone

Protocol = Literal["knn", "linear", "factors"]


def evaluate(
    run: str,
    data: Data,
    protocols: list[Protocol] = ["knn", "linear"],  # noqa: B006 (never changed)
    controls: bool = True,
    k: int = 20,
    temperature: float = 0.07,
    resize: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    device: str | None = None,
    backbone: nn.Module | None = None,
    out: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a trained backbone: train on the training images' features, count on the test images.

    RUN is a run folder, an exported backbone.safetensors or a checkpoint. Without any --data option the images are
    those that the run learned from.

    Args:
        run: run folder, exported backbone or checkpoint; `--run` may be left out if it comes first.
        data: labeled images.
        protocols: `knn` (weighted nearest neighbors), `linear` (logistic regression on fixed features), `factors` (one
            linear probe per factor of the Shapes data set).
        controls: also measure pixels and random weights.
        k: how many neighbors kNN asks.
        temperature: of kNN's votes; lower trusts the nearest more.
        resize: the image's shorter side before the center is cut; by default 8/7 of the view, below 128 pixels all.
        batch_size: images at a time.
        seed: key of the linear probe's validation part.
        device: cpu, cuda, cuda:1; a GPU if there is one.
        backbone: the module to fill, for backbones that are not from sslbook.nn.
        out: a new JSON file for the result, with its origin (command, commit, versions, hardware, date).
        progress: show progress bars.

    Returns:
        What `out` holds as values: accuracies in percent by row, and scores per factor.

    Raises:
        UserError: something the caller can mend.
    """
    target = _free(out)
    at_least_one(batch_size=batch_size)
    if not protocols:
        raise UserError("--protocols: name at least one of knn, linear, factors")
    if "factors" in protocols and not data.factors("test"):
        raise UserError("--protocols factors: only the Shapes data set knows its factors; leave it out for other data")
    where = choose_device(device)
    module, facts = load_backbone(run, backbone)
    view = view_of(facts, resize)
    options = {
        "protocols": tuple(protocols),
        "k": k,
        "temperature": temperature,
        "seed": seed,
        "device": where,
        "batch_size": batch_size,
        "progress": progress,
    }
    print(data.describe())
    name = str(facts.get("method", Path(run).name))
    subjects = {name: module}
    if controls and (start := _start(run, facts, seed, backbone)) is not None:
        subjects["random weights"] = start
    with quiet_about_skipped():
        rows, scores = _measure(subjects, data, view, factors_too="factors" in protocols, options=options)
    values: dict[str, Any] = {}
    if set(protocols) & {"knn", "linear"}:
        if controls:
            rows.insert(1, pixels(data, view, **options))
        chance = chance_row(data)
        print(f"\nAccuracy on {data.num_test:,} test images\n{format_table(rows, chance)}")
        values |= {str(row.pop("name")): row for row in to_json(rows, chance)}
    if scores:
        level = factors.chance_levels(data.factors("train"), data.factors("test"))
        print(f"\nWhat the features know of each factor\n{format_factors(scores, level)}")
        values["factors"] = {**scores, "chance": level}
    tell_skipped(data)
    if target is not None:
        _write(target, values, run, data, view, options)
        print(f"\nwritten to {target}")
    return values


def _measure(
    subjects: dict[str, nn.Module], data: Data, view: View, factors_too: bool, options: dict[str, Any]
) -> tuple[list[Row], dict[str, dict[str, float]]]:
    """A row for every backbone, and what it knows of each factor; features are extracted once."""
    require_labels(data)
    given = {key: options[key] for key in ("device", "batch_size", "progress")}
    scoring = {key: value for key, value in options.items() if key not in ("batch_size", "progress")}
    probing = {key: options[key] for key in ("seed", "device", "progress")}
    rows, scores = [], {}
    for name, module in subjects.items():
        train, test = (extract_features(module, data, split, view, **given) for split in ("train", "test"))
        rows.append(score(name, train, test, **scoring))
        if factors_too:
            known = data.factors("train"), data.factors("test")
            scores[name] = factors.probe(train[0], known[0], test[0], known[1], **probing)
    return rows, scores


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
    except UserError:  # a backbone from elsewhere: there is no telling how it begins
        return None


def _write(target: Path, values: dict[str, Any], run: str, data: Data, view: View, options: dict[str, Any]) -> None:
    from sslbook import results

    settings = {
        "run": run,
        "data": data.describe(),
        "view": {"size": view.size, "resize": view.resize, "mean": list(view.mean), "std": list(view.std)},
        **{key: options[key] for key in ("protocols", "k", "temperature", "batch_size")},
    }
    results.save(target.stem, values, seeds=[options["seed"]], settings=settings, to=target.parent)


# -- what extraction shares --------------------------------------------------------------------------------------------


def choose_device(device: str | None) -> torch.device:
    """The device of that name; by default a GPU if there is one."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0][:120]}") from None
    return chosen


def view_of(facts: dict[str, Any], resize: int | None) -> View:
    """The view that suits an exported backbone."""
    try:
        view = facts["view"]
        size, mean, std = int(view["size"]), _colors(view["mean"]), _colors(view["std"])
    except (KeyError, TypeError, ValueError):
        raise UserError("the backbone's description does not say its view (size, mean, std); export it again") from None
    return center_view(size, mean, std, resize=resize)


def _colors(values: Iterable[Any]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue


def own_data(run: str) -> list[str]:
    """Options that choose the images a run learned from."""
    path = Path(run)
    description = (path / "backbone.json") if path.is_dir() else path.with_suffix(".json")
    if not path.exists():
        raise UserError(f"{path}: no such run folder, exported backbone or checkpoint")
    if description.is_file():
        try:
            facts = json.loads(description.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"{description}: not valid JSON") from None
    else:
        facts = checkpoint.load(checkpoint.find(path), "description")["description"]
    data = facts.get("data") if isinstance(facts, dict) else None
    options = data.get("init_args", data) if isinstance(data, dict) else None
    if not options:
        raise UserError(f"{run}: does not say which images it learned from; give --data.folder or --data.name")
    if "." in str(options.get("name", "")):  # a description is data, and must not choose what code is run
        raise UserError(f"{run}: learned from {options['name']}, a class of your own; give it again as --data.name")
    return [f"--data.{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]


def command_line(argv: list[str], lists: tuple[str, ...] = ()) -> list[str]:
    """The words of a command as options: the run first, lists with blanks between, the run's own data by default."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv[0] = f"--run={argv[0]}"
    for flag in lists:
        if flag in argv:
            first = argv.index(flag)
            last = next((i for i in range(first + 1, len(argv)) if argv[i].startswith("-")), len(argv))
            words = [w for word in argv[first + 1 : last] for w in word.strip("[]").replace(",", " ").split()]
            argv[first:last] = [f"{flag}={json.dumps(words)}"]
    run = next((word.partition("=")[2] for word in argv if word.startswith("--run=")), None)
    if run is None and "--run" in argv[:-1]:
        run = argv[argv.index("--run") + 1]
    asks = any(word in ("-h", "--help") for word in argv)
    if run is not None and not asks and not any(word.startswith(("--data", "--config")) for word in argv):
        argv += own_data(run)
    if run is None and not asks and not any(word.startswith("--config") for word in argv):
        raise UserError("which run? Name its folder first, an exported backbone.safetensors, or a checkpoint")
    return argv


@contextmanager
def quiet_about_skipped() -> Iterator[None]:
    """Without the warning at the first unreadable image: `tell_skipped` names them all at the end."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="skipped the unreadable image")
        yield


def tell_skipped(data: Data, most: int = 20) -> None:
    """Name the images that could not be read, on standard error."""
    for name, reason in list(data.unreadable.items())[:most]:
        text = f"skipped {name} ({reason})"
        print(text.encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    if data.skipped > most:
        print(f"skipped {data.skipped - most} more", file=sys.stderr)


def require_writable(target: Path) -> None:
    """Refuse a file that cannot be written, before the work and not after it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {target}: its folder cannot be made ({error.strerror})") from None
    if not os.access(target.parent, os.W_OK) or target.is_dir():
        raise UserError(f"--out {target}: cannot be written there; choose another place")


def _free(out: str | None) -> Path | None:
    """The file to write, refused now and not after the work."""
    if out is None:
        return None
    target = Path(out)
    if target.suffix != ".json":
        raise UserError(f"--out {out}: the result is a JSON file; end its name in .json")
    if target.exists():
        raise UserError(f"--out {out}: exists already; choose another name, nothing is overwritten")
    require_writable(target)
    return target


def main() -> None:
    """`python -m sslbook.evaluate RUN`."""
    from sslbook.configuration import cli

    cli(evaluate, command_line(sys.argv[1:], ("--protocols",)), prog="python -m sslbook.evaluate RUN")


if __name__ == "__main__":
    from sslbook.configuration import run as run_command

    run_command(main)
