"""`sslbook train ...`, the same as `python -m sslbook.train ...`; likewise `evaluate`, `extract` and `compare`."""

import importlib
import sys

from sslbook.errors import nearest

COMMANDS = ("train", "evaluate", "extract", "compare")


def main() -> None:
    """Hand over to the command."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: sslbook {train,evaluate,extract,compare} ...\n\nsslbook COMMAND --help explains each.")
        return
    if name not in COMMANDS:
        print(f"error: unknown command {name}{nearest(name, list(COMMANDS))}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"sslbook {name}", *sys.argv[2:]]
    command = importlib.import_module(f"sslbook.{name}")
    from sslbook.configuration import run

    run(command.main)


if __name__ == "__main__":
    main()
