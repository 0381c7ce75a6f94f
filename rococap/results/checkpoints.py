"""Checkpoint segments: CSV files of finished images in order of completion, each written once and never changed.

The database records which image belongs to which segment; this module only assigns and writes them. A caption that
replaces one of a segment gets into a later one, so that of all that segments say of an image, the last holds.
"""

import re
import shlex
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.db import execute, transaction
from rococap.errors import RococapError
from rococap.files import read_json, replacing, write_json
from rococap.queue import Run
from rococap.results.formats import write_csv
from rococap.results.manifest import manifest_of
from rococap.results.snapshot import DONE, SELECTED, frame_of

CHECKPOINT = re.compile(r"checkpoint_\w+_(?P<number>\d{6,})\.csv")
SEGMENTS_AT_ONCE = 200
FOLLOW_SEC = 2.0


def write_checkpoints(database: Database, run: Run, split: str, folder: Path, every: int) -> list[Path]:
    """Writes the segments of a split that are due, `every` images each in order of completion; returns their paths.

    Once the split has no work left, the remaining images form a shorter last segment. The database records which image
    belongs to which segment, so a missing file is rewritten with the same content, without captions replaced since.

    Raises RococapError if `folder` holds segments of another run or database, or cannot be written.
    """
    with transaction(database) as conn:
        _check_folder(run, folder, split, _last_checkpoint(conn, run, split))
    while _assign(database, run, split, every):
        pass
    with transaction(database) as conn:
        last = _last_checkpoint(conn, run, split)
        run = queue.get_run(conn, run.name)  # a worker may have pinned the model meanwhile, or accepted new rules
    existing = read_json(folder / "run.json") or {}
    if last and ("run" not in existing or existing.get("resolved") != run.resolved):
        write_json(folder / "run.json", manifest_of(run))
    missing = [n for n in range(1, last + 1) if not checkpoint_path(folder, split, n).exists()]
    written: list[Path] = []
    for start in range(0, len(missing), SEGMENTS_AT_ONCE):
        written += _write_segments(database, run, split, folder, missing[start : start + SEGMENTS_AT_ONCE])
    return written


def _check_folder(run: Run, folder: Path, split: str, last: int) -> None:
    """Refuses a folder with segments of another run or database: an existing file of the right name is never rewritten,
    so a foreign one would pass for this run's.
    """
    existing = read_json(folder / "run.json")
    if existing is not None and (existing.get("run"), existing.get("recipe_hash")) != (run.name, run.recipe.hash):
        raise RococapError(
            f"{folder} holds checkpoints of another run ({existing.get('run')}). Move them away, or choose another "
            "folder with --output."
        )
    numbers = (segment_number(path) or 0 for path in folder.glob(f"checkpoint_{split}_*.csv"))
    if max(numbers, default=0) > last:
        raise RococapError(
            f"{folder} holds checkpoints of {split} that are not in this database. If this database replaces a lost "
            f"one, restore them first: rococap restore {shlex.quote(str(folder))}/checkpoint_{split}_*.csv; otherwise "
            "move them away."
        )


def checkpoint_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"checkpoint_{split}_{number:06}.csv"


def _last_checkpoint(conn: Connection, run: Run, split: str) -> int:
    row = execute(
        conn,
        "SELECT coalesce(max(checkpoint), 0) FROM jobs WHERE run_id = ? AND split = ? AND checkpoint IS NOT NULL",
        (run.id, split),
    )
    return int(row.scalar_one())


def _assign(database: Database, run: Run, split: str, every: int) -> int:
    """Assigns up to SEGMENTS_AT_ONCE segments to done images; returns how many segments were filled."""
    with transaction(database, write=True) as conn:
        db.lock(conn, "runs", run.id)
        due = execute(
            conn,
            "SELECT id FROM jobs WHERE run_id = ? AND split = ? AND status = 'done' AND checkpoint IS NULL "
            "ORDER BY finished_at, id LIMIT ?",
            (run.id, split, every * SEGMENTS_AT_ONCE),
        ).fetchall()
        is_finished = not any(queue.unfinished(conn, run, [split]).values())
        n_segments = -(-len(due) // every) if is_finished else len(due) // every
        first = _last_checkpoint(conn, run, split) + 1
        rows = [(first + n // every, row[0]) for n, row in enumerate(due[: n_segments * every])]
        if rows:
            execute(conn, "UPDATE jobs SET checkpoint = ? WHERE id = ? AND checkpoint IS NULL", rows)
    return n_segments


def renew(conn: Connection, run: Run, split: str, job_ids: Sequence[int]) -> None:
    """Moves those of these images that are in segments to a new one, because their captions were replaced.

    The number of the last segment never falls, so none is used twice. The transaction must hold the lock of the run.
    """
    number = _last_checkpoint(conn, run, split) + 1
    sql = "UPDATE jobs SET checkpoint = ? WHERE id = ? AND checkpoint IS NOT NULL"
    if job_ids:
        execute(conn, sql, [(number, id) for id in sorted(job_ids)])


def _write_segments(database: Database, run: Run, split: str, folder: Path, numbers: Sequence[int]) -> list[Path]:
    """Writes segments; returns their paths. One of which all captions were replaced is not written."""
    written = []
    with transaction(database) as conn:
        rows = execute(
            conn,
            f"SELECT {SELECTED} {DONE}j.checkpoint IS NOT NULL AND j.checkpoint BETWEEN ? AND ? "
            # Not by finished_at, which for a restored caption is the time of the restore.
            "ORDER BY j.checkpoint, c.generated_at, j.id",
            (run.id, split, numbers[0], numbers[-1]),
        ).fetchall()
    for number, segment in groupby(rows, key=lambda row: row[1]):
        if number in numbers:
            written.append(checkpoint_path(folder, split, number))
            with replacing(written[-1]) as partial:
                write_csv(iter([frame_of(list(segment), run, split)]), partial)
    return written


def follow(
    database: Database, run: Run, splits: Sequence[str], folder: Path, every: int, written: Callable[[list[Path]], None]
) -> None:
    """Writes segments as workers finish images, until the splits have no work left.

    `written` is called with the paths of each batch of new segments. Raises as `write_checkpoints` does.
    """
    while True:
        with transaction(database) as conn:
            is_finished = not any(queue.unfinished(conn, run, splits).values())
        for split in splits:
            if paths := write_checkpoints(database, run, split, folder, every):
                written(paths)
        if is_finished:
            return
        time.sleep(FOLLOW_SEC)


def segment_number(path: Path) -> int | None:
    """The number in the file name of a checkpoint segment, or None if the path is not one."""
    name = CHECKPOINT.fullmatch(path.name)
    return int(name["number"]) if name else None
