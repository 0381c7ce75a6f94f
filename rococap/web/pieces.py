"""Texts in pieces, as pages mark them: what a search has found, and where a text differs from another one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rococap.web.words import Change, Segment, Term, differences, marked


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text. It is in both texts that are compared ("same"), or in one of them only; `hit` if a search has
    found it.
    """

    text: str
    kind: Literal["same", "added", "removed"] = "same"
    hit: bool = False


def pieces(text: str, terms: Sequence[Term] = (), before: str | None = None, *, removed: bool = True) -> list[Piece]:
    """A text in pieces, marked where it differs from `before`, if that is given. With `removed`, what only `before` has
    is among them.
    """
    changes = [Change("equal", text, text)] if before is None else differences(before, text)
    segments = _Segments(marked(text, terms) if terms else [Segment(text, False)])
    found = []
    for change in changes:
        is_same = change.kind == "equal"
        if removed and not is_same and change.before:
            found.append(Piece(change.before, "removed"))
        for segment in segments.next(len(change.after)):
            found.append(Piece(segment.text, "same" if is_same else "added", segment.hit))
    return found


class _Segments:
    """Segments that are taken in lengths of other ones."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._rest = list(reversed(segments))

    def next(self, length: int) -> Iterator[Segment]:
        while length:
            one = self._rest.pop()
            if len(one.text) > length:
                self._rest.append(Segment(one.text[length:], one.hit))
                one = Segment(one.text[:length], one.hit)
            length -= len(one.text)
            yield one
