"""A jsonargparse parser that answers a mistake in one line, with the option that is meant."""

import difflib
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, get_args

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from sslbook.cli.renamed import GONE, RENAMED, RENAMED_CLASSES, VIEW_SIZE
from sslbook.errors import UserError, nearest

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")  # the last are those that a constructor takes as **kwargs


class Parser(ArgumentParser):
    """Options from signatures; everything that goes wrong while parsing is a `UserError`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"exit_on_error": False, "allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> None:  # pyrefly: ignore
        """Called by argparse. Raises: UserError: always."""
        raise UserError(_one_line(message, ex))

    def parse(self, values: dict[str, Any]) -> Namespace:
        """The options as their types, from a mapping whose values may be strings of the command line.

        Raises:
            UserError: an option that does not exist, or a value of another type.
        """
        self.refuse_unknown(values)
        try:
            return self.parse_object(values)
        except ArgumentError as error:
            raise UserError(_one_line(str(error), error)) from None

    def construct(self, config: Namespace) -> Namespace:
        """Call the constructors that the parsed options name.

        Raises:
            UserError: a constructor refuses its options.
        """
        try:
            return self.instantiate(config)
        except ValueError as error:  # jsonargparse wraps what a constructor in a list, or one that may be null, raises
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None

    def plain(self, config: Namespace) -> dict[str, Any]:
        """The parsed options as values that YAML can hold, nulls included: a default may be something else."""
        return json.loads(self.dump(config, format="json", skip_validation=True, skip_unset=False))

    def format_help(self) -> str:  # pyrefly: ignore
        """The help, without lists of classes that are longer than a screen: of torch's modules."""
        text = super().format_help()
        return re.sub(r",\s+known\s+subclasses:(?:[^,)]*,){20,}[^)]*\)", ")", text)

    # -- names ---------------------------------------------------------------------------------------------------------

    @cached_property
    def options(self) -> list[str]:
        """The names of all options, such as `method.view.size`; asked for after all were added."""
        names = [name.removeprefix("--") for name in self._option_string_actions if name.startswith("--")]
        return [name for name in names if not name.endswith((".help", "+")) and name not in ("help", "print_config")]

    def holds_options(self, name: str) -> bool:
        """Whether a name stands for a group of options, such as `method.view`."""
        return any(option.startswith(name + ".") for option in self.options)

    def takes_class(self, name: str) -> bool:
        """Whether an option's value is a class with its arguments, or a list of such."""
        may_be_text = str in get_args(self.hint(name))  # such as the folder of a teacher's run
        return f"--{name}.help" in self._option_string_actions and not may_be_text and not self.holds_options(name)

    def only_class(self, name: str) -> str | None:
        """The import path of the one class of ours that an option takes, if it takes no other."""
        own = [kind for kind in _classes(self.hint(name)) if kind.__module__.startswith("sslbook.")]
        return f"{own[0].__module__}.{own[0].__qualname__}" if len(own) == 1 and not own[0].__subclasses__() else None

    def hint(self, name: str) -> Any:
        """The type of an option, as its signature has it."""
        action = self._option_string_actions.get(f"--{name}")
        return getattr(action, "_typehint", getattr(action, "type", None))

    def refuse_unknown(self, values: dict[str, Any], source: str = "") -> None:
        """Compare the keys of a nested mapping with the options, and arguments of classes with their signatures.

        Args:
            values: from a file, or from the command line.
            source: the file.

        Raises:
            UserError: names every key that does not exist, with the one that may be meant.
        """
        wrong = dict.fromkeys(self._unknown(values, "", "" if source else "--"))
        if wrong:
            raise UserError((f"{source}: " if source else "") + "; ".join(list(wrong)[:8]))

    def _unknown(self, values: dict[str, Any], prefix: str, dashes: str) -> Iterator[str]:
        for key, value in values.items():
            name = f"{prefix}{key}"
            if self.holds_options(name) and isinstance(value, dict):
                yield from self._unknown(value, name + ".", dashes)
            elif self.holds_options(name):
                first = next(option for option in self.options if option.startswith(name + "."))
                yield f"{dashes}{name}: holds options, such as {first}, and not {value}"
            elif name not in self.options:
                yield self.explain_unknown(name, dashes)
            elif self.takes_class(name):
                yield from _wrong_arguments(f"{dashes}{name}", value, self.hint(name))

    def explain_unknown(self, name: str, dashes: str = "") -> str:
        """What to write instead of an option that does not exist; `dashes` as the command line has them."""
        parent, _, last = name.rpartition(".")
        options, close = self.options, difflib.get_close_matches
        new = RENAMED.get(name) or RENAMED.get(last, "")
        new = f"data.{new}" if new == "shapes" and parent == "" else new  # a data set's options, or a recipe
        if f"{parent}.{new}" in options:
            new = f"{parent}.{new}"
        if new == VIEW_SIZE and new not in options:  # a method whose views have other names
            new = f" and {dashes}".join(n for n in options if n.startswith("method.") and n.endswith(".size"))
        if new:
            return f"unknown option {dashes}{name}; write {'' if new.startswith('torchrun') else dashes}{new}"
        if last in GONE:
            return f"unknown option {dashes}{name}; leave it out"
        same_end = [option for option in options if option.rpartition(".")[2] == last]
        by_end = {option.rpartition(".")[2]: option for option in options}
        meant = close(name, same_end, n=1, cutoff=0.0) or close(name, options, n=1, cutoff=0.5)
        meant = meant or [by_end[end] for end in close(last, list(by_end), n=1, cutoff=0.5)]
        return f"unknown option {dashes}{name}" + (f"; did you mean {dashes}{meant[0]}?" if meant else "")


def class_named(name: str, hint: Any = None) -> Callable | None:
    """The class or function of an import path, or the one of that name which suits a type; None if there is none."""
    module, _, last = name.rpartition(".")
    if not module:
        return _subclasses(hint).get(name)
    try:
        found = getattr(importlib.import_module(module), last, None)
    except (ImportError, ValueError):
        return None
    return found if callable(found) else None


def _classes(hint: Any) -> Iterator[type]:
    """The classes in a type such as `list[Hook] | None` or `Callable[[Iterable], Optimizer]`."""
    if inspect.isclass(hint) and not get_args(hint):
        yield hint
    for part in hint if isinstance(hint, list) else get_args(hint):
        yield from _classes(part)


def _subclasses(hint: Any) -> dict[str, type]:
    """Subclasses of the classes in a type, by their names without a path."""
    kinds = [kind for kind in _classes(hint) if kind is not object and kind.__module__ != "builtins"]
    bases = len(kinds)
    for kind in kinds:  # which grows: AdamW is an Adam
        kinds += [subclass for subclass in kind.__subclasses__() if not subclass.__name__.startswith("_")]
    return {kind.__name__: kind for kind in kinds[bases:]}


def _wrong_arguments(name: str, value: Any, hint: Any) -> Iterator[str]:
    """Arguments that the class of an option does not take, and a class that does not exist."""
    for spec in value if isinstance(value, list) else [value]:
        if not isinstance(spec, dict):
            continue
        if not isinstance(value, list) and (astray := [str(key) for key in spec if key not in CLASS_KEYS]):
            yield f"{name}: {', '.join(astray)} stand below init_args of a class_path"
        elif (path := str(spec.get("class_path", ""))) and (kind := class_named(path, hint)) is None:
            yield f"{name}: there is no {path}{_meant_class(path, hint)}"
        elif path:
            parameters = inspect.signature(kind).parameters
            takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
            arguments = spec.get("init_args") or {}
            if not isinstance(arguments, dict):
                yield f"{name}: init_args is {str(arguments)[:40]!r}, not a mapping of options"
                continue
            for key, argument in arguments.items():
                if key in parameters and isinstance(argument, dict) and "class_path" in argument:
                    yield from _wrong_arguments(f"{name}.{key}", argument, parameters[key].annotation)
                elif key not in parameters and not takes_any:
                    new = RENAMED.get(key)
                    meant = f"; write {new}" if new in parameters else nearest(key, list(parameters))
                    yield f"{name}: unknown option {key!r} of {kind.__name__}{meant}"


def _meant_class(path: str, hint: Any) -> str:
    """What to write instead of a class that does not exist."""
    name = path.rpartition(".")[2]
    for old, new in RENAMED_CLASSES.items():
        if name == old or path.startswith(old):
            return f"; write {new + name if new.endswith('.') else new}"
    if name != path:
        return "; it cannot be imported"
    return f"{nearest(name, list(_subclasses(hint)))} (a name, or the import path of your own)"


def _one_line(message: str, error: BaseException | None) -> str:
    """The option and the innermost reason, of a message that jsonargparse lays out over many lines."""
    options = [line.split('"')[1] for line in message.split("\n") if line.lstrip().startswith('Parser key "')]
    reason = message
    while error is not None and not reason.startswith("--"):  # which a parser of a class's arguments has answered
        reason, error = str(error), error.__cause__ or error.__context__
    for word in ("<class '", "'>", "typing."):
        reason = reason.replace(word, "")
    if reason.startswith("--"):
        reason = f"--{'.'.join([*options, reason.removeprefix('--')])}"
    elif options:
        reason = f"--{'.'.join(options)}: {reason}"
    return " ".join(reason.split())[:400]
