"""Buttons on every page with code: open its portable notebook in Colab or Kaggle, or download it for Jupyter.

The theme's own button for Colab opens the source, whose MyST Colab shows as plain markup. These open what
`python -m sslbook.tools portable` makes. The notebooks are also written into the site, in `notebooks/`.
"""

from pathlib import Path
from typing import Any

from sslbook.notebook import portable
from sslbook.notebook.portable import build
from sslbook.notebook.portable.labels import Labels
from sslbook.notebook.portable.sources import has_code


def _buttons(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    listed = app.sslbook_labels.pages.get(page)
    if listed is None or not has_code(listed):
        return
    download = context["pathto"](f"notebooks/{portable.name_of(page)}.ipynb", 1)
    buttons = [
        ("Colab", "Open in Colab", portable.colab(page), "_static/images/logo_colab.png"),
        ("Kaggle", "Open in Kaggle", portable.kaggle(page), "fab fa-kaggle"),
        ("Jupyter", "Download the notebook", download, "fas fa-download"),
    ]
    links = [{"type": "link", "text": t, "tooltip": tip, "url": url, "icon": icon} for t, tip, url, icon in buttons]
    group = {"type": "group", "tooltip": "Run this page", "icon": "fas fa-rocket", "label": "launch-buttons"}
    context["header_buttons"].insert(0, {**group, "buttons": links})


def _read_labels(app: Any) -> None:
    app.sslbook_labels = Labels(Path(app.srcdir))


def _write_notebooks(app: Any, exception: Exception | None) -> None:
    if exception is None and app.builder.format == "html":
        folder = Path(app.outdir) / "notebooks"
        folder.mkdir(exist_ok=True)
        for page in filter(has_code, app.sslbook_labels.pages.values()):
            build.write(build.portable(page, app.sslbook_labels), folder / f"{portable.name_of(page.name)}.ipynb")


def setup(app: Any) -> dict[str, Any]:
    app.connect("builder-inited", _read_labels)
    app.connect("html-page-context", _buttons, priority=502)  # after the theme's own
    app.connect("build-finished", _write_notebooks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
