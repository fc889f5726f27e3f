"""One page of the book as a notebook for Colab, Kaggle and Jupyter."""

import json
import re
from pathlib import Path
from typing import Any

from sslbook.errors import UserError
from sslbook.notebook.portable import REPOSITORY, SITE, colab, kaggle
from sslbook.notebook.portable.citations import Citations
from sslbook.notebook.portable.labels import Labels, Page
from sslbook.notebook.portable.myst import Writer
from sslbook.notebook.portable.solutions import rename
from sslbook.notebook.portable.sources import cells_of, installs, unwritten

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
    source = cells_of(page)
    citations = Citations(labels.root / "book" / "references.bib", page.markdown())
    writer = Writer(page, labels, citations, site)
    stubs = unwritten(source)
    cells, gpu = [], False
    for cell in source:
        if cell["cell_type"] == "markdown":
            text = writer.markdown("".join(cell["source"]))
            if text:
                cells.append(v4.new_markdown_cell(text))
        elif cell["cell_type"] == "code" and not installs(cell):
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
    title = fold_title(source)
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


def fold_title(source: str) -> str:
    """What stands on a folded cell."""
    if re.search(r"^predict\(", source, re.M):
        return "Predict first"
    if re.search(r"\b(caption|alt)=|\bfigures\.\w+\(", source):
        return "The code of the figure"
    return "Imports" if re.match(r"(import|from) ", source) else "Code to skip"


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
