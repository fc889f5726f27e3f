"""The one exception a user is meant to read, and imports of what may be missing that raise it."""

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """Something the user can mend; the message is one line that says what is wrong and what to do about it.

    The command line prints it as ``error: ...`` without a traceback and leaves with status 2. From Python it is an
    ordinary `ValueError`.
    """


def nearest(word: str, words: list[str]) -> str:
    """`; did you mean X?` for the closest of `words`, or an empty string."""
    import difflib

    by_lower = {known.lower(): known for known in words}  # SimCLR is simclr
    found = difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.5)
    return f"; did you mean {by_lower[found[0]]}?" if found else ""


def require_known(name: str, names: Iterable[str], what: str) -> None:
    """Refuse a name that is not among `names`: `what`, and the nearest of them, or all if they are few.

    Raises:
        UserError: it is not among them.
    """
    if name not in (known := list(names)):
        few = f"; choose one of {', '.join(known)}" if 0 < len(known) <= 12 else ""
        raise UserError(f"{what}{nearest(name, known) or few}")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def explained(what: str, *kinds: type[Exception], cure: str = "") -> Iterator[None]:
    """Say errors of some kinds as a `UserError`: `what (reason): cure`, or `what: reason`. UserErrors pass as they are.

    Raises:
        UserError: there was one of them.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError):
            raise
        said = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        reason = (said or type(error).__name__)[:200].rstrip(" .")
        raise UserError(f"{what} ({reason}): {cure}" if cure else f"{what}: {reason}") from error


def at_least_one(**counts: int) -> None:
    """Refuse a count below 1, by its name.

    Raises:
        UserError: one of them is below 1.
    """
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name} is {count}: give 1 or more")


def import_attribute(path: str, what: str) -> Any:
    """What the import path `package.module.name` names.

    Args:
        path: the import path.
        what: what it is for, as the message says it: `method`.

    Raises:
        UserError: there is none.
    """
    module, _, name = path.rpartition(".")
    kinds = (ImportError, AttributeError, TypeError, ValueError)  # TypeError: a path that begins with a dot
    cure = "check the path, or set PYTHONPATH"
    with explained(f"{what} {path}: cannot be imported", *kinds, cure=cure):
        return getattr(importlib.import_module(module), name)


def import_extra(module: str, extra: str) -> Any:
    """A module of a package that only `sslbook[extra]` brings.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f'{package} is not installed: python -m pip install "sslbook[{extra}]"') from None
