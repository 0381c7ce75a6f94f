"""Rows of any table, by what the metadata says of its columns and foreign keys; and what every transfer refuses."""

import os
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import db
from rococap.db import execute
from rococap.errors import DatabaseError
from rococap.tables import metadata

PAGE = 500
Row = dict[str, Any]
Ids = Mapping[str, Mapping[int, int]]
"""For some tables, the ids of rows here by their ids in the other database."""


def columns_of(table: str) -> list[str]:
    return [column.name for column in metadata.tables[table].columns]


def select(conn: Connection, table: str, where: str = "1 = 1", params: Sequence[Any] = ()) -> list[Row]:
    """Whole rows of a table, whose alias is `x`."""
    names = columns_of(table)
    sql = f"SELECT {', '.join(f'x.{name}' for name in names)} FROM {table} x WHERE {where}"
    return [dict(zip(names, row, strict=True)) for row in execute(conn, sql, tuple(params)).fetchall()]


def pages(conn: Connection, table: str, where: str = "1 = 1", params: Sequence[Any] = ()) -> Iterator[list[Row]]:
    """The rows of a table with ids, in order of id, in pages."""
    after = 0
    while rows := select(conn, table, f"{where} AND x.id > ? ORDER BY x.id LIMIT {PAGE}", (*params, after)):
        yield rows
        after = rows[-1]["id"]


def of_jobs(conn: Connection, table: str, job_ids: Sequence[int], order: str = "1") -> dict[int, list[Row]]:
    """The rows of a table that belong to these jobs, by job."""
    found: dict[int, list[Row]] = {}
    for row in select(conn, table, f"x.job_id IN ({db.marks(job_ids)}) ORDER BY {order}", job_ids) if job_ids else []:
        found.setdefault(row["job_id"], []).append(row)
    return found


def translated(table: str, row: Row, ids: Ids, **changes: Any) -> Row:
    """The row without its id, with `changes`, and with foreign keys to the tables in `ids` that point to rows here."""
    new = {name: value for name, value in row.items() if name != "id"} | changes
    for key in metadata.tables[table].foreign_keys:
        name, target = key.parent.name, key.column.table.name
        if name not in changes and target in ids and new[name] is not None:
            new[name] = ids[target][new[name]]
    return new


def insert(conn: Connection, table: str, rows: Sequence[Row], conflict: str = "") -> int:
    """Inserts rows that have the same columns; returns how many. `conflict` is an ON CONFLICT clause."""
    if not rows:
        return 0
    names = list(rows[0])
    sql = f"INSERT INTO {table} ({', '.join(names)}) VALUES ({db.marks(names)}) {conflict}"
    return execute(conn, sql, [tuple(row[name] for name in names) for row in rows]).rowcount


def insert_one(conn: Connection, table: str, row: Row) -> int:
    """Inserts a row; returns its id."""
    sql = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({db.marks(list(row))}) RETURNING id"
    return int(execute(conn, sql, tuple(row.values())).scalar_one())


def add_to_log(conn: Connection, table: str, key: str, ties: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """Adds rows, which are in order of id, that a log does not have yet; returns those. They are put in order of `at`,
    and of the columns `ties` where that is the same.

    The latest entry of a log is the one with the highest id. If older ones are added, those of the same `key` are
    written again, so that this stays true.
    """
    if not rows:
        return []
    owners = sorted({row[key] for row in rows})
    known = select(conn, table, f"x.{key} IN ({db.marks(owners)}) ORDER BY x.id", owners)
    here = _placed([translated(table, row, {}) for row in known], key, ties)
    contents = {_content(table, row) for _, row in here}
    new = [(place, row) for place, row in _placed(rows, key, ties) if _content(table, row) not in contents]
    latest: dict[int, _Place] = {}
    for place, row in here:
        latest[row[key]] = max(place, latest.get(row[key], place))
    again = {row[key] for place, row in new if row[key] in latest and place < latest[row[key]]}
    if again:
        execute(conn, f"DELETE FROM {table} WHERE {key} = ?", [(owner,) for owner in sorted(again)])
    kept = [(place, row) for place, row in here if row[key] in again]
    insert(conn, table, [row for _, row in sorted((*new, *kept), key=itemgetter(0))])
    return [row for _, row in new]


_Place = tuple[Any, ...]


def _placed(rows: Sequence[Row], key: str, ties: Sequence[str]) -> list[tuple[_Place, Row]]:
    """The rows with their places in the log of their `key`, which is in order of time unless a clock was set back.

    What followed a row with a later time stays behind it, because its place begins with the place of that row. Sorting
    by places so keeps the order of each database, and each row has the same place again in the one that is merged into.
    """
    placed = []
    later: dict[int, list[int]] = {}
    for row in rows:
        times = later.setdefault(row[key], [])
        while times and times[-1] <= row["at"]:
            times.pop()
        times.append(row["at"])
        placed.append(((tuple(times), *(row[name] for name in ties)), row))
    return placed


def _content(table: str, row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in columns_of(table) if name != "id")


def is_same(one: Database, other: Database) -> bool:
    if one.dialect.name == other.dialect.name == "sqlite":
        return os.path.samefile(one.url.database or "", other.url.database or "")
    return one.url == other.url


def refuse_open_leases(conn: Connection, shown: str, then: str) -> None:
    """Raises DatabaseError if workers hold pictures in this database, or held them when they died."""
    n_open, n_expired = execute(
        conn,
        "SELECT count(*), count(CASE WHEN expires_at <= ? THEN 1 END) FROM leases WHERE state = 'open'",
        (db.now(conn),),
    ).one()
    if n_open:
        step = (
            f"Their workers have died: free the pictures first: rococap --db {shown} reap"
            if n_open == n_expired
            else "Stop its workers first. If they were killed, wait until their leases have expired. To see when: "
            f"rococap --db {shown} leases"
        )
        raise DatabaseError(f"{shown} has open leases ({n_open}), so nothing was {then}. {step}")
