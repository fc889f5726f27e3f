"""`sslbook train ...`, the same as `python -m sslbook.train ...`; likewise the other commands."""

import importlib
import sys

COMMANDS = {
    "train": "learn features from images without labels; measure and plot what was learned",
    "evaluate": "measure a run or an exported backbone: nearest neighbors, linear probe, your own protocols",
    "extract": "write the features of images to a file",
    "compare": "train several methods on the same images and put their results side by side",
    "tools": "replay a failed step, ...; `sslbook tools` lists them",
}


def main() -> None:
    """Hand over to the command, or say in one line that there is none of that name."""
    from sslbook.cli.common import run
    from sslbook.errors import require_known

    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: sslbook COMMAND ...\n")
        print("\n".join(f"  {command:<10}{text}" for command, text in COMMANDS.items()))
        print("\nsslbook COMMAND --help explains each; python -m sslbook.COMMAND is the same.")
        return

    def command() -> None:
        require_known(name, COMMANDS, f"unknown command {name}")
        sys.argv = [f"sslbook {name}", *sys.argv[2:]]
        importlib.import_module(f"sslbook.{name}").main()

    run(command)


if __name__ == "__main__":
    main()
