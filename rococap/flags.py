"""Flags on captions that may not describe their picture: what each flag means, and how it is detected from the text.

A flag never changes the caption's text. Knows only texts, no pictures and no database.
"""

import re

EMPTY = "empty"
ONE_TOKEN = "one_token"
LOOP = "loop"
BLANK = "blank"
REASONING = "reasoning"
UNFINISHED_REASONING = "unfinished_reasoning"
FLAGS = (EMPTY, ONE_TOKEN, LOOP, "fewer_pixels", "replaced", BLANK, REASONING, UNFINISHED_REASONING)
"""Every flag. The engine adds `fewer_pixels` when a picture had to be shrunk to fit into memory, the queue adds
`replaced` when the text contained characters that a database cannot store, and the worker adds `blank` when the picture
is a single colour. `reasoning` marks output with a <think> block, and `unfinished_reasoning` output whose block does
not end or is followed by no caption."""

_ONE_TOKEN = re.compile(r"(\S{1,12}?)\s?(?:\1\s?){7,}\S{0,12}", re.DOTALL)
_STUTTER = re.compile(r"\b(\w{2,})(?:\W+\1\b){5}")
_OPEN = "<think>"
_CLOSED = re.compile(r"</think>\s*")
_TAIL_CHARS = 2_000
_MIN_REPEATS = 3
_MIN_LOOP_CHARS = 24
"""A shorter repetition at the end may be ordinary language."""


def degenerate(text: str, finish_reason: str) -> tuple[str, ...]:
    """The flag of a caption that is empty, is one repeated token ("!!!!"), has a word six times in a row, or reached
    the length limit while repeating itself; an empty tuple for any other.
    """
    stripped = text.strip()
    if not stripped:
        return (EMPTY,)
    if _ONE_TOKEN.fullmatch(stripped):
        return (ONE_TOKEN,)
    return (LOOP,) if _STUTTER.search(stripped) or (finish_reason == "length" and _loops(stripped)) else ()


def of_reasoning(text: str) -> tuple[str, ...]:
    """REASONING for output with a <think> block, UNFINISHED_REASONING if the block does not end or no caption follows
    it, and an empty tuple for output without one.
    """
    if _OPEN not in text and _CLOSED.search(text) is None:
        return ()
    rest = without_reasoning(text)
    return (REASONING,) if rest.strip() and _OPEN not in rest else (UNFINISHED_REASONING,)


def without_reasoning(text: str) -> str:
    """The text without its closed `<think>` blocks and the white space after each. A block that is not closed stays."""
    kept, position = [], 0
    closed = _CLOSED.search(text)
    if closed is not None and _OPEN not in text[: closed.start()]:
        position = closed.end()  # some chat templates open the block in the prompt, so that the model only closes it
    while (begin := text.find(_OPEN, position)) >= 0 and (closed := _CLOSED.search(text, begin)) is not None:
        kept.append(text[position:begin])
        position = closed.end()
    return "".join(kept) + text[position:]


def _loops(text: str) -> bool:
    """Whether the text ends in one passage repeated at least three times. All numbers count as equal, so that numbered
    lists are caught too.
    """
    tail = re.sub(r"\d+", "0", text)[-_TAIL_CHARS:][::-1]
    return any(
        length + period >= max(_MIN_REPEATS * period, _MIN_LOOP_CHARS)
        for period, length in enumerate(_self_overlaps(tail))
        if period
    )


def _self_overlaps(text: str) -> list[int]:
    """For each position, the length of the longest prefix of the text that also starts there; 0 for the first position.

    This is the Z algorithm: Gusfield 1997, "Algorithms on Strings, Trees, and Sequences", section 1.4.
    """
    n = len(text)
    overlaps = [0] * n
    left = right = 0
    for start in range(1, n):
        length = min(right - start, overlaps[start - left]) if start < right else 0
        while start + length < n and text[length] == text[start + length]:
            length += 1
        overlaps[start] = length
        if start + length > right:
            left, right = start, start + length
    return overlaps
