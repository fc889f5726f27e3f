"""FAITHFULNESS.md: the sources of methods and recipes, and what differs, from their docstrings and heads.

python book/reference/faithfulness.py
"""

import ast
import re
from pathlib import Path

from sslbook.checkpoint import write_text
from sslbook.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "FAITHFULNESS.md"
HEAD = """# Faithfulness

What every method is taken from, and where it departs from its source: the authors' code where there is one, else the
paper. Whatever is not listed is meant to be the same; a departure that you find and this table lacks is a bug. Where
the consequence of a departure is known, it stands with it. The authors' code is linked at the version that a list is
about.

`python book/reference/faithfulness.py` writes this page from the docstrings of `sslbook/methods/` and the heads of
`sslbook/recipes/`, and a test keeps it from going stale.

| Method | Source | What differs, and what follows from it |
|---|---|---|
"""
RECIPES = """
## Recipes for ImageNet

Where the values of `--recipe` come from, and what differs from there, as each recipe's head says it.
`tests/test_papers_values.py` compares the values with those of the sources. {shared}

| Recipe | Source, and what differs |
|---|---|
"""


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse((ROOT / "sslbook" / "methods" / f"{name}.py").read_text(encoding="utf-8"))) or ""


def source(text: str) -> str:
    """The citations: authors, year and title, each ending in a link to arXiv."""
    (first, *_) = [part for part in text.split("\n\n") if "arXiv:" in part]
    flat = " ".join(first.split())
    cited = flat[: flat.rindex("arXiv:")] + re.search(r"arXiv:[\d.]+\d", flat[flat.rindex("arXiv:") :])[0]
    return re.sub(r"arXiv:([\d.]+\d)", r"[arXiv:\1](https://arxiv.org/abs/\1)", cited) + ")" * (
        cited.count("(") - cited.count(")")
    )


def departures(text: str) -> list[tuple[str, list[str]]]:
    """Every list of a docstring: the sentence that introduces it, and its items."""
    found = []
    for block in re.finditer(r"(?P<before>[^\n]+(?:\n[^\n-][^\n]*)*):\n\n?(?P<items>- .*(?:\n(?:- |  ).*)*)", text):
        sentence = re.split(r"(?<=[.;)]) (?=[A-Z])", " ".join(block["before"].split()))[-1]
        items = [" ".join(item.split()) for item in re.split(r"^- ", block["items"], flags=re.M)[1:]]
        found.append((sentence, [item.rstrip(".;") for item in items]))
    return found


def linked(sentence: str) -> str:
    """A repository and its version, `(owner/name, 1a2b3c4)`, as a link."""
    link = r"([\1 at \2](https://github.com/\1/tree/\2))"
    return re.sub(r"\(([\w.-]+/[\w.-]+), ([0-9a-f]{7})\)", link, sentence)


def row(name: str) -> str:
    """A line of the table."""
    text = docstring(name)
    title = re.split(r": | \(|, ", text.splitlines()[0])[0]
    lists = [f"{linked(sentence)}:<br>" + "<br>".join(f"• {item}" for item in items) for sentence, items in departures(text)]
    cells = [f"[{title}](sslbook/methods/{name}.py)", source(text), "<br>".join(lists)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def head(path: Path, word: str = "") -> str:
    """What a recipe's first comment says after `word:`, or all of it."""
    comment = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))[0]
    lines = re.sub(r"^# ?", "", comment, flags=re.M)
    if word:
        lines = re.search(rf"^{word}:((?:.*\n?)(?:^ +.*\n?)*)", lines, flags=re.M)[1]
    return " ".join(lines.split())


def recipes() -> str:
    """The table of the recipes at full scale."""
    folder = ROOT / "sslbook" / "recipes"
    paths = [path for name in METHODS for path in sorted((folder / name).glob("*.yaml"))]
    rows = [
        f"| [{path.parent.name}/{path.stem}]({path.relative_to(ROOT).as_posix()}) | {head(path, 'Source')} |"
        for path in paths
        if path.stem.startswith(("imagenet", "dinov2"))
    ]
    return RECIPES.format(shared=head(folder / "_imagenet.yaml")) + "\n".join(rows) + "\n"


def page() -> str:
    """The whole page."""
    return HEAD + "\n".join(row(name) for name in METHODS) + "\n" + recipes()


if __name__ == "__main__":
    write_text(PAGE, page())
