"""Restores captions from exports and checkpoint segments into a run of the database.

It does not enqueue: the run and its images must exist already.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.data.layout import MANIFEST
from rococap.db import execute, transaction
from rococap.errors import RococapError, RunError
from rococap.files import ending, read_json, sha256_of
from rococap.queue import Run, clean_text
from rococap.results import doubles
from rococap.results.checkpoints import renew, segment_number
from rococap.results.doubles import Made
from rococap.results.formats import armed
from rococap.results.manifest import STRIPPED, manifest_path
from rococap.results.snapshot import COLUMNS, PAGE
from rococap.tables import JobState


@dataclass(slots=True)
class Restored:
    """What became of the rows of one file.

    `restored` rows are done now; `known` ones were captioned already; `leased` ones are being captioned by a worker;
    `unknown` ones are of images that the run does not have; `different` ones of images that have another original
    caption in the database. Where files are merged, `twice` ones had another caption, which in `replaced` cases went.
    `has_manifest` is true if the file has a manifest of its own, or is a segment.
    """

    path: Path
    restored: int = 0
    known: int = 0
    twice: int = 0
    replaced: int = 0
    leased: int = 0
    unknown: int = 0
    different: int = 0
    has_manifest: bool = True


def restore(database: Database, run: Run, path: Path, *, merging: bool = False) -> Restored:
    """Restores the captions of an export or a checkpoint segment into a run.

    Existing captions are kept, except that a segment replaces those restored from an earlier one. Columns that a file
    does not have, such as token counts, stay NULL. Images restored from a segment are recorded as written to it.
    `merging`: the file is of another database, so that of two captions of an image the one that `doubles` says is kept,
    and segments are not those of this database.

    Raises RococapError, and changes nothing, for a file that is not an export, was altered since, had its reasoning
    stripped, or was made with another model or recipe than the run's.
    """
    manifest = _read_manifest(path)
    with transaction(database) as conn:
        run = queue.get_run(conn, run.name)  # read again: restoring an earlier file may have pinned the model
    _check_whole(path, manifest)
    _check_manifest(run, path, manifest)
    for frame in _as_exported(path, manifest):
        _check_frame(run, path, frame)
    # The run.json of a checkpoint folder does not vouch for an export in the same folder.
    result = Restored(path, has_manifest=manifest_path(path).exists() or segment_number(path) is not None)
    for frame in _as_exported(path, manifest):
        with transaction(database, write=True) as conn:
            if merging:
                db.take_turns(conn)
            for split, rows in frame.groupby("split", sort=False):
                _restore_page(conn, run, str(split), rows, result, merging)
    if manifest and manifest.get("resolved") and result.restored:
        with transaction(database, write=True) as conn:
            queue.pin_first(conn, run, manifest["resolved"])
    return result


def _read_manifest(path: Path) -> dict[str, Any] | None:
    return read_json(manifest_path(path)) or read_json(path.parent / "run.json")


def _check_whole(path: Path, manifest: dict[str, Any] | None) -> None:
    published = read_json(path.absolute().parents[1] / MANIFEST) if path.absolute().parent.name == "data" else None
    kinds = [found.get("captions") for found in (manifest, published) if found is not None]
    if any(kinds) or path.stem.endswith((".edited", ".reviewed")):
        raise _edited(path)
    if any(found is not None and found.get(STRIPPED) for found in (manifest, published)):
        raise RococapError(
            f"{path} was exported with --strip-reasoning, and a run keeps captions with the model's reasoning. Restore "
            "the checkpoint segments, or an export without --strip-reasoning."
        )


def _edited(path: Path) -> RococapError:
    return RococapError(
        f"{path} holds captions with the edits of readers, and a run keeps what the machine said. Restore the "
        "checkpoint segments or an export without --captions; then bring the edits back: rococap reviews --import FILE"
    )


def _check_manifest(run: Run, path: Path, manifest: dict[str, Any] | None) -> None:
    if manifest is None:
        return
    pinned, resolved = run.resolved, manifest.get("resolved")
    if pinned and resolved and (queue.differences(pinned, resolved) or not _are_its_rules(pinned, resolved)):
        raise RunError(
            f"{path} was made with another state of the model than run {run.name!r} ({resolved}, not {pinned}), and a "
            "run never mixes the two. Restore it into another run: rococap restore --run NAME"
        )
    if manifest.get("recipe_hash") != run.recipe.hash:
        raise RunError(
            f"{path} was made with another recipe than that of run {run.name!r} ({_differences(manifest, run)}). "
            "Restore it into a run with its recipe: rococap enqueue --run NAME …, then rococap restore --run NAME"
        )
    if manifest.get("file") == path.name and manifest.get("sha256") != sha256_of(path):
        raise RococapError(
            f"{path} was altered after it was exported (its SHA-256 differs). Use the original, or delete "
            f"{manifest_path(path)} to restore it as it is."
        )


def _are_its_rules(pinned: Mapping[str, Any], resolved: Mapping[str, Any]) -> bool:
    """Whether the run has captions made under the same rules as the file's: its current rules or earlier ones."""
    earlier = {accepted["from"] for accepted in pinned.get("accepted_rules", [])}
    return queue.rules_of(resolved) in {queue.rules_of(pinned), *earlier}


def _differences(manifest: dict[str, Any], run: Run) -> str:
    theirs, mine = manifest.get("recipe") or {}, asdict(run.recipe)
    return "; ".join(
        f"{name}: {theirs.get(name)!r}, not {mine[name]!r}" for name in mine if theirs.get(name) != mine[name]
    )


def _as_exported(path: Path, manifest: dict[str, Any] | None) -> Iterator[pd.DataFrame]:
    is_excel_safe = manifest is not None and manifest.get("excel_safe")
    return (frame.map(armed) for frame in _read(path)) if is_excel_safe else _read(path)


def _read(path: Path) -> Iterator[pd.DataFrame]:
    try:
        match ending(path):
            case ".csv":
                # utf-8-sig: drops the byte-order mark that --excel-safe or a spreadsheet puts before the first column.
                yield from pd.read_csv(path, encoding="utf-8-sig", dtype=str, keep_default_na=False, chunksize=PAGE)
            case ".jsonl":
                yield from pd.read_json(path, lines=True, dtype=False, chunksize=PAGE)
            case ".parquet":
                yield from (batch.to_pandas() for batch in pq.ParquetFile(path).iter_batches(PAGE))
            case _:
                raise RococapError(f"{path} is not a .csv, .jsonl or .parquet file: name a file that rococap exported.")
    except (ValueError, pa.ArrowException) as error:
        raise RococapError(f"{path} cannot be read ({error}). Name a file that rococap exported.") from error


def _check_frame(run: Run, path: Path, frame: pd.DataFrame) -> None:
    if "edited_by" in frame.columns:
        raise _edited(path)
    if absent := [name for name in COLUMNS if name not in frame.columns]:
        raise RococapError(f"{path} lacks the columns {', '.join(absent)}: name a file that rococap exported.")
    for name in COLUMNS:
        if (
            name not in ("processing_time_sec", "timestamp")
            and not frame[name].map(lambda cell: type(cell) is str).all()
        ):
            raise RococapError(f"{path} has a value that is not text in the column {name}: use the original file.")
    if others := sorted(set(frame["model"]) - {run.recipe.model}):
        raise RunError(
            f"{path} holds captions by {', '.join(others)}, but run {run.name!r} uses {run.recipe.model}. "
            "Restore it into a run with that model: rococap restore --run NAME"
        )
    _milliseconds(path, frame)
    _seconds(path, frame)


def _milliseconds(path: Path, frame: pd.DataFrame) -> list[int]:
    """Timestamps in ms since the epoch. Raises RococapError for one that is not ISO 8601."""
    times = pd.to_datetime(frame["timestamp"], format="ISO8601", utc=True, errors="coerce")
    if times.isna().any():
        raise RococapError(f"{path} has a timestamp that is not ISO 8601: use the original file.")
    return [int(time.timestamp() * 1000 + 0.5) for time in times]


def _seconds(path: Path, frame: pd.DataFrame) -> list[float | None]:
    """Processing times in seconds, None where the file has none. Raises RococapError for one that is not a number."""
    cells = frame["processing_time_sec"]
    is_absent = cells.isna() | (cells == "")
    values = pd.to_numeric(cells.where(~is_absent), errors="coerce")
    if not np.isfinite(values[~is_absent].to_numpy(dtype=float)).all():
        raise RococapError(f"{path} has a processing_time_sec that is not a number: use the original file.")
    return [None if absent else float(value) for value, absent in zip(values, is_absent, strict=True)]


@dataclass(slots=True)
class _Job:
    """The job of a picture: the segment its caption belongs to, the original caption of the picture and, unless a
    caption that is there is kept whatever the file says, how that was made.
    """

    id: int
    status: str
    checkpoint: int | None
    original: str
    made: Made | None = None


@dataclass(slots=True)
class _Page:
    """What a page of a file changes: the captions to store, as rows by job, and the jobs whose captions the file has
    as they are.
    """

    captions: dict[int, tuple[Any, ...]] = field(default_factory=dict)
    same: list[int] = field(default_factory=list)


def _restore_page(conn: Connection, run: Run, split: str, rows: pd.DataFrame, result: Restored, merging: bool) -> None:
    db.lock(conn, "runs", run.id)
    segment = None if merging else segment_number(result.path)
    jobs = _jobs_by_image_id(conn, run, split, list(rows["image_id"]))
    before = {job.id: job.status for job in jobs.values()}
    if merging or segment:
        _add_made(conn, jobs)
    page = _page(rows, jobs, result, segment, merging)
    replaced = sorted(job_id for job_id in page.captions if before[job_id] == JobState.DONE)
    doubles.remove(conn, run, split, replaced)
    if page.captions:
        _store(conn, run, split, page.captions, before, segment)
    if segment and page.same:
        sql = "UPDATE jobs SET checkpoint = ? WHERE id = ? AND checkpoint IS NULL"
        execute(conn, sql, [(segment, job_id) for job_id in page.same])
    if merging:
        renew(conn, run, split, replaced)
    result.replaced += len(replaced)
    result.restored += len(page.captions) - len(replaced)


def _page(rows: pd.DataFrame, jobs: dict[str, _Job], result: Restored, segment: int | None, merging: bool) -> _Page:
    """Decides row by row which captions are stored, and counts the others."""
    page = _Page()
    cells = (rows["image_id"], rows["original_caption"], rows["generated_caption"])
    measures = (_seconds(result.path, rows), _milliseconds(result.path, rows))
    for image_id, original, text, seconds, generated_at in zip(*cells, *measures, strict=True):
        made = Made(True, generated_at, clean_text(text))
        job = jobs.get(image_id)
        if job is None:
            result.unknown += 1
        elif job.original != clean_text(original):
            result.different += 1
        elif job.status == JobState.LEASED:
            result.leased += 1
        elif job.status == JobState.DONE and (job.made is None or made.is_same(job.made)):
            result.known += 1
            page.same.append(job.id)
        elif job.status == JobState.DONE and not merging and not _is_later(segment, job):
            result.known += 1
        else:
            result.twice += merging and job.status == JobState.DONE
            if not merging or job.made is None or made < job.made:
                job.status, job.made = JobState.DONE, made
                processing_ms = None if seconds is None else seconds * 1000
                row = (job.id, made.text, queue.flags_of(text, ""), processing_ms, generated_at)
                page.captions[job.id] = row
    return page


def _is_later(segment: int | None, job: _Job) -> bool:
    """Whether a segment comes after the one from which a caption was restored that nobody has worked on since."""
    if segment is None or job.checkpoint is None or job.made is None:
        return False
    return job.checkpoint < segment and job.made.is_restored and job.made.is_unused


def _store(
    conn: Connection,
    run: Run,
    split: str,
    captions: Mapping[int, tuple[Any, ...]],
    before: Mapping[int, str],
    segment: int | None,
) -> None:
    """Stores captions, as rows by job. `before`: the status of each job until now."""
    execute(
        conn,
        "UPDATE jobs SET status = 'done', not_before = NULL, finished_at = ?, checkpoint = COALESCE(?, checkpoint) "
        "WHERE id = ?",
        [(db.now(conn), segment, job_id) for job_id in captions],
    )
    execute(
        conn,
        "INSERT INTO captions (job_id, text, flags, processing_ms, generated_at) VALUES (?, ?, ?, ?, ?)",
        list(captions.values()),
    )
    moved = Counter({str(JobState.DONE): len(captions)})
    moved.subtract(before[job_id] for job_id in captions)
    moved.update(queue.flag_counts(row[2] for row in captions.values()))
    queue.tally(conn, run.id, split, 0, moved)


def _jobs_by_image_id(conn: Connection, run: Run, split: str, image_ids: list[str]) -> dict[str, _Job]:
    found = {}
    for start in range(0, len(image_ids), 500):
        some = image_ids[start : start + 500]
        rows = execute(
            conn,
            "SELECT i.image_id, j.id, j.status, j.checkpoint, i.caption FROM images i "
            "JOIN jobs j ON j.run_id = ? AND j.image_id = i.id "
            f"WHERE i.dataset_id = ? AND i.split = ? AND i.image_id IN ({', '.join('?' * len(some))}) "
            f"ORDER BY j.id{db.for_update(conn, 'j')}",
            (run.id, run.dataset_id, split, *some),
        ).fetchall()
        found.update({image_id: _Job(*others) for image_id, *others in rows})
    return found


def _add_made(conn: Connection, jobs: Mapping[str, _Job]) -> None:
    """Adds to the jobs that are done how their captions were made."""
    done = {job.id: job for job in jobs.values() if job.status == JobState.DONE}
    for job_id, made in doubles.made(conn, sorted(done)).items():
        done[job_id].made = made
