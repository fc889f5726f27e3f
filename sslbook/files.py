"""Files that others may have changed: each kind is read in one place, and compared with a schema before it is used.

A schema is a type (`str`, `float`, `Tensor`, None for null; `object` for anything whose names are texts), a `Whole`
number, a value that stands for itself, a tuple of alternatives, a list with the schema of all its items, or a mapping of
names to schemas. A name that ends in `?` may be missing; `str` as a name stands for all that are not listed, which
otherwise are left alone.
"""

import errno
import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sslbook.errors import UserError, first_line

Schema = Any
MAX_BYTES = 16 * 2**20
MAX_DEPTH = 40
MAX_NODES = 100_000  # aliases counted as often as they are used


@dataclass(frozen=True)
class Whole:
    """A whole number within bounds.

    Args:
        least: the smallest one.
        most: the greatest one.
    """

    least: int = 0
    most: int = 2**63 - 1

    def __str__(self) -> str:
        return f"a whole number of at least {self.least}" + (f", at most {self.most}" if self.most < 2**63 - 1 else "")


def check(path: str | Path, value: Any, schema: Schema) -> Any:
    """The value itself, if it has the form of a schema.

    Args:
        path: the file that it comes from.
        value: what was read.
        schema: see above.

    Raises:
        UserError: `FILE: ENTRY: what is wrong`, for the first entry that does not fit.
    """
    if (found := _fault(value, schema, "")) is not None:
        raise UserError(f"{path}: {found.strip(': ')}")
    return value


def read_text(path: str | Path) -> str:
    """The text of a file, without the byte order mark that Excel begins it with.

    Raises:
        OSError: it cannot be read, or is a pipe or a device, which would be waited for.
        UnicodeDecodeError: it is not UTF-8.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise OSError(errno.EINVAL, "is a folder, or no file that can be read to its end", str(path))
    return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: str | Path, schema: Schema) -> Any:
    """A JSON file of this form.

    Raises:
        UserError: it cannot be read, is not JSON, or has another form.
    """
    return _parsed(path, json.loads, schema, "JSON")


def read_yaml(path: str | Path, schema: Schema | None = None) -> Any:
    """A YAML file of this form; an empty one is an empty mapping.

    Raises:
        UserError: it cannot be read, is not YAML, or has another form.
    """

    def parse(text: str) -> Any:
        return {} if (found := parse_yaml(text)) is None else found  # an empty file

    return _parsed(path, parse, schema or {str: object}, "YAML")


def parse_yaml(text: str) -> Any:
    """A YAML text; one that is nested deeply, refers to itself or grows by its aliases is a `yaml.YAMLError`."""
    return yaml.load(text, _Loader)  # a SafeLoader


class _Loader(yaml.SafeLoader):
    """A SafeLoader that counts."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} times")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        _count_nodes(node, {})
        return node


def _count_nodes(node: Any, known: dict[int, int]) -> int:
    """The nodes below a node, those of an alias counted at each of its uses."""
    if id(node) not in known:
        known[id(node)] = MAX_NODES + 1  # met again before it is counted: it contains itself
        value = getattr(node, "value", None)
        inner = [part for pair in value for part in pair] if isinstance(node, yaml.MappingNode) else value
        count = 1 + sum(_count_nodes(part, known) for part in inner) if isinstance(inner, list) else 1
        known[id(node)] = count
    if known[id(node)] > MAX_NODES:
        raise yaml.YAMLError(f"an alias refers to what contains it, or grows to more than {MAX_NODES:,} values")
    return known[id(node)]


def _parsed(path: str | Path, parse: Any, schema: Schema, kind: str) -> Any:
    try:
        if Path(path).stat().st_size <= MAX_BYTES:
            return check(path, parse(read_text(path)), schema)
        reason = f"is larger than {MAX_BYTES // 2**20} MB"
    except OSError as error:
        reason = f"cannot be read ({error.strerror})"
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:  # ValueError: JSON, UTF-8, dates
        reason = f"not valid {kind} ({' '.join(str(error).split())[:160] or first_line(error)})"
    raise UserError(f"{str(path)[:300]}: {reason}")


WORDS = {
    str: "a text",
    bool: "true or false",
    float: "a finite number",
    dict: "a mapping",
    list: "a list",
    None: "null",
}


def _fault(value: Any, schema: Schema, entry: str, depth: int = 0) -> str | None:
    """What is wrong with a value, beginning with the name of the entry; None if nothing is."""
    if depth > MAX_DEPTH:
        return f"{entry[:60]}: is nested more than {MAX_DEPTH} times"
    if schema is object and isinstance(value, dict | list):
        schema = {str: object} if isinstance(value, dict) else [object]
    if isinstance(schema, tuple):
        faults = [_fault(value, part, entry, depth) for part in schema]
        inside = [fault for fault in faults if fault and not fault.startswith(f"{entry}: is ")]
        words = " or ".join(_words(part) for part in schema)
        return None if None in faults else inside[0] if inside else _not_a(value, words, entry)
    parts: list[tuple[str, Any, Schema]] = []  # name, value and schema of what is inside
    if isinstance(schema, dict) and isinstance(value, dict):
        if strange := [key for key in value if not isinstance(key, str)]:
            return _not_a(strange[0], "a text that names an entry", entry)
        named = {name.removesuffix("?"): part for name, part in schema.items() if name is not str}
        if absent := [name for name in named if name not in value and f"{name}?" not in schema]:
            return f"{entry}: lacks {absent[0]}"
        named |= dict.fromkeys(value.keys() - named.keys(), schema[str]) if str in schema else {}
        parts = [(f"{entry}.{name}".strip("."), value[name], part) for name, part in named.items() if name in value]
    elif isinstance(schema, list) and isinstance(value, list | tuple):
        parts = [(f"{entry}[{i}]", item, schema[0]) for i, item in enumerate(value)]
    elif not _fits(value, schema):
        return _not_a(value, _words(schema), entry)
    faults = (_fault(part, inner, name, depth + 1) for name, part, inner in parts)
    return next((fault for fault in faults if fault is not None), None)


def _fits(value: Any, schema: Schema) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(schema, Whole):
        return number and isinstance(value, int) and schema.least <= value <= schema.most
    if schema is float:
        return number and abs(value) < 1.7e308  # an int may be larger
    if isinstance(schema, type):
        return isinstance(value, schema)
    return not isinstance(schema, dict | list) and type(value) is type(schema) and value == schema


def _words(schema: Schema) -> str:
    if isinstance(schema, Whole):
        return str(schema)
    kind = type(schema) if isinstance(schema, dict | list) else schema
    return WORDS.get(kind) or (f"a {kind.__name__}" if isinstance(kind, type) else repr(kind))


def _not_a(value: Any, words: str, entry: str) -> str:
    shown = WORDS[type(value)] if type(value) in (dict, list) else "null" if value is None else repr(value)[:40]
    return f"{entry}: is {' '.join(shown.split())}, not {words}"
