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
        # By first character, so that it is tested only once at each word: this takes half the time.
        several = [("", *word) for trap in traps for word in _words(trap)]
        several += [(one.name, *word) for one in entries for word in _words(one)]
        self._names: list[str] = []
        patterns = []
        for first, same in groupby(sorted(several, key=itemgetter(1)), itemgetter(1)):
            named = [(name, "|".join(rest for *_, rest in words)) for name, words in groupby(same, itemgetter(0))]
            self._names += [name for name, _ in named]
            patterns.append(f"{_any_case(first)}(?:{'|'.join(f'({words})' for _, words in named)})")
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})s?(?!\w)")

    def finditer(self, folded: str) -> Iterator[Found]:
        """What a text names, in its order. White space in the text must be folded (`results.formats.fold`)."""
        for match in self._pattern.finditer(folded):
            if name := self._names[(match.lastindex or 0) - 1]:
                yield Found(name, *match.span())


def _words(entry: Entry) -> Iterator[tuple[str, str]]:
    """For each term or abbreviation, the longest first: its first character, lower case, and a pattern of the rest."""
    for term in sorted(entry.terms, key=len, reverse=True):
        yield term[0], _pattern(term[1:], _any_case)
    for word in sorted(entry.abbreviations, key=len, reverse=True):
        yield word[0].lower(), f"(?<={re.escape(word[0])}){_pattern(word[1:], re.escape)}"


def _pattern(term: str, cased: Callable[[str], str]) -> str:
    return "".join(_WILD.get(part, cased(part)) for part in re.split("(… |-)", term))


def _any_case(text: str) -> str:
    """A pattern for the text in any case, spelled out letter by letter: re.IGNORECASE takes twice as long."""
    return "".join(f"[{char}{char.upper()}]" if char.isalpha() else re.escape(char) for char in text)


_WILD: Final = {"-": "[-‐‑–—−/ ]{0,3}", "… ": r"(?:[^ .;]+ ){0,3}?"}
