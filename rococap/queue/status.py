"""Views that only read: counts and rates, workers, leases, failures."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from rococap.data import SPLITS
from rococap.db import execute
from rococap.errors import RunError
from rococap.flags import FLAGS
from rococap.queue import runs as runs_module
from rococap.queue import status as status_module
from rococap.queue.records import NORMAL, SOLO, SUSPECTS, Telemetry, Timing, flagged, time_of
from rococap.queue.runs import Run, get_run, list_runs, refuse_deleted
from rococap.tables import JobState

RATE_WINDOW_MS = 5 * 60_000


@dataclass(frozen=True, slots=True)
class Counts:
    """One run and split. `per_minute` is over the last five minutes at most; `eta_sec` is None while it is 0."""

    run: str
    split: str
    pending: int
    leased: int
    waiting: int
    done: int
    failed: int
    cancelled: int
    per_minute: float
    eta_sec: float | None
    paused: bool = False
    flags: Mapping[str, int] = field(default_factory=dict)
    """Captions by what is odd about them: see `rococap.flags`."""

    @property
    def total(self) -> int:
        return self.pending + self.leased + self.waiting + self.done + self.failed + self.cancelled

    @property
    def unfinished(self) -> int:
        return self.pending + self.leased + self.waiting


@dataclass(frozen=True, slots=True)
class RunSeen:
    """A run and where it stands, by split. `counts` is empty if it has no pictures yet."""

    run: Run
    created_at: int
    counts: tuple[Counts, ...]


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker process. `state`: running, stopped, or lost (not seen for its own lease time, and never said
    goodbye)."""

    id: int
    host: str
    pid: int
    device: str
    state: str
    done: int
    seen_sec_ago: float
    telemetry: Telemetry | None
    """None before its first heartbeat."""
    self_check: dict[str, Any] | None = None
    """What it found before its first claim; None if it did not look."""


@dataclass(frozen=True, slots=True)
class LeaseSeen:
    """A lease. `lane`: normal, suspects or solo; `expires_in_sec` is negative if overdue, None once it has ended.
    `timing`: of what is stored; the part of storing comes with the worker's next heartbeat.
    """

    id: int
    worker: int
    host: str
    pid: int
    run: str
    split: str
    lane: str
    state: str
    jobs: int
    done: int
    age_sec: float
    beat_sec_ago: float
    expires_in_sec: float | None
    timing: Timing


@dataclass(frozen=True, slots=True)
class Failed:
    run: str
    split: str
    image_id: str
    code: str
    message: str
    attempts: int


def counts(conn: Connection, *, now: int | None = None) -> list[Counts]:
    """Every run and split, in constant time: from the tallies, and the rate from the last minutes' leases."""
    at = time_of(conn, now)
    per_minute = _rates(conn, at)
    rows = execute(
        conn,
        "SELECT r.id, r.name, r.paused, t.split, t.status, sum(t.n) FROM tallies t JOIN runs r ON r.id = t.run_id "
        "WHERE r.deleted_at IS NULL GROUP BY r.id, r.name, r.paused, t.split, t.status",
    ).fetchall()
    keys = sorted({tuple(row[:4]) for row in rows}, key=lambda key: (key[0], SPLITS.index(key[3])))
    n = {(row[0], row[3], row[4]): int(row[5]) for row in rows}
    return [
        _counts(run_id, name, split, n, per_minute.get((run_id, split), 0.0), bool(paused))
        for run_id, name, paused, split in keys
    ]


def counts_of(conn: Connection, run: Run, splits: Sequence[str] = SPLITS) -> list[Counts]:
    """Those of one run. Raises RunError if it has nothing of these splits, or was deleted."""
    refuse_deleted(conn, run)
    mine = [one for one in counts(conn) if one.run == run.name and one.split in splits]
    if not mine:
        raise RunError(
            f"Run {run.name!r} has no pictures of {', '.join(splits)}. Register them, with the run's own data set and "
            f"recipe: rococap enqueue --run {run.name} --split {splits[0]} …"
        )
    return mine


def runs_seen(conn: Connection) -> list[RunSeen]:
    """Every run, at a cost that does not depend on how many pictures it has."""
    of_run: dict[str, list[Counts]] = {}
    for one in counts(conn):
        of_run.setdefault(one.run, []).append(one)
    created = {row[0]: row[1] for row in execute(conn, "SELECT id, created_at FROM runs")}
    return [RunSeen(run, created[run.id], tuple(of_run.get(run.name, ()))) for run in list_runs(conn)]


def _counts(
    run_id: int, name: str, split: str, n: Mapping[tuple[int, str, str], int], per_minute: float, paused: bool
) -> Counts:
    in_state = {state.value: n.get((run_id, split, state.value), 0) for state in JobState}
    left = in_state["pending"] + in_state["leased"] + in_state["waiting"]
    eta = 60 * left / per_minute if per_minute else (0.0 if not left else None)
    flags = {flag: found for flag in FLAGS if (found := n.get((run_id, split, flagged(flag)), 0))}
    return Counts(name, split, **in_state, per_minute=per_minute, eta_sec=eta, paused=paused, flags=flags)


def _rates(conn: Connection, at: int) -> dict[tuple[int, str], float]:
    """Captions per minute of each (run, split), over the last five minutes or since the first lease in them.

    Without leases of the future, which say that the clock was set back since.
    """
    start = at - RATE_WINDOW_MS
    rows = execute(
        conn,
        "SELECT run_id, split, sum(n_done), min(claimed_at) FROM ("
        "SELECT run_id, split, n_done, claimed_at FROM leases WHERE closed_at BETWEEN ? AND ? UNION ALL "
        "SELECT run_id, split, n_done, claimed_at FROM leases WHERE state = 'open') AS recent "
        "WHERE claimed_at <= ? GROUP BY run_id, split",
        (start, at, at),
    ).fetchall()
    return {
        (run_id, split): float(n_done) * 60_000 / max(at - max(first, start), 1_000)
        for run_id, split, n_done, first in rows
        if n_done
    }


def unfinished(conn: Connection, run: Run, splits: Sequence[str]) -> dict[str, int]:
    """How many jobs of these splits are pending, leased and waiting."""
    rows = execute(
        conn,
        "SELECT split, status, n FROM tallies WHERE run_id = ? AND status IN ('pending', 'leased', 'waiting')",
        (run.id,),
    ).fetchall()
    total = Counter({"pending": 0, "leased": 0, "waiting": 0})
    for split, status, n in rows:
        if split in splits:
            total[status] += n
    return dict(total)


def list_workers(conn: Connection, *, everyone: bool = False, now: int | None = None) -> list[WorkerSeen]:
    """Workers of the last day that have not stopped, and those that stopped in the last five minutes; or `everyone`."""
    at = time_of(conn, now)
    since, stopped_since = (0, 0) if everyone else (at - 86_400_000, at - RATE_WINDOW_MS)
    rows = execute(
        conn,
        "SELECT id, host, pid, device, stopped_at, n_done, seen_at, lease_ttl_ms, telemetry, self_check "
        "FROM workers "
        "WHERE seen_at >= ? AND (stopped_at IS NULL OR stopped_at >= ?) ORDER BY id",
        (since, stopped_since),
    ).fetchall()

    def state(stopped_at: int | None, seen_at: int, lease_ttl_ms: int) -> str:
        if stopped_at is not None:
            return "stopped"
        # One that was seen in the future was not seen since the clock was set back.
        return "lost" if abs(at - seen_at) > lease_ttl_ms else "running"

    return [
        WorkerSeen(
            *(id, host, pid, device, state(stopped, seen, ttl_ms), done, max(0, at - seen) / 1000),
            telemetry=Telemetry.from_json(told) if told else None,
            self_check=json.loads(checked) if checked else None,
        )
        for id, host, pid, device, stopped, done, seen, ttl_ms, told, checked in rows
    ]


_LANES = {NORMAL: "normal", SUSPECTS: "suspects", SOLO: "solo"}


def list_leases(conn: Connection, *, closed: int = 0, now: int | None = None) -> list[LeaseSeen]:
    """The open leases, oldest first, after the last `closed` of those that ended."""
    at = time_of(conn, now)
    columns = (
        "SELECT l.id, w.id, w.host, w.pid, r.name, l.split, l.lane, l.state, l.n_jobs, l.n_done, l.claimed_at, "
        "l.beat_at, l.expires_at, l.load_ms, l.prepare_ms, l.prefill_ms, l.decode_ms, l.store_ms "
        "FROM leases l JOIN workers w ON w.id = l.worker_id JOIN runs r ON r.id = l.run_id "
    )
    latest = columns + "WHERE l.closed_at IS NOT NULL ORDER BY l.closed_at DESC, l.id DESC LIMIT ?"
    ended = execute(conn, latest, (closed,)).fetchall()
    rows = [*reversed(ended), *execute(conn, columns + "WHERE l.state = 'open' ORDER BY l.id").fetchall()]
    return [_lease_seen(row, at) for row in rows]


def _lease_seen(row: Sequence[Any], at: int) -> LeaseSeen:
    id, worker, host, pid, run, split, lane, state, jobs, done, claimed, beat, expires, *timing = row
    expires_in_sec = (expires - at) / 1000 if state == "open" else None
    age_sec, beat_sec_ago = (at - claimed) / 1000, (at - beat) / 1000
    return LeaseSeen(
        *(id, worker, host, pid, run, split, _LANES[lane], state, jobs, done, age_sec, beat_sec_ago, expires_in_sec),
        timing=Timing(*timing),
    )


# One split at a time: only then does SQLite prefer the index of what failed to that of the whole run.
_FAILED = (
    "SELECT j.split, i.image_id, f.code, f.message, j.attempts FROM jobs j JOIN images i ON i.id = j.image_id "
    "JOIN failures f ON f.id = (SELECT max(id) FROM failures WHERE job_id = j.id) "
    "WHERE j.run_id = ? AND j.split = ? AND j.status = 'failed' ORDER BY j.id"
)


def list_failures(conn: Connection, run: str | None = None, splits: Sequence[str] = ()) -> list[Failed]:
    """What failed, with its latest reason, by run, split and job."""
    return [
        Failed(one.name, *row)
        for one in ([get_run(conn, run)] if run else list_runs(conn))
        for split in splits or SPLITS
        for row in execute(conn, _FAILED, (one.id, split)).fetchall()
    ]


def choose_run(conn: Connection, name: str | None, splits: Sequence[str], command: str = "worker") -> Run:
    """The run of that name; without one, `default`, or the only run that has work.

    Raises RunError, naming them; `command` is the one to choose with.
    """
    if name is not None:
        return runs_module.get_run(conn, name)
    runs = runs_module.list_runs(conn)
    if not runs:
        raise RunError("Nothing is registered here yet. Register pictures first: rococap enqueue --split train")
    busy = [run for run in runs if any(status_module.unfinished(conn, run, splits or SPLITS).values())]
    for run in busy or runs:
        if run.name == "default":
            return run
    if len(busy) > 1:
        names = ", ".join(run.name for run in busy)
        raise RunError(f"Several runs have work ({names}). Choose one: rococap {command} --run NAME")
    return busy[0] if busy else runs[-1]
