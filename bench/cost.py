"""Measures the cost of claiming and completing one job: rococap against sqlite3 replaying the same statements, and
against other queues.
"""

import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from contenders import (
    HUEY,
    OURS,
    OURS_ON_SERVER,
    PERSIST_QUEUE,
    PROCRASTINATE,
    Contender,
    drain_ours,
    register,
    url_at,
)
from crew import Together, crew, start_together
from report import Clock, Line, Took, alternate, compare, timed
from rows import connect
from server import Server
from sqlalchemy import event
from sqlalchemy.engine import make_url

from rococap import db

RAW = "sqlite3 replaying"
DRAINERS = 4
CLOCKS: tuple[Clock, ...] = ("wall", "cpu")

Statement = tuple[str, Any, bool]
"""SQL, its parameters, and whether they are for executemany."""


@dataclass(frozen=True, slots=True)
class Base:
    """A filled queue that serves as a template: it is copied for each measurement and never drained itself."""

    contender: Contender
    place: str
    jobs: int


@dataclass(frozen=True, slots=True)
class Drained:
    """The result of several processes draining one queue together: `lost` jobs were never done."""

    jobs: int
    duplicates: int
    lost: int
    errors: tuple[str, ...]

    def __str__(self) -> str:
        lost = f", {self.lost} never" if self.lost else ""
        stopped = f", {len(self.errors)} of {DRAINERS} stopped: {self.errors[0]}" if self.errors else ""
        return f"{self.duplicates} of {self.jobs}{lost}{stopped}"


@dataclass(frozen=True, slots=True)
class Cost:
    """By name of the queue: its time per job in every round, and the result of several processes draining it."""

    took: dict[str, tuple[Took, ...]]
    drained: dict[str, Drained]
    n_statements: int


def measure(folder: Path, server: Server, rows: int, peer_jobs: int, rounds: int) -> Cost:
    bases = [
        fill_base(OURS, str(folder / "ours"), rows),
        fill_base(HUEY, str(folder / "huey"), peer_jobs),
        fill_base(PERSIST_QUEUE, str(folder / "persist-queue"), peer_jobs),
        fill_base(OURS_ON_SERVER, server.create(), rows),
        fill_base(PROCRASTINATE, server.create(), peer_jobs),
    ]
    with crew(DRAINERS) as together:
        drained = {base.contender.name: drain_together(together, base, server) for base in bases}
    statements = record(bases[0], server)
    gc.collect()
    gc.freeze()  # otherwise every garbage collection would traverse the recording, in our time and in the peer's
    turns = [partial(time_replay, bases[0], server, statements), *(partial(time_drain, base, server) for base in bases)]
    columns = zip(*alternate(rounds, *turns), strict=True)
    gc.unfreeze()
    names = [RAW, *(base.contender.name for base in bases)]
    return Cost(dict(zip(names, columns, strict=True)), drained, len(statements))


def lines(cost: Cost) -> list[Line]:
    return [
        *(_line(cost, OURS.name, RAW, clock, "<= 2.0") for clock in ("cpu", "user", "wall")),
        *(_line(cost, OURS.name, HUEY.name, clock, ">= 2.5") for clock in CLOCKS),
        *(_line(cost, OURS.name, PERSIST_QUEUE.name, clock, "") for clock in CLOCKS),
        *(_line(cost, OURS_ON_SERVER.name, PROCRASTINATE.name, clock, "") for clock in CLOCKS),
    ]


def _line(cost: Cost, ours: str, peer: str, clock: Clock, target: str) -> Line:
    rounds = list(zip(cost.took[peer], cost.took[ours], strict=True))
    found = f"ours {cost.drained[ours]}" + (f"; peer {cost.drained[peer]}" if peer in cost.drained else "")
    times_faster = peer != RAW
    what = f"{peer} / {ours}" if times_faster else f"{ours} / {peer}"
    return compare(what, rounds, clock, target, times_faster=times_faster, rows=1, duplicates=found)


# --- Queues to drain -------------------------------------------------------------------------------------------


def fill_base(contender: Contender, place: str, jobs: int) -> Base:
    if "://" not in place:
        Path(place).mkdir()
    contender.fill(place, jobs)
    return Base(contender, place, jobs)


@contextmanager
def copied(base: Base, server: Server) -> Iterator[str]:
    if "://" in base.place:
        yield server.create(template=str(make_url(base.place).database))  # deleted with the server
    else:
        copy = shutil.copytree(base.place, f"{base.place} copy")
        yield copy
        shutil.rmtree(copy)


# --- One process -----------------------------------------------------------------------------------------------


def time_drain(base: Base, server: Server) -> Took:
    done: list[int] = []
    with copied(base, server) as place, base.contender.open(place) as drain:
        took = timed(lambda: drain(done))
    if len(done) != base.jobs or len(set(done)) != base.jobs:
        raise SystemExit(f"{base.contender.name} did {len(done)} jobs, {len(set(done))} distinct, out of {base.jobs}")
    return took.per(base.jobs)


def record(base: Base, server: Server) -> list[Statement]:
    """All statements that rococap sends to the driver, for the peer to replay: it does the same work in the database,
    and none to compute the parameters.
    """
    statements: list[Statement] = []

    def note(conn: Any, cursor: Any, sql: str, parameters: Any, context: Any, many: bool) -> None:
        statements.append((sql, parameters, many))

    with copied(base, server) as place:
        engine = db.connect(url_at(place))
        event.listen(engine, "before_cursor_execute", note)
        drain_ours(engine, register(engine), [])
        engine.dispose()
    return statements


def time_replay(base: Base, server: Server, statements: list[Statement]) -> Took:
    with copied(base, server) as place:
        connection = connect(Path(place, "queue.db"))
        took = timed(lambda: replay(connection, statements))
        n_left = connection.execute("SELECT count(*) FROM jobs WHERE status <> 'done'").fetchone()[0]
        n_left += base.jobs - connection.execute("SELECT count(*) FROM captions").fetchone()[0]
        connection.close()
    if n_left:
        raise SystemExit(f"replaying left {n_left} jobs or captions incomplete")
    return took.per(base.jobs)


def replay(connection: Any, statements: list[Statement]) -> None:
    for sql, parameters, many in statements:
        if many:
            connection.executemany(sql, parameters)
        else:
            connection.execute(sql, parameters).fetchall()


# --- Several processes -----------------------------------------------------------------------------------------


def drain_together(together: Together, base: Base, server: Server) -> Drained:
    with copied(base, server) as place:
        results = together(drain_in_crew, base.contender, place)
    done = [number for numbers, _ in results for number in numbers]
    errors = tuple(error for _, error in results if error)
    return Drained(base.jobs, len(done) - len(set(done)), base.jobs - len(set(done)), errors)


def drain_in_crew(contender: Contender, place: str) -> tuple[list[int], str]:
    """The jobs that this process did, and the error that stopped it, or an empty text."""
    done: list[int] = []
    with contender.open(place) as drain:
        start_together()
        try:
            drain(done)
        except Exception as error:  # any error of a peer's: the other processes go on without this one
            return done, repr(error)
    return done, ""
