"""Plain Markdown: folded parts, quotes, indentation, and the ids of the glossary's terms."""

import html
import re
import unicodedata

from sslbook.notebook.portable import blocks


def details(title: str, body: str) -> str:
    """A folded part; the empty lines let Markdown go on inside."""
    bold = re.sub(r"`([^`]+)`", lambda code: f"<code>{html.escape(code[1])}</code>", title)
    return f"<details>\n<summary><b>{bold}</b></summary>\n\n{body.strip()}\n\n</details>"


def quote(text: str) -> str:
    """A block quote, with every displayed formula on one line."""
    parts = []
    for block in blocks.blocks(text):
        if isinstance(block, blocks.Formula):
            parts.append("$$ " + " ".join(block.tex.split("\n")) + " $$")
        elif isinstance(block, blocks.Text | blocks.Code):
            parts.append(block.text)
    return "\n".join(f"> {line}".rstrip() for line in "\n\n".join(parts).split("\n"))


def indented(text: str, indent: str) -> str:
    return "\n".join(indent + line if line else line for line in text.split("\n"))


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def term_id(term: str) -> str:
    """The id that Sphinx gives a term of the glossary."""
    plain = unicodedata.normalize("NFKD", f"term-{term}").encode("ascii", "ignore").decode()
    return re.sub(r"^[-0-9._]+|-+$", "", re.sub(r"[^a-zA-Z0-9._]+", "-", " ".join(plain.split())))
