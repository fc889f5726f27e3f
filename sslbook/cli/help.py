"""`--help`, `--print_config`, `--method.backbone.help`: the options with the values in force."""

import inspect
import re
import sys
import textwrap
from typing import Any, Literal, get_args, get_origin

import yaml

from sslbook.cli.parser import Parser, class_named
from sslbook.cli.values import backbone_names

KNOBS = {  # the first to turn; views have other names in some methods
    "optimizer.lr": "learning rate, for `base_batch_size` images where that is set",
    "optimizer.weight_decay": "weight decay; not for biases and normalizations",
    "method.backbone": "the network to train: resnet18, vit_small, ...; --method.backbone.help lists them",
    "method.*.size": "side of a view, in pixels",
    "batch_size": "",
    "epochs": "",
}
EXPERT = (
    *("compile", "channels_last", "layer_decay", "decay_bias_and_norm", "rules", "weight_decay_schedule"),
    *("checkpoint_every", "keep_last", "monitor", "log_every", "progress", "data.start_method", "data.augment"),
    *("optimizer.amsgrad", "optimizer.maximize", "optimizer.foreach", "optimizer.capturable"),
    *("optimizer.differentiable", "optimizer.fused", "optimizer.decoupled_weight_decay"),
    *("data.strict", "data.limit", "data.shapes.*", "method.*.ratio", "method.*.resize", "method.*.interpolation"),
    *("method.*.blur_sigma", "method.*.color_jitter_p", "method.*.mean", "method.*.std"),
)


def is_question(name: str) -> bool:
    """Whether an option asks for something to be printed instead of a run."""
    return name in ("help", "print_config") or name.endswith(".help")


def answer(name: str, value: str | None, *, parser: Parser, resolved: dict[str, Any], description: str) -> None:
    """Print what is asked for and leave.

    Raises:
        SystemExit: always.
    """
    if name == "print_config":
        print(yaml.safe_dump(resolved, sort_keys=False), end="")
    elif name == "method.backbone.help" and value is None:
        print(backbone_list())
    elif name == "help":
        print(option_list(parser, resolved, description))
    else:
        parser.parse_args([f"--{name}", *([value] if value else [])])  # of jsonargparse: a class and its arguments
    sys.exit(0)


def option_list(parser: Parser, resolved: dict[str, Any], description: str) -> str:
    """All options of a training run with the values in force: the most used first, those for experts last."""
    values = {**resolved, "method": resolved["method"]["init_args"]}
    texts = {action.dest: action.help or "" for action in parser._actions}
    rows = {}  # name: (value, text)
    for name in parser.options:
        if parser.holds_options(name):
            continue
        value = _lookup(values, name)
        rows[name] = (_plain(value) if value is not None else _type_name(parser.hint(name)), texts.get(name, ""))
        if isinstance(value, dict) and "class_path" in value:
            for key, argument in (value.get("init_args") or {}).items():
                rows[f"{name}.{key}"] = (_plain(argument), "")
    sections: dict[str, list[str]] = {"most used": [], "method": [], "data": [], "run": [], "for experts": []}
    for knob, text in KNOBS.items():
        for name in [name for name in rows if _matches(name, knob)]:
            sections["most used"].append(_row(name, rows.pop(name), text))
    for name, row in rows.items():
        expert = any(_matches(name, pattern) for pattern in EXPERT)
        group = name.partition(".")[0]
        section = "for experts" if expert else group if group in ("method", "data") else "run"
        sections[section].append(_row(name, row))
    parts = [f"usage: {parser.usage}\n\n{description}"]
    parts += ["\n".join([f"{title}:", *lines]) for title, lines in sections.items()]
    return "\n\n".join(parts)


def backbone_list() -> str:
    """The backbones a name is enough for, with their numbers of parameters and their options."""
    import torch

    lines = ["backbones, millions of parameters, options (--method.backbone NAME --method.backbone.OPTION VALUE):"]
    for name in backbone_names():
        make = class_named(f"sslbook.nn.{name}")
        assert make is not None
        with torch.device("meta"):
            millions = sum(parameter.numel() for parameter in make().parameters()) / 1e6
        parameters = [p for p in inspect.signature(make).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        options = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
        row = f"  {name:<18}{millions:>7.1f}   {options}"
        lines.append(textwrap.fill(row, 118, subsequent_indent=" " * 30))
    lines.append("  timm/NAME          any network of timm; or the import path of a module of your own")
    return "\n".join(lines)


def _lookup(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _matches(name: str, pattern: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name) is not None


def _plain(value: Any) -> str:
    """A value as the command line takes it, a class by its name."""
    if isinstance(value, dict) and "class_path" in value:
        return value["class_path"].rpartition(".")[2]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    if isinstance(value, float) and value.is_integer():
        return f"{value:g}"
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _type_name(hint: Any) -> str:
    """The type of an option that is not set."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    parts = [getattr(part, "__origin__", part) for part in get_args(hint) if part is not type(None)]
    names = [getattr(part, "__name__", str(part)) for part in parts]
    return "null" + (f" ({' or '.join(names)})" if names and "." not in names[0] else "")


def _row(name: str, row: tuple[str, str], text: str = "") -> str:
    head = f"  --{name} {row[0]}"
    text = " ".join((text or row[1]).split()).rstrip(".")
    if not text:
        return head
    indent = " " * 44
    if len(head) > 42:
        return "\n".join([head, *textwrap.wrap(text, 118, initial_indent=indent, subsequent_indent=indent)])
    return textwrap.fill(text, 118, initial_indent=f"{head:<44}", subsequent_indent=indent)
