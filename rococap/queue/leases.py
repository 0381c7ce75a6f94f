"""The life of a lease: claim, heartbeat, complete, fail, release.

Each claim creates one lease, which fences every write that its worker makes for these jobs and records how long they
took. The package's docstring states what all transitions have in common.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from rococap import db
from rococap.data import Columns
from rococap.db import execute
from rococap.engines import Completion, Failure
from rococap.errors import LeaseLost
from rococap.queue.records import (
    NORMAL,
    PLACE,
    SOLO,
    SUSPECTS,
    Claim,
    Job,
    Lease,
    Telemetry,
    Timing,
    clean_text,
    flag_counts,
    flags_of,
    place_of,
    tally,
    time_of,
)
from rococap.queue.runs import Run
from rococap.queue.workers import add_store_ms, mark_seen
from rococap.tables import JobState

MAX_MESSAGE = 2_000
MAX_BACKOFF_MS = 15 * 60_000

CRASHES = {NORMAL: (0, 0), SUSPECTS: (1, 1), SOLO: (2, 1 << 30)}
"""The lowest and highest number of crashes of a job that each lane takes."""

_PENDING = (
    f"SELECT j.id, {PLACE} "
    "FROM runs r JOIN jobs j ON j.run_id = r.id JOIN images i ON i.id = j.image_id JOIN shards s ON s.id = i.shard_id "
    "WHERE r.id = ? AND r.paused = 0 AND j.split = ? AND j.status = 'pending' AND (j.crashes, j.id) > (?, ?) "
    "AND j.crashes <= ? ORDER BY j.crashes, j.id LIMIT ?"
)
SKIP_LOCKED = {"sqlite": "", "postgresql": " FOR UPDATE OF j SKIP LOCKED"}
_ANY_SUSPECT = "SELECT 1 FROM jobs WHERE run_id = ? AND split = ? AND status = 'pending' AND crashes > 0 LIMIT 1"


def claim(
    conn: Connection,
    worker_id: int,
    run_id: int,
    split: str,
    max_jobs: int,
    *,
    ttl_ms: int,
    lane: int = NORMAL,
    after: int = 0,
    now: int | None = None,
) -> Claim | None:
    """Leases up to `max_jobs` pending jobs of one split to a worker, in order of id; None if there are none.

    The order of ids is that of the data set, so that a claim reads neighbouring rows. Jobs after the id `after` come
    first: PostgreSQL would pass by every job that has been claimed since the last vacuum. The lease expires after
    `ttl_ms` milliseconds without a heartbeat. The lanes SUSPECTS and SOLO take at most 4 jobs and 1.
    """
    limit = min(max_jobs, lane) if lane else max_jobs
    sql = _PENDING + SKIP_LOCKED[conn.dialect.name]
    fewest, most = CRASHES[lane]
    rows = execute(conn, sql, (run_id, split, fewest, after, most, limit)).fetchall()
    if after and not rows:
        rows = execute(conn, sql, (run_id, split, fewest, 0, most, limit)).fetchall()
    if not rows:
        return None
    lease_id = new_lease(conn, worker_id, run_id, split, lane, [row[0] for row in rows], ttl_ms, time_of(conn, now))
    columns = _columns(conn, run_id)
    jobs = tuple(Job(id, lease_id, place_of(place, columns)) for id, *place in rows)
    return Claim(lease_id, worker_id, run_id, split, lane, jobs)


def _columns(conn: Connection, run_id: int) -> Columns:
    sql = "SELECT d.columns FROM datasets d JOIN runs r ON r.dataset_id = d.id WHERE r.id = ?"
    return Columns.from_json(execute(conn, sql, (run_id,)).scalar_one())


def new_lease(
    conn: Connection, worker_id: int, run_id: int, split: str, lane: int, job_ids: list[int], ttl_ms: int, at: int
) -> int:
    """Puts pending jobs, which this transaction has locked, under a new lease; returns its id."""
    lease_id = execute(
        conn,
        "INSERT INTO leases (worker_id, run_id, split, lane, state, n_jobs, claimed_at, beat_at, expires_at) "
        "VALUES (?, ?, ?, ?, 'open', ?, ?, ?, ?) RETURNING id",
        (worker_id, run_id, split, lane, len(job_ids), at, at, at + ttl_ms),
    ).scalar_one()
    execute(
        conn,
        "UPDATE jobs SET status = 'leased', lease_id = ?, attempts = attempts + 1 WHERE id = ? AND status = 'pending'",
        [(lease_id, job_id) for job_id in job_ids],
    )
    tally(conn, run_id, split, lease_id, {JobState.PENDING: -len(job_ids), JobState.LEASED: len(job_ids)})
    return int(lease_id)


def has_suspects(conn: Connection, run: Run, splits: Sequence[str]) -> bool:
    """Whether jobs that have been in a crash are pending in these splits."""
    return any(execute(conn, _ANY_SUSPECT, (run.id, split)).one_or_none() for split in splits)


def heartbeat(
    conn: Connection,
    worker_id: int,
    lease_ids: Iterable[int],
    *,
    ttl_ms: int,
    store_ms: Mapping[int, float] | None = None,
    telemetry: Telemetry | None = None,
    now: int | None = None,
) -> set[int]:
    """Extends the leases that this worker still holds by `ttl_ms` milliseconds from now, and returns their ids.

    The other leases are lost: the worker must abandon their jobs. `store_ms` is the time spent on storing since the
    last heartbeat, in milliseconds by lease; those leases may have ended.
    """
    at = time_of(conn, now)
    held, spent = sorted(lease_ids), store_ms or {}
    _lock(conn, f"worker_id = ? AND id IN ({db.marks([*held, *spent])})", (worker_id, *held, *spent))
    kept = {lease_id for lease_id in held if _extend(conn, worker_id, lease_id, at, ttl_ms)}
    add_store_ms(conn, worker_id, spent)
    # After the leases, as in `complete`: in another order the two could deadlock on PostgreSQL.
    mark_seen(conn, worker_id, at, telemetry)
    return kept


def _extend(conn: Connection, worker_id: int, lease_id: int, at: int, ttl_ms: int) -> bool:
    """Extends a lease; returns False, changing nothing, if this worker no longer holds it."""
    sql = "UPDATE leases SET beat_at = ?, expires_at = ? WHERE id = ? AND worker_id = ? AND state = 'open'"
    return bool(execute(conn, sql, (at, at + ttl_ms, lease_id, worker_id)).rowcount)


def lock_leases(conn: Connection, worker_id: int, lease_ids: Iterable[int]) -> None:
    """Locks a worker's open leases and those in `lease_ids` in order of id, for a transaction that will change both."""
    ids = tuple(lease_ids)
    if ids:
        _lock(conn, f"worker_id = ? AND (state = 'open' OR id IN ({db.marks(ids)}))", (worker_id, *ids))


def _lock(conn: Connection, where: str, values: Sequence[Any]) -> None:
    """Locks leases in order of id on PostgreSQL; a write transaction on SQLite holds the only lock."""
    if conn.dialect.name != "sqlite":
        execute(conn, f"SELECT id FROM leases WHERE {where} ORDER BY id{db.for_update(conn, 'leases')}", values)


def _hold(conn: Connection, lease: Lease, n_done: int = 0, timing: Timing = Timing()) -> None:
    """Locks the lease, adding the time that its jobs took. Raises LeaseLost if the worker no longer holds it."""
    t = timing
    held = execute(
        conn,
        "UPDATE leases SET n_done = n_done + ?, load_ms = load_ms + ?, prepare_ms = prepare_ms + ?, "
        "prefill_ms = prefill_ms + ?, decode_ms = decode_ms + ?, store_ms = store_ms + ? "
        "WHERE id = ? AND worker_id = ? AND state = 'open'",
        (n_done, t.load_ms, t.prepare_ms, t.prefill_ms, t.decode_ms, t.store_ms, lease.id, lease.worker_id),
    )
    if held.rowcount != 1:
        raise LeaseLost(f"This worker no longer holds lease {lease.id}: nothing was changed.")


def _leave(conn: Connection, lease: Lease, sql: str, rows: list[tuple[Any, ...]]) -> None:
    """Moves jobs out of the lease. `rows` are the parameters of `sql`, ending in job id and lease id.

    Raises LeaseLost unless every job is still in the lease.
    """
    if rows and execute(conn, sql, rows).rowcount != len(rows):
        raise LeaseLost(f"Lease {lease.id} does not hold all of {[row[-2] for row in rows]}: nothing was changed.")


def close_if_empty(conn: Connection, lease_id: int, state: str, at: int) -> None:
    """Ends an open lease in `state`, "closed" or "released", unless it still holds jobs."""
    execute(
        conn,
        "UPDATE leases SET state = ?, closed_at = ? WHERE id = ? AND state = 'open' "
        "AND NOT EXISTS (SELECT 1 FROM jobs WHERE lease_id = ?)",
        (state, at, lease_id, lease_id),
    )


def complete(
    conn: Connection,
    lease: Lease,
    completions: Sequence[Completion],
    *,
    timing: Timing = Timing(),
    now: int | None = None,
) -> None:
    """Stores captions and makes their jobs done, all or none. Raises LeaseLost if the worker no longer holds the lease.

    A lease may be completed in parts, even after it has expired as long as no other worker has reaped it, so that no
    GPU work is wasted. It is closed with its last job.
    """
    at = time_of(conn, now)
    done = sorted(completions, key=lambda completion: completion.job_id)
    _hold(conn, lease, len(done), timing)
    _leave(
        conn,
        lease,
        "UPDATE jobs SET status = 'done', lease_id = NULL, finished_at = ? "
        "WHERE id = ? AND lease_id = ? AND status = 'leased'",
        [(at, c.job_id, lease.id) for c in done],
    )
    flags = {c.job_id: flags_of(c.text, c.finish_reason, c.flags) for c in done}
    execute(
        conn,
        "INSERT INTO captions (job_id, lease_id, text, flags, finish_reason, prompt_tokens, new_tokens, processing_ms, "
        "latency_ms, batch_size, generated_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                *(
                    c.job_id,
                    lease.id,
                    clean_text(c.text),
                    flags[c.job_id],
                    c.finish_reason,
                    c.prompt_tokens,
                    c.new_tokens,
                ),
                *(c.processing_ms, c.latency_ms, c.batch_size, at),
            )
            for c in done
        ],
    )
    close_if_empty(conn, lease.id, "closed", at)
    execute(conn, "UPDATE workers SET n_done = n_done + ?, seen_at = ? WHERE id = ?", (len(done), at, lease.worker_id))
    # Last, because other workers wait for these rows until the commit.
    changes: dict[str, int] = {JobState.LEASED: -len(done), JobState.DONE: len(done)}
    tally(conn, lease.run_id, lease.split, lease.id, changes | flag_counts(flags.values()))


def backoff_ms(attempts: int, jitter: float | None = None) -> int:
    """Milliseconds to wait after `attempts` failed attempts: min(15 min, 5 s * 4^(attempts - 1)), up to a quarter less.

    `jitter`, from 0 to 1, is random unless given; it spreads the retries of jobs that failed together.
    """
    full = min(MAX_BACKOFF_MS, 5_000 * 4 ** min(attempts - 1, 10))
    return int(full * (1 - 0.25 * (random.random() if jitter is None else jitter)))


def fail(conn: Connection, lease: Lease, failed: Mapping[int, Failure], *, now: int | None = None) -> None:
    """Records failures by job id. A job whose failure is transient waits for another attempt if it has any left; every
    other job has failed for good. Raises LeaseLost if the worker no longer holds the lease.
    """
    at = time_of(conn, now)
    _hold(conn, lease)
    attempts = {
        row[0]: row[1] for row in execute(conn, "SELECT id, attempts FROM jobs WHERE lease_id = ?", (lease.id,))
    }
    limit = execute(conn, "SELECT max_attempts FROM runs WHERE id = ?", (lease.run_id,)).scalar_one()
    retried = {id for id, failure in failed.items() if failure.transient and attempts.get(id, limit) < limit}
    _leave(
        conn,
        lease,
        "UPDATE jobs SET status = 'waiting', lease_id = NULL, not_before = ? "
        "WHERE id = ? AND lease_id = ? AND status = 'leased'",
        [(at + backoff_ms(attempts[id]), id, lease.id) for id in sorted(retried)],
    )
    _leave(
        conn,
        lease,
        "UPDATE jobs SET status = 'failed', lease_id = NULL, finished_at = ? "
        "WHERE id = ? AND lease_id = ? AND status = 'leased'",
        [(at, id, lease.id) for id in sorted(failed.keys() - retried)],
    )
    record(conn, lease.id, at, failed)
    close_if_empty(conn, lease.id, "closed", at)
    changes: dict[str, int] = {
        JobState.WAITING: len(retried),
        JobState.FAILED: len(failed) - len(retried),
        JobState.LEASED: -len(failed),
    }
    tally(conn, lease.run_id, lease.split, lease.id, changes)


def record(conn: Connection, lease_id: int, at: int, failed: Mapping[int, Failure]) -> None:
    """Adds failures, by job id, to the table of failures."""
    execute(
        conn,
        "INSERT INTO failures (job_id, lease_id, code, message, at) VALUES (?, ?, ?, ?, ?)",
        [(id, lease_id, f.code, clean_text(f.message, MAX_MESSAGE), at) for id, f in sorted(failed.items())],
    )


def release(conn: Connection, lease: Lease, job_ids: Iterable[int], *, now: int | None = None) -> int:
    """Makes jobs pending again without counting the attempt; returns how many.

    Jobs that have left the lease since stay as they are. Raises LeaseLost if the worker no longer holds the lease.
    """
    at = time_of(conn, now)
    _hold(conn, lease)
    rows = [(id, lease.id) for id in sorted(job_ids)]
    sql = (
        "UPDATE jobs SET status = 'pending', lease_id = NULL, attempts = attempts - 1 "
        "WHERE id = ? AND lease_id = ? AND status = 'leased'"
    )
    released = execute(conn, sql, rows).rowcount if rows else 0
    close_if_empty(conn, lease.id, "released", at)
    tally(conn, lease.run_id, lease.split, lease.id, {JobState.LEASED: -released, JobState.PENDING: released})
    return released
