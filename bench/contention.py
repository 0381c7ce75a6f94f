"""Measures contention of several processes on one database: waits for the write lock, fairness, the effect of a
concurrent export, and PostgreSQL against SQLite.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

from contenders import claim_batch, completions, register
from crew import SPAWN, crew, start_together
from report import Line, alternate, ratio_line, value_line
from rows import RUN_NAME, SPLIT, TEXT, fill_many
from server import Server
from sqlalchemy import Connection, Engine

from rococap import db, queue
from rococap.errors import RococapError

PROCESSES = 8
MANY = 32
THINK_SEC = 0.01
ROWS_PER_SEC = 20_000
"""Rows to fill in per second of measurement: more than can be claimed, so that no queue becomes empty."""

# --- One process of several ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Worked:
    """What one process did: ids of its jobs, errors, and durations in seconds: `waits` to enter a write transaction,
    and `claims` for whole claims, wait and commit included.
    """

    ids: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    claims: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def work(url: str, seconds: float, think_sec: float) -> Worked:
    engine = db.connect(url)
    worker_id = register(engine)
    worked = Worked()
    start_together()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        try:
            claim_and_complete(engine, worker_id, worked)
        except RococapError as error:
            worked.errors.append(str(error))
        if think_sec:
            time.sleep(think_sec)
    engine.dispose()
    return worked


def claim_and_complete(engine: Engine, worker_id: int, worked: Worked) -> None:
    began = time.perf_counter()
    with writing(engine, worked) as conn:
        lease = claim_batch(conn, worker_id)
    worked.claims.append(time.perf_counter() - began)
    with writing(engine, worked) as conn:
        queue.complete(conn, lease, completions(lease))
    worked.ids += [job.id for job in lease.jobs]


@contextmanager
def writing(engine: Engine, worked: Worked) -> Iterator[Connection]:
    began = time.perf_counter()
    with db.transaction(engine, write=True) as conn:
        worked.waits.append(time.perf_counter() - began)
        yield conn


def rows_of(crew: list[Worked]) -> int:
    return sum(len(one.ids) for one in crew)


def duplicates(*crews: list[Worked]) -> int:
    """The number of times that jobs were done again, summed over crews that have no jobs in common."""
    return sum(rows_of(crew) - len({id for one in crew for id in one.ids}) for crew in crews)


# --- Waits, fairness, an export --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fairness:
    """The results of each crew: in each round, `alone` for `seconds`, and half as long `without` an export and while
    `exporting`; and once, `many` processes that pause between claims.
    """

    journal: str
    seconds: float
    alone: list[list[Worked]]
    many: list[Worked]
    without: list[list[Worked]]
    exporting: list[list[Worked]]
    exported: int
    """Rows that the export wrote during all rounds."""


def measure(folder: Path, seconds: float, rounds: int, export_rows: int) -> Fairness:
    url = f"sqlite:///{folder}/fair.db"
    journal = _fill(url, pending=int((rounds + 1) * seconds * ROWS_PER_SEC))
    big = f"sqlite:///{folder}/exported.db"
    _fill(big, pending=int(rounds * seconds * ROWS_PER_SEC), done=export_rows)
    exported: list[int] = []

    with crew(PROCESSES) as together:

        def work_during_export() -> list[Worked]:
            with exporting(big, folder / "exported.csv") as rows:
                before = rows.value
                worked = together(work, big, seconds / 2, 0.0)
                exported.append(rows.value - before)
            return worked

        alone = [together(work, url, seconds, 0.0) for _ in range(rounds)]
        pairs = alternate(rounds, partial(together, work, big, seconds / 2, 0.0), work_during_export)
    with crew(MANY) as together:
        many = together(work, url, seconds, THINK_SEC)
    without, during = ([pair[n] for pair in pairs] for n in (0, 1))
    return Fairness(journal, seconds, alone, many, without, during, sum(exported))


def lines(fair: Fairness) -> list[Line]:
    half = fair.seconds / 2
    n_errors = sum(len(one.errors) for crew in fair.alone for one in crew)
    found = _found(*fair.alone)
    pairs_found = _found(*fair.without, *fair.exporting)
    who, during = f"{PROCESSES} processes without pause", "during an export / without"
    return [
        value_line(
            f"{who}, longest wait for the write lock", [longest(crew) for crew in fair.alone], "s", "< 0.5", found
        ),
        value_line(f"{who}, most rows / fewest", [spread(crew) for crew in fair.alone], "", "<= 3", found),
        value_line(f"{who}, errors", [n_errors], "", "<= 0", found),
        value_line(
            f"{MANY} processes with {1000 * THINK_SEC:.0f} ms of thought, errors",
            [sum(len(one.errors) for one in fair.many)],
            "",
            "<= 0",
            _found(fair.many),
        ),
        ratio_line(
            f"{who}, claim p50, {during}",
            *_both(fair, median_claim),
            "ms",
            "< 2",
            pairs_found,
        ),
        ratio_line(f"{who}, rows/s, {during}", *_both(fair, lambda crew: rows_of(crew) / half), "", "", pairs_found),
        value_line("rows/s exported meanwhile", [fair.exported / (half * len(fair.exporting))], "", ""),
    ]


def longest(crew: list[Worked]) -> float:
    return max(wait for one in crew for wait in one.waits)


def spread(crew: list[Worked]) -> float:
    shares = [len(one.ids) for one in crew]
    return max(shares) / max(min(shares), 1)


def median_claim(crew: list[Worked]) -> float:
    return 1000 * statistics.median(claim for one in crew for claim in one.claims)


def _both(fair: Fairness, of: Callable[[list[Worked]], float]) -> tuple[list[float], list[float]]:
    return [of(crew) for crew in fair.without], [of(crew) for crew in fair.exporting]


def _found(*crews: list[Worked]) -> str:
    return f"ours {duplicates(*crews)} of {sum(map(rows_of, crews))}"


def _fill(url: str, *, pending: int, done: int = 0) -> str:
    """Fills a new database; returns the journal mode of its file."""
    engine = db.connect(url)
    fill_many(engine, pending, done=done, text=TEXT)
    with db.transaction(engine) as conn:
        journal = db.execute(conn, "PRAGMA journal_mode").scalar_one()
    engine.dispose()
    return str(journal)


@contextmanager
def exporting(url: str, path: Path) -> Iterator["Synchronized[int]"]:
    """Runs exports one after another in a separate process; yields a counter of the rows written so far."""
    rows = SPAWN.Value("q", 0)
    process = SPAWN.Process(target=export_for_ever, args=(url, path, rows), daemon=True)
    process.start()
    try:
        while rows.value == 0 and process.is_alive():
            time.sleep(0.05)
        yield rows
        if not process.is_alive():
            raise RuntimeError("the export ended with an error")
    finally:
        process.kill()
        process.join()


def export_for_ever(url: str, path: Path, rows: "Synchronized[int]") -> None:
    from rococap.results import export  # imports pandas, which the other processes do not need

    engine = db.connect(url)
    with db.transaction(engine) as conn:
        run = queue.get_run(conn, RUN_NAME)
    before = 0

    def count(_what: str, done: int, _total: int) -> None:
        rows.value = before + done

    while True:
        before += export.export(engine, run, SPLIT, path, progress=count).rows


# --- PostgreSQL against SQLite ---------------------------------------------------------------------------------

Sides = list[tuple[list[Worked], list[Worked]]]
"""For each round, the results of the processes on SQLite and of those on PostgreSQL."""


def measure_postgres(folder: Path, server: Server, seconds: float, rounds: int) -> Sides:
    """Claims and completes without pause, on SQLite and PostgreSQL in turns, with equally many processes."""
    urls = [f"sqlite:///{folder}/beside.db", server.create()]
    for url in urls:
        engine = db.connect(url)
        fill_many(engine, int(seconds * rounds * ROWS_PER_SEC), text=TEXT)
        engine.dispose()
    with crew(PROCESSES) as together:
        turns = [partial(together, work, url, seconds, 0.0) for url in urls]
        return [(first, second) for first, second in alternate(rounds, *turns)]


def lines_postgres(sides: Sides, seconds: float) -> list[Line]:
    on_sqlite, on_server = ([rows_of(side[n]) / seconds for side in sides] for n in (0, 1))
    crews = [crew for side in sides for crew in side]
    n_errors = sum(len(one.errors) for crew in crews for one in crew)
    what = f"PostgreSQL / SQLite, {PROCESSES} processes without pause"
    return [
        ratio_line(f"{what}, rows/s", on_sqlite, on_server, "", "", _found(*crews)),
        value_line(f"{what}, duplicates", [duplicates(*crews)], "", "<= 0", _found(*crews)),
        value_line(f"{what}, errors", [n_errors], "", "<= 0", _found(*crews)),
    ]
