"""What a protocol is, and how any protocols are applied to any networks.

A protocol is a class in a file of its own, in `sslbook/evaluation/protocols` or anywhere else: its constructor holds the
options, `run` returns the metrics. `python -m sslbook.evaluate`, the report of a run, comparisons and hooks call
`measure` with the protocols they were given, and know none by name.
"""

import copy
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError, import_attribute, nearest
from sslbook.evaluation.features import Features, Split, extract_with_index
from sslbook.results import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT = ("knn", "linear", "factors")  # what is measured unless protocols are named; data may not allow all of them
FOLDER = "sslbook.evaluation.protocols"
SUMMARY = "summary"  # the table that protocols share, unless they have one of their own
Metrics = dict[str, float]
Tables = dict[str, dict[str, Metrics]]


@dataclass
class Representation:
    """A frozen backbone on some data; the features of a split are extracted once, for all protocols.

    Args:
        backbone: maps images to one vector each; it is left in the mode it came in.
        data: where the images come from.
        view: what becomes of an image, without randomness.
        device: where to compute; by default where the backbone is.
        batch_size: images at a time.
        progress: show bars.
        seed: of everything random in a protocol.
        folder: where a protocol that trains keeps its run, so that it can be resumed; by default nothing is kept.
        details: what protocols noted beside their metrics, by protocol.
    """

    backbone: nn.Module
    data: Data
    view: View
    device: torch.device | str | None = None
    batch_size: int = 256
    progress: bool = True
    seed: int = 0
    folder: Path | None = None
    _features: dict[str, Features] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def features(self, split: Split) -> Features:
        """Features, labels and positions of every readable image of a split, on the CPU."""
        if split not in self._features:
            self._features[split] = extract_with_index(
                self.backbone,
                self.data,
                split,
                self.view,
                device=self.device,
                batch_size=self.batch_size,
                progress=self.progress,
            )
        return self._features[split]

    def labeled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training features and labels, test features and labels; images without a label are left out."""
        parts = [self.features(split) for split in ("train", "test")]
        train, test = ((part.x[part.y >= 0], part.y[part.y >= 0]) for part in parts)
        return *train, *test


class Protocol:
    """One way to measure a representation. The constructor of a subclass holds its options.

    Raises:
        UserError: from the constructor where an option is out of its range, from `run` where the data do not suit.
    """

    needs: Literal["features", "maps", "tokens"] = "features"
    """what the backbone must offer: `forward`, `forward_map`, `forward_tokens`"""
    labels = True
    """whether it needs labeled training and test images"""
    title: str | None = None
    """heads a table of its own, with a line for every metric; without it the metrics are columns of the shared table"""
    digits = 1
    """behind the point, in a table of its own"""
    cost = "seconds"
    """what it takes beyond extracting features, for who is to decide"""
    uses_data = True
    """whether it measures on the images it is given; otherwise its own options name them"""
    name: str
    """of its file (`few_shot`) if it is one of the package's, else the class in lower case"""
    trains = False
    """whether the loop of pre-training runs in it: a backbone without parameters is then left out"""

    def __init_subclass__(cls) -> None:
        module, _, last = cls.__module__.rpartition(".")
        cls.name = last if module == FOLDER else cls.__name__.lower()

    def run(self, model: Representation, data: Data) -> Metrics:
        """The metrics by name: percentages, unless the name says what else. The backbone is left as it was.

        What belongs beside them in a result file, such as what was chosen on which split, goes to
        `model.details[self.name]`.
        """
        raise NotImplementedError

    def figures(self) -> dict[str, "Figure"]:
        """Figures of the last `run`, by name."""
        return {}

    def chance(self, data: Data) -> Metrics:
        """The level of chance of the same metrics: what features without any information yield."""
        return {}

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        """What the backbone or the data lack for this protocol, or None; ends a sentence that names the protocol."""
        method = {"features": "forward", "maps": "forward_map", "tokens": "forward_tokens"}[self.needs]
        if not hasattr(backbone, method):
            return f"a backbone with {self.needs} (a method {method}), which {type(backbone).__name__} does not offer"
        if self.trains and not any(True for _ in backbone.parameters()):
            return f"a backbone with parameters, and {type(backbone).__name__} has none"
        if self.uses_data and self.labels and data.kind in ("several classes", "numbers"):
            return f"one class of each image, and those of {data.name} have {data.kind}"
        if self.uses_data and self.labels and not data.has_test_labels:
            return (
                f"labeled training and test images; {data.name} has no labels for both: "
                "put them into FOLDER/train/CLASS and FOLDER/test/CLASS, two classes or more and no image beside them"
            )
        return None


def available() -> list[str]:
    """Names of the package's protocols."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "protocols")]))


def find(name: str) -> type[Protocol]:
    """The protocol of that name (`knn`), or of that import path (`my.module.Mine`).

    Raises:
        UserError: there is none.
    """
    if "." in name:
        found = import_attribute(name, "protocol")
    elif name.lower() in available():
        module = importlib.import_module(f"{FOLDER}.{name.lower()}")
        own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
        found = next(value for value in own if isinstance(value, type) and issubclass(value, Protocol))
    else:
        raise UserError(
            f"protocol {name}: choose among {', '.join(available())}, or give the import path of your own"
            f"{nearest(name, available())}"
        )
    if not (isinstance(found, type) and issubclass(found, Protocol)):
        raise UserError(f"protocol {name}: is not a subclass of sslbook.evaluation.base.Protocol")
    return found


def chosen(names: Sequence[str] | None, backbone: nn.Module, data: Data) -> list[Protocol]:
    """The protocols of these names; without names, those by default that the backbone and the data can serve."""
    found = [find(name)() for name in (DEFAULT if names is None else names)]
    return found if names is not None else [protocol for protocol in found if protocol.lacks(backbone, data) is None]


def require(protocols: Sequence[Protocol], backbone: nn.Module, data: Data) -> None:
    """UserError if the backbone or the data lack what a protocol needs."""
    for protocol in protocols:
        if lack := protocol.lacks(backbone, data):
            raise UserError(f"{protocol.name} needs {lack}")


def measure(
    models: Mapping[str, Representation],
    protocols: Sequence[Protocol],
    save_figure: Callable[[str, "Figure"], object] | None = None,
) -> Tables:
    """Every protocol on every model: `{table: {row: {metric: value}}}`, the level of chance last in each table.

    Args:
        models: the first is the one in question; controls that cannot serve a protocol are left out.
        protocols: what to measure.
        save_figure: called with the name and each figure that a protocol has of the first model.

    Raises:
        UserError: the first model or the data lack what a protocol needs.
    """
    first = next(iter(models.values()))
    require(protocols, first.backbone, first.data)
    tables: Tables = {}
    for name, model in models.items():
        for protocol in protocols:
            if protocol.lacks(model.backbone, model.data) is None:
                table = tables.setdefault(_table(protocol), {})
                table.setdefault(name, {}).update(protocol.run(model, model.data))
                if save_figure is not None and model is first:
                    for what, figure in protocol.figures().items():
                        save_figure(f"{protocol.name}-{what}", figure)
    for protocol in protocols:
        if level := protocol.chance(first.data):
            tables[_table(protocol)].setdefault("chance", {}).update(level)
    return tables


def measure_online(
    backbone: nn.Module, data: Data, view: View, protocols: Sequence[Protocol], limit: int, device: torch.device
) -> Metrics:
    """All metrics of a network in training, measured with at most `limit` training images."""
    if data.num_train > limit:
        data = copy.copy(data)
        data.limit = limit
        data.__dict__.pop("_splits", None)  # which it chooses anew
    model = Representation(backbone, data, view, device, progress=False)
    return {key: value for protocol in protocols for key, value in protocol.run(model, data).items()}


def format_tables(tables: Tables, protocols: Sequence[Protocol], data: Data) -> str:
    """The tables as text. Models are rows of the shared table, and columns of a table with a title of its own."""
    titles = {_table(protocol): protocol.title for protocol in protocols}
    digits = {_table(protocol): protocol.digits for protocol in protocols}
    parts = []
    for name, rows in tables.items():
        if title := titles[name]:
            lines = {
                metric: {row: m[metric] for row, m in rows.items() if metric in m}
                for metric in next(iter(rows.values()))
            }
            parts.append(f"{title}\n{Table(lines, digits=digits[name])}")
        else:
            where = f", on {data.num_test:,} test images" if any(protocol.uses_data for protocol in protocols) else ""
            parts.append(f"Metrics in %{where}\n{Table(rows)}")
    return "\n\n".join(parts)


def _table(protocol: Protocol) -> str:
    return protocol.name if protocol.title else SUMMARY
