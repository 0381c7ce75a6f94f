"""Measures how far one PostgreSQL goes: hundreds of workers on a queue of millions of pictures, most of them captioned.

A worker here does what a real one does with the queue: it looks for work, claims, stores captions and sends
heartbeats, by the same functions in the same order, over a connection of its own. It reads no pictures and has no
model, because its time is simulated: captioning takes none, and the clock that it gives to the queue advances with what
all have stored, as if each captioned `--rate` pictures a second. So the captions come with as many heartbeats, and as
many leases of the last minutes, as those of so many GPUs, while the workers wait for nothing but the database, which is
as busy as can be.
"""

import argparse
import os
import resource
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.sharedctypes import Synchronized
from typing import Any

if __name__ == "__main__":  # spawned processes inherit the path with this change
    sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's

from concurrent.futures import ThreadPoolExecutor

import psutil
import server
from contenders import completions, register
from crew import SPAWN, crew, shared, start_together
from report import Line, show, value_line
from rows import RUN_NAME, SPLIT, TEXT, fill_many
from sizes import timing
from sqlalchemy import Engine

from rococap import db, queue
from rococap.data import SPLITS
from rococap.queue import Claim, Telemetry
from rococap.worker.fetcher import FROM_START_EVERY, SUSPECTS_EVERY
from rococap.worker.settings import Settings

GPUS = 1_000
"""For how many GPUs the table says what they would need."""
PROCESSES = 4
"""Processes that the workers are threads of: one would be the limit itself."""
SETTINGS = Settings()
PARTS = 2
"""Transactions in which a lease is completed: with captions of uneven lengths, those of two or three leases are stored
together."""
ALONE = 100
"""Claims of one worker before the others begin."""
SAMPLE_SEC = 0.25
HOT_TABLES = ("jobs", "captions", "leases", "workers", "tallies")
TELEMETRY = Telemetry(1000.0, 50.0, 3000.0, 0.9, 0.98, 12.5, 32, 4096.0, 60_000.0, 80_000.0, 0.97)


# --- Workers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Task:
    """What the workers of a bench have in common. `per_sec` is how much all of them caption in a simulated second."""

    url: str
    workers: int
    batch: int
    per_sec: float
    seconds: float
    started_at: int
    """The database's clock in milliseconds when the simulated time began."""


@dataclass(slots=True)
class Worked:
    """What some workers did, with milliseconds of whole transactions. `began` and `ended` are of the monotonic clock,
    and `cpu` is the CPU time of their process, in seconds.
    """

    stored: int = 0
    claims: list[float] = field(default_factory=list)
    completes: list[float] = field(default_factory=list)
    looks: list[float] = field(default_factory=list)
    beats: list[float] = field(default_factory=list)
    began: float = 0.0
    ended: float = 0.0
    cpu: float = 0.0


class Worker:
    """One worker without a model, at its own connection."""

    def __init__(self, task: Task, stored: "Synchronized[int]", worked: Worked) -> None:
        self._task = task
        self._stored = stored
        self._worked = worked
        self._engine = db.connect(task.url)
        self._id = register(self._engine)
        with db.transaction(self._engine) as conn:
            self._run = queue.get_run(conn, RUN_NAME)
        self._n_claims = 0
        self._last_job_id = 0
        self._store_ms: dict[int, float] = {}
        self._next_beat = self._now() + int(1000 * SETTINGS.beat_sec)

    def work(self, until: float, most: int | None = None) -> None:
        """Captions until nothing is pending, the monotonic clock says `until`, or after `most` claims."""
        while self._n_claims != most and time.monotonic() < until and (claim := self._next_claim()):
            self._last_job_id = claim.jobs[-1].id
            done = completions(claim)
            for part in range(PARTS):
                if self._now() >= self._next_beat:
                    self._beat(claim)
                self._complete(claim, done[part::PARTS])
        self._engine.dispose()

    def _now(self) -> int:
        return self._task.started_at + int(1000 * self._stored.value / self._task.per_sec)

    def _next_claim(self) -> Claim | None:
        with timing(self._worked.looks):
            with db.transaction(self._engine) as conn:
                db.now(conn)
                queue.overdue(conn, now=self._now())
            with db.transaction(self._engine) as conn:
                db.refuse_other_schema(conn)
                queue.refuse_deleted(conn, self._run)
                queue.check_rules(conn, self._run)
                queue.unfinished(conn, self._run, (SPLIT,))
            self._n_claims += 1
            if self._n_claims % SUSPECTS_EVERY == 0:
                with db.transaction(self._engine) as conn:
                    queue.has_suspects(conn, self._run, (SPLIT,))
        with timing(self._worked.claims), db.transaction(self._engine, write=True) as conn:
            run, batch = self._run.id, self._task.batch
            after = self._last_job_id if self._n_claims % FROM_START_EVERY else 0
            return queue.claim(conn, self._id, run, SPLIT, batch, ttl_ms=SETTINGS.ttl_ms, after=after, now=self._now())

    def _beat(self, claim: Claim) -> None:
        self._next_beat = self._now() + int(1000 * SETTINGS.beat_sec)
        store_ms, self._store_ms = self._store_ms, {}
        with timing(self._worked.beats), db.transaction(self._engine, write=True) as conn:
            queue.heartbeat(
                *(conn, self._id, [claim.id]),
                ttl_ms=SETTINGS.ttl_ms,
                store_ms=store_ms,
                telemetry=TELEMETRY,
                now=self._now(),
            )

    def _complete(self, claim: Claim, done: Sequence[Any]) -> None:
        with timing(self._worked.completes), db.transaction(self._engine, write=True) as conn:
            queue.complete(conn, claim, done, timing=queue.Timing(1.5, 2.5, 3.5, 4.5), now=self._now())
        self._store_ms[claim.id] = self._worked.completes[-1]
        self._worked.stored += len(done)
        with self._stored.get_lock():
            self._stored.value += len(done)
        with db.transaction(self._engine) as conn:
            queue.unfinished(conn, self._run, SPLITS)


def work(task: Task) -> Worked:
    """The workers of one process."""
    worked = Worked()
    workers = [Worker(task, shared(), worked) for _ in range(task.workers)]
    before = resource.getrusage(resource.RUSAGE_SELF)
    start_together()
    worked.began = time.monotonic()
    with ThreadPoolExecutor(task.workers) as pool:
        for future in [pool.submit(worker.work, worked.began + task.seconds) for worker in workers]:
            future.result()
    worked.ended = time.monotonic()
    after = resource.getrusage(resource.RUSAGE_SELF)
    worked.cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return worked


# --- The server ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Table:
    """What has happened to a table so far. `hot_updates` touched no index; `bytes` are with indexes."""

    updates: int
    hot_updates: int
    dead_rows: int
    vacuums: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Used:
    """What the server has used so far. `cpu` is in seconds."""

    cpu: float
    wal_bytes: int
    full_pages: int
    database_bytes: int
    tables: dict[str, Table]


def used(engine: Engine, postmaster: psutil.Process) -> Used:
    tables = (
        "SELECT relname, n_tup_upd, n_tup_hot_upd, n_dead_tup, autovacuum_count, pg_total_relation_size(relid) "
        f"FROM pg_stat_user_tables WHERE relname IN ({db.marks(HOT_TABLES)})"
    )
    with engine.connect() as conn:
        wal, full_pages, size = db.execute(
            conn,
            "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0'), (SELECT wal_fpi FROM pg_stat_wal), "
            "pg_database_size(current_database())",
        ).one()
        by_name = {name: Table(*figures) for name, *figures in db.execute(conn, tables, HOT_TABLES)}
    return Used(cpu_of(postmaster), int(wal), int(full_pages), int(size), by_name)


def cpu_of(postmaster: psutil.Process) -> float:
    """CPU seconds of a server's processes, those that have ended included."""
    times = postmaster.cpu_times()
    seconds = times.user + times.system + times.children_user + times.children_system
    for process in postmaster.children():
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds


@contextmanager
def watching(engine: Engine) -> Iterator[Counter[str]]:
    """Counts, now and then while the block runs, what each busy connection waits for."""
    seen: Counter[str] = Counter()
    is_over = threading.Event()
    sql = (
        "SELECT CASE WHEN state <> 'active' THEN 'for their worker' WHEN wait_event IS NULL THEN 'for nothing' "
        "ELSE wait_event_type || ' ' || wait_event END, count(*) FROM pg_stat_activity "
        "WHERE backend_type = 'client backend' AND state <> 'idle' AND pid <> pg_backend_pid() GROUP BY 1"
    )

    def watch() -> None:
        while not is_over.wait(SAMPLE_SEC):
            with engine.connect() as conn:
                seen.update(dict(tuple(row) for row in db.execute(conn, sql)))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


# --- The bench -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scaled:
    """What was measured. `checked` says how many jobs and captions there are in the end."""

    fill_sec: float
    alone: Worked
    crew: list[Worked]
    before: Used
    after: Used
    waits: Counter[str]
    checked: str

    @property
    def stored(self) -> int:
        return sum(one.stored for one in self.crew)

    @property
    def seconds(self) -> float:
        return max(one.ended for one in self.crew) - min(one.began for one in self.crew)

    def times(self, what: str) -> list[float]:
        return [ms for one in self.crew for ms in getattr(one, what)]

    def a_caption(self, what: str) -> float:
        """How much of `cpu`, `wal_bytes` or `full_pages` the server used for a caption."""
        return (getattr(self.after, what) - getattr(self.before, what)) / self.stored


def measure(options: argparse.Namespace) -> Scaled:
    with server.started(max_connections=options.connections + 20) as running:
        engine = db.connect(running.create())
        began = time.perf_counter()
        per_sec = options.rate * options.connections
        fill_many(engine, options.rows - options.done, done=options.done, text=TEXT, per_sec=per_sec)
        fill_sec = time.perf_counter() - began
        print(f"filled in {fill_sec:.0f} s; {options.connections} workers caption", file=sys.stderr)
        with engine.connect() as conn:
            backend = psutil.Process(db.execute(conn, "SELECT pg_backend_pid()").scalar_one())
            postmaster, started_at = backend.parent(), db.now(conn)
        url = engine.url.render_as_string(hide_password=False)
        task = Task(url, options.connections // PROCESSES, options.batch, per_sec, options.seconds, started_at)
        stored = SPAWN.Value("q", 0)
        alone = Worked()
        Worker(task, stored, alone).work(time.monotonic() + options.seconds, ALONE)
        with crew(PROCESSES, stored) as together:
            before = used(engine, postmaster)
            with watching(engine) as waits:
                worked = together(work, task)
            after = used(engine, postmaster)
        scaled = Scaled(fill_sec, alone, worked, before, after, waits, check(engine))
        engine.dispose()
    return scaled


def check(engine: Engine) -> str:
    """Counts every job and caption. Raises RuntimeError if the tallies do not agree."""
    with db.transaction(engine) as conn:
        total, done, leased = db.execute(
            conn, "SELECT count(*), count(*) FILTER (WHERE status = 'done'), count(lease_id) FROM jobs"
        ).one()
        captions = db.execute(conn, "SELECT count(*) FROM captions").scalar_one()
        (tallied,) = (counts.done for counts in queue.counts(conn))
    if not done == captions == tallied:
        raise RuntimeError(f"{done} jobs are done, {captions} captions stored, and {tallied} jobs counted as done")
    return f"{done:,} of {total:,} jobs done in the end, each with its caption; {leased} leased"


def lines(scaled: Scaled, options: argparse.Namespace) -> list[Line]:
    before, after = scaled.before, scaled.after
    return [
        value_line("captions stored a second", [scaled.stored / scaled.seconds], "", ""),
        *time_lines(scaled),
        value_line("CPU of the server, 1,000 captions", [1000 * scaled.a_caption("cpu")], "s", ""),
        value_line(
            "CPU of the workers, 1,000 captions", [1000 * sum(one.cpu for one in scaled.crew) / scaled.stored], "s", ""
        ),
        value_line("WAL, a caption", [scaled.a_caption("wal_bytes")], "bytes", ""),
        value_line("full pages in it, 1,000 captions", [1000 * scaled.a_caption("full_pages")], "", ""),
        value_line("database, before", [before.database_bytes / 1e9], "GB", ""),
        value_line("database, after", [after.database_bytes / 1e9], "GB", ""),
        value_line("database, a row", [after.database_bytes / options.rows], "bytes", ""),
        *(line for name in HOT_TABLES for line in table_lines(name, before.tables[name], after.tables[name])),
        *wait_lines(scaled.waits),
        *need_lines(scaled, options.rate),
    ]


def time_lines(scaled: Scaled) -> Iterator[Line]:
    for name in ("looks", "claims", "completes", "beats"):
        for who, times in (("one worker alone", getattr(scaled.alone, name)), ("all workers", scaled.times(name))):
            for percentile, share in (("p50", 0.5), ("p99", 0.99)):
                if times:
                    value = sorted(times)[int(share * (len(times) - 1))]
                    yield value_line(f"{name}, {who}, {percentile}", [value], "ms", "")


def table_lines(name: str, before: Table, after: Table) -> Iterator[Line]:
    if updates := after.updates - before.updates:
        share = 100 * (after.hot_updates - before.hot_updates) / updates
        yield value_line(f"{name}: updates that touch no index", [share], f"% of {updates:,}", "")
    times = f"({after.vacuums - before.vacuums} times vacuumed)"
    yield value_line(f"{name}: dead rows in the end", [after.dead_rows], times, "")
    yield value_line(
        f"{name}: growth, with indexes", [(after.bytes - before.bytes) / 1e6], f"MB, to {after.bytes / 1e6:,.0f}", ""
    )


def wait_lines(waits: Counter[str]) -> Iterator[Line]:
    for what, n in waits.most_common(6):
        yield value_line(f"busy connections that wait {what}", [100 * n / waits.total()], "%", "")


def need_lines(scaled: Scaled, rate: int) -> list[Line]:
    """What GPUS GPUs would need that caption `rate` pictures a second each."""
    jobs, who = GPUS * rate, f"{GPUS:,} GPUs with {rate} captions/s"
    n_commits = sum(len(scaled.times(what)) for what in ("claims", "completes", "beats"))
    return [
        value_line(f"{who}: captions", [jobs], "/s", ""),
        value_line(f"{who}: connections", [GPUS * db.CONNECTIONS], "", ""),
        value_line(f"{who}: cores of the server", [jobs * scaled.a_caption("cpu")], "", ""),
        value_line(f"{who}: WAL", [jobs * scaled.a_caption("wal_bytes") / 1e6], "MB/s", ""),
        value_line(f"{who}: commits", [jobs * n_commits / scaled.stored], "/s", ""),
    ]


def main() -> None:
    options = _options()
    load = os.getloadavg()[0]
    scaled = measure(options)
    show(
        lines(scaled, options),
        f"load {load:.1f} before; PostgreSQL with fsync; {options.connections} workers, {options.batch} a claim; "
        f"{scaled.stored:,} captions in {scaled.seconds:.0f} s; filled in {scaled.fill_sec:.0f} s; {scaled.checked}",
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=10_000_000, help="pictures in the queue")
    add("--done", type=int, default=9_000_000, help="those of them that are captioned before")
    add("--connections", type=int, default=200, help=f"workers, a multiple of {PROCESSES}")
    add("--batch", type=int, default=32, help="pictures that a worker claims at a time")
    add("--rate", type=int, default=50, help="pictures that a GPU captions in a second of simulated time")
    add("--seconds", type=float, default=1500, help="longest time to caption")
    options = parser.parse_args()
    if options.connections % PROCESSES:
        parser.error(f"the number of connections has to be a multiple of {PROCESSES}")
    return options


if __name__ == "__main__":
    main()
