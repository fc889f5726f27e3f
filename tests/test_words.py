"""One word, one meaning: docstrings, messages, recipes, chapters and pages use the field's words.

The words that are kept out stand in `book/reference/glossary.md`, in the table "Words we do not use".
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "book" / "reference" / "glossary.md"
HEADING = "## Words we do not use"

Text = tuple[int, str]  # line at which it begins (in a notebook: number of the cell), text


def forbidden() -> list[tuple[re.Pattern, re.Pattern | None]]:
    """Patterns of words, each with the phrases in which it is right; from the glossary's table."""
    table = GLOSSARY.read_text(encoding="utf-8").partition(HEADING)[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    found = []
    for _, words, phrases in rows[1:]:
        either = "|".join(re.escape(word.strip()).replace(r"\ ", r"\s+") for word in words.split(","))
        allowed = "|".join(re.escape(phrase.strip()).replace(r"\ ", r"\s+") for phrase in phrases.split(",") if phrase)
        found.append(
            (re.compile(rf"\b(?:{either})\b", re.I), re.compile(rf"\b(?:{allowed})\b", re.I) if allowed else None)
        )
    return found


def python_texts(path: Path) -> Iterator[Text]:
    """Comments and the text of strings; in f-strings without the expressions."""
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.search(r"\s", node.value):
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def names_of_tests(path: Path) -> Iterator[Text]:
    """The words of the names of tests."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.lineno, node.name.replace("_", " ")


def notebook_texts(path: Path) -> Iterator[Text]:
    """The sources of all cells and the text that they printed, without the lines that say where a result comes from."""
    for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        yield i, "".join(cell["source"])
        for output in cell.get("outputs", []):
            shown = "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/plain", ""))
            yield i, re.sub(r"^book/results/.*", "", shown, flags=re.M)


def page_texts(path: Path) -> Iterator[Text]:
    """A page without the lines that say where a result comes from; the glossary without its table of these words."""
    text = path.read_text(encoding="utf-8").partition(HEADING if path == GLOSSARY else "\0")[0]
    yield 1, re.sub(r"^book/results/.*", "", text, flags=re.M)


def recipe_texts(path: Path) -> Iterator[Text]:
    """The comments of a recipe."""
    yield 1, "\n".join(line.partition("#")[2] for line in path.read_text(encoding="utf-8").split("\n"))


def files(*patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern)) if "_build" not in path.parts]


READERS = {
    "package": (python_texts, ["sslbook/**/*.py", "benchmarks/*.py", "data_scripts/*.py", "book/**/*.py"]),
    "recipes": (recipe_texts, ["sslbook/recipes/**/*.yaml"]),
    "tests": (names_of_tests, ["tests/**/test_*.py"]),
    "chapters": (notebook_texts, ["book/chapters/*/chapter.ipynb"]),
    "pages": (
        page_texts,
        ["README.md", "CONTRIBUTING.md", "FAITHFULNESS.md", "book/*.md", "book/background/*.md", "book/reference/*.md"],
    ),
}


def problems(path: Path, texts: Iterable[Text]) -> list[str]:
    """One line for every word that should not be there: file, line, word and its surroundings."""
    found = []
    for first, text in texts:
        for pattern, allowed in FORBIDDEN:
            right = [match.span() for match in allowed.finditer(text)] if allowed else []
            for match in pattern.finditer(text):
                if not any(start <= match.start() and match.end() <= end for start, end in right):
                    line = first + (0 if path.suffix == ".ipynb" else text.count("\n", 0, match.start()))
                    around = " ".join(text[max(0, match.start() - 40) : match.end() + 40].split())
                    found.append(f"{path.relative_to(ROOT)}:{line}: {match[0]!r} in: {around}")
    return found


FORBIDDEN = forbidden()


@pytest.mark.parametrize("kind", READERS)
def test_forbidden_words(kind: str) -> None:
    read, patterns = READERS[kind]
    found = [problem for path in files(*patterns) for problem in problems(path, read(path))]
    assert found == [], "\n" + "\n".join(found)


def test_words_are_found_and_true_uses_are_not(tmp_path: Path) -> None:
    assert len(FORBIDDEN) > 20
    texts = ["a partner of x", "world size", "standard\ndeviation", "hidden_dim", "one\ntwo deviations", "Pictures"]
    found = problems(ROOT / "module.py", enumerate(texts, start=1))
    assert [problem.split(": ")[:2] for problem in found] == [
        ["module.py:1", "'partner' in"],
        ["module.py:6", "'deviations' in"],
        ["module.py:6", "'Pictures' in"],
    ]
    module = tmp_path / "module.py"
    module.write_text('"""A picture."""\nx = f"{partner} of the pictures"  # right answer\npicture = "picture"\n')
    assert list(python_texts(module)) == [(1, "A picture."), (2, " of the pictures"), (2, "# right answer")]
