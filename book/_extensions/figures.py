"""The role `{fig}`: "Figure 3.2", linked to the figure in its chapter.

The number comes from the chapters' lists (`sslbook.notebook.numbering`), which a figure's caption reads too. A name that
no list has is a warning, and so, under `-W`, an error.
"""

from pathlib import Path
from typing import Any

from docutils import nodes

from sslbook.errors import UserError
from sslbook.notebook import numbering

Reply = tuple[list[nodes.Node], list[nodes.system_message]]


def _fig(
    role: str, rawtext: str, text: str, lineno: int, inliner: Any, options: Any = None, content: Any = ()
) -> Reply:
    environment = inliner.document.settings.env
    book = Path(environment.srcdir) / "book"
    try:
        label = f"Figure {numbering.number(text, book)}"
        page = f"book/chapters/{numbering.chapter_of(text, book)}/chapter"
    except UserError as error:
        message = inliner.reporter.warning(str(error), line=lineno)
        return [nodes.literal(rawtext, text)], [message]
    here = environment.docname
    address = environment.app.builder.get_relative_uri(here, page) if page != here else ""
    reference = nodes.reference(rawtext, label, refuri=f"{address}#{numbering.anchor(text)}", internal=True)
    return [reference], []


def setup(app: Any) -> dict[str, Any]:
    app.add_role("fig", _fig)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
