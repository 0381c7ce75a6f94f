"""The callback through which long-running work reports its progress."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the name of the current step, how many of its items are done, and how many there are."""


def silent(what: str, done: int, total: int) -> None:
    """Reports nothing."""
