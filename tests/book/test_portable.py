"""Portable notebooks hold no MyST, number as the site does, and run with only the wheel installed."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import nbformat
import pytest
from filelock import FileLock

from sslbook import UserError, tools
from sslbook.notebook import numbering
from sslbook.notebook.portable import build, colab, kaggle, myst, name_of
from sslbook.notebook.portable.citations import Citations
from sslbook.notebook.portable.labels import Labels
from sslbook.notebook.portable.plain import details
from sslbook.notebook.portable.solutions import bound, rename, stubs
from sslbook.notebook.portable.sources import has_code
from tests.test_packaging import build_wheel

ROOT = Path(__file__).parents[2]
LABELS = Labels(ROOT)
PAGES = [name for name, page in LABELS.pages.items() if has_code(page)]
SECONDS_A_CELL = 600  # only against a cell that hangs

each_page = pytest.mark.parametrize("name", PAGES)


@functools.cache
def portable(name: str) -> Any:
    return build.portable(LABELS.pages[name], LABELS)


def markdown(notebook: Any) -> str:
    """All Markdown of a notebook, without fences and spans of code, in which braces and colons mean nothing."""
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", re.sub(r"^```\w*\n.*?^```$", "", text, flags=re.M | re.S))


# -- the book's notebooks ----------------------------------------------------------------------------------------------


def test_every_chapter_has_a_notebook():
    assert {f"book/chapters/{name}/chapter" for name in numbering.chapters(ROOT / "book")} <= set(PAGES)
    numbered = [page.name for page in LABELS.pages.values() if page.chapter and page.name.endswith("/chapter")]
    assert [name.split("/")[2] for name in numbered] == list(numbering.chapters(ROOT / "book"))
    assert [LABELS.pages[name].chapter for name in numbered] == list(range(1, len(numbered) + 1))


@pytest.mark.slow
@each_page
def test_notebook_is_valid_and_without_myst(name: str):
    notebook = portable(name)
    nbformat.validate(notebook)
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    left = {
        "directive": re.findall(r"(?:```|~~~|:::)+ *\{.*", text),
        "role": re.findall(r"\{[\w:+-]+\}`+[^`]*`", text),
        "fence": re.findall(r"^ *:::.*", markdown(notebook), re.M),
        "label": re.findall(r"^\([\w:.-]+\)=.*", text, re.M),
        "label of a formula": re.findall(r"\$\$ *\([\w:.-]+\)", text),
        "option": re.findall(r"^:[a-z-]+:.*", markdown(notebook), re.M),
        "substitution": re.findall(r"\{\{.*?\}\}", re.sub(r"\$.*?\$", "", markdown(notebook), flags=re.S)),
        "comment or break": re.findall(r"^(?:%|\+\+\+).*", markdown(notebook), re.M),
        "link to a file": re.findall(r"\]\((?!https?:|#|data:|mailto:)[^)]*\)", markdown(notebook)),
    }
    assert {kind: found for kind, found in left.items() if found} == {}


@each_page
def test_numbers_of_equations_and_exercises_are_consecutive(name: str):
    text = markdown(portable(name))
    page = LABELS.pages[name]
    for pattern in (r"\\tag\{([\d.]+)\}", r"^(?:### |\*\*)Exercise ([\d.]+)\b", r"\*\*Proposition ([\d.]+)\*\*"):
        numbers = [number.rstrip(".") for number in re.findall(pattern, text, re.M)]
        if page.chapter:
            assert numbers == [f"{page.chapter}.{i}" for i in range(1, len(numbers) + 1)]
    if page.chapter:
        assert re.findall(r"\\tag\{", text), "a chapter has numbered equations"


@each_page
def test_every_formula_and_every_fold_is_closed(name: str):
    for cell in portable(name).cells:
        if cell.cell_type == "markdown":
            assert cell.source.count("$$") % 2 == 0
            assert cell.source.count("<details>") == cell.source.count("</details>")
            split = [line for line in cell.source.split("\n") if line.startswith("> ") and line.count("$$") % 2]
            assert split == [], "Jupyter would take the next line's > for a part of the formula"


@each_page
def test_title_and_install_cell_come_first(name: str):
    notebook = portable(name)
    title, install = notebook.cells[:2]
    assert title.source.startswith("# ")
    assert colab(name) in title.source
    assert kaggle(name) in title.source
    assert "sslbook @ git+https://" in install.source
    installs = [i for i, cell in enumerate(notebook.cells) if re.search(r"\bpip\b.*\binstall\b", cell.source)]
    assert installs == [1]
    assert len(re.findall(r"^# ", markdown(notebook), re.M)) == 1


@each_page
def test_no_solution_rebinds_what_the_reader_writes(name: str):
    code = [cell for cell in portable(name).cells if cell.cell_type == "code"]
    solutions = [cell for cell in code if cell.source.startswith("# @title Solution")]
    left = set().union(*(stubs(cell.source) for cell in code if cell not in solutions))
    assert left or not solutions
    for cell in solutions:
        assert bound(cell.source) & left == set()
        assert cell.metadata["jupyter"] == {"source_hidden": True, "outputs_hidden": True}


@each_page
def test_run_all_never_stops(name: str):
    assert not [cell for cell in portable(name).cells if "raises-exception" in cell.metadata.get("tags", [])]


@each_page
def test_tags_that_fold_become_what_colab_kaggle_and_jupyter_fold(name: str):
    page = LABELS.pages[name]
    if page.path.suffix != ".ipynb":
        pytest.skip("Markdown, without outputs")
    made = {cell.source.split("\n", 1)[-1]: cell for cell in portable(name).cells if cell.cell_type == "code"}
    made |= {cell.source: cell for cell in portable(name).cells if cell.cell_type == "code"}
    for cell in nbformat.read(page.path, as_version=4).cells:
        tags = set(cell.metadata.get("tags", []))
        if cell.cell_type == "code" and tags & {"hide-output", "remove-output", "hide-cell"}:
            metadata = made[cell.source].metadata
            assert metadata["collapsed"]
            assert metadata["jupyter"]["outputs_hidden"]
            assert metadata["_kg_hide-output"]
        if cell.cell_type == "code" and tags & {"hide-input", "remove-input", "hide-cell"}:
            metadata = made[cell.source].metadata
            assert metadata["cellView"] == "form"
            assert metadata["jupyter"]["source_hidden"]
            assert metadata["_kg_hide-input"]


# -- the rules, on a small book ----------------------------------------------------------------------------------------

TOC = """
root: book/intro
parts:
- caption: Chapters
  numbered: 2
  chapters:
  - file: book/chapters/first/chapter
  - file: book/chapters/second/chapter
- caption: Reference
  chapters:
  - file: book/reference/glossary
  - file: book/background/background
"""
FIRST = """\
(ch-one)=
# One

$$ a = b $$ (eq-one)
"""
SECOND = [
    """\
(ch-two)=
# Two

Words before.
""",
    """\
(sec-toy)=
## A toy

% a comment of the source
See {eq}`eq-two`, {eq}`eq-one`, {ref}`sec-toy`, {doc}`../first/chapter`, {term}`views <view>` and {prf:ref}`prf-two`;
`{eq}` and $\\{x\\}`$ stay. {cite:t}`chen2020simclr` and {cite:p}`chen2020mocov2,he2020moco`. {fig}`second.circle`.

:::{admonition} Predict first
:class: tip

$$
x =
y
$$ (eq-two)

Then?
:::

```{prf:proposition} A title
:label: prf-two

Text.
```

```{prf:proof}
$$
1 = 1
$$
```
""",
    """\
## Exercises

```{exercise} The sum
:label: ex-two-sum

Write it, from {eq}`eq-two`.
```

```{dropdown} Hint 1
Use `+`.
```
""",
    """\
```{solution-start} ex-two-sum
:class: dropdown
```

Add them.
""",
    """\
```{solution-end}
```

````{solution} ex-two-sum
:class: dropdown

```python
one + two
```
````
""",
]
STUB = 'def total(a, b):\n    """The sum."""\n    return ...\n\n\ntotal(1, 2)'
SOLUTION = "def total(a, b):\n    return sum([a, b])\n\n\nassert total(1, 2) == 3"
BACKGROUND = """\
---
kernelspec: {name: python3}
---
# Background

Text.

```{code-cell} ipython3
:tags: [hide-output]
print("three")
```

After.

```python
assert 1 + 1 == 2
```
"""


@pytest.fixture
def small(tmp_path: Path) -> Labels:
    """The labels of a book of two chapters, a glossary and a page of Markdown with code."""

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    v4 = nbformat.v4
    write("_toc.yml", TOC)
    write("book/intro.md", "# Intro\n")
    write("book/references.bib", (ROOT / "book" / "references.bib").read_text())
    write("book/chapters/__init__.py", 'CHAPTERS = ("first", "second")\n')
    write("book/chapters/first/figures.py", "FIGURES = ()\n")
    write("book/chapters/second/figures.py", 'FIGURES = ("second.schematic", "second.circle")\n')
    write("book/reference/glossary.md", "# Glossary\n\n```{glossary}\nview\n  One of two.\n```\n")
    write("book/background/background.md", BACKGROUND)
    write("book/chapters/first/chapter.ipynb", nbformat.writes(v4.new_notebook(cells=[v4.new_markdown_cell(FIRST)])))
    code = v4.new_code_cell
    predict = code("predict('?', {'a': 'b'}, answer='a')", metadata={"tags": ["hide-input"]})
    settles = code("print(3)", metadata={"tags": ["hide-output"]}, outputs=[v4.new_output("stream", text="3\n")])
    installs = code("%pip install sslbook", metadata={"tags": ["remove-cell"]})
    setup = code("import sslbook\n\nsslbook.default_device()")
    texts = [v4.new_markdown_cell(text) for text in SECOND]
    cells = [texts[0], installs, setup, texts[1], predict, settles, texts[2], code(STUB), texts[3], code(SOLUTION)]
    write("book/chapters/second/chapter.ipynb", nbformat.writes(v4.new_notebook(cells=[*cells, texts[4]])))
    return Labels(tmp_path)


def cells(small: Labels, page: str = "book/chapters/second/chapter") -> list[Any]:
    notebook = build.portable(small.pages[page], small, site="https://book.org")
    nbformat.validate(notebook)
    return notebook.cells


def test_references_become_text_with_the_sites_numbers(small: Labels):
    text = cells(small)[4].source
    assert text.startswith("## 2.1. A toy\n\nSee (2.1), [(1.1)](https://book.org/book/chapters/first/chapter.html#")
    assert "equation-eq-one), A toy, [One](https://book.org/book/chapters/first/chapter.html)" in text
    assert "[views](https://book.org/book/reference/glossary.html#term-view) and Proposition 2.1;" in text
    assert "`{eq}` and $\\{x\\}`$ stay." in text
    assert "[Chen et al. (2020a)](https://arxiv.org/abs/2002.05709)" in text
    assert "([Chen et al., 2020b](https://arxiv.org/abs/2003.04297); [He et al., 2020](" in text
    assert "Figure 2.2." in text
    assert "a comment" not in text
    assert "> **Predict first**\n>\n> $$ x = y \\tag{2.1} $$\n>\n> Then?" in text
    assert "> **Proposition 2.1** (A title)\n>\n> Text." in text
    assert "> *Proof.*\n>\n> $$ 1 = 1 $$" in text


def test_exercises_hints_and_solutions(small: Labels):
    found = cells(small)
    exercise, stub, solution, code, last = found[7:12]
    assert exercise.source.startswith("## 2.2. Exercises\n\n### Exercise 2.1. The sum\n\nWrite it, from (2.1).")
    assert "<summary><b>Hint 1</b></summary>\n\nUse `+`.\n\n</details>" in exercise.source
    assert stub.source == STUB
    assert solution.source == details("Solution to exercise 2.1", "Add them.")
    assert code.source.startswith("# @title Solution to exercise 2.1\ndef total_solution(a, b):")
    assert last.source == details("Solution to exercise 2.1", "```python\none + two\n```")
    names: dict[str, Any] = {}
    exec(stub.source, names)
    mine = names["total"]
    exec(code.source, names)
    assert names["total"] is mine
    assert names["total_solution"](1, 2) == 3


def test_cells_are_folded_for_every_frontend(small: Labels):
    setup, predict, settles = (cells(small)[i] for i in (3, 5, 6))
    assert setup.metadata == {}
    assert predict.source.startswith("# @title Predict first\npredict(")
    assert predict.metadata == build.INPUT_HIDDEN
    assert settles.metadata == build.OUTPUT_HIDDEN
    assert settles.outputs[0]["text"] == "3\n"


@pytest.mark.parametrize(
    ("source", "title"),
    [
        ("predict(\n    '?', {}, answer='a')", "Predict first"),
        ("import math\nfrom torch import nn", "Imports"),
        ("plots.grid(images, alt='Four images.')", "The code of the figure"),
        ("from sslbook.book.chapters.mae import figures\n\nfigures.schematic()", "The code of the figure"),
        ("table = 3", "Code to skip"),
    ],
)
def test_a_folded_cell_says_what_it_is(source: str, title: str):
    assert build.fold_title(source) == title


def test_a_gpu_is_asked_for_where_the_chapter_uses_one(small: Labels):
    second, first = (
        build.portable(small.pages[f"book/chapters/{name}/chapter"], small) for name in ("second", "first")
    )
    assert second.metadata["accelerator"] == "GPU"
    assert "accelerator" not in first.metadata


def test_markdown_with_cells_becomes_a_notebook(small: Labels):
    title, install, text, code, after, fence = cells(small, "book/background/background")
    assert title.source.startswith("# Background\n")
    assert "importlib" in install.source
    assert (text.source, after.source) == ("Text.", "After.")
    assert code.source == 'print("three")'
    assert fence.source == "assert 1 + 1 == 2"
    assert code.metadata == build.OUTPUT_HIDDEN


def test_references_end_the_notebook(small: Labels):
    text = cells(small)[-1].source
    lines = text.split("\n")
    assert lines[:2] == ["## References", ""]
    assert [re.search(r"\((\d+\w?)\)", line)[1] for line in lines[2:]] == ["2020a", "2020b", "2020"]
    assert "A Simple Framework for Contrastive Learning of Visual Representations" in lines[2]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("```{mermaid}\na\n```", "directive {mermaid}"),
        ("{nowhere}`x`", "role {nowhere}"),
        ("{eq}`eq-tow`", "eq-two"),
        ("{doc}`../third/chapter`", "no page ../third/chapter"),
        ("{term}`veiw`", "veiw"),
        ("{fig}`second.circel`", "second.circle"),
        ("{cite:t}`chen2020simclrr`", "chen2020simclr"),
    ],
)
def test_what_no_rule_knows_is_named(small: Labels, source: str, message: str):
    page = small.pages["book/chapters/second/chapter"]
    writer = myst.Writer(page, small, Citations(small.root / "book" / "references.bib", []), "https://book.org")
    with pytest.raises(UserError, match=re.escape(message)):
        writer.markdown(source)


def test_rename_changes_the_name_and_nothing_else():
    source = "def f(x):\n    return 2 * f(x - 1)  # f calls f\n\n\ncheck.f(f)\nprint('f', f=f)"
    expected = "def f_solution(x):\n    return 2 * f_solution(x - 1)  # f calls f\n\n\n"
    assert rename(source, {"f", "g"}) == expected + "check.f(f_solution)\nprint('f', f=f_solution)"
    assert rename("y = f(1)", {"f"}) == "y = f(1)"


def test_the_command_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        tools.main(["portable", "--out", str(tmp_path)])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_the_command_writes_notebooks_and_a_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tools.main(["portable", "--out", str(tmp_path / "made"), "--revision", "v9"])
    written = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert written == sorted(["README.md", *(f"{name}.ipynb" for name in map(name_of, PAGES))])
    again = (tmp_path / "made" / "simclr.ipynb").stat().st_mtime_ns
    tools.main(["portable", "--out", str(tmp_path / "made"), "--revision", "v9"])  # its own are written anew
    assert (tmp_path / "made" / "simclr.ipynb").stat().st_mtime_ns > again
    assert f"{tmp_path}/made/simclr.ipynb" in capsys.readouterr().out
    assert "sslbook@v9" in json.dumps(json.loads((tmp_path / "made" / "simclr.ipynb").read_text()))
    assert (tmp_path / "made" / "README.md").read_text().count("colab.research.google.com") == len(PAGES)


# -- the install cell --------------------------------------------------------------------------------------------------


class Pip:
    """Stands for `subprocess.run`, and remembers the command and the constraints."""

    def __init__(self, status: int = 0):
        self.status, self.commands, self.constraints = status, [], []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess:
        self.commands.append(command)
        self.constraints.append(Path(command[command.index("-c") + 1]).read_text().split())
        return subprocess.CompletedProcess(command, self.status, "", "no route to host")


def install(monkeypatch: pytest.MonkeyPatch, present: bool, installed: dict[str, str], status: int = 0) -> Pip:
    import importlib.metadata
    import importlib.util

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    pip = Pip(status)
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if present or name != "sslbook" else None)
    monkeypatch.setattr(subprocess, "run", pip)
    exec(build.INSTALL.replace("{source}", "sslbook @ git+https://book.org"), {})
    return pip


def test_install_cell_does_nothing_where_sslbook_is(monkeypatch: pytest.MonkeyPatch):
    assert install(monkeypatch, present=True, installed={"torch": "2.11.0"}).commands == []


def test_install_cell_pins_torch_and_numpy(monkeypatch: pytest.MonkeyPatch):
    installed = {"torch": "2.11.0+cu128", "torchvision": "0.26.0+cu128", "numpy": "2.0.2", "pillow": "11.0"}
    pip = install(monkeypatch, present=False, installed=installed)
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-1] == "sslbook @ git+https://book.org"
    assert not {"-U", "--upgrade", "--force-reinstall"} & set(command)
    assert pip.constraints == [["torch==2.11.0+cu128", "torchvision==0.26.0+cu128", "numpy==2.0.2"]]


def test_install_cell_says_what_to_do_when_it_fails(monkeypatch: pytest.MonkeyPatch, capsys):
    with pytest.raises(RuntimeError, match="Internet"):
        install(monkeypatch, present=False, installed={}, status=1)
    assert "no route to host" in capsys.readouterr().out


# -- only the wheel ----------------------------------------------------------------------------------------------------

RUN = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
asked = nbformat.v4.new_code_cell("import sslbook, torch\\n(sslbook.__file__, torch.__version__)")
notebook.cells.append(asked)
NotebookClient(notebook, timeout=int(sys.argv[2]), kernel_name="python3").execute()
# The value, not what is printed: a thread of an earlier cell may print meanwhile.
(value,) = [output for output in notebook.cells[-1].outputs if output.output_type == "execute_result"]
print(" ".join(value["data"]["text/plain"].split()))  # a long one is broken into lines
"""


def alone(folder: Path) -> dict[str, str]:
    """The environment of a process that knows no checkout, no data and no settings of Jupyter."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SSLBOOK_DATA", "VIRTUAL_ENV")}
    own = {name: str(folder / "jupyter") for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    return {**kept, **own, "SSLBOOK_PROFILE": "smoke", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="session")
def wheel_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that the install cell has made: this one's packages, and sslbook from the wheel.

    Nothing is downloaded: the packages are links to this environment's. All processes of pytest share it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "only-the-wheel"
    python = folder / "environment" / "bin" / "python"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()
            wheel = build_wheel(folder)
            words = [sys.executable, "-m", "venv", "--without-pip", str(folder / "environment")]
            subprocess.run(words, check=True, capture_output=True)
            find = "import sysconfig; print(sysconfig.get_path('purelib'))"
            (site,) = subprocess.run([python, "-c", find], check=True, capture_output=True, text=True).stdout.split()
            for path in Path(sysconfig.get_path("purelib")).iterdir():
                if "sslbook" not in path.name:
                    (Path(site) / path.name).symlink_to(path)
            cell = build.INSTALL.replace("{source}", str(wheel))
            done = subprocess.run([python, "-c", cell], cwd=folder, env=alone(folder), capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            (folder / "done").touch()
    return python


@pytest.mark.slow
@each_page
def test_notebook_runs_with_only_the_wheel(name: str, wheel_python: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    path = tmp_path / "notebook.ipynb"
    path.write_text(nbformat.writes(portable(name)), encoding="utf-8")
    command = [wheel_python, "-c", RUN, str(path), str(SECONDS_A_CELL)]
    run = subprocess.run(command, cwd=tmp_path / "empty", env=alone(tmp_path), capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    file, torch_version = ast.literal_eval(run.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(wheel_python.parents[1])
    assert not Path(file).is_relative_to(ROOT)
    assert torch_version == str(__import__("torch").__version__)
