"""MyST source cut into blocks: text, code, displayed formulas, targets and directives."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

FENCE = re.compile(r"^( *)(`{3,}|~{3,}|:{3,})(.*)$")
DIRECTIVE = re.compile(r"^\{([\w:+-]+)\}\s*(.*)$")
TARGET = re.compile(r"^\(([\w:.-]+)\)=\s*$")
OPTION = re.compile(r"^:([\w-]+):\s*(.*)$")
FORMULA_END = re.compile(r"^(.*?)\$\$\s*(?:\(([\w:.-]+)\))?\s*$")
HEADING = re.compile(r"^(#{1,6})\s+(.*?)\s*$")


@dataclass
class Text:
    """Markdown that holds no block of another kind."""

    text: str


@dataclass
class Code:
    """A fence of code, with its fences, or lines outside the markup's reach."""

    text: str


@dataclass
class Formula:
    """A displayed formula; `label` is None where it has no number."""

    tex: str
    label: str | None
    indent: str = ""


@dataclass
class Target:
    """`(label)=` on a line of its own: names what follows."""

    label: str


@dataclass
class Directive:
    """A directive with its argument, its options and its body, which is source again."""

    name: str
    argument: str
    options: dict[str, str] = field(default_factory=dict)
    body: str = ""
    indent: str = ""

    @property
    def label(self) -> str | None:
        return self.options.get("label") or self.options.get("name")

    @property
    def classes(self) -> list[str]:
        return self.options.get("class", "").split()


Block = Text | Code | Formula | Target | Directive


def blocks(source: str) -> list[Block]:
    """The blocks of `source` in order."""
    found: list[Block] = []
    text: list[str] = []
    lines = source.split("\n")
    at = 0

    def flush() -> None:
        if any(line.strip() for line in text):
            found.append(Text("\n".join(text).strip("\n")))
        text.clear()

    while at < len(lines):
        line = lines[at]
        if fence := FENCE.match(line):
            flush()
            block, at = _fenced(lines, at, *fence.groups())
            found.append(block)
        elif line.lstrip().startswith("$$"):
            flush()
            block, at = _formula(lines, at)
            found.append(block)
        elif target := TARGET.match(line):
            flush()
            found.append(Target(target[1]))
            at += 1
        else:
            if not line.startswith(("%", "+++")):  # comments and breaks between cells
                text.append(line)
            at += 1
    flush()
    return found


def headings(text: str) -> Iterator[tuple[int, str]]:
    """Level and title of every heading in a block of text."""
    for line in text.split("\n"):
        if heading := HEADING.match(line):
            yield len(heading[1]), heading[2]


def _fenced(lines: list[str], at: int, indent: str, marks: str, info: str) -> tuple[Block, int]:
    closing = re.compile(rf"^ *{re.escape(marks[0])}{{{len(marks)},}}\s*$")
    end = next((i for i in range(at + 1, len(lines)) if closing.match(lines[i])), len(lines))
    body = [line.removeprefix(indent) for line in lines[at + 1 : end]]
    directive = DIRECTIVE.match(info.strip())
    if not directive:
        return Code("\n".join(lines[at : end + 1])), end + 1
    options: dict[str, str] = {}
    while body and (option := OPTION.match(body[0])):
        options[option[1]] = option[2]
        body.pop(0)
    return Directive(directive[1], directive[2].strip(), options, "\n".join(body).strip("\n"), indent), end + 1


def _formula(lines: list[str], at: int) -> tuple[Block, int]:
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    rest = [lines[at].lstrip()[2:], *lines[at + 1 :]]
    for i, line in enumerate(rest):
        if end := FORMULA_END.match(line):
            tex = [*(part.removeprefix(indent) for part in rest[:i]), end[1]]
            return Formula("\n".join(part for part in tex if part.strip()), end[2], indent), at + i + 1
    return Code("\n".join(lines[at:])), len(lines)
