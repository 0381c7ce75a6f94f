"""The life of a lease: claim, heartbeat, complete, fail, release.

One claim is one lease, which is at once the fence of every write that its worker makes and the record of what its jobs
took. The package says what all of these have in common.
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
from rococap.queue.workers import book, see
from rococap.tables import JobState

MAX_MESSAGE = 2_000
MAX_BACKOFF_MS = 15 * 60_000

CRASHES = {NORMAL: (0, 0), SUSPECTS: (1, 1), SOLO: (2, 1 << 30)}

_PENDING = (
    f"SELECT j.id, {PLACE} "
    "FROM runs r JOIN jobs j ON j.run_id = r.id JOIN images i ON i.id = j.image_id JOIN shards s ON s.id = i.shard_id "
    "WHERE r.id = ? AND r.paused = 0 AND j.split = ? AND j.status = 'pending' AND j.crashes BETWEEN ? AND ? "
    "ORDER BY j.crashes, j.id LIMIT ?"
)
SKIP_LOCKED = {"sqlite": "", "postgresql": " FOR UPDATE OF j SKIP LOCKED"}
_ANY_SUSPECT = "SELECT 1 FROM jobs WHERE run_id = ? AND split = ? AND status = 'pending' AND crashes > 0 LIMIT 1"


def claim(
    conn: Connection,
    worker_id: int,
    run_id: int,
    split: str,
    most: int,
    *,
    ttl_ms: int,
    lane: int = NORMAL,
    now: int | None = None,
) -> Claim | None:
    """Leases up to `most` pending jobs of one split to a worker, in order of id; None if there are none.

    Neighbours in a claim are neighbours on disk. The lanes SUSPECTS and SOLO bound the claim by 4 and 1.
    """
    bound = min(most, lane) if lane else most
    sql = _PENDING + SKIP_LOCKED[conn.dialect.name]
    rows = execute(conn, sql, (run_id, split, *CRASHES[lane], bound)).fetchall()
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
    """Puts pending jobs, which the transaction has locked, under a new lease."""
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
    """Whether jobs that were in a crash are pending."""
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
    """Extends the leases that are still this worker's; returns those. The others are lost: abandon their rows.

    `store_ms` is what storing took since the last one, by lease: those may have ended.
    """
    at = time_of(conn, now)
    held, took = set(lease_ids), store_ms or {}
    kept = set()
    for lease_id in sorted(held | took.keys()):
        if lease_id in held and _extend(conn, worker_id, lease_id, at, ttl_ms):
            kept.add(lease_id)
        if lease_id in took:
            book(conn, worker_id, lease_id, took[lease_id])
    # After the leases, as in `complete`: PostgreSQL would find a deadlock between the two.
    see(conn, worker_id, at, telemetry)
    return kept


def _extend(conn: Connection, worker_id: int, lease_id: int, at: int, ttl_ms: int) -> bool:
    """Whether it is this worker's still."""
    sql = "UPDATE leases SET beat_at = ?, expires_at = ? WHERE id = ? AND worker_id = ? AND state = 'open'"
    return bool(execute(conn, sql, (at, at + ttl_ms, lease_id, worker_id)).rowcount)


def lock_leases(conn: Connection, worker_id: int, lease_ids: Iterable[int]) -> None:
    """Locks a worker's open leases and those named, in order of id, for who goes on to change some of each kind."""
    ids = tuple(lease_ids)
    if ids and conn.dialect.name != "sqlite":
        sql = f"SELECT id FROM leases WHERE worker_id = ? AND (state = 'open' OR id IN ({', '.join('?' * len(ids))})) "
        execute(conn, sql + "ORDER BY id" + db.for_update(conn, "leases"), (worker_id, *ids))


def _hold(conn: Connection, lease: Lease, n_done: int = 0, timing: Timing = Timing()) -> None:
    """Locks the lease and proves that it is still ours, adding what its jobs took."""
    t = timing
    held = execute(
        conn,
        "UPDATE leases SET n_done = n_done + ?, load_ms = load_ms + ?, prepare_ms = prepare_ms + ?, "
        "prefill_ms = prefill_ms + ?, decode_ms = decode_ms + ?, store_ms = store_ms + ? "
        "WHERE id = ? AND worker_id = ? AND state = 'open'",
        (n_done, t.load_ms, t.prepare_ms, t.prefill_ms, t.decode_ms, t.store_ms, lease.id, lease.worker_id),
    )
    if held.rowcount != 1:
        raise LeaseLost(f"Lease {lease.id} is not this worker's any more: nothing was changed.")


def _leave(conn: Connection, lease: Lease, sql: str, rows: list[tuple[Any, ...]]) -> None:
    """Moves jobs out of the lease; every one of them must still be in it. Rows end in job id and lease id."""
    if rows and execute(conn, sql, rows).rowcount != len(rows):
        raise LeaseLost(f"Lease {lease.id} does not hold all of {[row[-2] for row in rows]}: nothing was changed.")


def close_if_empty(conn: Connection, lease_id: int, state: str, at: int) -> None:
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
    """Stores captions and makes their jobs done, all or nothing. Raises LeaseLost if the lease is no longer ours.

    A lease may be completed in parts, also after its time ran out as long as nobody reaped it: no GPU work is thrown
    away. It closes with its last job.
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
    flags = {one.job_id: flags_of(one.text, one.finish_reason, one.flags) for one in done}
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
    changes: dict[str, int] = {JobState.LEASED: -len(done), JobState.DONE: len(done)}
    tally(conn, lease.run_id, lease.split, lease.id, changes | flag_counts(flags.values()))
    execute(conn, "UPDATE workers SET n_done = n_done + ?, seen_at = ? WHERE id = ?", (len(done), at, lease.worker_id))
    close_if_empty(conn, lease.id, "closed", at)


def backoff_ms(attempts: int, jitter: float | None = None) -> int:
    """How long to wait after the nth attempt failed: min(15 min, 5 s * 4^n), up to a quarter less by jitter."""
    full = min(MAX_BACKOFF_MS, 5_000 * 4 ** min(attempts - 1, 10))
    return int(full * (1 - 0.25 * (random.random() if jitter is None else jitter)))


def fail(conn: Connection, lease: Lease, failed: Mapping[int, Failure], *, now: int | None = None) -> None:
    """Ends jobs (id -> failure) without a caption: for good, or, if the failure is transient and attempts are left,
    to be tried again later. Raises LeaseLost if the lease is no longer ours.
    """
    at = time_of(conn, now)
    _hold(conn, lease)
    attempts = {
        row[0]: row[1] for row in execute(conn, "SELECT id, attempts FROM jobs WHERE lease_id = ?", (lease.id,))
    }
    most = execute(conn, "SELECT max_attempts FROM runs WHERE id = ?", (lease.run_id,)).scalar_one()
    again = {id for id, failure in failed.items() if failure.transient and attempts.get(id, most) < most}
    _leave(
        conn,
        lease,
        "UPDATE jobs SET status = 'waiting', lease_id = NULL, not_before = ? "
        "WHERE id = ? AND lease_id = ? AND status = 'leased'",
        [(at + backoff_ms(attempts[id]), id, lease.id) for id in sorted(again)],
    )
    _leave(
        conn,
        lease,
        "UPDATE jobs SET status = 'failed', lease_id = NULL, finished_at = ? "
        "WHERE id = ? AND lease_id = ? AND status = 'leased'",
        [(at, id, lease.id) for id in sorted(failed.keys() - again)],
    )
    record(conn, lease.id, at, failed)
    changes: dict[str, int] = {
        JobState.WAITING: len(again),
        JobState.FAILED: len(failed) - len(again),
        JobState.LEASED: -len(failed),
    }
    tally(conn, lease.run_id, lease.split, lease.id, changes)
    close_if_empty(conn, lease.id, "closed", at)


def record(conn: Connection, lease_id: int, at: int, failed: Mapping[int, Failure]) -> None:
    execute(
        conn,
        "INSERT INTO failures (job_id, lease_id, code, message, at) VALUES (?, ?, ?, ?, ?)",
        [(id, lease_id, f.code, clean_text(f.message, MAX_MESSAGE), at) for id, f in sorted(failed.items())],
    )


def release(conn: Connection, lease: Lease, job_ids: Iterable[int], *, now: int | None = None) -> int:
    """Gives jobs back as they were before the claim, the attempt refunded; returns how many.

    Jobs that left the lease meanwhile stay as they are. Raises LeaseLost if the lease is not ours any more.
    """
    at = time_of(conn, now)
    _hold(conn, lease)
    rows = [(id, lease.id) for id in sorted(job_ids)]
    sql = (
        "UPDATE jobs SET status = 'pending', lease_id = NULL, attempts = attempts - 1 "
        "WHERE id = ? AND lease_id = ? AND status = 'leased'"
    )
    released = execute(conn, sql, rows).rowcount if rows else 0
    tally(conn, lease.run_id, lease.split, lease.id, {JobState.LEASED: -released, JobState.PENDING: released})
    close_if_empty(conn, lease.id, "released", at)
    return released
