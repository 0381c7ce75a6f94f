"""Reader studies of another database, with what their readers said."""

from collections.abc import Mapping

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import db
from rococap.db import execute, transaction
from rococap.results import doubles
from rococap.tables import JobState
from rococap.transfer.catalogue import Catalogue, image_ids, refusal
from rococap.transfer.rows import Row, add_to_log, insert, insert_one, select, translated
from rococap.transfer.work import Merged


def check_studies(read: Connection, conn: Connection, source: str) -> None:
    """Raises RococapError for a study that differs from the one of its name here, or has other readers."""
    for theirs in select(read, "studies"):
        _check(read, conn, source, theirs)


def _check(read: Connection, conn: Connection, source: str, theirs: Row) -> None:
    for ours in select(conn, "studies", "x.name = ?", (theirs["name"],)):
        differing = [
            f"{key}: {theirs[key]}, not {ours[key]}" for key in theirs if key != "id" and theirs[key] != ours[key]
        ]
        here = {row["reader_number"]: row["reader"] for row in _of(conn, "study_readers", ours["id"])}
        for row in _of(read, "study_readers", theirs["id"]):
            number = row["reader_number"]
            if here.get(number, row["reader"]) != row["reader"]:
                differing.append(f"reader {number}: {row['reader']}, not {here[number]}")
        if differing:
            what = f"its study {theirs['name']!r} differs from the one here"
            raise refusal(source, what, differing, "a study never changes")


def merge_studies(read: Connection, database: Database, catalogue: Catalogue, result: Merged) -> None:
    """Adds studies and what readers said, each study in one transaction. One of whose texts some are not here, because
    workers hold their pictures, is left out.
    """
    for theirs in select(read, "studies", "1 = 1 ORDER BY x.id"):
        with transaction(database, write=True) as conn:
            db.take_turns(conn)
            _check(read, conn, result.source, theirs)
            _study(read, conn, catalogue, theirs, result)


def _study(read: Connection, conn: Connection, catalogue: Catalogue, theirs: Row, result: Merged) -> None:
    items = _of(read, "study_items", theirs["id"])
    images, jobs = _pictures(read, conn, catalogue, theirs["id"])
    if any(row["image_id"] not in images or (row["job_id"] or 0) not in jobs for row in items):
        result.studies_left.append(theirs["name"])
        return
    known = select(conn, "studies", "x.name = ?", (theirs["name"],))
    id = known[0]["id"] if known else insert_one(conn, "studies", translated("studies", theirs, {}))
    db.lock(conn, "studies", id)
    ids = {"studies": {theirs["id"]: id}, "images": images, "jobs": jobs}

    def rows(table: str) -> list[Row]:
        return [translated(table, row, ids) for row in _of(read, table, theirs["id"])]

    n = 0 if known else insert(conn, "study_items", rows("study_items"))
    n += insert(conn, "study_readers", rows("study_readers"), "ON CONFLICT DO NOTHING")
    n += len(add_to_log(conn, "ratings", "study_id", ("reader_number", "position", "answers"), rows("ratings")))
    for row in rows("unblindings"):  # it was opened when it was first opened
        sql = "DELETE FROM unblindings WHERE study_id = ? AND (at > ? OR (at = ? AND reader > ?))"
        execute(conn, sql, (id, row["at"], row["at"], row["reader"]))
        n += insert(conn, "unblindings", [row], "ON CONFLICT DO NOTHING")
    result.studies += n
    result.is_new |= bool(n or not known)


def _of(conn: Connection, table: str, study_id: int) -> list[Row]:
    return select(conn, table, "x.study_id = ? ORDER BY 1", (study_id,))


def _pictures(
    read: Connection, conn: Connection, catalogue: Catalogue, study_id: int
) -> tuple[Mapping[int, int], Mapping[int, int]]:
    """The images of a study here by those there, and the jobs whose captions its readers read; the key 0 stands for no
    job. A worker here may have stored another caption since the jobs were merged.
    """
    sql = (
        "SELECT DISTINCT i.id, i.dataset_id, i.split, i.image_id FROM study_items t JOIN images i ON i.id = t.image_id "
        "WHERE t.study_id = ?"
    )
    images = {}
    for id, dataset_id, split, image_id in execute(read, sql, (study_id,)).fetchall():
        for ours, _ in image_ids(conn, catalogue.datasets[dataset_id], split, [image_id]).values():
            images[id] = ours
    sql = (
        "SELECT DISTINCT j.id, j.run_id, j.image_id FROM study_items t JOIN jobs j ON j.id = t.job_id "
        "WHERE t.study_id = ?"
    )
    jobs = {0: 0}
    rows = execute(read, sql, (study_id,)).fetchall()
    theirs = doubles.made(read, [row[0] for row in rows])
    for id, run_id, image_id in rows:
        done = f"SELECT id FROM jobs WHERE run_id = ? AND image_id = ? AND status = '{JobState.DONE}'"
        for (ours,) in execute(conn, done, (catalogue.runs[run_id].id, images.get(image_id, 0))).fetchall():
            if doubles.made(conn, [ours])[ours].is_same(theirs[id]):
                jobs[id] = ours
    return images, jobs
