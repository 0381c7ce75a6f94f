"""Finds the terms of a lexicon in a text. How terms are written is explained at the top of concepts.toml."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Entry:
    """A name and the words for it: terms match in any case, abbreviations only as written."""

    name: str
    terms: tuple[str, ...]
    abbreviations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A name that a text has words for, and where these begin and end."""

    name: str
    start: int
    end: int


def entry(table: dict[str, Any], name: str) -> Entry:
    """An entry from a table of a lexicon's file."""
    return Entry(name, tuple(table.get("terms", ())), tuple(table.get("abbreviations", ())))


class Lexicon:
    """Entries of one kind. Where terms of several begin at one place, the first entry counts.

    Traps come before all entries and name nothing; the words that they match are used up.
    """

    def __init__(self, entries: Sequence[Entry], traps: Sequence[Entry] = ()) -> None:
        self._names = [one.name for one in entries]
        patterns = [*map(_alternatives, traps), *(f"({_alternatives(one)})" for one in entries)]
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})(?!\w)")

    def finditer(self, folded: str) -> Iterator[Found]:
        """What a text names, in its order. White space in the text must be folded (`results.formats.fold`)."""
        for match in self._pattern.finditer(folded):
            if match.lastindex:
                yield Found(self._names[match.lastindex - 1], *match.span())


def _alternatives(entry: Entry) -> str:
    return "|".join([*_by_first(entry.terms, _any_case), *_by_first(entry.abbreviations, re.escape)])


def _by_first(terms: Sequence[str], cased: Callable[[str], str]) -> Iterator[str]:
    """Patterns of terms, grouped by first character, so that the regular expression tests that character only once."""
    for first, same in groupby(sorted(terms), itemgetter(0)):
        yield f"{cased(first)}(?:{'|'.join(_pattern(term[1:], cased) for term in same)})s?"


def _pattern(term: str, cased: Callable[[str], str]) -> str:
    return "".join(_WILD.get(part, cased(part)) for part in re.split("(… |-)", term))


def _any_case(text: str) -> str:
    """A pattern for the text in any case, spelled out letter by letter: re.IGNORECASE takes twice as long."""
    return "".join(f"[{char}{char.upper()}]" if char.isalpha() else re.escape(char) for char in text)


_WILD: Final = {"-": "[-‐‑–—−/ ]{0,3}", "… ": r"(?:[^ .;]+ ){0,3}?"}
