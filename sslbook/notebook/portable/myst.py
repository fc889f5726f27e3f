"""MyST to the Markdown that every notebook shows: quotes for boxes, `<details>` for what is folded, text for references.

Formulas in a quote stand on one line, since Jupyter would take the `>` before a further line for part of the formula.
"""

import html
import posixpath
import re
from collections import Counter
from pathlib import Path

from sslbook.errors import UserError
from sslbook.notebook import numbering
from sslbook.notebook.portable import REPOSITORY, blocks
from sslbook.notebook.portable.citations import Citations
from sslbook.notebook.portable.labels import COUNTED, PROOFS, Label, Labels, Page, section_number
from sslbook.notebook.portable.plain import capital, details, indented, quote, term_id

INLINE = re.compile(
    r"\{(?P<role>[a-z][\w:+-]*)\}(?P<ticks>`+)(?P<content>.+?)(?P=ticks)"
    r"|(?P<code>(?<!`)(?P<marks>`+)(?!`).+?(?<!`)(?P=marks)(?!`))"
    r"|(?P<math>(?<![\\$])\$(?!\$)[^$]+\$)"
    r"|\[\]\(#(?P<bare>[\w:.-]+)\)"
    r"|\]\((?P<href>[^)\s]+)\)",
    re.S,
)
WITH_TARGET = re.compile(r"^(?P<text>.*?)\s*<(?P<target>[^<>]+)>$", re.S)
BOXES = {
    "admonition",
    "note",
    "tip",
    "hint",
    "important",
    "warning",
    "caution",
    "attention",
    "danger",
    "error",
    "seealso",
}
SHOWN = ("fig", "eq", "ref", "numref", "prf:ref", "exercise")


class Writer:
    """Writes the Markdown of one page, cell after cell; a solution that is open at the end of a cell stays open.

    Args:
        page: which page.
        labels: of the book.
        citations: of the page.
        site: the address of the book's site.
    """

    def __init__(self, page: Page, labels: Labels, citations: Citations, site: str) -> None:
        self.page, self.labels, self.citations, self.site = page, labels, citations, site.rstrip("/")
        self.solution: str | None = None  # the label of the exercise whose solution is open
        self.sections = Counter[int]()
        self.section = ""  # the title of the last heading

    def markdown(self, source: str) -> str:
        """The plain Markdown of a cell."""
        written: list[str] = []
        folded: list[str] = []

        def close() -> None:
            if folded:
                written.append(details(f"Solution to {self.shown(self.solution or '')}", "\n\n".join(folded)))
            folded.clear()

        for block in blocks.blocks(source):
            if isinstance(block, blocks.Directive) and block.name == "solution-start":
                self.solution = block.argument
            elif isinstance(block, blocks.Directive) and block.name == "solution-end":
                close()
                self.solution = None
            else:
                (written if self.solution is None else folded).append(self._block(block, top=self.solution is None))
        close()
        return "\n\n".join(part for part in written if part)

    def title(self) -> str:
        """The page's title with its number, as its heading shows it."""
        number = f"{self.page.chapter}. " if self.page.chapter else ""
        return number + self.inline(self.page.title)

    def shown(self, label: str) -> str:
        """How the text names what has `label`: `(3.7)`, `exercise 3.1`, `Proposition 3.2`, or a section's title."""
        found = self.labels[label]
        if found.kind == "equation":
            return f"({found.number})"
        if found.kind == "exercise":
            return f"exercise {found.number}"
        return found.title if found.kind == "section" else f"{found.kind.capitalize()} {found.number}"

    # -- blocks --------------------------------------------------------------------------------------------------------

    def _block(self, block: blocks.Block, top: bool = False) -> str:
        if isinstance(block, blocks.Target):
            return ""
        if isinstance(block, blocks.Code):
            return block.text
        if isinstance(block, blocks.Text):
            return self._text(block.text, top)
        if isinstance(block, blocks.Formula):
            return indented(self._formula(block.tex, block.label), block.indent)
        return indented(self._directive(block), block.indent)

    def _text(self, text: str, top: bool) -> str:
        lines = text.split("\n")
        for i, line in enumerate(lines):
            if heading := blocks.HEADING.match(line):
                number = section_number(self.page, self.sections, len(heading[1])) if top else ""
                self.section = heading[2]
                lines[i] = f"{heading[1]} {f'{number}. ' if number else ''}{heading[2]}"
        return self.inline("\n".join(lines))

    def _formula(self, tex: str, label: str | None) -> str:
        tag = f" \\tag{{{self.labels[label].number}}}" if label else ""
        return f"$$\n{tex.strip()}{tag}\n$$"

    def _inside(self, source: str) -> str:
        return "\n\n".join(filter(None, (self._block(block) for block in blocks.blocks(source))))

    def _directive(self, block: blocks.Directive) -> str:
        kind = block.name.removeprefix("prf:")
        if block.name in ("dropdown", "toggle"):
            return details(self.inline(block.argument), self._inside(block.body))
        if block.name in BOXES:
            return self._box(block)
        if block.name in COUNTED:
            return self._exercise(block)
        if block.name == "solution":
            return details(f"Solution to {self.shown(block.argument)}", self._inside(block.body))
        if block.name in ("exercise-end", "bibliography", "tableofcontents"):
            return ""
        if block.name == "prf:proof" or (block.name.startswith("prf:") and kind in PROOFS):
            return self._proof(block, kind)
        if block.name == "math":
            return self._formula("\n".join(part for part in (block.argument, block.body) if part), block.label)
        if block.name in ("figure", "image"):
            caption = self._inside(block.body)
            alt = block.options.get("alt", "")
            return f"![{alt}]({self._file(block.argument)})" + (f"\n\n*{caption}*" if caption else "")
        raise UserError(f"{self.page.name}: portable notebooks do not know the directive {{{block.name}}}")

    def _box(self, block: blocks.Directive) -> str:
        named = block.name == "admonition"
        title = self.inline(block.argument if named else block.name.capitalize().replace("Seealso", "See also"))
        body = self._inside(block.body if named else "\n".join(filter(None, (block.argument, block.body))))
        return self._folds(block, title, quote(f"**{title}**\n\n{body}"), body)

    def _proof(self, block: blocks.Directive, kind: str) -> str:
        title, body = f" ({self.inline(block.argument)})" if block.argument else "", self._inside(block.body)
        if kind == "proof":
            gap = "\n\n" if body.startswith(("$$", "-", "1.", ">", "`")) else " "
            return self._folds(block, f"Proof{title}", quote(f"*Proof{title}.*{gap}{body}"))
        number = f" {self.labels[block.label].number}" if block.label else ""
        return quote(f"**{kind.capitalize()}{number}**{title}\n\n{body}")

    def _folds(self, block: blocks.Directive, title: str, shown: str, body: str | None = None) -> str:
        if "dropdown" not in block.classes:
            return shown
        return details(title, self._inside(block.body) if body is None else body)

    def _exercise(self, block: blocks.Directive) -> str:
        number = f" {self.labels[block.label].number}" if block.label else ""
        name = f"Exercise{number}" + (f". {self.inline(block.argument)}" if block.argument else "")
        # A heading lists the exercise in the outline; amid a section it would take the rest of the section with it.
        head = f"### {name}" if self.section.lower().startswith("exercises") else f"**{name}**"
        return f"{head}\n\n{self._inside(block.body)}"

    # -- references ----------------------------------------------------------------------------------------------------

    def inline(self, text: str) -> str:
        """Text with its roles and links resolved; code and formulas are left as they are."""

        def replace(match: re.Match[str]) -> str:
            if role := match["role"]:
                return self._role(role, " ".join(match["content"].split()))
            if match["bare"]:
                return self._reference(match["bare"])
            if match["href"]:
                return f"]({self._address(match['href'])})"
            return match[0]

        return INLINE.sub(replace, text)

    def _role(self, role: str, content: str) -> str:
        split = WITH_TARGET.match(content)
        text, target = (split["text"], split["target"]) if split else ("", content)
        if role.startswith("cite"):
            return self.citations.text(content, textual=role == "cite:t")
        if role == "fig":
            return f"Figure {numbering.number(target, self._book())}"
        if role in SHOWN:
            return self._reference(target, text)
        if role == "doc":
            return self._document(target, text)
        if role == "term":
            return self._term(target, text)
        if role == "download":
            return f"[{text or target}]({self._file(target)})"
        if role in ("sub", "sup", "kbd"):
            return f"<{role}>{html.escape(content)}</{role}>"
        if role == "math":
            return f"${content}$"
        if role in ("code", "command", "file"):
            return f"`{content}`"
        raise UserError(f"{self.page.name}: portable notebooks do not know the role {{{role}}}")

    def _reference(self, target: str, text: str = "") -> str:
        found = self.labels[target]
        shown = text.replace("%s", found.number).replace("{number}", found.number) or capital(self.shown(target))
        return shown if found.page == self.page.name else f"[{shown}]({self._url(found, target)})"

    def _url(self, found: Label, label: str) -> str:
        fragment = f"equation-{label}" if found.kind == "equation" else label
        return f"{self.site}/{found.page}.html#{fragment.lower().replace('_', '-').replace('.', '-')}"

    def _document(self, target: str, text: str) -> str:
        page = self._page(target)
        if page is None:
            raise UserError(f"{self.page.name}: there is no page {target}")
        return f"[{text or self.inline(page.title)}]({self.site}/{page.name}.html)"

    def _page(self, target: str) -> Page | None:
        name = posixpath.normpath(posixpath.join(posixpath.dirname(self.page.name), target)).lstrip("/")
        return self.labels.pages.get(re.sub(r"\.(ipynb|md|html)$", "", name))

    def _term(self, target: str, text: str) -> str:
        if target.lower() not in self.labels.terms:
            raise UserError(f"{self.page.name}: the glossary has no term {target!r}")
        term, page = self.labels.terms[target.lower()]
        return f"[{text or target}]({self.site}/{page}.html#{term_id(term)})"

    def _address(self, href: str) -> str:
        if href.startswith("#") and href[1:] in self.labels.known:
            found = self.labels[href[1:]]
            return href if found.page == self.page.name else self._url(found, href[1:])
        if re.match(r"[a-z]+:|#", href):
            return href
        path, _, fragment = href.partition("#")
        if page := self._page(path):
            return f"{self.site}/{page.name}.html" + (f"#{fragment}" if fragment else "")
        return self._file(path)

    def _file(self, path: str) -> str:
        """The address of a file of the repository."""
        if re.match(r"[a-z]+:", path):
            return path
        name = posixpath.normpath(posixpath.join(posixpath.dirname(self.page.name), path)).lstrip("/")
        return f"{REPOSITORY}/raw/main/{name}"

    def _book(self) -> Path:
        return self.labels.root / "book"
