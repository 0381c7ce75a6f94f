"""A world small enough to be explored whole: a queue of a few jobs, two workers and somebody who cancels and retries.

Every step calls the code under test: the workers' own holdings, store, heartbeat and claims, and the queue's functions.
Of a worker the world keeps only what it believes, which can be saved and restored like the database. Time passes when a
step says so.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from samples import fill
from small_engine import INFO, SmallEngine
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.pool import StaticPool

from rococap import db, queue, tables
from rococap.data import datasets
from rococap.engines import Completion, Failure, Prepared
from rococap.errors import DatabaseUnavailable
from rococap.queue import NORMAL, SOLO, SUSPECTS, leases
from rococap.worker import clock, heartbeat, process
from rococap.worker.context import Context
from rococap.worker.fetcher import Fetcher
from rococap.worker.holdings import Holdings, _State
from rococap.worker.settings import Settings
from rococap.worker.spool import Entry, Spool
from rococap.worker.store import Store
from rococap.worker.telemetry import Meter

TICK_MS = 5_000
"""As long as the first backoff."""
MAX_ATTEMPTS = 2
CLAIM = 2
"""The most jobs that a worker claims at once."""
A, B = 0, 1
LOST, REFUSED = "lost", "refused"
"""What may go wrong with a transaction: it is committed, but its answer is lost; or it is not committed."""
FINISHED = ("done", "failed", "cancelled")


# --- What is under control ---------------------------------------------------------------------------------------


class Control:
    """The time on every clock, in milliseconds, and how the next transactions that write are answered."""

    def __init__(self) -> None:
        self.now = 1_000_000
        self.answer = ""
        self.is_writing = False


def controlled(monkeypatch: pytest.MonkeyPatch) -> Control:
    """Clocks show the control's time, backoffs have no jitter, nothing waits, and answers are as the control says."""
    control = Control()
    begin, commit = db._begin, db._commit

    def begin_and_note(conn: Connection, write: bool, patience: float | None = None) -> None:
        control.is_writing = write
        begin(conn, write, patience)

    def commit_or_not(conn: Connection, patience: float | None = None) -> None:
        if control.is_writing and control.answer == REFUSED:
            raise DatabaseUnavailable("The test refuses it.")
        commit(conn, patience)
        if control.is_writing and control.answer == LOST:
            raise DatabaseUnavailable("The test lost the answer.")

    monkeypatch.setattr(db, "_begin", begin_and_note)
    monkeypatch.setattr(db, "_commit", commit_or_not)
    monkeypatch.setattr(db.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(db, "now", lambda conn: control.now)
    monkeypatch.setattr(clock, "now", lambda: control.now / 1000)
    monkeypatch.setattr(leases.random, "random", lambda: 0.0)
    monkeypatch.setattr(Holdings, "_wait", lambda self, condition: condition())
    return control


def in_memory() -> Engine:
    """An empty queue on one connection, which can be saved and restored."""
    database = create_engine(
        "sqlite://", isolation_level="AUTOCOMMIT", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    event.listen(database, "connect", lambda connection, _: connection.execute("PRAGMA foreign_keys = ON"))
    db.upgrade(database)
    return database


# --- The steps -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a method of the world, and how its transaction is answered."""

    verb: str
    args: tuple[Any, ...] = ()
    answer: str = ""

    def __str__(self) -> str:
        lanes = {NORMAL: "NORMAL", SUSPECTS: "SUSPECTS", SOLO: "SOLO"}
        args = [str(arg) for arg in self.args]
        if self.verb in WORKERS_VERBS:
            args[0] = "AB"[self.args[0]]
        if self.verb == "claim":
            args[1] = lanes[self.args[1]]
        answer = f", answer={self.answer.upper()}" if self.answer else ""
        return f"world.do({', '.join([repr(self.verb), *args])}{answer})"


WORKERS_VERBS = frozenset(
    ["claim", "take", "beat", "caption", "fail", "replay", "take_over", "forget", "reap", "give_back", "give_up", "die"]
)
VERBS = WORKERS_VERBS | {"wake", "tick", "cancel", "retry"}
TROUBLES = frozenset(["give_back", "give_up", "die", "cancel", "fail"])
"""What need not happen. Nor need an answer be lost or refused."""


# --- What a state is -------------------------------------------------------------------------------------------


_COLUMNS = {
    name: tables.metadata.tables[name].columns.keys()
    for name in ("workers", "leases", "jobs", "captions", "failures", "tallies")
}
_SELECT = {
    name: f"SELECT {', '.join(columns)} FROM {name} "
    f"ORDER BY {', '.join(tables.metadata.tables[name].primary_key.columns.keys())}"
    for name, columns in _COLUMNS.items()
}
_INSERT = {
    name: f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    for name, columns in _COLUMNS.items()
}


@dataclass(frozen=True, slots=True)
class JobRow:
    status: str
    attempts: int
    crashes: int
    solo_crashes: int
    lease_id: int | None
    not_before: int | None


def lane_of(job: JobRow) -> int:
    """The lane in which a job is claimed."""
    return [NORMAL, SUSPECTS, SOLO][min(job.crashes, 2)]


@dataclass(frozen=True, slots=True)
class LeaseRow:
    worker_id: int
    lane: int
    state: str
    n_jobs: int
    n_done: int
    beat_at: int
    expires_at: int
    closed_at: int | None


@dataclass(frozen=True, slots=True)
class Rows:
    """What is in the database."""

    jobs: dict[int, JobRow]
    leases: dict[int, LeaseRow]
    captions: dict[int, list[Any]]
    failures: list[tuple[Any, ...]]
    tallies: dict[str, int]
    n_done: int

    @classmethod
    def of(cls, tables_: dict[str, list[Any]]) -> "Rows":
        def column(name: str, *wanted: str) -> list[tuple[Any, ...]]:
            at = [_COLUMNS[name].index(column) for column in wanted]
            return [tuple(row[n] for n in at) for row in tables_[name]]

        tallies: Counter[str] = Counter()
        for status, n in column("tallies", "status", "n"):
            tallies[status] += n
        leases_ = ("worker_id", "lane", "state", "n_jobs", "n_done", "beat_at", "expires_at", "closed_at")
        return cls(
            {id: JobRow(*row) for id, *row in column("jobs", "id", *JobRow.__slots__)},
            {id: LeaseRow(*row) for id, *row in column("leases", "id", *leases_)},
            {id: row for id, *row in column("captions", "job_id", "lease_id", "text")},
            column("failures", "job_id", "lease_id", "code"),
            {status: n for status, n in tallies.items() if n},
            sum(n for (n,) in column("workers", "n_done")),
        )

    def held(self, lease_id: int) -> list[int]:
        return [id for id, job in self.jobs.items() if job.lease_id == lease_id]

    def open(self) -> dict[int, LeaseRow]:
        return {id: lease for id, lease in self.leases.items() if lease.state == "open"}

    def is_over(self) -> bool:
        return all(job.status in FINISHED for job in self.jobs.values())


@dataclass
class Mind:
    """What a worker believes: what it holds, what it could not store, and whether it may have claimed more."""

    worker_id: int
    uuid: str
    state: _State = field(default_factory=_State)
    entries: list[Entry] = field(default_factory=list)
    is_unsure: bool = False

    def copy(self) -> "Mind":
        state = self.state
        held = {id: replace(one, outstanding=set(one.outstanding)) for id, one in state.held.items()}
        copied = _State(
            held,
            dict(state.lease_of),
            deque(state.ready),
            set(state.running),
            set(state.abandoned),
            set(state.finished),
            set(state.blank),
        )
        return Mind(self.worker_id, self.uuid, copied, list(self.entries), self.is_unsure)

    def workable(self, lease_id: int) -> list[int]:
        """Jobs of a lease that the model is running, and whose captions the store would store under this lease."""
        state = self.state
        return sorted(
            id
            for id in state.held[lease_id].outstanding & state.running - state.abandoned
            if state.lease_of.get(id) == lease_id
        )


@dataclass(frozen=True, slots=True)
class Saved:
    """A whole state."""

    tables: dict[str, list[Any]]
    now: int
    n_started: int
    minds: list[Mind]
    left: list[Entry]


class _Memory(Spool):
    """A spool on no disk: what outlives the worker is its list of entries."""

    def __init__(self, uuid: str, entries: list[Entry]) -> None:
        super().__init__(Path(), uuid)
        self.entries = entries

    def add(self, lease: queue.Lease, completions: Sequence[Completion] = (), released: Sequence[int] = ()) -> None:
        self.entries.append(Entry(self._uuid, lease, tuple(completions), tuple(released)))

    def clear(self) -> None:
        self.entries.clear()


class _AlwaysInContact:
    """Every worker may always judge the others, which is more than a real one may."""

    def made(self, database_ms: int | None = None) -> None: ...

    def lost(self, error: Exception) -> None: ...

    def unbroken_sec(self) -> float:
        return 1e9


class World:
    """A run on the database, and two workers that hold nothing yet.

    `crashes` says how many crashes each job of the run has been in before. Leases last `ttl` ticks.
    """

    def __init__(
        self, database: Engine, folder: Path, control: Control, *, crashes: Sequence[int], ttl: int = 1
    ) -> None:
        self.database = database
        self.control = control
        self.ttl_ms = ttl * TICK_MS
        self.run = fill(database, folder / "set", len(crashes))
        with self._writing() as conn:
            db.execute(conn, "UPDATE runs SET max_attempts = ?", (MAX_ATTEMPTS,))
            db.execute(conn, "UPDATE jobs SET crashes = ? WHERE id = ?", [(n, id) for id, n in enumerate(crashes, 1)])
        self._template = Context(
            database,
            Settings(lease_ttl=self.ttl_ms / 1000),
            self.run,
            ["train"],
            datasets.locate(self.run.dataset, ["train"]),
            SmallEngine(batch_size=CLAIM),
            "",
            threading.Event(),
            _AlwaysInContact(),  # type: ignore[arg-type]
        )
        self._n_started = 0
        self.left: list[Entry] = []
        """What dead workers have left in their spools."""
        self.n_lost = 0
        """Captions that the latest replay counted as lost."""
        self.minds = [self._start(), self._start()]
        self.tables: dict[str, list[Any]] = {}
        self._driver = database.raw_connection().driver_connection if database.dialect.name == "sqlite" else None

    # --- saving and restoring ---

    def save(self) -> "Saved":
        return Saved(
            self.tables, self.control.now, self._n_started, [mind.copy() for mind in self.minds], list(self.left)
        )

    def restore(self, saved: "Saved") -> None:
        """Puts back the rows that differ, on SQLite.

        To deserialise the whole file would take longer than a step, because SQLite would parse the schema again.
        """
        self.control.now, self._n_started, self.left = saved.now, saved.n_started, list(saved.left)
        self.minds = [mind.copy() for mind in saved.minds]
        self._driver.execute("BEGIN")
        self._driver.execute("PRAGMA defer_foreign_keys = ON")
        for name, rows in saved.tables.items():
            if rows != self.tables[name]:
                self._driver.execute(f"DELETE FROM {name}")
                self._driver.executemany(_INSERT[name], rows)
        self._driver.execute("COMMIT")
        self.tables = saved.tables

    def look(self) -> "Rows":
        """Reads what is in the database now."""
        if self._driver is not None:
            self.tables = {name: self._driver.execute(sql).fetchall() for name, sql in _SELECT.items()}
        else:
            with db.transaction(self.database) as conn:
                self.tables = {name: db.execute(conn, sql).fetchall() for name, sql in _SELECT.items()}
        return Rows.of(self.tables)

    # --- what there is ---

    def key(self, rows: Rows) -> Any:
        """The state up to the ids of leases and workers and to a shift of time; the two workers may change places."""
        return min(self._key(rows, (A, B)), self._key(rows, (B, A)))

    def _key(self, rows: Rows, slots: tuple[int, int]) -> Any:
        minds = [self.minds[slot] for slot in slots]
        slot_of = {mind.worker_id: n for n, mind in enumerate(minds)}
        known = set(rows.open())
        for mind in minds:
            known |= mind.state.held.keys() | {entry.lease.id for entry in mind.entries}
        known |= {entry.lease.id for entry in self.left}
        label = {id: n for n, id in enumerate(sorted(known), 1)}

        def left(at: float | None) -> int:
            return -1 if at is None else max(0, round(at - self.control.now))

        jobs = tuple(
            (
                *(job.status, job.attempts, job.crashes, job.solo_crashes, label.get(job.lease_id or 0, 0)),
                *(left(job.not_before), label.get((rows.captions.get(id) or (0,))[0] or 0, 0)),
            )
            for id, job in rows.jobs.items()
        )
        held = tuple(
            (
                slot_of.get(lease.worker_id, 2),
                lease.lane,
                lease.state,
                left(lease.expires_at) if lease.state == "open" else 0,
            )
            for lease in (rows.leases[id] for id in sorted(known))
        )
        return (
            jobs,
            held,
            tuple(self._mind_key(mind, label, left) for mind in minds),
            tuple(sorted(_entry_key(entry, label) for entry in self.left)),
        )

    def _mind_key(self, mind: Mind, label: dict[int, int], left: Callable[[float], int]) -> Any:
        state = mind.state
        leases_ = tuple(
            (label[id], tuple(sorted(held.outstanding)), left(held.expires_at * 1000))
            for id, held in sorted(state.held.items())
        )
        ready = tuple(sorted(picture.job_id for picture in state.ready))
        of_job = {id: lease_id for id, lease_id in state.lease_of.items() if lease_id in state.held}
        jobs = {*ready, *state.running, *of_job, *(id for held in state.held.values() for id in held.outstanding)}
        return (
            leases_,
            tuple(sorted((id, label[lease_id]) for id, lease_id in of_job.items())),
            ready,
            tuple(sorted(state.running)),
            tuple(sorted(state.abandoned & jobs)),
            tuple(sorted(state.finished)),
            tuple(sorted(_entry_key(entry, label) for entry in mind.entries)),
            mind.is_unsure,
        )

    def steps(self, rows: Rows) -> Iterator[Step]:
        """All that may happen next, without lost answers and other troubles first."""
        for slot, mind in enumerate(self.minds):
            yield from self._steps_of(slot, mind, rows)
        if any(job.status == "waiting" for job in rows.jobs.values()):
            yield Step("wake")
        if (
            rows.open()
            or any(mind.state.held for mind in self.minds)
            or any(job.not_before for job in rows.jobs.values())
        ):
            yield Step("tick")
        statuses = {job.status for job in rows.jobs.values()}
        if not statuses <= set(FINISHED):
            yield Step("cancel")
            yield from (Step("cancel", (id,)) for id, job in rows.jobs.items() if job.status not in FINISHED)
        if statuses & {"failed", "cancelled"}:
            yield Step("retry")

    def _steps_of(self, slot: int, mind: Mind, rows: Rows) -> Iterator[Step]:
        state = mind.state
        if not mind.is_unsure:
            holdings = self._holdings(mind)
            for lane in sorted({lane_of(job) for job in rows.jobs.values() if job.status == "pending"}):
                if holdings.wait_until_taken() if lane == NORMAL else holdings.wait_until_empty():
                    yield from self._either("claim", slot, lane)
        if state.ready:
            yield Step("take", (slot,))
        if state.held:
            yield from self._either("beat", slot)
            for running in (False, True):
                yield from self._either("give_back", slot, running)
                yield Step("give_back", (slot, running), REFUSED)
            yield Step("give_up", (slot,))
        for lease_id in state.held:
            jobs = mind.workable(lease_id)
            for group in [*([id] for id in jobs), *([jobs] if len(jobs) > 1 else [])]:
                yield from self._either("caption", slot, *group)
                yield Step("caption", (slot, *group), REFUSED)
                yield from self._either("fail", slot, *group)
        for n in range(len(mind.entries)):
            yield from self._either("replay", slot, n)
        for n in range(len(self.left)):
            yield from self._either("take_over", slot, n)
        if mind.is_unsure:
            yield from self._either("forget", slot)
        if any(
            lease.worker_id != mind.worker_id or lease.expires_at <= self.control.now for lease in rows.open().values()
        ):
            yield Step("reap", (slot,))
        if state.held or mind.is_unsure or mind.entries:
            yield Step("die", (slot,))

    def _either(self, verb: str, *args: Any) -> Iterator[Step]:
        yield Step(verb, args)
        yield Step(verb, args, LOST)

    # --- what can be done ---

    def do(self, verb: str, *args: Any, answer: str = "") -> None:
        """Takes a step."""
        self.control.answer = answer
        try:
            getattr(self, f"_{verb}")(*args)
        finally:
            self.control.answer = ""

    def _start(self) -> Mind:
        self._n_started += 1
        uuid = f"worker {self._n_started}"
        with self._writing() as conn:
            return Mind(queue.register_worker(conn, uuid, "host", 1, INFO), uuid)

    def _writing(self) -> Any:
        return db.transaction(self.database, write=True)

    def _context(self, mind: Mind) -> Context:
        return replace(self._template, worker_id=mind.worker_id, uuid=mind.uuid)

    def _holdings(self, mind: Mind) -> Holdings:
        holdings = Holdings()
        holdings._state = mind.state
        return holdings

    def _store(self, mind: Mind, entries: list[Entry] | None = None) -> Store:
        context, holdings = self._context(mind), self._holdings(mind)
        spool = _Memory(mind.uuid, mind.entries if entries is None else entries)
        return Store(context, holdings, spool, Meter(context.engine, holdings.usage))

    def _claim(self, slot: int, lane: int) -> None:
        mind = self.minds[slot]
        holdings = self._holdings(mind)
        try:
            claim = Fetcher(self._context(mind), holdings, lambda completion: None)._claim(lane)
        except DatabaseUnavailable:
            mind.is_unsure = True
            return
        for job in claim.jobs if claim else ():
            holdings.offer(job, Prepared(job.id, None, 1), 0.0, 0.0, is_blank=False)

    def _take(self, slot: int) -> None:
        self._holdings(self.minds[slot]).take(CLAIM, 0)

    def _beat(self, slot: int) -> None:
        mind = self.minds[slot]
        holdings = self._holdings(mind)
        context = self._context(mind)
        heartbeat._beat_once(context, holdings, Meter(context.engine, holdings.usage))

    def _caption(self, slot: int, *job_ids: int) -> None:
        uuid = self.minds[slot].uuid
        self._put(slot, [Completion(id, f"Job {id} by {uuid}") for id in job_ids])

    def _fail(self, slot: int, *job_ids: int) -> None:
        busy = Failure("busy", "Come back later.", transient=True)
        self._put(slot, [Completion(id, failure=busy) for id in job_ids])

    def _put(self, slot: int, completions: list[Completion]) -> None:
        store = self._store(self.minds[slot])
        for completion in completions:
            store._holdings.finish(completion.job_id)
        for lease, its in store._by_lease(completions):
            store._store_lease(lease, its)

    def _replay(self, slot: int, n: int) -> None:
        mind = self.minds[slot]
        entries = [mind.entries.pop(n)]
        store = self._store(mind, entries)
        store._next_look = float("inf")
        store._empty_spool()
        mind.entries[n:n] = entries
        self.n_lost = store.outcome.lost

    def _take_over(self, slot: int, n: int) -> None:
        try:
            self.left[n : n + 1] = self._store(self.minds[slot])._recover(self.left[n])
        except DatabaseUnavailable:
            return

    def _forget(self, slot: int) -> None:
        mind = self.minds[slot]
        held = {lease.id for lease in self._holdings(mind).open_leases()}
        try:
            with self._writing() as conn:
                queue.release_forgotten(conn, mind.worker_id, held)
        except DatabaseUnavailable:
            return
        mind.is_unsure = False

    def _reap(self, slot: int) -> None:
        mind = self.minds[slot]
        Fetcher(self._context(mind), self._holdings(mind), lambda completion: None)._reap()

    def _give_back(self, slot: int, running: bool) -> None:
        self._store(self.minds[slot]).release(running=running)

    def _give_up(self, slot: int) -> None:
        store = self._store(self.minds[slot])
        process._give_up(store._context, store._holdings, store, RuntimeError("the model broke"))
        self._die(slot)

    def _die(self, slot: int) -> None:
        self.left += self.minds[slot].entries
        self.minds[slot] = self._start()

    def _wake(self) -> None:
        with self._writing() as conn:
            queue.wake(conn)

    def _tick(self) -> None:
        self.control.now += TICK_MS

    def _cancel(self, *job_ids: int) -> None:
        with self._writing() as conn:
            queue.cancel(conn, self.run, image_ids=[f"train_{id - 1:05}" for id in job_ids])

    def _retry(self) -> None:
        with self._writing() as conn:
            queue.retry(conn, self.run)
            queue.retry(conn, self.run, cancelled=True)


def _entry_key(entry: Entry, label: dict[int, int]) -> Any:
    completions = tuple((one.job_id, one.failure is not None) for one in entry.completions)
    return label[entry.lease.id], completions, entry.released
