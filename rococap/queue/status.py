"""Read-only views of the queue: counts and rates, workers, leases, failures."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from sqlalchemy import Connection

from rococap.data import SPLITS, Place
from rococap.db import execute
from rococap.errors import RunError
from rococap.flags import FLAGS
from rococap.queue.records import NORMAL, PLACE, SOLO, SUSPECTS, Telemetry, Timing, flagged, place_of, time_of
from rococap.queue.runs import Run, get_run, list_runs, only_or_default, refuse_deleted
from rococap.tables import JobState

RATE_WINDOW_MS = 5 * 60_000


@dataclass(frozen=True, slots=True)
class Counts:
    """How many jobs of one run and split are in each state, and how fast they are being captioned.

    `per_minute` is the rate over the last five minutes at most; `eta_sec` is None while that is 0 and jobs are left.
    """

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
    """Number of captions by flag: see `rococap.flags`."""

    @property
    def total(self) -> int:
        return self.pending + self.leased + self.waiting + self.done + self.failed + self.cancelled

    @property
    def unfinished(self) -> int:
        return self.pending + self.leased + self.waiting


@dataclass(frozen=True, slots=True)
class RunSeen:
    """A run with its counts by split; `counts` is empty if it has no pictures yet. `created_at` is in milliseconds."""

    run: Run
    created_at: int
    counts: tuple[Counts, ...]

    @property
    def state(self) -> str:
        """paused, running, waiting (for a worker), finished, or empty."""
        if self.run.paused:
            return "paused"
        if any(split.leased for split in self.counts):
            return "running"
        if any(split.unfinished for split in self.counts):
            return "waiting"
        return "finished" if self.counts else "empty"


@dataclass(frozen=True, slots=True)
class WorkerSeen:
    """A worker process. `state`: running, stopped, or lost, which is not seen for longer than its lease time without
    having stopped.
    """

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
    """The outcome of its self-check before the first claim; None if it made none."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of rococap and the packages that its engine runs on."""

    @property
    def rate(self) -> float | None:
        """Pictures per second; None unless it is running and has reported."""
        return self.telemetry.pictures_per_sec if self.state == "running" and self.telemetry else None


@dataclass(frozen=True, slots=True)
class HostSeen:
    """The workers of one host. `done` counts the pictures of all of them, `pictures_per_sec` adds up the rates of those
    that are running, and `slowest` is one of these; None if none has reported.
    """

    host: str
    running: int
    lost: int
    stopped: int
    done: int
    pictures_per_sec: float
    slowest: WorkerSeen | None


@dataclass(frozen=True, slots=True)
class LeaseSeen:
    """A lease. `lane`: normal, suspects or solo. `expires_in_sec` is negative if overdue, and None once it has ended.

    `timing` covers the pictures that are stored; its `store_ms` follows with the worker's next heartbeat.
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
    """A failed job, with the code and message of its latest failure."""

    run: str
    split: str
    image_id: str
    code: str
    message: str
    attempts: int


@dataclass(frozen=True, slots=True)
class FailedAlike:
    """The failed jobs of one run that have the same failure code."""

    run: str
    code: str
    failed: tuple[Failed, ...]

    @property
    def n(self) -> int:
        return len(self.failed)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A picture of a run with its original caption, which may be "", and its concepts (UMLS CUIs). `id` orders them."""

    id: int
    place: Place
    caption: str
    concepts: frozenset[str]


def counts(conn: Connection, *, now: int | None = None) -> list[Counts]:
    """The counts of every run and split, in order of run and split. The cost does not depend on the number of pictures:
    the counts come from the tallies, and the rates from recent leases.
    """
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
    """The counts of one run. Raises RunError if it has no pictures of these splits, or was deleted."""
    refuse_deleted(conn, run)
    found = [c for c in counts(conn) if c.run == run.name and c.split in splits]
    if not found:
        raise RunError(
            f"Run {run.name!r} has no pictures of {', '.join(splits)}. Register them, with the run's own data set and "
            f"recipe: rococap enqueue --run {run.name} --split {splits[0]} …"
        )
    return found


def has_jobs(conn: Connection, run: Run, split: str) -> bool:
    """Whether the run has any pictures of the split."""
    sql = "SELECT 1 FROM tallies WHERE run_id = ? AND split = ? LIMIT 1"
    return execute(conn, sql, (run.id, split)).one_or_none() is not None


def runs_seen(conn: Connection) -> list[RunSeen]:
    """Every run, at a cost that does not depend on how many pictures it has."""
    by_run: dict[str, list[Counts]] = {}
    for split_counts in counts(conn):
        by_run.setdefault(split_counts.run, []).append(split_counts)
    created = {row[0]: row[1] for row in execute(conn, "SELECT id, created_at FROM runs")}
    return [RunSeen(run, created[run.id], tuple(by_run.get(run.name, ()))) for run in list_runs(conn)]


def _counts(
    run_id: int, name: str, split: str, n: Mapping[tuple[int, str, str], int], per_minute: float, paused: bool
) -> Counts:
    in_state = {state.value: n.get((run_id, split, state.value), 0) for state in JobState}
    left = in_state["pending"] + in_state["leased"] + in_state["waiting"]
    eta = 60 * left / per_minute if per_minute else (0.0 if not left else None)
    flags = {flag: found for flag in FLAGS if (found := n.get((run_id, split, flagged(flag)), 0))}
    return Counts(name, split, **in_state, per_minute=per_minute, eta_sec=eta, paused=paused, flags=flags)


def _rates(conn: Connection, at: int) -> dict[tuple[int, str], float]:
    """Captions per minute of each (run id, split), over the last five minutes or since the first claim in them.

    Leases claimed in the future are ignored: the clock has been set back since.
    """
    start = at - RATE_WINDOW_MS
    rows = execute(
        conn,
        "SELECT run_id, split, sum(n_done), min(claimed_at) FROM ("
        "SELECT run_id, split, n_done, claimed_at FROM leases WHERE closed_at BETWEEN ? AND ? "
        "AND origin_id IS NULL UNION ALL "
        "SELECT run_id, split, n_done, claimed_at FROM leases WHERE state = 'open') AS recent "
        "WHERE claimed_at <= ? GROUP BY run_id, split",
        (start, at, at),
    ).fetchall()
    return {
        (run_id, split): float(n_done) * 60_000 / max(at - max(first, start), 1_000)
        for run_id, split, n_done, first in rows
        if n_done
    }


def labelled(conn: Connection, run: Run, split: str, *, after: int = 0, limit: int = 1_000) -> list[Labelled]:
    """Up to `limit` pictures of a run that were not cancelled, in data set order, that come after the id `after`."""
    rows = execute(
        conn,
        f"SELECT j.image_id, {PLACE}, i.caption, i.cui FROM jobs j "
        "JOIN images i ON i.id = j.image_id JOIN shards s ON s.id = i.shard_id "
        "WHERE j.run_id = ? AND j.split = ? AND j.image_id > ? AND j.status <> 'cancelled' ORDER BY j.image_id LIMIT ?",
        (run.id, split, after, limit),
    ).fetchall()
    return [
        Labelled(image_id, place_of(place, run.columns), caption, frozenset(filter(None, cui.split(";"))))
        for image_id, *place, caption, cui in rows
    ]


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
    """Workers seen in the last day that are not stopped, and those stopped in the last five minutes; all of them with
    `everyone`.
    """
    at = time_of(conn, now)
    since, stopped_since = (0, 0) if everyone else (at - 86_400_000, at - RATE_WINDOW_MS)
    rows = execute(
        conn,
        "SELECT id, host, pid, device, stopped_at, n_done, seen_at, lease_ttl_ms, telemetry, self_check, versions "
        "FROM workers WHERE seen_at >= ? AND (stopped_at IS NULL OR stopped_at >= ?) ORDER BY id",
        (since, stopped_since),
    ).fetchall()

    def state(stopped_at: int | None, seen_at: int, lease_ttl_ms: int) -> str:
        if stopped_at is not None:
            return "stopped"
        # A worker seen in the future has not been seen since the clock was set back.
        return "lost" if abs(at - seen_at) > lease_ttl_ms else "running"

    return [
        WorkerSeen(
            *(id, host, pid, device, state(stopped, seen, ttl_ms), done, max(0, at - seen) / 1000),
            telemetry=Telemetry.from_json(telemetry) if telemetry else None,
            self_check=json.loads(self_check) if self_check else None,
            versions=json.loads(versions),
        )
        for id, host, pid, device, stopped, done, seen, ttl_ms, telemetry, self_check, versions in rows
    ]


def by_version(workers: Iterable[WorkerSeen]) -> dict[str, list[WorkerSeen]]:
    """The workers that are running by their version of rococap, the most common first."""
    groups: dict[str, list[WorkerSeen]] = {}
    for worker in workers:
        if worker.state == "running":
            groups.setdefault(worker.versions.get("rococap", "unknown"), []).append(worker)
    return dict(sorted(groups.items(), key=lambda group: (-len(group[1]), group[0])))


def by_host(workers: Iterable[WorkerSeen]) -> list[HostSeen]:
    """Workers grouped by host, in order of its name."""
    groups: dict[str, list[WorkerSeen]] = {}
    for worker in workers:
        groups.setdefault(worker.host, []).append(worker)
    return [_host_seen(host, groups[host]) for host in sorted(groups)]


def _host_seen(host: str, workers: Sequence[WorkerSeen]) -> HostSeen:
    n = Counter(worker.state for worker in workers)
    rated = [(worker.rate, worker.id, worker) for worker in workers if worker.rate is not None]
    return HostSeen(
        host=host,
        running=n["running"],
        lost=n["lost"],
        stopped=n["stopped"],
        done=sum(worker.done for worker in workers),
        pictures_per_sec=sum(rate for rate, *_ in rated),
        slowest=min(rated)[2] if rated else None,
    )


def outliers(workers: Iterable[WorkerSeen]) -> list[WorkerSeen]:
    """The workers that are lost, then those at less than half the median rate of their kind of device, slowest first.

    Kinds are `cuda` and `cpu`, for example, whatever the number after the colon.
    """
    lost: list[WorkerSeen] = []
    kinds: dict[str, list[tuple[float, int, WorkerSeen]]] = {}
    for worker in workers:
        if worker.state == "lost":
            lost.append(worker)
        elif worker.rate is not None:
            kinds.setdefault(worker.device.split(":")[0], []).append((worker.rate, worker.id, worker))
    slow = []
    for rated in kinds.values():
        limit = median(rate for rate, *_ in rated) / 2
        slow += [one for one in rated if one[0] < limit]
    return lost + [worker for *_, worker in sorted(slow)]


_LEASES = (
    "SELECT l.id, w.id, w.host, w.pid, r.name, l.split, l.lane, l.state, l.n_jobs, l.n_done, l.claimed_at, "
    "l.beat_at, l.expires_at, l.load_ms, l.prepare_ms, l.prefill_ms, l.decode_ms, l.store_ms "
    "FROM leases l JOIN workers w ON w.id = l.worker_id JOIN runs r ON r.id = l.run_id "
)
_LANES = {NORMAL: "normal", SUSPECTS: "suspects", SOLO: "solo"}


def list_leases(conn: Connection, *, closed: int = 0, now: int | None = None) -> list[LeaseSeen]:
    """The open leases, oldest first, preceded by the last `closed` leases that have ended."""
    at = time_of(conn, now)
    latest = _LEASES + "WHERE l.closed_at IS NOT NULL ORDER BY l.closed_at DESC, l.id DESC LIMIT ?"
    ended = execute(conn, latest, (closed,)).fetchall()
    rows = [*reversed(ended), *execute(conn, _LEASES + "WHERE l.state = 'open' ORDER BY l.id").fetchall()]
    return [_lease_seen(row, at) for row in rows]


def leases_with(conn: Connection, ids: Sequence[int], *, now: int | None = None) -> list[LeaseSeen]:
    """The leases with these ids, oldest first."""
    if not ids:
        return []
    at = time_of(conn, now)
    sql = f"{_LEASES}WHERE l.id IN ({', '.join('?' * len(ids))}) ORDER BY l.id"
    return [_lease_seen(row, at) for row in execute(conn, sql, tuple(ids)).fetchall()]


def _lease_seen(row: Sequence[Any], at: int) -> LeaseSeen:
    id, worker, host, pid, run, split, lane, state, jobs, done, claimed, beat, expires, *timing = row
    expires_in_sec = (expires - at) / 1000 if state == "open" else None
    age_sec, beat_sec_ago = (at - claimed) / 1000, (at - beat) / 1000
    return LeaseSeen(
        *(id, worker, host, pid, run, split, _LANES[lane], state, jobs, done, age_sec, beat_sec_ago, expires_in_sec),
        timing=Timing(*timing),
    )


# One split at a time: only then does SQLite prefer the index of failed jobs to that of the whole run.
_FAILED = (
    "SELECT j.split, i.image_id, f.code, f.message, j.attempts FROM jobs j JOIN images i ON i.id = j.image_id "
    "JOIN failures f ON f.id = (SELECT max(id) FROM failures WHERE job_id = j.id) "
    "WHERE j.run_id = ? AND j.split = ? AND j.status = 'failed' ORDER BY j.id"
)


def list_failures(conn: Connection, run: str | None = None, splits: Sequence[str] = ()) -> list[Failed]:
    """The failed jobs of a run, or of every run if it is None, in order of run, split and job id."""
    runs = [get_run(conn, run)] if run else list_runs(conn)
    return [
        Failed(found.name, *row)
        for found in runs
        for split in splits or SPLITS
        for row in execute(conn, _FAILED, (found.id, split)).fetchall()
    ]


def by_code(failed: Iterable[Failed]) -> list[FailedAlike]:
    """Failed jobs grouped by run and code, the largest group first."""
    groups: dict[tuple[str, str], list[Failed]] = {}
    for failure in failed:
        groups.setdefault((failure.run, failure.code), []).append(failure)
    alike = [FailedAlike(run, code, tuple(found)) for (run, code), found in groups.items()]
    return sorted(alike, key=lambda group: -group.n)


def choose_run(conn: Connection, name: str | None, splits: Sequence[str], command: str = "worker") -> Run:
    """The run called `name`. If it is None: among the runs that have work, or all runs if none has any, the one called
    `default`; failing that, the only run that has work, or the newest run if none has any.

    Raises RunError if there is no such run, or if several runs have work and none of them is `default`; `command` is
    the subcommand that the message suggests.
    """
    if name is not None:
        return get_run(conn, name)
    runs = list_runs(conn)
    if not runs:
        raise RunError("Nothing is registered here yet. Register pictures first: rococap enqueue --split train")
    busy = [run for run in runs if any(unfinished(conn, run, splits or SPLITS).values())]
    if run := only_or_default(busy or runs):
        return run
    if busy:
        names = ", ".join(run.name for run in busy)
        raise RunError(f"Several runs have work ({names}). Choose one: rococap {command} --run NAME")
    return runs[-1]
