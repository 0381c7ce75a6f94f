"""A world small enough to be explored whole: a queue of a few jobs, two workers and somebody who cancels and retries.

Every step calls the code under test: the workers' own holdings, store, heartbeat and claims, and the queue's functions.
Of a worker the world keeps only what it believes, which can be saved and restored like the database. Time passes when a
step says so.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
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
from rococap.worker.contact import Contact
from rococap.worker.context import Context
from rococap.worker.fetcher import Fetcher
from rococap.worker.holdings import Holdings, _Held, _State
from rococap.worker.settings import Settings
from rococap.worker.spool import Entry, Spool
from rococap.worker.store import Store
from rococap.worker.telemetry import Meter

TICK_MS = 5_000
"""As long as the first backoff."""
TTL_MS = TICK_MS
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
        self.is_writing = self.is_open = False


def controlled(monkeypatch: pytest.MonkeyPatch) -> Control:
    """Clocks show the control's time, backoffs have no jitter, nothing waits, and answers are as the control says.

    On SQLite, a transaction is a savepoint, so that the world goes back to an earlier state by rolling back.
    """
    control = Control()
    begin, commit, roll_back = db._begin, db._commit, db._roll_back

    def controlled_begin(conn: Connection, write: bool, patience: float | None = None) -> None:
        if conn.dialect.name == "sqlite":
            conn.connection.driver_connection.execute("SAVEPOINT step")
        else:
            begin(conn, write, patience)
        control.is_writing, control.is_open = write, True

    def controlled_commit(conn: Connection, patience: float | None = None) -> None:
        if control.is_writing and control.answer == REFUSED:
            raise DatabaseUnavailable("The test refuses it.")
        if conn.dialect.name == "sqlite":
            conn.connection.driver_connection.execute("RELEASE step")
        else:
            commit(conn, patience)
        control.is_open = False
        if control.is_writing and control.answer == LOST:
            raise DatabaseUnavailable("The test lost the answer.")

    def controlled_roll_back(conn: Connection) -> None:
        if conn.dialect.name != "sqlite":
            roll_back(conn)
        elif control.is_open:
            conn.connection.driver_connection.execute("ROLLBACK TO step")
            conn.connection.driver_connection.execute("RELEASE step")

    monkeypatch.setattr(db, "_begin", controlled_begin)
    monkeypatch.setattr(db, "_commit", controlled_commit)
    monkeypatch.setattr(db, "_roll_back", controlled_roll_back)
    monkeypatch.setattr(db.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(db, "now", lambda conn: control.now)
    monkeypatch.setattr(clock, "now", lambda: control.now / 1000)
    monkeypatch.setattr(leases.random, "random", lambda: 0.0)
    monkeypatch.setattr(Holdings, "_wait", lambda self, condition: condition())
    return control


def in_memory() -> Engine:
    """An empty queue on one connection, which can be saved and restored."""
    database = create_engine(
        "sqlite://",
        isolation_level="AUTOCOMMIT",
        poolclass=StaticPool,
        pool_reset_on_return=None,
        skip_autocommit_rollback=True,
        connect_args={"check_same_thread": False},
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
    name: ", ".join(tables.metadata.tables[name].columns.keys())
    for name in ("workers", "leases", "jobs", "captions", "failures", "tallies")
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


@dataclass(frozen=True)
class Rows:
    """What is in the database."""

    jobs: dict[int, JobRow]
    leases: dict[int, LeaseRow]
    captions: dict[int, tuple[int, str]]
    """The lease and the text, by job."""
    failures: list[tuple[int, int, str]]
    """Job, lease and code."""
    tallies: dict[str, int]
    n_done: int
    """By all workers."""

    @classmethod
    def read(cls, select: Callable[[str], Sequence[Any]]) -> "Rows":
        jobs, leases_ = ", ".join(JobRow.__slots__), ", ".join(LeaseRow.__slots__)
        return cls(
            {row[0]: JobRow(*row[1:]) for row in select(f"SELECT id, {jobs} FROM jobs ORDER BY id")},
            {row[0]: LeaseRow(*row[1:]) for row in select(f"SELECT id, {leases_} FROM leases ORDER BY id")},
            {row[0]: (row[1], row[2]) for row in select("SELECT job_id, lease_id, text FROM captions")},
            list(select("SELECT job_id, lease_id, code FROM failures ORDER BY id")),
            {row[0]: row[1] for row in select("SELECT status, sum(n) FROM tallies GROUP BY status") if row[1]},
            select("SELECT sum(n_done) FROM workers")[0][0],
        )

    @cached_property
    def open(self) -> dict[int, LeaseRow]:
        return {id: lease for id, lease in self.leases.items() if lease.state == "open"}

    def is_over(self) -> bool:
        return all(job.status in FINISHED for job in self.jobs.values())


@dataclass
class Mind:
    """What a worker believes: what it holds, what it could not store, and whether it may have claimed more."""

    context: Context
    state: _State = field(default_factory=_State)
    entries: list[Entry] = field(default_factory=list)
    is_unsure: bool = False

    @property
    def worker_id(self) -> int:
        return self.context.worker_id

    def copy(self) -> "Mind":
        state = self.state
        copied = _State(
            {id: _Held(one.lease, set(one.outstanding), one.expires_at) for id, one in state.held.items()},
            dict(state.lease_of),
            deque(state.ready),
            set(state.running),
            set(state.abandoned),
            set(state.finished),
            set(state.blank),
        )
        return Mind(self.context, copied, list(self.entries), self.is_unsure)

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
    """A whole state. `tables` has every row of the tables that change, unless it is not to be restored."""

    rows: Rows
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


class _Silent(Meter):
    """Measures nothing that heartbeats would report."""

    def recent(self) -> None:  # type: ignore[override]
        return None


class _AlwaysInContact(Contact):
    """Every worker may always judge the others, which is more than a real one may."""

    def unbroken_sec(self) -> float:
        return 1e9


class World:
    """A run on the database, and two workers that hold nothing yet.

    `crashes` says how many crashes each job of the run has been in before.
    """

    def __init__(self, database: Engine, folder: Path, control: Control, *, crashes: Sequence[int]) -> None:
        self.database = database
        self.control = control
        self.run = fill(database, folder / "set", len(crashes))
        self._n_jobs = len(crashes)
        with self._writing() as conn:
            db.execute(conn, "UPDATE runs SET max_attempts = ?", (MAX_ATTEMPTS,))
            db.execute(conn, "UPDATE jobs SET crashes = ? WHERE id = ?", [(n, id) for id, n in enumerate(crashes, 1)])
        self._template = Context(
            database,
            Settings(lease_ttl=TTL_MS / 1000),
            self.run,
            ["train"],
            datasets.locate(self.run.dataset, ["train"]),
            SmallEngine(batch_size=CLAIM),
            "",
            threading.Event(),
            _AlwaysInContact(0),
        )
        self._n_started = 0
        self.left: list[Entry] = []
        """What dead workers have left in their spools."""
        self.n_lost = 0
        """Captions that the latest replay counted as lost."""
        self.minds = [self._start(), self._start()]
        self._driver = database.raw_connection().driver_connection if database.dialect.name == "sqlite" else None
        if self._driver is not None:
            self._driver.execute("SAVEPOINT base")
        self._rows = Rows.read(self._select)
        self._n_written = self._driver.total_changes if self._driver else 0
        self._base = self.save()
        """The state to which the database is rolled back."""

    # --- saving and restoring ---

    def save(self, *, to_restore: bool = True) -> Saved:
        """The state, as the last look has found it."""
        selects = {name: f"SELECT {columns} FROM {name}" for name, columns in _COLUMNS.items() if to_restore}
        tables_ = {name: self._select(sql) for name, sql in selects.items()}
        return Saved(self._rows, tables_, self.control.now, self._n_started, list(self.minds), list(self.left))

    def restore(self, saved: Saved) -> None:
        """Puts back a state. If it is the one that was restored last, SQLite only rolls back.

        To deserialise the whole database would take longer than a step, because SQLite would parse the schema again.
        """
        self.control.now, self._n_started = saved.now, saved.n_started
        self.minds, self.left = list(saved.minds), list(saved.left)
        if self._driver is not None:
            self._driver.execute("ROLLBACK TO base")
        if self._driver is None or saved is not self._base:
            self._put_back(saved)
        self._rows = saved.rows
        self._n_written = self._driver.total_changes if self._driver else 0

    def _put_back(self, saved: Saved) -> None:
        names = [name for name in _COLUMNS if self._driver is None or saved.tables[name] != self._base.tables[name]]
        with self._writing() as conn:
            if self._driver is not None:
                db.execute(conn, "PRAGMA defer_foreign_keys = ON")
            for name in reversed(names):
                db.execute(conn, f"DELETE FROM {name}")
            for name in names:
                if rows := saved.tables[name]:
                    db.execute(conn, f"INSERT INTO {name} ({_COLUMNS[name]}) VALUES ({db.marks(rows[0])})", rows)
        if self._driver is not None:
            self._driver.execute("RELEASE base")
            self._driver.execute("SAVEPOINT base")
        self._base = saved

    def look(self) -> Rows:
        """Reads what is in the database now, unless nothing was written since the last look."""
        if self._driver is None or self._driver.total_changes != self._n_written:
            self._rows = Rows.read(self._select)
            self._n_written = self._driver.total_changes if self._driver else 0
        return self._rows

    def _select(self, sql: str) -> Sequence[Any]:
        if self._driver is not None:
            return self._driver.execute(sql).fetchall()
        with db.transaction(self.database) as conn:
            return [tuple(row) for row in db.execute(conn, sql).fetchall()]

    # --- what there is ---

    def key(self, rows: Rows) -> Any:
        """The state up to the ids of leases and workers and to a shift of time; the two workers may change places."""
        known = set(rows.open)
        for mind in self.minds:
            known |= mind.state.held.keys() | {entry.lease.id for entry in mind.entries}
        known |= {entry.lease.id for entry in self.left}
        label = {id: n for n, id in enumerate(sorted(known), 1)}

        def left(at: float | None) -> int:
            return -1 if at is None else max(0, round(at - self.control.now))

        jobs = tuple(
            (
                *(
                    job.status,
                    *((0, 0, 0) if job.status in FINISHED else (job.attempts, job.crashes, job.solo_crashes)),
                ),
                *(
                    label.get(job.lease_id or 0, 0),
                    left(job.not_before),
                    label.get(rows.captions[id][0], 0) if id in rows.captions else 0,
                ),
            )
            for id, job in rows.jobs.items()
        )
        known_leases = [(rows.leases[id], n) for id, n in label.items()]
        held = tuple((lease.lane, left(lease.expires_at) if lease.state == "open" else -1) for lease, _ in known_leases)
        minds = sorted(
            (
                tuple(n for lease, n in known_leases if lease.worker_id == mind.worker_id),
                *self._mind_key(mind, label, left),
            )
            for mind in self.minds
        )
        return jobs, held, minds, sorted(_entry_key(entry, label) for entry in self.left)

    def _mind_key(self, mind: Mind, label: dict[int, int], left: Callable[[float], int]) -> tuple[Any, ...]:
        state = mind.state
        ready = sorted(picture.job_id for picture in state.ready)
        leases_ = [
            (label[id], sorted(held.outstanding), left(held.expires_at * 1000) if held.outstanding & set(ready) else -1)
            for id, held in sorted(state.held.items())
        ]
        of_job = sorted((id, label[lease_id]) for id, lease_id in state.lease_of.items() if lease_id in state.held)
        jobs = {*ready, *state.running, *(id for id, _ in of_job)}
        jobs.update(*(held.outstanding for held in state.held.values()))
        return (
            *(leases_, of_job, ready, sorted(state.running), sorted(state.abandoned & jobs), sorted(state.finished)),
            *(sorted(_entry_key(entry, label) for entry in mind.entries), mind.is_unsure),
        )

    def steps(self, rows: Rows) -> Iterator[Step]:
        """All that may happen next, without lost answers and other troubles first."""
        for slot, mind in enumerate(self.minds):
            yield from self._steps_of(slot, mind, rows)
        if any(job.status == "waiting" for job in rows.jobs.values()):
            yield Step("wake")
        if (
            rows.open
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
            lease.worker_id != mind.worker_id or lease.expires_at <= self.control.now for lease in rows.open.values()
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
        if verb in WORKERS_VERBS:
            slot = args[0]
            self.minds[slot] = self.minds[slot].copy()
        try:
            getattr(self, f"_{verb}")(*args)
        finally:
            self.control.answer = ""

    def _start(self) -> Mind:
        self._n_started += 1
        uuid = f"worker {self._n_started}"
        with self._writing() as conn:
            worker_id = queue.register_worker(conn, uuid, "host", 1, INFO)
        return Mind(replace(self._template, worker_id=worker_id, uuid=uuid))

    def _writing(self) -> Any:
        return db.transaction(self.database, write=True)

    def _holdings(self, mind: Mind) -> Holdings:
        holdings = Holdings()
        holdings._state = mind.state
        return holdings

    def _fetcher(self, slot: int) -> Fetcher:
        mind = self.minds[slot]
        return Fetcher(mind.context, self._holdings(mind), lambda completion: None)

    def _store(self, mind: Mind, entries: list[Entry] | None = None) -> Store:
        context, holdings = mind.context, self._holdings(mind)
        spool = _Memory(context.uuid, mind.entries if entries is None else entries)
        return Store(context, holdings, spool, _Silent(context.engine, holdings.usage))

    def _claim(self, slot: int, lane: int) -> None:
        fetcher = self._fetcher(slot)
        try:
            claim = fetcher._claim(lane)
        except DatabaseUnavailable:
            self.minds[slot].is_unsure = True
            return
        for job in claim.jobs if claim else ():
            fetcher._holdings.offer(job, Prepared(job.id, None, 1), 0.0, 0.0, is_blank=False)

    def _take(self, slot: int) -> None:
        self._holdings(self.minds[slot]).take(CLAIM, 0)

    def _beat(self, slot: int) -> None:
        store = self._store(self.minds[slot])
        heartbeat._beat_once(store._context, store._holdings, store.meter)

    def _caption(self, slot: int, *job_ids: int) -> None:
        uuid = self.minds[slot].context.uuid
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
        with suppress(DatabaseUnavailable):
            self.left[n : n + 1] = self._store(self.minds[slot])._recover(self.left[n])

    def _forget(self, slot: int) -> None:
        mind = self.minds[slot]
        held = {lease.id for lease in self._holdings(mind).open_leases()}
        with suppress(DatabaseUnavailable):
            with self._writing() as conn:
                queue.release_forgotten(conn, mind.worker_id, held)
            mind.is_unsure = False

    def _reap(self, slot: int) -> None:
        self._fetcher(slot)._reap()

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
            queue.retry(conn, self.run, image_ids=[f"train_{id - 1:05}" for id in range(1, self._n_jobs + 1)])


def _entry_key(entry: Entry, label: dict[int, int]) -> Any:
    completions = tuple((one.job_id, one.failure is not None) for one in entry.completions)
    return label[entry.lease.id], completions, entry.released
