"""One word, one meaning: docstrings, messages, recipes, chapters and pages use the field's words.

The words that are kept out stand in `book/reference/glossary.md`, in the table "Words we do not use".
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "book" / "reference" / "glossary.md"

Line = tuple[int, str]  # number in the file (in a notebook: of the cell), text


def forbidden() -> list[tuple[re.Pattern, re.Pattern | None]]:
    """Patterns of words, each with the phrases in which it is right; from the glossary's table."""
    table = GLOSSARY.read_text(encoding="utf-8").partition("## Words we do not use")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    found = []
    for _, words, phrases in rows[1:]:
        either = "|".join(re.escape(word.strip()).replace(r"\ ", r"\s+") for word in words.split(","))
        allowed = "|".join(re.escape(phrase.strip()).replace(r"\ ", r"\s+") for phrase in phrases.split(",") if phrase)
        found.append((re.compile(rf"\b(?:{either})\b", re.I), re.compile(allowed, re.I) if allowed else None))
    return found


def python_lines(path: Path) -> Iterator[Line]:
    """Comments and the text of strings; in f-strings without the expressions."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (" " in node.value or "\n" in node.value):
            for i, line in enumerate(node.value.split("\n")):
                yield node.lineno + i, line
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def test_names(path: Path) -> Iterator[Line]:
    """The words of the names of tests."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def notebook_lines(path: Path) -> Iterator[Line]:
    """Markdown, and the comments and printed text of code cells, numbered by cell."""
    for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        text = "".join(cell["source"])
        yield from ((i, line) for line in text.split("\n"))
        for output in cell.get("outputs", []):
            shown = "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/plain", ""))
            yield from ((i, line) for line in shown.split("\n") if not line.startswith("book/results/"))


def text_lines(path: Path) -> Iterator[Line]:
    """Lines of a page without those that a command wrote: where a result comes from."""
    lines = enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
    return ((i, line) for i, line in lines if not line.startswith("book/results/"))


def comment_lines(path: Path) -> Iterator[Line]:
    lines = enumerate(path.read_text(encoding="utf-8").split("\n"), start=1)
    return ((i, line.partition("#")[2]) for i, line in lines)


def files(*patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern)) if "_build" not in path.parts]


READERS = {
    "package": (python_lines, ["sslbook/**/*.py", "benchmarks/*.py", "data_scripts/*.py", "book/**/*.py"]),
    "recipes": (comment_lines, ["sslbook/recipes/**/*.yaml"]),
    "tests": (test_names, ["tests/**/test_*.py"]),
    "chapters": (notebook_lines, ["book/chapters/*/chapter.ipynb"]),
    "pages": (text_lines, ["README.md", "CONTRIBUTING.md", "FAITHFULNESS.md", "book/*.md", "book/reference/*.md"]),
}


def problems(path: Path, lines: Iterator[Line]) -> list[str]:
    found = []
    for number, line in lines:
        for pattern, allowed in forbidden_words:
            for word in pattern.findall(allowed.sub(" ", line) if allowed else line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {word!r} in: {line.strip()[:100]}")
    return found


forbidden_words = forbidden()


@pytest.mark.parametrize("kind", READERS)
def test_forbidden_words(kind: str) -> None:
    read, patterns = READERS[kind]
    table = GLOSSARY.read_text(encoding="utf-8").partition("## Words we do not use")[2]
    found = []
    for path in files(*patterns):
        lines = read(path)
        if path == GLOSSARY:  # the table itself holds the words
            lines = (line for line in lines if line[1] not in table)
        found += problems(path, lines)
    assert found == [], "\n" + "\n".join(found)


def test_the_words_are_found(tmp_path: Path) -> None:
    """What the test reads: docstrings, messages with expressions in them, comments; and what it leaves alone."""
    assert len(forbidden_words) > 20
    path = ROOT / "module.py"
    words = [
        line for line in ("a partner of x", "chance level", "a kind of model", "hidden_dim", "the network says so")
    ]
    assert len(problems(path, enumerate(words))) == 3
    module = tmp_path / "module.py"
    module.write_text('"""A picture."""\nx = f"{partner} of the pictures"  # right answer\npicture = 1\n')
    assert [number for number, _ in python_lines(module)] == [1, 2, 2]
