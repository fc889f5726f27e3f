"""Numbers of a resolved configuration against the annotations of the constructors that take them."""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

from sslbook.cli.parser import class_named
from sslbook.errors import UserError
from sslbook.types import Above


def check_numbers(values: dict[str, Any], *owners: Callable | None, prefix: str = "") -> None:
    """No number may be NaN, infinite or beyond 64 bits; what our constructors count is not below 0 nor below its bound.

    Args:
        values: the options as plain values, classes as `{class_path, init_args}`.
        owners: the functions that take them.
        prefix: of the options' names, such as `slurm.`

    Raises:
        UserError: names the option and what it may be.
    """
    for name, value, bound in _numbers(prefix, values, owners):
        whole = isinstance(value, int)
        if not math.isfinite(value):
            wanted = "a number"
        elif whole and abs(value) >= 2**63:
            wanted = "a number of at most 64 bits"
        elif value <= bound.bound:
            wanted = f"{int(bound.bound) + 1} or more" if whole else f"more than {bound.bound:g}"
        elif value >= bound.below:
            wanted = f"less than {bound.below:g}"
        else:
            continue
        raise UserError(f"--{name} is {value}: give {wanted}")


def _numbers(
    prefix: str, values: dict[str, Any], owners: tuple[Callable | None, ...]
) -> Iterator[tuple[str, float, Above]]:
    """Every number with its name and its bounds."""
    parameters: dict[str, inspect.Parameter] = {}
    for owner in filter(None, owners):
        for maker in reversed(inspect.getmro(owner)) if inspect.isclass(owner) else [owner]:
            if maker is not object:  # parents too: a variant passes their options on as **kwargs
                parameters |= inspect.signature(maker).parameters
    counts = any(owner is not None and owner.__module__.startswith("sslbook.") for owner in owners)  # ours are counts
    for key, value in values.items():
        name = f"{prefix}{key}"
        annotation = parameters[key].annotation if key in parameters else None
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and "class_path" in item:
                yield from _numbers(f"{name}.", item.get("init_args") or {}, (class_named(item["class_path"]),))
            elif isinstance(item, dict):
                yield from _numbers(f"{name}.", item, (annotation if inspect.isclass(annotation) else None,))
            elif isinstance(item, int | float) and not isinstance(item, bool):
                least = -1 if counts and isinstance(item, int) else -math.inf
                yield name, item, next(_bounds(annotation), Above(least))


def _bounds(annotation: Any) -> Iterator[Above]:
    """The bounds in an annotation, or in a part of it, such as `PositiveInt | None`."""
    for part in getattr(annotation, "__metadata__", ()):
        if isinstance(part, Above):
            yield part
    for part in get_args(annotation):
        yield from _bounds(part)
