"""One page of the book as a notebook for Colab, Kaggle and Jupyter."""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sslbook.errors import UserError
from sslbook.notebook.portable import REPOSITORY, SITE, blocks, colab, kaggle
from sslbook.notebook.portable.citations import Citations
from sslbook.notebook.portable.labels import Labels, Page, strip_front_matter
from sslbook.notebook.portable.myst import Writer

# Colab folds a cell with `@title` and cellView, Jupyter by `jupyter`, Kaggle by `_kg_hide-*`.
INPUT_HIDDEN = {"cellView": "form", "jupyter": {"source_hidden": True}, "_kg_hide-input": True}
OUTPUT_HIDDEN = {"collapsed": True, "jupyter": {"outputs_hidden": True}, "_kg_hide-output": True}

INSTALL = """\
# @title Install sslbook, where it is missing
import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile

SOURCE = "{source}"
if importlib.util.find_spec("sslbook") is None:
    pins = []  # what may not change: the versions that are installed
    for name in ("torch", "torchvision", "numpy"):
        try:
            pins.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    with tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False) as constraints:
        constraints.write("\\n".join(pins))
    command = [sys.executable, "-m", "pip", "install", "-q", "-c", constraints.name]
    done = subprocess.run([*command, SOURCE], capture_output=True, text=True)
    if done.returncode != 0:
        print(done.stderr)
        raise RuntimeError("sslbook could not be installed. In Kaggle, switch on Internet in the "
                           "settings; if torch is too old, choose a newer environment.")
    importlib.invalidate_caches()
"""


def has_code(page: Page) -> bool:
    """Whether a page is a notebook, or Markdown with cells."""
    if page.path.suffix == ".ipynb":
        return True
    return bool(re.search(r"^(```|:::)+\{code-cell\}", page.path.read_text(encoding="utf-8"), re.M))


def portable(page: Page, labels: Labels, site: str = SITE, revision: str = "main") -> Any:
    """The notebook of a page.

    Args:
        page: which page.
        labels: of the book.
        site: the address of the book's site.
        revision: branch, tag or commit of the package that the notebook installs.

    Raises:
        UserError: markup that no rule here knows, a reference to nothing, or nbformat is not installed.
    """
    try:
        from nbformat import v4
    except ImportError:
        raise UserError('notebooks need nbformat: pip install "sslbook[notebook]"') from None
    source = _cells(page)
    citations = Citations(labels.root / "book" / "references.bib", page.markdown())
    writer = Writer(page, labels, citations, site)
    stubs = _stubs(source)
    cells, gpu = [], False
    for cell in source:
        if cell["cell_type"] == "markdown":
            text = writer.markdown("".join(cell["source"]))
            if text:
                cells.append(v4.new_markdown_cell(text))
        elif cell["cell_type"] == "code" and not _installs(cell):
            cells.append(_code(v4, cell, writer, stubs))
            gpu = gpu or "default_device" in cell["source"]
    cells = [*_opening(v4, cells, writer, page, site, revision), *cells[1:]]
    if citations.cited:
        cells.append(v4.new_markdown_cell(f"## References\n\n{citations.references()}"))
    for i, cell in enumerate(cells):
        cell["id"] = f"cell-{i}"  # the same in every build
    return v4.new_notebook(cells=cells, metadata=_metadata(gpu))


def write(notebook: Any, path: Path) -> None:
    """Write a notebook, in the form that git compares well."""
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _opening(v4: Any, cells: list[Any], writer: Writer, page: Page, site: str, revision: str) -> list[Any]:
    """Title and badges, the install cell, and what else stood in the first cell."""
    title, rest = re.sub(r"\A# .*\n?", "", cells[0]["source"]).strip(), []
    if title:
        rest = [v4.new_markdown_cell(title)]
    head = (
        f"# {writer.title()}\n\n"
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab(page.name)}) "
        f"[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]({kaggle(page.name)})\n\n"
        f"From *Self-supervised learning for vision*. The [same page on the site]({site}/{page.name}.html) needs no "
        "kernel. Text CC BY 4.0, code MIT."
    )
    source = f"sslbook @ git+{REPOSITORY}@{revision}"
    install = v4.new_code_cell(INSTALL.replace("{source}", source).rstrip(), metadata=dict(INPUT_HIDDEN))
    return [v4.new_markdown_cell(head), install, *rest]


def _code(v4: Any, cell: dict[str, Any], writer: Writer, stubs: set[str]) -> Any:
    tags = set(cell["metadata"].get("tags", []))
    source, outputs = cell["source"], list(cell.get("outputs", []))
    metadata: dict[str, Any] = {"tags": ["raises-exception"]} if "raises-exception" in tags else {}
    hide_input = bool(tags & {"hide-input", "hide-cell", "remove-input", "remove-cell"})
    hide_output = bool(tags & {"hide-output", "hide-cell", "remove-output", "remove-cell"})
    title = "Predict first" if re.search(r"^predict\(", source, re.M) else "Code that need not be read"
    if writer.solution is not None:
        hide_input = hide_output = True
        title = f"Solution to {writer.shown(writer.solution)}"
        source = rename(source, stubs)
    if tags & {"remove-output", "remove-cell"}:
        outputs = []
    if hide_input:
        metadata = _merged(metadata, INPUT_HIDDEN)
        if not source.startswith("%%"):
            source = f"# @title {title}\n{source}"
    if hide_output:
        metadata = _merged(metadata, OUTPUT_HIDDEN)
    made = v4.new_code_cell(source, metadata=metadata)
    made["outputs"], made["execution_count"] = outputs, cell.get("execution_count") if outputs else None
    return made


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {**one, **other, "jupyter": {**one.get("jupyter", {}), **other["jupyter"]}}


def _metadata(gpu: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "colab": {"provenance": [], "toc_visible": True},
        "kaggle": {"isInternetEnabled": True, "language": "python", "sourceType": "notebook"},
    }
    if gpu:
        found["accelerator"] = "GPU"
        found["colab"]["gpuType"] = "T4"
        found["kaggle"] |= {"accelerator": "nvidiaTeslaT4", "isGpuEnabled": True}
    return found


def _installs(cell: dict[str, Any]) -> bool:
    return "remove-cell" in cell["metadata"].get("tags", []) and "pip install" in cell["source"]


# -- sources -----------------------------------------------------------------------------------------------------------


def _cells(page: Page) -> list[dict[str, Any]]:
    """The cells of a notebook, or of Markdown cut at its code cells."""
    import nbformat

    text = page.path.read_text(encoding="utf-8")
    if page.path.suffix == ".ipynb":
        return list(nbformat.reads(text, as_version=4).cells)
    cells: list[dict[str, Any]] = []
    written: list[str] = []
    lines = strip_front_matter(text).split("\n")
    at = 0
    while at < len(lines):
        match = blocks.FENCE.match(lines[at])
        if match and match[3].strip().startswith("{code-cell}"):
            cells.append({"cell_type": "markdown", "metadata": {}, "source": "\n".join(written)})
            (cell,) = blocks.blocks("\n".join(lines[at : (end := _closing(lines, at, match[2])) + 1]))
            assert isinstance(cell, blocks.Directive)
            tags = re.findall(r"[\w-]+", cell.options.get("tags", ""))
            cells.append({"cell_type": "code", "metadata": {"tags": tags}, "source": cell.body})
            written, at = [], end + 1
        else:
            end = _closing(lines, at, match[2]) if match else at
            written += lines[at : end + 1]
            at = end + 1
    return [*cells, {"cell_type": "markdown", "metadata": {}, "source": "\n".join(written)}]


def _closing(lines: list[str], at: int, marks: str) -> int:
    pattern = re.compile(rf"^ *{re.escape(marks[0])}{{{len(marks)},}}\s*$")
    return next((i for i in range(at + 1, len(lines)) if pattern.match(lines[i])), len(lines) - 1)


# -- solutions ---------------------------------------------------------------------------------------------------------


def tree(source: str) -> ast.Module:
    """A cell's syntax; lines that only IPython knows are left out."""
    plain = [("pass" if re.match(r"\s*[%!]", line) else line) for line in source.split("\n")]
    return ast.parse("\n".join(plain))


def bound(source: str) -> set[str]:
    """The names that a cell binds at its top level."""
    names: set[str] = set()
    for node in tree(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        else:
            names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return names


def stubs(source: str) -> set[str]:
    """The names that a cell leaves for the reader to write: functions that return `...`, and `name = ...`."""
    names: set[str] = set()
    for node in tree(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and any(map(_unwritten, ast.walk(node))):
            names.add(node.name)
        elif isinstance(node, ast.Assign) and _is_ellipsis(node.value):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def rename(source: str, names: Iterable[str]) -> str:
    """`source` with `NAME_solution` for every one of `names` that it binds, wherever it says NAME."""
    mine = bound(source) & set(names)
    if not mine:
        return source
    lines = source.split("\n")
    places = []
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Name) and node.id in mine:
            places.append((node.lineno, len(lines[node.lineno - 1].encode()[: node.col_offset].decode()), node.id))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in mine:
            line = lines[node.lineno - 1]
            places.append((node.lineno, line.index(node.name, line.index(" ", node.col_offset)), node.name))
    for row, column, name in sorted(places, reverse=True):
        line = lines[row - 1]
        lines[row - 1] = f"{line[:column]}{name}_solution{line[column + len(name) :]}"
    return "\n".join(lines)


def _unwritten(node: ast.AST) -> bool:
    if isinstance(node, ast.Return | ast.Expr) and node.value is not None:
        return _is_ellipsis(node.value)
    return isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node)


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def _stubs(cells: list[dict[str, Any]]) -> set[str]:
    """What all cells outside solutions leave to the reader."""
    names: set[str] = set()
    inside = False
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for block in blocks.blocks(cell["source"]):
                if isinstance(block, blocks.Directive) and block.name in ("solution-start", "solution-end"):
                    inside = block.name == "solution-start"
        elif cell["cell_type"] == "code" and not inside and not _installs(cell):
            names |= stubs(cell["source"])
    return names
