"""Reviews and edits as a file, and back: JSON Lines, a row for each verdict and each edit, oldest first.

A row names its picture by run, split and image_id and carries the machine's caption, so that it can be read without the
database, and is not put beside another caption. Times and readers stay as they are. Its uuid is its identity, so that a
file can be imported any number of times, in any order, into any database with the same captions.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap.db import execute, transaction
from rococap.errors import RococapError
from rococap.files import replacing
from rococap.queue import Run, clean_text, get_run
from rococap.results.texts import iso
from rococap.review.records import MAX_NOTE, checked_errors, checked_name, checked_text, lock

_UUID = re.compile("[0-9a-f]{32}")
SHOWN = 10
"""Faults of a file that an error lists."""
AT_ONCE = 500

_PLACE = "r.name, j.split, i.image_id, c.text"
_FROM = (
    "JOIN jobs j ON j.id = x.job_id JOIN captions c ON c.job_id = j.id JOIN images i ON i.id = j.image_id "
    "JOIN runs r ON r.id = j.run_id LEFT JOIN edits u ON u.id = {undoes} WHERE r.deleted_at IS NULL "
)
_REVIEWS = f"SELECT {_PLACE}, x.uuid, x.reader, x.at, x.verdict, x.errors, x.note FROM reviews x {_FROM}".format(
    undoes="NULL"
)
_EDITS = f"SELECT {_PLACE}, x.uuid, x.reader, x.at, x.text, x.previous, u.uuid, x.act FROM edits x {_FROM}".format(
    undoes="x.undoes"
)
_KEYS = ("run", "split", "image_id", "caption", "uuid", "reader", "at")
_REVIEW_KEYS = ("verdict", "errors", "note")
_EDIT_KEYS = ("text", "previous", "undoes", "act")


def export_reviews(database: Database, path: Path, run: Run | None = None) -> int:
    """Writes the reviews and edits of one run, or of all, to a JSON Lines file; returns the number of rows.

    Raises RococapError if the file cannot be written; then an older one stays as it was.
    """
    where, params = ("AND r.id = ?", (run.id,)) if run else ("", ())
    with transaction(database) as conn:
        reviews = execute(conn, _REVIEWS + where, params).fetchall()
        edits = execute(conn, _EDITS + where, params).fetchall()
    rows = [_exported("review", row, _REVIEW_KEYS) for row in reviews]
    rows += [_exported("edit", row, _EDIT_KEYS) for row in edits]
    rows.sort(key=lambda row: (row["at"], row["uuid"]))
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return len(rows)


def _exported(kind: str, row: Sequence[Any], keys: Sequence[str]) -> dict[str, Any]:
    values = {"kind": kind, **dict(zip((*_KEYS, *keys), row, strict=True))}
    values["at"] = iso(values["at"])
    if kind == "review":
        values["errors"] = list(filter(None, values["errors"].split(",")))
    return values


# --- Back ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Imported:
    """How many reviews and edits of a file were added, and how many of its rows were known already."""

    reviews: int
    edits: int
    known: int


class _Fault(ValueError):
    """What is wrong with a row."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a file: `number` is that of its line, `values` are the columns of its table that follow `job_id`."""

    number: int
    table: str
    place: tuple[str, str, str]
    caption: str
    uuid: str
    at: int
    undoes: str | None
    values: tuple[Any, ...]


def import_reviews(database: Database, path: Path) -> Imported:
    """Adds the reviews and edits of a file that the database does not have yet.

    Raises RococapError, and adds nothing, if the file cannot be read, or if a row is damaged, is of a picture that its
    run has not captioned, or is about another caption; the error names the rows.
    """
    rows = _read(path)
    runs = sorted({row.place[0] for row in rows})
    with transaction(database, write=True) as conn:
        for name in runs:
            lock(conn, get_run(conn, name))
        known = _ids(conn, "reviews", rows) | _ids(conn, "edits", rows)
        jobs = _jobs(conn, rows)
        _refuse_unknown(path, rows, jobs)
        new = [row for row in rows if row.uuid not in known]
        for row in new:
            known[row.uuid] = _insert(conn, path, row, jobs[row.place][0], known)
    edits = sum(row.table == "edits" for row in new)
    return Imported(len(new) - edits, edits, len(rows) - len(new))


def _read(path: Path) -> list[_Row]:
    """The rows of a file, each once, oldest first."""
    rows: dict[str, _Row] = {}
    faults: list[str] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        row = _parsed(number, json.loads(line))
                        rows.setdefault(row.uuid, row)
                except (ValueError, TypeError, KeyError, RococapError) as error:
                    faults.append(f"line {number}: {f'{error} is missing' if isinstance(error, KeyError) else error}")
    except UnicodeDecodeError as error:
        raise RococapError(f"{path} is not UTF-8 ({error}): name a file that reviews were exported to.") from error
    if faults:
        raise _refusal(path, "are damaged", faults, "Use the original file")
    return sorted(rows.values(), key=lambda row: (row.at, row.uuid))


def _parsed(number: int, given: Any) -> _Row:
    if not isinstance(given, Mapping):
        raise _Fault("not an object")
    of_kind = {"review": ("verdict", "note"), "edit": ("text", "previous")}
    for key in (*_KEYS, *of_kind.get(given["kind"], ())):
        if not isinstance(given[key], str):
            raise _Fault(f"{key} is not text")
    at = _milliseconds(given["at"])
    reader = checked_name(given["reader"])
    run, split, image_id = (clean_text(given[key]) for key in ("run", "split", "image_id"))
    undoes = None
    for key in ("uuid", "undoes", "act"):
        if given.get(key) is not None and not _UUID.fullmatch(given[key]):
            raise _Fault(f"{key} is not 32 hexadecimal digits: {given[key]!r}")
    match given["kind"]:
        case "review":
            errors = ",".join(checked_errors(given["verdict"], given["errors"]))
            note = checked_text(given["note"], "note", MAX_NOTE)
            table, values = "reviews", (reader, given["verdict"], errors, note, at)
        case "edit":
            undoes, act = given["undoes"], given["act"]
            texts = (checked_text(given["text"]), checked_text(given["previous"]))
            table, values = "edits", (reader, *texts, act, at)
        case other:
            raise _Fault(f"kind is {other!r}, not review or edit")
    return _Row(number, table, (run, split, image_id), given["caption"], given["uuid"], at, undoes, values)


def _milliseconds(text: str) -> int:
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise _Fault(f"at has no time zone: {text}")
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)


def _refusal(path: Path, what: str, faults: Sequence[str], advice: str) -> RococapError:
    shown = "; ".join(faults[:SHOWN]) + (f"; … and {len(faults) - SHOWN} more" if len(faults) > SHOWN else "")
    return RococapError(f"{len(faults)} rows of {path} {what} ({shown}): nothing was imported. {advice}.")


def _chunks(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (values[start : start + AT_ONCE] for start in range(0, len(values), AT_ONCE))


def _ids(conn: Connection, table: str, rows: Sequence[_Row]) -> dict[str, int]:
    """The ids of the rows that the table has, by uuid: of those of the file, and of those that they undo."""
    found: dict[str, int] = {}
    uuids = sorted({uuid for row in rows for uuid in (row.uuid, row.undoes) if uuid})
    for some in _chunks(uuids):
        sql = f"SELECT uuid, id FROM {table} WHERE uuid IN ({', '.join('?' * len(some))})"
        found |= dict(map(tuple, execute(conn, sql, tuple(some)).fetchall()))
    return found


def _jobs(conn: Connection, rows: Sequence[_Row]) -> dict[tuple[str, str, str], tuple[int, str]]:
    """The job and the machine's caption of each place that has one."""
    found: dict[tuple[str, str, str], tuple[int, str]] = {}
    for run, split in sorted({row.place[:2] for row in rows}):
        for some in _chunks(sorted({row.place[2] for row in rows if row.place[:2] == (run, split)})):
            sql = (
                "SELECT i.image_id, j.id, c.text FROM runs r JOIN images i ON i.dataset_id = r.dataset_id "
                "JOIN jobs j ON j.run_id = r.id AND j.image_id = i.id JOIN captions c ON c.job_id = j.id "
                f"WHERE r.name = ? AND i.split = ? AND i.image_id IN ({', '.join('?' * len(some))})"
            )
            for image_id, job_id, text in execute(conn, sql, (run, split, *some)).fetchall():
                found[run, split, image_id] = (job_id, text)
    return found


def _refuse_unknown(path: Path, rows: Sequence[_Row], jobs: Mapping[tuple[str, str, str], tuple[int, str]]) -> None:
    in_order = sorted(rows, key=lambda row: row.number)
    if unknown := [row for row in in_order if row.place not in jobs]:
        listed = [f"line {row.number}: {' '.join(row.place)}" for row in unknown]
        raise _refusal(
            path, "are of pictures that their run has not captioned", listed, "Caption or restore them first"
        )
    if others := [row for row in in_order if jobs[row.place][1] != row.caption]:
        listed = [f"line {row.number}: {' '.join(row.place)}" for row in others]
        raise _refusal(
            path, "are about other captions than the run has", listed, "Import them where these captions were made"
        )


def _insert(conn: Connection, path: Path, row: _Row, job_id: int, known: Mapping[str, int]) -> int:
    if row.table == "reviews":
        sql = "INSERT INTO reviews (uuid, job_id, reader, verdict, errors, note, at) VALUES (?, ?, ?, ?, ?, ?, ?)"
        values = (row.uuid, job_id, *row.values)
    else:
        if row.undoes is not None and row.undoes not in known:
            listed = [f"line {row.number}: {row.undoes}"]
            raise _refusal(path, "undo an edit that is missing", listed, "Import the file with that edit first")
        reader, text, previous, act, at = row.values
        sql = (
            "INSERT INTO edits (uuid, job_id, reader, text, previous, undoes, act, at) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        )
        undoes = known[row.undoes] if row.undoes else None
        values = (row.uuid, job_id, reader, text, previous, undoes, act, at)
    return int(execute(conn, f"{sql} RETURNING id", values).scalar_one())
