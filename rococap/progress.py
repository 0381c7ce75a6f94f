"""The callback through which long-running work reports its progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of the current step, how many of its items are done, and how many there are."""


def with_label(progress: Progress, label: str) -> Progress:
    """Reports with the label before the name of each step."""
    return lambda what, done, total: progress(f"{label}: {what}", done, total)


def silent(what: str, done: int, total: int) -> None:
    """Reports nothing."""
