"""How many captions and tokens the runs made in each interval of the last hours, read in short pages."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

from sqlalchemy import Connection

from rococap.db import execute
from rococap.queue.records import time_of

PAGE_MS = 5 * 60_000
PAGE_SEGMENTS = 40

Read = Callable[[], AbstractContextManager[Connection]]


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval of a run and split. It begins at `at`, in milliseconds since 1970."""

    run: str
    split: str
    at: int


@dataclass(frozen=True, slots=True)
class Made:
    """Captions, and the tokens in them, by interval. An interval in which nothing was captioned is absent."""

    captions: Counter[Interval]
    tokens: Counter[Interval]


_ACTIVE = (
    "SELECT DISTINCT r.id, r.name, l.split FROM leases l JOIN runs r ON r.id = l.run_id WHERE r.deleted_at IS NULL AND "
)
_SUMS = (
    "SELECT j.finished_at / ?, count(*), COALESCE(sum(c.new_tokens), 0) FROM jobs j JOIN captions c ON c.job_id = j.id "
    "WHERE j.run_id = ? AND j.split = ? AND c.lease_id IS NOT NULL AND c.generated_at = j.finished_at AND "
)
# Two queries, because a job is in one partial index until it has its checkpoint segment, and then in another.
_NOT_IN_A_SEGMENT = _SUMS + (
    "j.status = 'done' AND j.checkpoint IS NULL AND j.finished_at >= ? AND j.finished_at < ? GROUP BY 1"
)
_IN_SEGMENTS = _SUMS + "j.checkpoint IS NOT NULL AND j.checkpoint > ? AND j.checkpoint <= ? GROUP BY 1"
_LAST_SEGMENT = "SELECT max(checkpoint) FROM jobs WHERE run_id = ? AND split = ? AND checkpoint IS NOT NULL"

_Sums = Iterator[tuple[int, int, int]]


def throughput(read: Read, *, since: int, every_ms: int, now: int | None = None) -> Made:
    """What workers captioned since the time `since`, in intervals of `every_ms` milliseconds, of which `since` must be
    a multiple. Captions that were restored or merged are left out.

    `read` opens a transaction for one page, so that no page holds up a commit for long.
    """
    with read() as conn:
        until = time_of(conn, now)
        active = {*execute(conn, _ACTIVE + "l.closed_at >= ?", (since,)), *execute(conn, _ACTIVE + "l.state = 'open'")}
    made = Made(Counter(), Counter())
    for run_id, run, split in sorted(tuple(row) for row in active):
        keys = (every_ms, run_id, split)
        for sums in (_not_in_a_segment(read, keys, since, until), _in_segments(read, keys, since)):
            for at, captions, tokens in sums:
                interval = Interval(run, split, at * every_ms)
                made.captions[interval] += int(captions)
                made.tokens[interval] += int(tokens)
    return made


def _not_in_a_segment(read: Read, keys: tuple[int, int, str], since: int, until: int) -> _Sums:
    for start in range(since, until + 1, PAGE_MS):
        with read() as conn:
            rows = execute(conn, _NOT_IN_A_SEGMENT, (*keys, start, start + PAGE_MS)).fetchall()
        yield from ((at, captions, tokens) for at, captions, tokens in rows)


def _in_segments(read: Read, keys: tuple[int, int, str], since: int) -> _Sums:
    """Backwards, because segments are numbered in the order in which their captions were finished."""
    every_ms, run_id, split = keys
    with read() as conn:
        last = execute(conn, _LAST_SEGMENT, (run_id, split)).scalar() or 0
    for end in range(last, 0, -PAGE_SEGMENTS):
        with read() as conn:
            rows = execute(conn, _IN_SEGMENTS, (*keys, end - PAGE_SEGMENTS, end)).fetchall()
        yield from ((at, captions, tokens) for at, captions, tokens in rows if at * every_ms >= since)
        if any(at * every_ms < since for at, _, _ in rows):
            return
