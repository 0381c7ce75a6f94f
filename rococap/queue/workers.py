"""Workers as the database knows them: which have started, what they measure, when they were last seen."""

import json
from collections.abc import Mapping
from itertools import chain

from sqlalchemy import Connection

from rococap.db import execute, marks
from rococap.engines import EngineInfo
from rococap.queue.records import Telemetry, time_of


def register_worker(
    conn: Connection,
    uuid: str,
    host: str,
    pid: int,
    info: EngineInfo,
    *,
    self_check: str | None = None,
    lease_ttl_ms: int = 120_000,
    now: int | None = None,
) -> int:
    """Registers a new worker process and returns its id. It counts as lost once unseen for `lease_ttl_ms` milliseconds.

    `uuid` is unique to the process, which may repeat this when an answer was lost; `self_check` is the JSON of a
    self-check, None if it makes none.
    """
    at = time_of(conn, now)
    row = execute(
        conn,
        "INSERT INTO workers (uuid, host, pid, device, engine, versions, self_check, lease_ttl_ms, started_at, "
        "seen_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (uuid) DO UPDATE SET seen_at = excluded.seen_at RETURNING id",
        (uuid, host, pid, info.device, info.name, _versions(info), self_check, lease_ttl_ms, at, at),
    )
    return int(row.scalar_one())


def _versions(info: EngineInfo) -> str:
    return json.dumps(info.versions, sort_keys=True)


def store_self_check(conn: Connection, worker_id: int, self_check: str | None) -> None:
    """Records the JSON of a worker's self-check; None if it has no outcome."""
    execute(conn, "UPDATE workers SET self_check = ? WHERE id = ?", (self_check, worker_id))


def last_self_check(conn: Connection, host: str, info: EngineInfo, run: str) -> tuple[int, str] | None:
    """The pid of the latest worker that checked itself on this run, with this engine on this device of this machine,
    and the JSON of its self-check; None if there is none among the last hundred.
    """
    rows = execute(
        conn,
        "SELECT pid, self_check FROM workers WHERE host = ? AND device = ? AND engine = ? AND versions = ? "
        "AND self_check IS NOT NULL ORDER BY id DESC LIMIT 100",
        (host, info.device, info.name, _versions(info)),
    )
    return next(((pid, check) for pid, check in rows.fetchall() if json.loads(check)["run"] == run), None)


def stop_worker(
    conn: Connection,
    worker_id: int,
    *,
    store_ms: Mapping[int, float] | None = None,
    telemetry: Telemetry | None = None,
    now: int | None = None,
) -> None:
    """Records that a worker has stopped, with its last measurements. `store_ms` is milliseconds of storing by lease."""
    at = time_of(conn, now)
    add_store_ms(conn, worker_id, store_ms or {})
    execute(conn, "UPDATE workers SET stopped_at = ? WHERE id = ?", (at, worker_id))
    mark_seen(conn, worker_id, at, telemetry)


def count_workers(conn: Connection, within_ms: int, *, now: int | None = None) -> int:
    """How many workers that have not stopped were seen within the last `within_ms` milliseconds."""
    sql = "SELECT count(*) FROM workers WHERE seen_at > ? AND stopped_at IS NULL"
    return int(execute(conn, sql, (time_of(conn, now) - within_ms,)).scalar_one())


def mark_seen(conn: Connection, worker_id: int, at: int, telemetry: Telemetry | None) -> None:
    """Records that a worker was seen at a time, with new telemetry if there is any."""
    sql = "UPDATE workers SET seen_at = ?, telemetry = COALESCE(?, telemetry) WHERE id = ?"
    execute(conn, sql, (at, telemetry.to_json() if telemetry else None, worker_id))


def add_store_ms(conn: Connection, worker_id: int, store_ms: Mapping[int, float]) -> None:
    """Adds milliseconds of storing, by lease, to leases of this worker, whatever their state."""
    if store_ms:
        # Not by executemany, after which the transaction of a worker that froze would not count as idle.
        spent = f"CASE id {'WHEN ? THEN ? ' * len(store_ms)}END"
        sql = f"UPDATE leases SET store_ms = store_ms + {spent} WHERE id IN ({marks(store_ms)}) AND worker_id = ?"
        execute(conn, sql, (*chain.from_iterable(store_ms.items()), *store_ms, worker_id))
