"""Take sphinx-thebe's scripts off every page.

Jupyter Book 1 always loads sphinx-thebe, which puts its script in twice (the second raises in the browser's console)
and knows only a copy of thebe on a content network. The pages of this book need neither.
"""

from typing import Any


def _without_thebe(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    for key in ("script_files", "css_files"):
        context[key] = [
            file
            for file in context.get(key, [])
            if "thebe" not in str(getattr(file, "filename", file) or "").lower()
            and "THEBE_JS_URL" not in getattr(file, "attributes", {}).get("body", "")
        ]


def setup(app: Any) -> dict[str, Any]:
    app.connect("html-page-context", _without_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
