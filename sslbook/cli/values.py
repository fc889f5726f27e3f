"""Options as nested mappings: read from YAML and from the command line, and laid one upon the other."""

from pathlib import Path
from typing import Any

import yaml

from sslbook import files
from sslbook.cli.parser import CLASS_KEYS, Parser
from sslbook.errors import UserError, explained, require_known

Values = dict[str, Any]
"""Nested as in YAML; a class is `{class_path: ..., init_args: {...}}`, and a value may still be a string."""


def read_yaml(path: str | Path) -> Values:
    """The options in a file.

    Raises:
        UserError: it cannot be read, is not YAML, or is no mapping of options.
    """
    return files.read_yaml(path)


def merge(base: Values, over: Values) -> Values:
    """`over` laid upon `base`, mapping by mapping; a class that replaces another gets none of its arguments.

    Arguments of the class in `base` may stand in `over` without `init_args`: `optimizer: {lr: 0.1}`.
    """
    name, old = (str(spec.get("class_path")).rpartition(".")[2] for spec in (over, base))  # SGD is torch.optim.SGD
    if "class_path" in over and name != old:
        return over
    if "class_path" in base and not set(over) & set(CLASS_KEYS):
        over = {"init_args": over}
    out = dict(base)
    for key, value in over.items():
        out[key] = merge(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def split_words(argv: list[str]) -> list[tuple[str, str | None]]:
    """`--name value` and `--name=value` as pairs; an option without a value has None.

    Raises:
        UserError: a word that is no option's value.
    """
    pairs: list[tuple[str, str | None]] = []
    for word in argv:
        if word.startswith("--") or word == "-h":
            name, has_value, value = word.lstrip("-").partition("=")
            pairs.append(("help" if name == "h" else name, value if has_value else None))
        elif pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], word)
        else:
            raise UserError(f"unexpected {word}: but for the first word all are --OPTION VALUE")
    return pairs


def from_words(pairs: list[tuple[str, str | None]], below: Values, parser: Parser) -> Values:
    """`below` with the options of a command line laid upon it, such as `--optimizer.lr 0.1` or `--optimizer SGD`.

    Raises:
        UserError: an option without a value.
    """
    values = below
    for name, value in pairs:
        if value is None:
            raise UserError(
                f"--{name}: expects a value" if name in parser.options else parser.explain_unknown(name, "--")
            )
        layer: Any = yaml.safe_load(value) if ".dict_kwargs." in name else value  # whose types no signature tells
        for key in reversed(name.removesuffix("+").split(".")):
            layer = {key: layer}
        layer = with_classes(layer, parser)
        if name.endswith("+"):  # one more in a list, such as --hooks+ TensorBoard
            name = name.removesuffix("+")
            added = layer.get(name)
            layer = {name: [*(values.get(name) or []), *(added if isinstance(added, list) else [added])]}
        values = merge(values, layer)
    return values


def with_classes(values: Values, parser: Parser, prefix: str = "") -> Values:
    """The same, with every class that is given by its name alone written as a mapping."""
    out = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and parser.holds_options(name):
            out[key] = with_classes(value, parser, name + ".")
        else:
            out[key] = class_spec(name, value, parser) if parser.takes_class(name) else value
    return out


def class_spec(name: str, value: Any, parser: Parser) -> Any:
    """`SGD` as `{class_path: SGD}`, `resnet18` and `timm/NAME` as their classes; mappings and null as they are.

    Raises:
        UserError: there is no such backbone.
    """
    if isinstance(value, str) and (value == "null" or value[:1] in ("{", "[")):
        with explained(f"--{name}: not valid YAML", yaml.YAMLError):
            value = files.parse_yaml(value)
    if isinstance(value, list):
        return [class_spec(name, item, parser) for item in value]
    if isinstance(value, dict) and not set(value) & set(CLASS_KEYS) and (own := parser.only_class(name)):
        return {"class_path": own, "init_args": value}
    if not isinstance(value, str):
        return value
    if value.startswith("timm/"):
        return {"class_path": "sslbook.nn.timm_model", "init_args": {"name": value[5:]}}
    if name.endswith("backbone") and "." not in value:
        known = backbone_names()
        require_known(value, known, f"unknown backbone {value}; known: {', '.join(known)}, timm/NAME")
        value = f"sslbook.nn.{value}"
    return {"class_path": value}


def backbone_names() -> list[str]:
    """The backbones of `sslbook.nn` that a name is enough for."""
    from sslbook import nn

    others = ("ConvNet", "ResNet", "VisionTransformer", "DiscreteEncoder")
    return [name for name in dir(nn) if name.startswith(("resnet", "wide_", "vit_")) or name in others]
