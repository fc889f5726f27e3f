"""Small programs around a run, found by their names: `python -m sslbook.tools NAME ...`.

A tool is a module with a function `main(argv)`: a file in this folder, or your own by its import path.
"""

import ast
import sys
from pathlib import Path

from sslbook.errors import import_attribute, require_known


def tools() -> dict[str, str]:
    """The tools of the package, with the first line of what each is for."""
    files = sorted(path for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").split("\n")[0] for path in files}


def main(argv: list[str] | None = None) -> None:
    """Hand over to a tool, or list them.

    Raises:
        UserError: there is no such tool.
    """
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("usage: python -m sslbook.tools NAME ...\n")
        print("\n".join(f"  {tool:<18}{text}" for tool, text in tools().items()))
        print("\npython -m sslbook.tools NAME --help explains each; NAME may be the import path of your own.")
        return
    if "." not in name:
        require_known(name, tools(), f"there is no tool {name}")
    import_attribute(f"{name if '.' in name else f'sslbook.tools.{name}'}.main", "tool")(words)
