"""The words of texts: what a search looks for, where it was found, and how two texts differ. Text in, segments out.

One rule decides what a word is, for both databases and for marking hits: letters and digits, in any case and with any
accent.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Final, Literal

from rococap.errors import RococapError

_WORD: Final = re.compile(r"[^\W_]+(?:[\u0300-\u036f]+[^\W_]*)*")
_PIECE: Final = re.compile(r"\w+|[^\w\s]")
_ASKED: Final = re.compile(r'"([^"]*)"?|([^\s"]+)')
_LONGEST_WORD: Final = 64
"""Characters of a word that are looked at: PostgreSQL limits a word to 2 KB."""
MAX_TERMS: Final = 16
MAX_DIFFERING: Final = 1_000
"""Words that are compared one by one, in the part in which two texts differ. It bounds the time to about a second."""


@dataclass(frozen=True, slots=True)
class Term:
    """Words that follow each other; with `prefix`, the last one may go on."""

    words: tuple[str, ...]
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a text, which a search has found or not."""

    text: str
    hit: bool


@dataclass(frozen=True, slots=True)
class Change:
    """A part of two texts. `before` is "" for an insertion, `after` for a deletion; both are alike if `equal`, apart
    from white space at the end.
    """

    kind: Literal["equal", "delete", "insert", "replace"]
    before: str
    after: str


def words_of(text: str) -> list[str]:
    """The words of a text, in one case and without accents."""
    if text.isascii():
        return [word[:_LONGEST_WORD] for word in _WORD.findall(text.lower())]
    return [word for match in _WORD.finditer(text) if (word := _folded(match[0]))]


def _folded(word: str) -> str:
    plain = unicodedata.normalize("NFKD", word).casefold()
    return "".join(filter(str.isalnum, plain))[:_LONGEST_WORD]


def parse(asked: str) -> tuple[Term, ...]:
    """The terms of a search: each has to be found. Quotes keep words together, and a star stands for any ending.

    Words that a sign joins, as in `L4-L5`, are kept together too. Raises RococapError if there is no word in it, or too
    many.
    """
    terms = []
    for match in _ASKED.finditer(asked):
        text = match[0].strip('"')
        if words := tuple(words_of(text)):
            terms.append(Term(words, text.endswith("*")))
    if not terms or len(terms) > MAX_TERMS:
        raise RococapError(
            f'A search takes one to {MAX_TERMS} words, or phrases in quotes: effusion "left lung" cardio*'
        )
    return tuple(terms)


def marked(text: str, terms: Sequence[Term]) -> list[Segment]:
    """The text in segments, those that contain a term as hits. Together they are the text."""
    places = [(match.span(), _folded(match[0])) for match in _WORD.finditer(text)]
    places = [place for place in places if place[1]]
    words = [word for _, word in places]
    segments: list[Segment] = []
    position = 0
    for start, end in _merged(sorted(_spans(places, words, terms))):
        segments += [Segment(text[position:start], False), Segment(text[start:end], True)]
        position = end
    return [segment for segment in [*segments, Segment(text[position:], False)] if segment.text]


def _spans(
    places: Sequence[tuple[tuple[int, int], str]], words: Sequence[str], terms: Sequence[Term]
) -> Iterator[tuple[int, int]]:
    for term in terms:
        n = len(term.words)
        for at in range(len(words) - n + 1):
            if _matches(words[at : at + n], term):
                yield places[at][0][0], places[at + n - 1][0][1]


def _matches(words: Sequence[str], term: Term) -> bool:
    *firsts, last = term.words
    if list(words[:-1]) != firsts:
        return False
    return words[-1].startswith(last) if term.prefix else words[-1] == last


def _merged(spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    end = start = -1
    for first, last in spans:
        if first > end:
            if end > start:
                yield start, end
            start, end = first, last
        end = max(end, last)
    if end > start:
        yield start, end


def differences(before: str, after: str) -> list[Change]:
    """What makes one text of another, word by word. The `before` of all parts is the one text, the `after` the other.

    Where more than MAX_DIFFERING words lie between the first and the last difference, they are one replacement.
    """
    old, new = _pieces(before), _pieces(after)
    olds, news = [piece.strip() for piece in old], [piece.strip() for piece in new]
    head = _n_alike(olds, news)
    tail = _n_alike(olds[head:][::-1], news[head:][::-1])
    ends = len(old) - tail, len(new) - tail
    codes = [("equal", 0, head, 0, head)]
    codes += _middle(olds[head : ends[0]], news[head : ends[1]], head)
    codes.append(("equal", ends[0], len(old), ends[1], len(new)))
    changes = [Change(kind, "".join(old[a:b]), "".join(new[c:d])) for kind, a, b, c, d in codes]  # type: ignore[arg-type]
    return [change for change in changes if change.before or change.after]


def _middle(old: Sequence[str], new: Sequence[str], head: int) -> list[tuple[str, int, int, int, int]]:
    if max(len(old), len(new)) > MAX_DIFFERING:
        return [("replace", head, head + len(old), head, head + len(new))]
    codes = SequenceMatcher(None, old, new).get_opcodes()
    return [(kind, a + head, b + head, c + head, d + head) for kind, a, b, c, d in codes]


def _pieces(text: str) -> list[str]:
    """The text in words and signs, each with the white space after it."""
    starts = [match.start() for match in _PIECE.finditer(text)]
    if not starts:
        return [text] if text else []
    starts[0] = 0
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _n_alike(one: Sequence[str], other: Sequence[str]) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
