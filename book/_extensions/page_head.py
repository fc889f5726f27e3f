"""The head of every page: its description, the preview that other sites show of it, and a quiet console.

A chapter is described by the question on its card, any other page by its first paragraph. The preview's image needs an
absolute address, so it appears only where `html_baseurl` is set.
"""

import html
import re
from typing import Any

from docutils import nodes

IMAGE = "_static/social.png"
IMAGE_TEXT = "Two views of an image go through one network; their features should agree."
# The theme and sphinx-togglebutton report each of their steps. Everything else still reaches the console, and an error
# of theirs does too: the theme's complaint about an empty mode has its cause removed instead.
QUIET = """<script>
  if (!localStorage.getItem("mode")) localStorage.setItem("mode", "auto");
  console.log = (log => (...what) => /^\\[(PST|togglebutton)\\]/.test(what[0]) || log(...what))(console.log);
</script>"""


def plain(node: nodes.Node) -> str:
    """The text of a node without its formulas."""
    text = "".join("…" if isinstance(n.parent, nodes.math) else n.astext() for n in node.findall(nodes.Text))
    return " ".join(text.split())


def description(doctree: nodes.document, length: int = 200) -> str:
    """The question of a chapter, else the first paragraph, cut between two words."""
    paragraphs = [plain(p) for p in doctree.findall(nodes.paragraph)]
    questions = [p.removeprefix("Question. ") for p in paragraphs if p.startswith("Question. ")]
    text = next(iter(questions + [p for p in paragraphs if p]), "")
    return text if len(text) <= length else text[: text.rindex(" ", 0, length)].rstrip(",;:") + " …"


def tags(title: str, text: str, address: str | None, image: str | None, article: bool) -> str:
    """The meta elements of a page."""
    named = {"description": text, "twitter:card": "summary_large_image" if image else "summary"}
    properties = {
        "og:type": "article" if article else "website",
        "og:title": title,
        "og:description": text,
        "og:url": address,
        "og:image": image,
        "og:image:alt": IMAGE_TEXT if image else None,
    }
    lines = [f'<meta name="{k}" content="{html.escape(v)}">' for k, v in named.items() if v]
    lines += [f'<meta property="{k}" content="{html.escape(v)}">' for k, v in properties.items() if v]
    return "\n".join(lines)


def _fill(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    base = app.config.html_baseurl.rstrip("/")
    image = f"{base}/{IMAGE}" if base else None
    address = f"{base}/{app.builder.get_target_uri(page)}" if base else None
    title = html.unescape(re.sub(r"<[^>]*>", "", context.get("title") or app.config.html_title))
    text = description(doctree) if doctree is not None else ""
    made = tags(title, text, address, image, article=page != app.config.root_doc)
    context["metatags"] = f"{context.get('metatags', '')}\n{made}\n{QUIET}\n"


def setup(app: Any) -> dict[str, Any]:
    app.connect("html-page-context", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
