"""Measures claim, complete and status with few and with many rows: the same calls on databases of different sizes, in
turns.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from contenders import claim_batch, completions, register
from report import Line, alternate, ratio_line, value_line
from rows import fill_many
from sqlalchemy import Connection, Engine

from rococap import db, queue

BATCHES = 40
"""Number of claims, completes and status queries on each database in each round."""


@dataclass(slots=True)
class Times:
    """Durations in milliseconds: of whole transactions and, in `*_inside`, without begin and commit, which wait for the
    disk.
    """

    claim: list[float] = field(default_factory=list)
    complete: list[float] = field(default_factory=list)
    status: list[float] = field(default_factory=list)
    claim_inside: list[float] = field(default_factory=list)
    complete_inside: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Sized:
    """One database: its size, the time to fill it, and the times of each round."""

    rows: int
    gigabytes: float
    fill_sec: float
    rounds: list[Times]

    def p50s(self, what: str) -> list[float]:
        """The median of each round."""
        return [statistics.median(getattr(times, what)) for times in self.rounds]

    def p50(self, what: str) -> float:
        return statistics.median(self.p50s(what))


def measure(folder: Path, sizes: list[int], rounds: int) -> list[Sized]:
    """Measures on databases of these sizes in rows. Half of the jobs of each are done, with leases of the last few
    minutes, and half are pending.
    """
    files = [folder / f"{rows}.db" for rows in sizes]
    fill_seconds = [_fill(path, rows) for path, rows in zip(files, sizes, strict=True)]
    engines = [db.connect(f"sqlite:///{path}") for path in files]
    turns = [partial(_time, engine, register(engine)) for engine in engines]
    columns = list(zip(*alternate(rounds, *turns), strict=True))
    for engine in engines:
        engine.dispose()
    return [
        Sized(rows, path.stat().st_size / 1e9, fill_sec, list(times))
        for rows, path, fill_sec, times in zip(sizes, files, fill_seconds, columns, strict=True)
    ]


def lines(sized: list[Sized]) -> list[Line]:
    small, large = sized[0], sized[-1]
    what = f"{small.rows:,} -> {large.rows:,} rows"
    return [
        *(
            ratio_line(f"{what}, {name} p50", small.p50s(field), large.p50s(field), "ms", "<= 2")
            for name, field in (
                ("claim", "claim"),
                ("complete", "complete"),
                ("claim without begin and commit", "claim_inside"),
                ("complete without begin and commit", "complete_inside"),
            )
        ),
        value_line(f"status of {large.rows:,} rows, p50", large.p50s("status"), "ms", "<= 5"),
    ]


def _fill(path: Path, rows: int) -> float:
    began = time.perf_counter()
    engine = db.connect(f"sqlite:///{path}")
    fill_many(engine, rows - rows // 2, done=rows // 2)
    engine.dispose()
    return time.perf_counter() - began


def _time(engine: Engine, worker_id: int) -> Times:
    times = Times()
    for _ in range(BATCHES):
        with _writing(engine, times.claim, times.claim_inside) as conn:
            lease = claim_batch(conn, worker_id)
        done = completions(lease)
        with _writing(engine, times.complete, times.complete_inside) as conn:
            queue.complete(conn, lease, done)
        with timing(times.status), db.transaction(engine) as conn:
            queue.counts(conn)
    return times


@contextmanager
def _writing(engine: Engine, whole: list[float], inside: list[float]) -> Iterator[Connection]:
    with timing(whole), db.transaction(engine, write=True) as conn, timing(inside):
        yield conn


@contextmanager
def timing(times: list[float]) -> Iterator[None]:
    """Appends the duration of the block in milliseconds."""
    began = time.perf_counter()
    yield
    times.append(1000 * (time.perf_counter() - began))
