"""What all commands share: from a command line to a call of a function, and errors as one line."""

import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from sslbook.cli.bounds import check_numbers
from sslbook.cli.help import is_question
from sslbook.cli.parser import Parser
from sslbook.cli.values import Values, from_words, merge, read_yaml, split_words, with_classes
from sslbook.errors import UserError

CHOICES = ("name", "folder", "list", "shapes")  # options of data that choose images; the others say how they are read


def run(main: Callable[[], object]) -> None:
    """Call a command's main function; what the user can mend becomes one line and status 2, a warning one line."""
    usual = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *where: Any) -> str:
        return f"warning: {message}\n" if category is UserWarning else usual(message, category, *where)

    warnings.formatwarning = one_line
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


def chosen(data: Any, names: list[str]) -> bool:
    """Whether options of data, those in a file or these names of the command line, say which images to take."""
    of_line = {name.split(".")[1] for name in names if name.startswith("data.")}
    return "data" in names or not isinstance(data, Mapping) or not {*data, *of_line}.isdisjoint(CHOICES)


def cli(
    function: Callable,
    argv: list[str] | None = None,
    *,
    prog: str,
    own_data: Callable[[str], tuple[str, Values]] | None = None,
    protocol: type | None = None,
) -> object:
    """Call `function` with what the command line says; its signature and docstring are the options and the help.

    The first word may be the function's first argument without its name: `python -m sslbook.evaluate RUN`.

    Args:
        function: what is called.
        argv: the words; by default those of this process.
        prog: the command, as the help prints it.
        own_data: for a function with the parameters `run` and `data`: the options of data that a run learned from, and
            the file that names them. They are in force where no option of data chooses other images.
        protocol: a class whose options are options of the command too; `function` gets the object as `protocols=[...]`.
            An option that both have, such as `seed`, goes to both.

    Raises:
        UserError: an option that does not exist, or a value of another type.
    """
    parameters = inspect.signature(function).parameters
    parser = Parser(prog=prog, description=(inspect.getdoc(function) or "").split("Args:")[0].strip())
    parser.add_argument("--config", type=str, help="a YAML file with options; may be given several times")
    arguments = set(inspect.signature(protocol).parameters) if protocol else set()
    if protocol:
        parser.add_class_arguments(protocol, skip=arguments & set(parameters))
    parser.add_function_arguments(function, skip={"data", *(["protocols"] if protocol else [])} & set(parameters))
    if "data" in parameters:
        from sslbook.data.loader import Data  # torch, which the list of commands does not wait for

        parser.add_class_arguments(Data, "data", skip={"train", "test"})
    argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    if argv and not argv[0].startswith("-"):
        argv[0] = f"--{next(iter(parameters))}={argv[0]}"
    pairs = split_words(argv)
    if any(is_question(name) for name, _ in pairs):
        parser.parse_args([word for word in argv if not word.startswith("--config")])  # prints and leaves
    values: Values = {}

    def known(source: str, given: Values) -> Values:
        given = with_classes(given, parser)
        parser.refuse_unknown(given, source)
        return given

    for path in [value for name, value in pairs if name == "config"]:
        values = merge(values, known(path, read_yaml(path)))
    pairs = [pair for pair in pairs if pair[0] != "config"]
    if own_data and not chosen(values.get("data") or {}, [name for name, _ in pairs]):
        run = next((value for name, value in reversed(pairs) if name == "run"), values.get("run"))
        if run is None:
            raise UserError("which run? Name its folder first, an exported backbone.safetensors, or a checkpoint")
        values = merge(known(*own_data(str(run))), values)
    config = parser.parse(from_words(pairs, values, parser))
    check_numbers(parser.plain(config), function, protocol)
    options = vars(parser.construct(config))
    options.pop("config", None)
    if protocol:
        options["protocols"] = [protocol(**{name: options[name] for name in arguments})]
    return function(**{name: value for name, value in options.items() if name in parameters})
