"""Copies a database to another place, in either direction between SQLite and PostgreSQL, and verifies the copy.

All rows are one transaction of the new database: if the copy is killed, that database stays empty.
"""

import hashlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Connection, Table
from sqlalchemy import Engine as Database

from rococap import db
from rococap.db import execute, transaction
from rococap.errors import DatabaseError
from rococap.progress import Progress, silent
from rococap.tables import metadata
from rococap.transfer.rows import columns_of, is_same, refuse_open_leases
from rococap.urls import shown

PAGE = 5_000
Values = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Copied:
    """A copied table: how many rows it has, and a hash of them that does not depend on their order."""

    table: str
    rows: int
    digest: str


def copy(source: str, target: str, progress: Progress = silent) -> list[Copied]:
    """Copies all tables of a database into a new or empty one, with their ids; returns what was copied.

    Raises DatabaseError, and leaves the target as it was, if there is no source, if workers hold leases in it or begin
    to, if the target holds anything, or if what was written is not what was read.
    """
    old = db.connect_source(source)
    try:
        name = shlex.quote(shown(old.url))
        with transaction(old) as read:
            refuse_open_leases(read, name, "copied")
        new = db.connect(target)
        try:
            if is_same(old, new):
                raise DatabaseError(f"{name} cannot be copied to itself. Name a new database.")
            return _copy(old, new, name, progress)
        finally:
            new.dispose()
    finally:
        old.dispose()


def _copy(old: Database, new: Database, name: str, progress: Progress) -> list[Copied]:
    with transaction(new, write=True) as write:
        _lock_all(write)
        if found := [table.name for table in metadata.sorted_tables if _count(write, table)]:
            raise DatabaseError(
                f"{shown(new.url)} is not empty (it has {', '.join(found[:3])}), so nothing was copied. Name a new "
                f"database, or combine the two: rococap --db {shlex.quote(shown(new.url))} merge {name}"
            )
        with transaction(old) as read:
            db.stay_idle(read)
            refuse_open_leases(read, name, "copied")
            newest = _newest_lease(read)
            copied = [_copy_table(read, write, table, progress) for table in metadata.sorted_tables]
            for table in metadata.sorted_tables:
                _continue_ids(read, write, table)
        for one in copied:
            _verify(write, one, progress)
        with transaction(old) as read:
            if _newest_lease(read) != newest:
                raise DatabaseError(
                    f"Workers claimed pictures in {name} while it was copied: nothing was copied. Stop them, then copy "
                    "again."
                )
    return copied


def _lock_all(write: Connection) -> None:
    """Keeps others from writing to the new database until the copy is complete."""
    if write.dialect.name == "postgresql":
        execute(write, f"LOCK TABLE {', '.join(metadata.tables)} IN EXCLUSIVE MODE")


def _count(conn: Connection, table: Table) -> int:
    return int(execute(conn, f"SELECT count(*) FROM {table.name}").scalar_one())


def _newest_lease(conn: Connection) -> int:
    return int(execute(conn, "SELECT COALESCE(max(id), 0) FROM leases").scalar_one())


def _order(table: Table) -> str:
    """In order of their keys: an edit comes after the one that it undoes."""
    return ", ".join(column.name for column in table.primary_key)


def _pages(conn: Connection, table: Table) -> Iterator[list[Values]]:
    """All rows of a table, as the server sends them, a page in memory at a time."""
    sql = f"SELECT {', '.join(columns_of(table.name))} FROM {table.name} ORDER BY {_order(table)}"
    with conn.exec_driver_sql(sql, execution_options={"stream_results": True}) as rows:
        for page in rows.partitions(PAGE):
            yield [tuple(row) for row in page]


class _Digest:
    """The sum of the hashes of rows: the two kinds of database sort text in different ways."""

    def __init__(self) -> None:
        self._sum = 0
        self.rows = 0

    def add(self, page: list[Values]) -> None:
        for row in page:
            self._sum += int.from_bytes(hashlib.sha256(repr(row).encode()).digest())
        self.rows += len(page)

    def of(self, table: str) -> Copied:
        return Copied(table, self.rows, f"{self._sum % 2**256:064x}")


def _copy_table(read: Connection, write: Connection, table: Table, progress: Progress) -> Copied:
    total, digest = _count(read, table), _Digest()
    names = columns_of(table.name)
    sql = f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({db.marks(names)})"
    for page in _pages(read, table):
        execute(write, sql, page)
        digest.add(page)
        progress(f"copying {table.name}", digest.rows, total)
    return digest.of(table.name)


def _verify(write: Connection, copied: Copied, progress: Progress) -> None:
    digest = _Digest()
    for page in _pages(write, metadata.tables[copied.table]):
        digest.add(page)
        progress(f"verifying {copied.table}", digest.rows, copied.rows)
    if (found := digest.of(copied.table)) != copied:
        raise DatabaseError(
            f"The copy of {copied.table} has {found.rows} rows with the hash {found.digest[:16]}…, not {copied.rows} "
            f"with {copied.digest[:16]}…: nothing was copied. Check the disks, then copy again."
        )


def _continue_ids(read: Connection, write: Connection, table: Table) -> None:
    """Makes new ids begin where those of the old database would. Ids of leases are never used again."""
    if "id" not in table.columns:
        return
    last = int(execute(read, f"SELECT COALESCE(max(id), 0) FROM {table.name}").scalar_one())
    if read.dialect.name == "postgresql":
        sequence = execute(read, "SELECT pg_get_serial_sequence(?, 'id')", (table.name,)).scalar_one()
        last = max(
            last, execute(read, f"SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM {sequence}").scalar_one()
        )
    elif table.dialect_options["sqlite"]["autoincrement"]:
        last = max(last, execute(read, "SELECT seq FROM sqlite_sequence WHERE name = ?", (table.name,)).scalar() or 0)
    if write.dialect.name == "postgresql":
        if last:
            execute(write, "SELECT setval(pg_get_serial_sequence(?, 'id'), ?)", (table.name, last))
    elif table.dialect_options["sqlite"]["autoincrement"]:
        execute(write, "DELETE FROM sqlite_sequence WHERE name = ?", (table.name,))
        execute(write, "INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", (table.name, last))
