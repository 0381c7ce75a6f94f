"""Marks on captions that no one should read as a description: the text itself is never edited."""

import re

EMPTY = "empty"
ONE_TOKEN = "one_token"
LOOP = "loop"
BLANK = "blank"
REASONING = "reasoning"
UNFINISHED_REASONING = "unfinished_reasoning"
FLAGS = (EMPTY, ONE_TOKEN, LOOP, "fewer_pixels", "replaced", BLANK, REASONING, UNFINISHED_REASONING)
"""All that there are: an engine adds `fewer_pixels` for a picture that did not fit into memory as it was, the queue
`replaced` for characters that no database holds, and the worker `blank` for a picture of one colour, in which there is
nothing to see. A model that thinks aloud gets `reasoning`, and `unfinished_reasoning` if it says nothing then."""

_ONE_TOKEN = re.compile(r"(\S{1,12}?)\s?(?:\1\s?){7,}\S{0,12}", re.DOTALL)
_STUTTER = re.compile(r"\b(\w{2,})(?:\W+\1\b){5}")
_OPEN = "<think>"
_CLOSED = re.compile(r"</think>\s*")
_TAIL = 2_000
_ROUNDS = 3
_SHORTEST = 24
"""Characters. What repeats less of the end than that may be a word that a sentence needs."""


def degenerate(text: str, finish_reason: str) -> tuple[str, ...]:
    """What is wrong with a caption: nothing said, one token for ever ("!!!!"), a word six times in a row, or a piece of
    text again and again until the longest caption.
    """
    stripped = text.strip()
    if not stripped:
        return (EMPTY,)
    if _ONE_TOKEN.fullmatch(stripped):
        return (ONE_TOKEN,)
    return (LOOP,) if _STUTTER.search(stripped) or (finish_reason == "length" and _loops(stripped)) else ()


def of_reasoning(text: str) -> tuple[str, ...]:
    """Whether a model thinks aloud in a caption; and if it does, whether it comes to an end and says something then."""
    if _OPEN not in text and _CLOSED.search(text) is None:
        return ()
    said = without_reasoning(text)
    return (REASONING,) if said.strip() and _OPEN not in said else (UNFINISHED_REASONING,)


def without_reasoning(text: str) -> str:
    """The text less every `<think>` block that is closed, and the white space after it. What is not closed stays."""
    kept, at = [], 0
    closed = _CLOSED.search(text)
    if closed is not None and _OPEN not in text[: closed.start()]:
        at = closed.end()  # some chat templates open the block in the prompt, so that a model only closes it
    while (begin := text.find(_OPEN, at)) >= 0 and (closed := _CLOSED.search(text, begin)) is not None:
        kept.append(text[at:begin])
        at = closed.end()
    return "".join(kept) + text[at:]


def _loops(text: str) -> bool:
    """Whether the end is one piece of text at least three times over. Numbers count as the same: lists loop too."""
    tail = re.sub(r"\d+", "0", text)[-_TAIL:][::-1]
    return any(
        length + period >= max(_ROUNDS * period, _SHORTEST)
        for period, length in enumerate(_self_overlaps(tail))
        if period
    )


def _self_overlaps(text: str) -> list[int]:
    """For each place, how long the text from there on is as at its beginning (the Z algorithm: Gusfield 1997, 1.4)."""
    n = len(text)
    overlaps = [0] * n
    left = right = 0
    for at in range(1, n):
        length = min(right - at, overlaps[at - left]) if at < right else 0
        while at + length < n and text[length] == text[at + length]:
            length += 1
        overlaps[at] = length
        if at + length > right:
            left, right = at, at + length
    return overlaps
