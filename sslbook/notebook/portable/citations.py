"""Citations by author and year, and the list of references, from `book/references.bib`."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sslbook.errors import UserError, require_known

MANY = 8  # authors; of more, the first three are named
CITED = re.compile(r"\{cite(?::\w+)?\}`([^`]+)`")


def keys(text: str) -> list[str]:
    """The keys of a citation's content: `"one,two"`."""
    return [key.strip() for key in text.split(",") if key.strip()]


class Citations:
    """The papers that one notebook cites.

    Args:
        bibliography: the BibTeX file.
        sources: all Markdown of the notebook; two papers of the same authors and year become 2020a and 2020b.

    Raises:
        UserError: pybtex is not installed.
    """

    def __init__(self, bibliography: Path, sources: Iterable[str]) -> None:
        try:
            from pybtex.database import parse_file
        except ImportError:
            raise UserError('citations need pybtex: pip install "sslbook[book]"') from None
        self.entries: dict[str, Any] = dict(parse_file(str(bibliography), "bibtex").entries)
        cited = {key: None for text in sources for content in CITED.findall(text) for key in keys(content)}
        self.cited = list(cited)
        same: dict[tuple[str, str], list[str]] = defaultdict(list)
        for key in self.cited:
            same[self._authors(key), self._year(key)].append(key)
        self.letters = {
            key: "abcdefgh"[i] if len(group) > 1 else "" for group in same.values() for i, key in enumerate(group)
        }

    def text(self, content: str, textual: bool) -> str:
        """`Chen et al. (2020)` in a sentence, `(Chen et al., 2020; He et al., 2020)` in brackets; each with its link."""
        if textual:
            parts = [self._link(key, f"{self._authors(key)} ({self._dated(key)})") for key in keys(content)]
            return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
        return f"({'; '.join(self._link(key, f'{self._authors(key)}, {self._dated(key)}') for key in keys(content))})"

    def references(self) -> str:
        """The cited papers as a Markdown list, by author and year."""
        lines = {key: self._reference(key) for key in self.cited}
        return "\n".join(f"- {lines[key]}" for key in sorted(lines, key=lambda key: (lines[key].lower(), key)))

    def _reference(self, key: str) -> str:
        fields = self._entry(key).fields
        names = [f"{_last(p)}, {'. '.join(n[0] for n in p.first_names + p.middle_names)}." for p in self._people(key)]
        if len(names) > MANY:
            names = [*names[:3], "others"]
        people = ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
        place = next((fields[name] for name in ("booktitle", "journal", "institution") if name in fields), "")
        parts = [f"{people} ({self._dated(key)})", _plain(fields["title"]), *([f"*{_plain(place)}*"] if place else [])]
        return ". ".join(parts) + "." + (f" <{self._url(key)}>" if self._url(key) else "")

    def _entry(self, key: str) -> Any:
        require_known(key, self.entries, f"book/references.bib has no {key!r}")
        return self.entries[key]

    def _people(self, key: str) -> list[Any]:
        return self._entry(key).persons.get("author", [])

    def _authors(self, key: str) -> str:
        names = [_last(person) for person in self._people(key)]
        if len(names) > 2:
            return f"{names[0]} et al."
        return " and ".join(names)

    def _year(self, key: str) -> str:
        return self._entry(key).fields.get("year", "")

    def _dated(self, key: str) -> str:
        return self._year(key) + self.letters.get(key, "")

    def _url(self, key: str) -> str:
        fields = self._entry(key).fields
        preprint = re.search(r"arXiv:(\d+\.\d+)", fields.get("journal", ""))
        if "eprint" in fields or preprint:
            return f"https://arxiv.org/abs/{fields.get('eprint') or preprint[1]}"
        return f"https://doi.org/{fields['doi']}" if "doi" in fields else fields.get("url", "")

    def _link(self, key: str, text: str) -> str:
        return f"[{text}]({self._url(key)})" if self._url(key) else text


def _last(person: Any) -> str:
    return _plain(" ".join(person.prelast_names + person.last_names))


def _plain(text: str) -> str:
    """BibTeX's braces and accents as plain characters."""
    from pybtex.richtext import Text

    return str(Text.from_latex(text))
