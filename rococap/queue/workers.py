"""Workers in the database: who started, what it measures, when it was seen last."""

import json
from collections.abc import Mapping

from sqlalchemy import Connection

from rococap.db import execute
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
    """`lease_ttl_ms`: unseen for longer, it counts as lost."""
    at = time_of(conn, now)
    row = execute(
        conn,
        "INSERT INTO workers (uuid, host, pid, device, engine, versions, self_check, lease_ttl_ms, started_at, "
        "seen_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
        (uuid, host, pid, info.device, info.name, _versions(info), self_check, lease_ttl_ms, at, at),
    )
    return int(row.scalar_one())


def _versions(info: EngineInfo) -> str:
    return json.dumps(info.versions, sort_keys=True)


def store_self_check(conn: Connection, worker_id: int, told: str | None) -> None:
    execute(conn, "UPDATE workers SET self_check = ? WHERE id = ?", (told, worker_id))


def last_self_check(conn: Connection, host: str, info: EngineInfo, run: str) -> tuple[int, str] | None:
    """The pid of the latest worker with this engine on this device of this machine that looked at that run, and what
    it found; None if none did.
    """
    rows = execute(
        conn,
        "SELECT pid, self_check FROM workers WHERE host = ? AND device = ? AND engine = ? AND versions = ? "
        "AND self_check IS NOT NULL ORDER BY id DESC LIMIT 100",
        (host, info.device, info.name, _versions(info)),
    )
    return next(((pid, told) for pid, told in rows.fetchall() if json.loads(told)["run"] == run), None)


def stop_worker(
    conn: Connection,
    worker_id: int,
    *,
    store_ms: Mapping[int, float] | None = None,
    telemetry: Telemetry | None = None,
    now: int | None = None,
) -> None:
    """Its goodbye, with what it measured: milliseconds of storing by lease, and the rest."""
    at = time_of(conn, now)
    for lease_id, ms in sorted((store_ms or {}).items()):
        book(conn, worker_id, lease_id, ms)
    execute(conn, "UPDATE workers SET stopped_at = ? WHERE id = ?", (at, worker_id))
    see(conn, worker_id, at, telemetry)


def see(conn: Connection, worker_id: int, at: int, telemetry: Telemetry | None) -> None:
    sql = "UPDATE workers SET seen_at = ?, telemetry = COALESCE(?, telemetry) WHERE id = ?"
    execute(conn, sql, (at, telemetry.to_json() if telemetry else None, worker_id))


def book(conn: Connection, worker_id: int, lease_id: int, store_ms: float) -> None:
    """Adds what storing took to a lease of this worker, whatever became of it."""
    sql = "UPDATE leases SET store_ms = store_ms + ? WHERE id = ? AND worker_id = ?"
    execute(conn, sql, (store_ms, lease_id, worker_id))
