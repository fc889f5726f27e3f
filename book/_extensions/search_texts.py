"""Texts for the summaries below search results, as a script that works from a disk.

Sphinx's own summaries fetch every page that was found, which a browser refuses for `file://`, and show formulas as raw
TeX. Here the prose of all sections lies in `_static/search_texts.js`, and `search.js` takes the summaries from it.
"""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

SKIPPED = {"script", "style", "pre", "button", "nav", "svg", "input", "h1", "h2", "h3", "h4"}
SKIPPED_CLASSES = {"headerlink", "eqno", "toggle-details", "sslbook-origin", "copybtn"}
BREAKS = {"p", "li", "td", "th", "dt", "dd", "div", "section", "summary", "figcaption", "br", "tr"}
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Sections(HTMLParser):
    """The prose of a page by section: `texts` maps an anchor to what stands in it outside its subsections."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.open: list[tuple[str, str | None, bool]] = []  # tag, section that it opens, whether it is skipped
        self.inside = False  # the article

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        classes = set((given.get("class") or "").split())
        self.inside |= tag == "article"
        if tag in BREAKS:
            self.handle_data(" ")
        if tag in VOID:
            return
        section = given.get("id") if tag == "section" else None
        skipped = tag in SKIPPED or bool(classes & SKIPPED_CLASSES) or (tag == "div" and "math" in classes)
        self.open.append((tag, section, skipped))

    def handle_endtag(self, tag: str) -> None:
        while any(tag == t for t, *_ in self.open) and self.open.pop()[0] != tag:
            pass
        self.inside &= tag != "article"
        if tag in BREAKS:
            self.handle_data(" ")

    def handle_data(self, data: str) -> None:
        sections = [section for _, section, _ in self.open if section]
        if self.inside and sections and not any(skipped for *_, skipped in self.open):
            self.texts.setdefault(sections[-1], []).append(data)


def sections(page: str) -> list[tuple[str, str]]:
    """`(anchor, text)` of every section of an HTML page that has text."""
    parser = Sections()
    parser.feed(page)
    texts = {anchor: " ".join("".join(parts).split()) for anchor, parts in parser.texts.items()}
    return [(anchor, text) for anchor, text in texts.items() if text]


def _write(app: Any, exception: Exception | None) -> None:
    if exception is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    pages = {name: out / app.builder.get_target_uri(name) for name in sorted(app.env.found_docs)}
    texts = {name: sections(path.read_text(encoding="utf-8")) for name, path in pages.items() if path.is_file()}
    content = f"window.SEARCH_TEXTS = {json.dumps(texts, ensure_ascii=False, separators=(',', ':'))};\n"
    (out / "_static" / "search_texts.js").write_text(content, encoding="utf-8")


def _scripts(app: Any, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    if page == "search":
        app.add_js_file("search_texts.js", loading_method="defer")
        app.add_js_file("search.js", loading_method="defer")


def setup(app: Any) -> dict[str, Any]:
    app.connect("html-page-context", _scripts)
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
