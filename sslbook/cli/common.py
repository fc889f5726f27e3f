"""What all commands share: from a command line to a call of a function, and errors as one line."""

import inspect
import sys
from collections.abc import Callable

from sslbook.cli.help import is_question
from sslbook.cli.parser import Parser
from sslbook.cli.values import Values, from_words, merge, read_yaml, split_words, with_classes
from sslbook.errors import UserError


def run(main: Callable[[], object]) -> None:
    """Call a command's main function; what the user can mend becomes one line and status 2."""
    try:
        main()
    except UserError as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


def cli(function: Callable, argv: list[str] | None = None, *, prog: str) -> object:
    """Call `function` with what the command line says; its signature and docstring are the options and the help.

    The first word may be the function's first argument without its name: `python -m sslbook.evaluate RUN`.

    Raises:
        UserError: an option that does not exist, or a value of another type.
    """
    parser = Parser(prog=prog, description=(inspect.getdoc(function) or "").split("Args:")[0].strip())
    parser.add_argument("--config", type=str, help="a YAML file with options; may be given several times")
    parser.add_function_arguments(function)
    argv = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    if argv and not argv[0].startswith("-"):
        argv[0] = f"--{next(iter(inspect.signature(function).parameters))}={argv[0]}"
    pairs = split_words(argv)
    if any(is_question(name) for name, _ in pairs):
        parser.parse_args([word for word in argv if not word.startswith("--config")])  # prints and leaves
    values: Values = {}
    for path in [value for name, value in pairs if name == "config"]:
        layer = with_classes(read_yaml(path), parser)
        parser.refuse_unknown(layer, path)
        values = merge(values, layer)
    values = from_words([pair for pair in pairs if pair[0] != "config"], values, parser)
    options = vars(parser.construct(parser.parse(values)))
    options.pop("config", None)
    return function(**options)
