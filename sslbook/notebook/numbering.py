"""Numbers of the book's figures: chapter and position, read from the chapters' own lists.

A chapter's number is its place in `CHAPTERS` of `book/chapters/__init__.py`, a figure's the place of its name in the
tuple `FIGURES` of the chapter's `figures.py`. Both files are read and not run, so the tuples are written as literals.

>>> number("simclr.circle")
'3.2'
"""

import ast
from pathlib import Path

from sslbook import results
from sslbook.errors import UserError, nearest


def chapters(book: Path | None = None) -> tuple[str, ...]:
    """The chapters' folders in the order of the table of contents; `book` is the folder of the book."""
    return _literal((book or results.book()) / "chapters" / "__init__.py", "CHAPTERS")


def figures(chapter: str, book: Path | None = None) -> tuple[str, ...]:
    """The names of a chapter's figures in order of appearance; UserError where its list is missing."""
    return _literal((book or results.book()) / "chapters" / chapter / "figures.py", "FIGURES")


def number(name: str, book: Path | None = None) -> str:
    """The number of the figure `name`, such as "3.2"; UserError if no chapter lists it."""
    known, missing = [], []
    for at, chapter in enumerate(chapters(book), 1):
        try:
            names = figures(chapter, book)
        except UserError:
            missing.append(chapter)
            continue
        if name in names:
            return f"{at}.{names.index(name) + 1}"
        known += names
    hint = nearest(name, known) or (f"; there is no list for {', '.join(missing)}" if missing else "")
    raise UserError(f"no chapter lists the figure {name!r} in FIGURES of its figures.py{hint}")


def chapter_of(name: str, book: Path | None = None) -> str:
    """The folder of the chapter that the figure `name` stands in."""
    return chapters(book)[int(number(name, book).split(".")[0]) - 1]


def anchor(name: str) -> str:
    """The id of the figure's element in a page: `fig-simclr-circle` for "simclr.circle"."""
    return "fig-" + name.replace(".", "-").replace("_", "-")


def _literal(path: Path, variable: str) -> tuple[str, ...]:
    where = "/".join(path.parts[-4:] if path.name == "figures.py" else path.parts[-3:])
    if not path.is_file():
        raise UserError(f"{where} is missing: write {variable} = (...) with the names in order")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == variable for target in targets):
            try:
                value = ast.literal_eval(node.value)  # pyrefly: ignore
            except ValueError:
                value = None
            if isinstance(value, tuple | list) and all(isinstance(name, str) for name in value):
                return tuple(value)
            raise UserError(f"{where}: {variable} must be a plain tuple of names, nothing computed")
    raise UserError(f"{where} has no {variable}: write {variable} = (...) with the names in order")
