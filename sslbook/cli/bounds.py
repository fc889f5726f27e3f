"""Numbers of a resolved configuration against the annotations of the constructors that take them."""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, get_args

from sslbook.cli.parser import class_named
from sslbook.errors import UserError
from sslbook.types import Above


def check_numbers(resolved: dict[str, Any], engine: Callable) -> None:
    """No number may be NaN, infinite or beyond 64 bits; what our constructors count is not below 0 nor below its bound.

    Args:
        resolved: the options as plain values, classes as `{class_path, init_args}`.
        engine: the function that takes them.

    Raises:
        UserError: names the option and what it may be.
    """
    for name, value, above in _numbers("", resolved, engine):
        if not math.isfinite(value):
            raise UserError(f"--{name} is {value}: give a number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise UserError(f"--{name} is {value}: give a number of at most 64 bits")
        if above is not None and value <= above:
            least = f"{int(above) + 1} or more" if isinstance(value, int) else f"more than {above:g}"
            raise UserError(f"--{name} is {value}: give {least}")


def _numbers(prefix: str, values: dict[str, Any], owner: Callable | None) -> Iterator[tuple[str, float, float | None]]:
    """Every number with its name and its bound."""
    parameters: dict[str, inspect.Parameter] = {}
    for maker in reversed(inspect.getmro(owner)) if inspect.isclass(owner) else [owner] if owner is not None else []:
        if maker is not object:  # parents too: a variant passes their options on as **kwargs
            parameters |= inspect.signature(maker).parameters
    counts = owner is not None and owner.__module__.startswith("sslbook.")  # our integers are counts
    for key, value in values.items():
        name = f"{prefix}{key}"
        annotation = parameters[key].annotation if key in parameters else None
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict) and "class_path" in item:
                yield from _numbers(f"{name}.", item.get("init_args") or {}, class_named(item["class_path"]))
            elif isinstance(item, dict):
                yield from _numbers(f"{name}.", item, annotation if inspect.isclass(annotation) else None)
            elif isinstance(item, int | float) and not isinstance(item, bool):
                bound = next(_bounds(annotation), None)
                yield name, item, -1 if bound is None and counts and isinstance(item, int) else bound


def _bounds(annotation: Any) -> Iterator[float]:
    """The bound in an annotation, or in a part of it, such as `PositiveInt | None`."""
    for part in getattr(annotation, "__metadata__", ()):
        if isinstance(part, Above):
            yield part.bound
    for part in get_args(annotation):
        yield from _bounds(part)
