"""Combines databases, exports and checkpoints of parts into one database, in any order and any number of times.

Each step is a transaction of its own that may be repeated: after a kill, the same command goes on. The steps of several
merges into one database take turns, so each looks again for what an earlier one of its own has not found.
"""

import shlex
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.db import execute, transaction
from rococap.errors import DatabaseError
from rococap.files import ending, read_json
from rococap.progress import Progress, silent
from rococap.results import doubles
from rococap.results.manifest import manifest_path
from rococap.results.restore import restore
from rococap.transfer.catalogue import Catalogue, forget_parts, image_ids, merge_images, merge_runs
from rococap.transfer.rows import insert, is_same, pages, refuse_open_leases, select, translated
from rococap.transfer.studies import check_studies, merge_studies
from rococap.transfer.work import Merged, merge_jobs, merge_leases, merge_workers, used_twice
from rococap.urls import shown

EXPORTS = (".csv", ".jsonl", ".parquet")


def is_export(source: str) -> bool:
    """Whether a source is an export or a checkpoint segment rather than a database."""
    return ending(Path(source)) in EXPORTS


def merge(database: Database, source: str, progress: Progress = silent) -> Merged:
    """Merges a database, a file or a URL, or an export or checkpoint segment into this database.

    A database brings its pictures and runs along. For the others, the split must be enqueued, as for `restore`.
    Raises RococapError, and changes nothing, if the source cannot be read, if workers hold leases in it, or if it is of
    another recipe, data set, rules version or model state than a run of its name here.
    """
    if is_export(source):
        return _merge_export(database, Path(source))
    other = open_source(source)
    try:
        named = shown(other.url) if "://" in source else source  # a URL may hold a password
        if is_same(database, other):
            raise DatabaseError(f"{named} is the database to merge into. Name the other parts.")
        with transaction(other) as read:
            db.stay_idle(read)
            return _merge_database(read, database, named, progress)
    finally:
        other.dispose()


def open_source(source: str) -> Database:
    """Opens a database to read from. Raises DatabaseError if there is none, or if workers hold leases in it."""
    database = db.connect_source(source)
    try:
        with transaction(database) as conn:
            refuse_open_leases(conn, shlex.quote(shown(database.url)), "merged")
    except BaseException:
        database.dispose()
        raise
    return database


def _merge_database(read: Connection, database: Database, source: str, progress: Progress) -> Merged:
    refuse_open_leases(read, shlex.quote(source), "merged")
    result = Merged(source)
    for (run, split), parts in queue.all_parts(read).items():
        result.parts += [f"{run} {split} {part}" for part in parts]
    with transaction(database, write=True) as conn:
        db.take_turns(conn)
        catalogue = merge_runs(read, conn, source)
        _refuse_used_twice(read, conn, catalogue, source)
        check_studies(read, conn, source)
    result.is_new |= bool(merge_images(read, database, catalogue.datasets, progress))
    result.is_new |= bool(_merge_hashes(read, database, catalogue))
    with transaction(database, write=True) as conn:
        db.take_turns(conn)
        workers = merge_workers(read, conn)
    result.is_new |= bool(merge_leases(read, database, catalogue, workers, progress))
    merge_jobs(read, database, catalogue, result, progress)
    merge_studies(read, database, catalogue, result)
    with transaction(database, write=True) as conn:
        db.take_turns(conn)
        forget_parts(read, conn, catalogue)
    return result


_USED = (
    "SELECT DISTINCT j.id, j.run_id, j.split, i.image_id FROM ("
    "SELECT job_id FROM reviews UNION SELECT job_id FROM edits UNION SELECT job_id FROM study_items) AS used "
    "JOIN jobs j ON j.id = used.job_id JOIN images i ON i.id = j.image_id ORDER BY j.id"
)


def _refuse_used_twice(read: Connection, conn: Connection, catalogue: Catalogue, source: str) -> None:
    rows = execute(read, _USED).fetchall()
    refused = []
    for start in range(0, len(rows), 500):
        some = [row for row in rows[start : start + 500] if row[1] in catalogue.runs]
        theirs = doubles.made(read, [row[0] for row in some])
        for id, run_id, split, name in some:
            run = catalogue.runs[run_id]
            sql = "SELECT id FROM jobs WHERE run_id = ? AND image_id = ?"
            for image, _ in image_ids(conn, run.dataset_id, split, [name]).values():
                ours = doubles.made(conn, [row[0] for row in execute(conn, sql, (run.id, image)).fetchall()])
                if any(not one.is_unused and not one.is_same(theirs[id]) for one in ours.values()):
                    refused.append(name)
    if refused:
        raise used_twice(source, refused)


def _merge_hashes(read: Connection, database: Database, catalogue: Catalogue) -> int:
    """Adds the hashes of pictures."""
    added = 0
    for page in pages(read, "images", "EXISTS (SELECT 1 FROM image_hashes h WHERE h.image_id = x.id)"):
        ids: dict[int, int] = {}
        with transaction(database, write=True) as conn:
            db.take_turns(conn)
            for dataset_id, split in sorted({(row["dataset_id"], row["split"]) for row in page}):
                theirs = {
                    row["image_id"]: row["id"]
                    for row in page
                    if (row["dataset_id"], row["split"]) == (dataset_id, split)
                }
                here = image_ids(conn, catalogue.datasets[dataset_id], split, list(theirs))
                ids |= {theirs[name]: id for name, (id, _) in here.items()}
            where = f"x.image_id IN ({db.marks(list(ids))})"
            rows = [
                translated("image_hashes", row, {"images": ids})
                for row in select(read, "image_hashes", where, list(ids))
            ]
            added += insert(conn, "image_hashes", rows, "ON CONFLICT (image_id, algorithm) DO NOTHING")
    return added


# --- Exports ---------------------------------------------------------------------------------------------------


def _merge_export(database: Database, path: Path) -> Merged:
    manifest = read_json(manifest_path(path)) or read_json(path.parent / "run.json") or {}
    with transaction(database) as conn:
        run = queue.find_run(conn, manifest.get("run"))
    found = restore(database, run, path, merging=True)
    return Merged(
        str(path),
        merged=found.restored,
        known=found.known,
        twice=found.twice,
        leased=found.leased,
        unknown=found.unknown + found.different,
        has_manifest=found.has_manifest,
        is_new=bool(found.restored or found.replaced),
    )
