"""Captions -> CSV, Parquet or JSON Lines, checkpoint segments, and back into a database.

Files are derived from the database and can always be made again. A file appears whole or not at all: it is written
under another name, fsynced and renamed. Done rows never change, so an export is a snapshot although it reads in short
transactions that stall no worker.
"""

import codecs
import errno
import hashlib
import json
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.csv import CSVWriter, WriteOptions
from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import __version__, db, queue
from rococap.db import execute, transaction
from rococap.errors import RococapError, RunError
from rococap.flags import without_reasoning
from rococap.models import JobState
from rococap.queue import Run, clean_text

FOLDER = Path("results_medical")
MANIFEST = "rococap.json"
"""In every folder that `publish` writes: only such folders are ever replaced."""
STRIPPED = "strip_reasoning"
FORMATS = ("csv", "parquet", "jsonl")
COLUMNS = (
    "image_id",
    "original_caption",
    "generated_caption",
    "processing_time_sec",
    "model",
    "timestamp",
    "split",
)
FORMULA = re.compile(r"'*(?:\s*[=+\-@＝＋－＠]|[\t\r\n])")
"""What a spreadsheet may run: OWASP's list with its full-width signs, these also behind white space, which some strip.
The apostrophes make it invertible: a cell matches with one more in front exactly if it does without.
"""
CHECKPOINT = re.compile(r"checkpoint_\w+_(?P<number>\d{6,})\.csv")
SCHEMA = pa.schema([(name, pa.float64() if name == "processing_time_sec" else pa.string()) for name in COLUMNS])
PAGE = 1_000
"""Rows a read. Larger pages are quicker, and hold up commits the longer under SQLite's DELETE journal."""
SEGMENTS_AT_ONCE = 200
FOLLOW_SEC = 2.0

Progress = Callable[[str, int, int], None]


class IncompleteError(RococapError):
    """The split is not captioned to the end, and the caller asked for all of it."""


@dataclass(frozen=True, slots=True)
class Exported:
    """`missing` counts the jobs of the split that are not done."""

    path: Path
    rows: int
    missing: int


# --- One file --------------------------------------------------------------------------------------------------


def export(
    database: Database,
    run: Run,
    split: str,
    path: Path,
    *,
    require_complete: bool = False,
    excel_safe: bool = False,
    strip_reasoning: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Exported:
    """Writes the done images of a split, in data set order, to a .csv, .parquet or .jsonl file, and its manifest.
    `excel_safe` puts an apostrophe before texts that a spreadsheet would run and a byte-order mark at the start of the
    file; `restore` removes both. `strip_reasoning` leaves out a model's reasoning, which cannot be restored.

    Raises RunError if the run has nothing of the split, IncompleteError if some are not done and all were required,
    RococapError if the file cannot be written; then an older file stays as it was.
    """
    with transaction(database) as conn:
        (counts,) = queue.counts_of(conn, run, [split])
        cutoff = finished_until(conn, [run], [split])
    if require_complete:
        check_complete(run, split, counts.done, counts.total)
    manifest = manifest_path(path)
    frames = _pages(database, run, split, cutoff, counts.done, progress, strip_reasoning=strip_reasoning)
    if excel_safe:
        frames = (frame.map(_disarmed) for frame in frames)
    with replacing(path) as partial:
        rows = write_frames(frames, partial, ending(path), mark=excel_safe)
        digest = sha256_of(partial)
        manifest.unlink(missing_ok=True)  # killed before the next line, the new file has none rather than the old one's
    missing = counts.total - rows
    about = {"split": split, "file": path.name, "rows": rows, "missing": missing, "sha256": digest}
    about |= stripped(strip_reasoning) | ({"excel_safe": True} if excel_safe else {})
    write_json(manifest, manifest_of(run) | about)
    return Exported(path, rows, missing)


def stripped(strip_reasoning: bool) -> dict[str, bool]:
    """How a manifest states it."""
    return {STRIPPED: True} if strip_reasoning else {}


def _disarmed(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and FORMULA.match(cell) else cell


def _armed(cell: Any) -> Any:
    return cell[1:] if isinstance(cell, str) and cell[:1] == "'" and FORMULA.match(cell, 1) else cell


def ending(path: Path) -> str:
    """`.csv` also of X.CSV, as older programs name it."""
    return path.suffix.lower()


def manifest_path(path: Path) -> Path:
    """`x.json` beside `x.csv`; beside another format of the same name, `x.parquet.json`."""
    return path.with_suffix(".json") if ending(path) == ".csv" else path.with_name(f"{path.name}.json")


def check_complete(run: Run, split: str, done: int, total: int) -> None:
    if done < total:
        raise IncompleteError(
            f"{total - done} of {total} images of {split} are not captioned (see rococap status). "
            f"Caption them: rococap worker --run {run.name}; or leave out --require-complete."
        )


SELECTED = "j.image_id, j.checkpoint, i.image_id, i.caption, c.text, c.processing_ms, c.generated_at"
_DONE = (
    "FROM jobs j JOIN captions c ON c.job_id = j.id JOIN images i ON i.id = j.image_id "
    "WHERE j.run_id = ? AND j.split = ? AND "
)


def _pages(
    database: Database, run: Run, split: str, cutoff: int, total: int, progress: Progress, *, strip_reasoning: bool
) -> Iterator[pd.DataFrame]:
    done = 0
    with short_reads(database) as read:
        for rows in done_pages(read, run, split, cutoff, SELECTED, strip_reasoning=strip_reasoning):
            done += len(rows)
            yield frame_of(rows, run, split)
            progress(f"{split}: exporting", done, total)


Read = Callable[[], AbstractContextManager[Connection]]


def finished_until(conn: Connection, runs: Sequence[Run], splits: Sequence[str]) -> int:
    """When the latest of what is done by now was finished: the cutoff that leaves out what is done later.

    The clock itself would be none: it may have run ahead and been set right, and what was finished meanwhile, in what
    is now the future, is done all the same.
    """
    within = ", ".join("?" * len(runs)), ", ".join("?" * len(splits))
    sql = (
        "SELECT COALESCE(max(finished_at), 0) FROM jobs WHERE run_id IN ({}) AND split IN ({}) AND status = 'done'"
    ).format(*within)
    return int(execute(conn, sql, (*(run.id for run in runs), *splits)).scalar_one())


def done_pages(
    read: Read, run: Run, split: str, cutoff: int, columns: str, *, strip_reasoning: bool = False
) -> Iterator[Sequence[Sequence[Any]]]:
    """What was done by the cutoff, in data set order. The first of the columns is j.image_id, and one is c.text; i is
    the image, c its caption.
    """
    at = columns.split(", ").index("c.text") if strip_reasoning else 0
    select = (
        f"SELECT {columns} {_DONE}j.status = 'done' AND j.finished_at <= ? AND j.image_id > ? "
        "ORDER BY j.image_id LIMIT ?"
    )
    after = 0
    while True:
        with read() as conn:
            rows = execute(conn, select, (run.id, split, cutoff, after, PAGE)).fetchall()
        if not rows:
            return
        after = rows[-1][0]
        yield [(*row[:at], without_reasoning(row[at]), *row[at + 1 :]) for row in rows] if strip_reasoning else rows


@contextmanager
def short_reads(database: Database) -> Iterator[Read]:
    """Each page is a transaction of its own on SQLite, where a long read blocks every commit under the DELETE
    journal; on PostgreSQL all pages share one snapshot.
    """
    if database.dialect.name == "sqlite":
        yield lambda: transaction(database)
    else:
        with transaction(database) as conn:
            yield lambda: nullcontext(conn)


def frame_of(rows: Sequence[Sequence[Any]], run: Run, split: str) -> pd.DataFrame:
    """COLUMNS, from rows that begin with SELECTED."""
    _, _, image_ids, captions, texts, processing_ms, generated_at, *_ = zip(*rows, strict=True)
    seconds = np.round(np.array(processing_ms, dtype=float) / 1000, 6)
    times = np.datetime_as_string(np.array(generated_at, dtype="datetime64[ms]"), timezone="UTC")
    columns = (image_ids, captions, texts, seconds, run.recipe.model, times.tolist(), split)
    # Objects, since pandas would turn every text into its own string type and back.
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)), dtype=object)


def write_frames(
    frames: Iterator[pd.DataFrame], path: Path, suffix: str, schema: pa.Schema = SCHEMA, *, mark: bool = False
) -> int:
    """Writes the format that the suffix names, with `mark` a CSV with a byte-order mark; returns how many rows."""
    match suffix:
        case ".csv":
            return _write_csv(frames, path, schema, **({"mark": True} if mark else {}))
        case ".jsonl":
            return _write_jsonl(frames, path)
        case ".parquet":
            return _write_parquet(frames, path, schema)
    raise ValueError(f"the file's name must end in one of {', '.join(FORMATS)}, not {suffix}")


def _write_csv(frames: Iterator[pd.DataFrame], path: Path, schema: pa.Schema = SCHEMA, *, mark: bool = False) -> int:
    """RFC 4180 with \\n and a plain header. Arrow quotes every text, where the csv module before Python 3.13 leaves a
    bare \\r unquoted, and takes half the time of pandas. Excel reads a file that has no `mark` in the machine's own
    code page, and so `é` as `Ã©`.
    """
    rows = 0
    with path.open("wb") as file:
        file.write(codecs.BOM_UTF8 if mark else b"")
        file.write(",".join(schema.names).encode() + b"\n")
        with CSVWriter(file, schema, write_options=WriteOptions(include_header=False)) as writer:
            for frame in frames:
                writer.write_table(_table(frame, schema))
                rows += len(frame)
    return rows


def _write_jsonl(frames: Iterator[pd.DataFrame], path: Path) -> int:
    rows = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        for frame in frames:
            file.write(frame.to_json(orient="records", lines=True, force_ascii=False))
            rows += len(frame)
    return rows


def _write_parquet(frames: Iterator[pd.DataFrame], path: Path, schema: pa.Schema) -> int:
    rows = 0
    with pq.ParquetWriter(path, schema) as writer:
        for frame in frames:
            writer.write_table(_table(frame, schema))
            rows += len(frame)
    return rows


def _table(frame: pd.DataFrame, schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pandas(frame, schema=schema, preserve_index=False)


def manifest_of(run: Run) -> dict[str, Any]:
    """What made the captions: enough to say so beside them, and to restore them."""
    return {
        "run": run.name,
        "dataset": run.dataset,
        "dataset_revision": run.dataset_revision,
        "recipe": asdict(run.recipe),
        "recipe_hash": run.recipe.hash,
        "resolved": run.resolved,
        "rococap": __version__,
        "note": "Machine-generated captions, not reviewed by clinicians. Not for clinical use.",
    }


# --- Files that appear whole -----------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; what was written there becomes `path` at the end, on disk, or never.

    Raises RococapError, naming the next step, if the disk is full or the folder cannot be written.
    """
    if path.exists() and not path.is_file():
        raise RococapError(f"{path} is a folder or a device, and no file to replace: name another with --output.")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        fsync(partial)
        partial.replace(path)
        fsync(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> RococapError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RococapError(
            f"No space left for {path}: nothing was changed there. Free some, or write elsewhere with --output."
        )
    return RococapError(f"{path} cannot be written ({error.strerror or error}). Write elsewhere with --output.")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Raises RococapError, as `replacing` does."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Checkpoint segments ---------------------------------------------------------------------------------------


def write_checkpoints(database: Database, run: Run, split: str, folder: Path, every: int) -> list[Path]:
    """Writes the segments that are due: `every` images each, in order of completion, never changed afterwards.

    When the split has nothing left to do, the short tail is a segment too. Which image is in which segment is decided
    in the database, so that a missing file is written again, the same.
    """
    with transaction(database) as conn:
        _check_folder(run, folder, split, _last_checkpoint(conn, run, split))
    while _assign(database, run, split, every):
        pass
    with transaction(database) as conn:
        last = _last_checkpoint(conn, run, split)
        run = queue.get_run(conn, run.name)  # which a worker may have pinned meanwhile, or new rules changed
    there = read_json(folder / "run.json") or {}
    if last and ("run" not in there or there.get("resolved") != run.resolved):
        write_json(folder / "run.json", manifest_of(run))
    missing = [n for n in range(1, last + 1) if not checkpoint_path(folder, split, n).exists()]
    for start in range(0, len(missing), SEGMENTS_AT_ONCE):
        _write_segments(database, run, split, folder, missing[start : start + SEGMENTS_AT_ONCE])
    return [checkpoint_path(folder, split, n) for n in missing]


def _check_folder(run: Run, folder: Path, split: str, last: int) -> None:
    """A segment counts as written when a file of its name exists: so those there must be this run's and database's."""
    there = read_json(folder / "run.json")
    if there is not None and (there.get("run"), there.get("recipe_hash")) != (run.name, run.recipe.hash):
        raise RococapError(
            f"{folder} holds checkpoints of another run ({there.get('run')}). Move them away, or write elsewhere with "
            "--output."
        )
    numbers = (_segment(path) or 0 for path in folder.glob(f"checkpoint_{split}_*.csv"))
    if max(numbers, default=0) > last:
        raise RococapError(
            f"{folder} holds checkpoints of {split} that this database does not know. If it replaces one that was "
            f"lost, restore them first: rococap restore {shlex.quote(str(folder))}/checkpoint_{split}_*.csv; else move "
            "them away."
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
    """Gives done images their segments; returns how many segments were filled."""
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
        rows = [(first + at // every, row[0]) for at, row in enumerate(due[: n_segments * every])]
        if rows:
            execute(conn, "UPDATE jobs SET checkpoint = ? WHERE id = ? AND checkpoint IS NULL", rows)
    return n_segments


def _write_segments(database: Database, run: Run, split: str, folder: Path, numbers: Sequence[int]) -> None:
    with transaction(database) as conn:
        rows = execute(
            conn,
            f"SELECT {SELECTED} {_DONE}j.checkpoint IS NOT NULL AND j.checkpoint BETWEEN ? AND ? "
            # Not finished_at, which is the time of restoring for what was restored.
            "ORDER BY j.checkpoint, c.generated_at, j.id",
            (run.id, split, numbers[0], numbers[-1]),
        ).fetchall()
    for number, segment in groupby(rows, key=lambda row: row[1]):
        if number in numbers:
            with replacing(checkpoint_path(folder, split, number)) as partial:
                _write_csv(iter([frame_of(list(segment), run, split)]), partial)


def follow(
    database: Database, run: Run, splits: Sequence[str], folder: Path, every: int, written: Callable[[list[Path]], None]
) -> None:
    """Keeps writing segments as workers finish them, until the splits have nothing left to do."""
    while True:
        with transaction(database) as conn:
            is_finished = not any(queue.unfinished(conn, run, splits).values())
        for split in splits:
            if paths := write_checkpoints(database, run, split, folder, every):
                written(paths)
        if is_finished:
            return
        time.sleep(FOLLOW_SEC)


# --- Restoring -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Restored:
    """Rows of one file: restored, captioned already, being captioned now, of images that the run does not have, and of
    images whose original caption is another here. `has_manifest`: the file's own, or it is a segment.
    """

    path: Path
    restored: int = 0
    known: int = 0
    leased: int = 0
    unknown: int = 0
    different: int = 0
    has_manifest: bool = True


def restore(database: Database, run: Run, path: Path) -> Restored:
    """Reads an export or a segment back: captions that are there win, what a file does not hold stays empty. What a
    segment holds counts as written to it.

    Raises RococapError, changing nothing, for a file that is no export, was altered since, lacks what was stripped, or
    was made by another model or recipe than the run's.
    """
    manifest = _read_manifest(path)
    with transaction(database) as conn:
        run = queue.get_run(conn, run.name)  # as it is by now: the file before may have pinned it
    _check_whole(path, manifest)
    _check_manifest(run, path, manifest)
    for frame in _as_exported(path, manifest):
        _check_frame(run, path, frame)
    # The run.json of segments says nothing of an export that stands beside them.
    result = Restored(path, has_manifest=manifest_path(path).exists() or _segment(path) is not None)
    for frame in _as_exported(path, manifest):
        with transaction(database, write=True) as conn:
            for split, rows in frame.groupby("split", sort=False):
                _restore_page(conn, run, str(split), rows, result)
    if manifest and manifest.get("resolved") and result.restored:
        with transaction(database, write=True) as conn:
            queue.pin_first(conn, run, manifest["resolved"])
    return result


def _read_manifest(path: Path) -> dict[str, Any] | None:
    return read_json(manifest_path(path)) or read_json(path.parent / "run.json")


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError) as error:
        raise RococapError(f"{path} is not a manifest ({error}). Move it away to go on without it.") from error


def _check_whole(path: Path, manifest: dict[str, Any] | None) -> None:
    of_folder = read_json(path.absolute().parents[1] / MANIFEST) if path.absolute().parent.name == "data" else None
    if any(one is not None and one.get(STRIPPED) for one in (manifest, of_folder)):
        raise RococapError(
            f"{path} was exported with --strip-reasoning: what the model thought aloud is missing, and a run keeps "
            "captions as they came. Restore the checkpoint segments, or an export without it."
        )


def _check_manifest(run: Run, path: Path, manifest: dict[str, Any] | None) -> None:
    if manifest is None:
        return
    pinned, resolved = run.resolved, manifest.get("resolved")
    if pinned and resolved and (queue.differences(pinned, resolved) or not _are_its_rules(pinned, resolved)):
        raise RunError(
            f"{path} was made with another model state than run {run.name!r}'s ({resolved}, not {pinned}), and a run "
            "never mixes. Restore it into a run of its own: rococap restore --run NAME"
        )
    if manifest.get("recipe_hash") != run.recipe.hash:
        raise RunError(
            f"{path} was made by another recipe than run {run.name!r} has ({_differences(manifest, run)}). "
            "Restore it into a run with that recipe: rococap enqueue --run NAME …, then rococap restore --run NAME"
        )
    if manifest.get("file") == path.name and manifest.get("sha256") != sha256_of(path):
        raise RococapError(
            f"{path} was altered since it was exported (its SHA-256 is another). Use the original, or remove "
            f"{manifest_path(path)} to restore it as it is."
        )


def _are_its_rules(pinned: Mapping[str, Any], resolved: Mapping[str, Any]) -> bool:
    """Whether a file's captions were made by rules that the run's own were made by."""
    earlier = {accepted["from"] for accepted in pinned.get("accepted_rules", [])}
    return queue.rules_of(resolved) in {queue.rules_of(pinned), *earlier}


def _differences(manifest: dict[str, Any], run: Run) -> str:
    theirs, mine = manifest.get("recipe") or {}, asdict(run.recipe)
    return "; ".join(
        f"{name}: {theirs.get(name)!r}, not {mine[name]!r}" for name in mine if theirs.get(name) != mine[name]
    )


def _as_exported(path: Path, manifest: dict[str, Any] | None) -> Iterator[pd.DataFrame]:
    is_excel_safe = manifest is not None and manifest.get("excel_safe")
    return (frame.map(_armed) for frame in _read(path)) if is_excel_safe else _read(path)


def _read(path: Path) -> Iterator[pd.DataFrame]:
    try:
        match ending(path):
            case ".csv":
                # utf-8-sig: a byte-order mark is --excel-safe's, or a spreadsheet's, and no part of the first name.
                yield from pd.read_csv(path, encoding="utf-8-sig", dtype=str, keep_default_na=False, chunksize=PAGE)
            case ".jsonl":
                yield from pd.read_json(path, lines=True, dtype=False, chunksize=PAGE)
            case ".parquet":
                yield from (batch.to_pandas() for batch in pq.ParquetFile(path).iter_batches(PAGE))
            case _:
                raise RococapError(f"{path} is neither .csv, .jsonl nor .parquet: name a file that rococap exported.")
    except (ValueError, pa.ArrowException) as error:
        raise RococapError(f"{path} cannot be read ({error}). Name a file that rococap exported.") from error


def _check_frame(run: Run, path: Path, frame: pd.DataFrame) -> None:
    if absent := [name for name in COLUMNS if name not in frame.columns]:
        raise RococapError(f"{path} lacks the columns {', '.join(absent)}: name a file that rococap exported.")
    for name in COLUMNS:
        if (
            name not in ("processing_time_sec", "timestamp")
            and not frame[name].map(lambda cell: type(cell) is str).all()
        ):
            raise RococapError(f"{path} holds something that is no text in the column {name}: use the original file.")
    if others := sorted(set(frame["model"]) - {run.recipe.model}):
        raise RunError(
            f"{path} holds captions by {', '.join(others)}, and run {run.name!r} is by {run.recipe.model}. "
            "Restore it into a run of that model: rococap restore --run NAME"
        )
    _milliseconds(path, frame)
    _seconds(path, frame)


def _milliseconds(path: Path, frame: pd.DataFrame) -> list[int]:
    times = pd.to_datetime(frame["timestamp"], format="ISO8601", utc=True, errors="coerce")
    if times.isna().any():
        raise RococapError(f"{path} holds a timestamp that is not ISO 8601: use the original file.")
    return [int(time.timestamp() * 1000 + 0.5) for time in times]


def _seconds(path: Path, frame: pd.DataFrame) -> list[float | None]:
    """Processing times; None where the file has none."""
    cells = frame["processing_time_sec"]
    is_absent = cells.isna() | (cells == "")
    values = pd.to_numeric(cells.where(~is_absent), errors="coerce")
    if not np.isfinite(values[~is_absent].to_numpy(dtype=float)).all():
        raise RococapError(f"{path} holds a processing_time_sec that is no number: use the original file.")
    return [None if absent else float(value) for value, absent in zip(values, is_absent, strict=True)]


def _restore_page(conn: Connection, run: Run, split: str, rows: pd.DataFrame, result: Restored) -> None:
    at = db.now(conn)
    segment = _segment(result.path)
    jobs = _jobs_by_image_id(conn, run, split, list(rows["image_id"]))
    moved: Counter[str] = Counter()
    done, captions, known = [], [], []
    cells = (rows["image_id"], rows["original_caption"], rows["generated_caption"])
    measures = (_seconds(result.path, rows), _milliseconds(result.path, rows))
    for image_id, original, text, seconds, generated_at in zip(*cells, *measures, strict=True):
        job_id, status, here = jobs.get(image_id, (None, None, None))
        if job_id is None:
            result.unknown += 1
        elif here != clean_text(original):
            result.different += 1
        elif status == JobState.DONE:
            result.known += 1
            known.append((segment, job_id))
        elif status == JobState.LEASED:
            result.leased += 1
        else:
            moved[str(status)] += 1
            jobs[image_id] = (job_id, JobState.DONE, here)
            done.append((at, segment, job_id))
            processing_ms = None if seconds is None else seconds * 1000
            captions.append((job_id, clean_text(text), queue.flags_of(text, ""), processing_ms, generated_at))
    if done:
        execute(
            conn,
            "UPDATE jobs SET status = 'done', not_before = NULL, finished_at = ?, checkpoint = ? WHERE id = ?",
            done,
        )
        execute(
            conn,
            "INSERT INTO captions (job_id, text, flags, processing_ms, generated_at) VALUES (?, ?, ?, ?, ?)",
            captions,
        )
        changes: dict[str, int] = {status: -n for status, n in moved.items()} | {JobState.DONE: len(done)}
        queue.tally(conn, run.id, split, 0, changes | queue.flag_counts(caption[2] for caption in captions))
    if segment and known:
        execute(conn, "UPDATE jobs SET checkpoint = ? WHERE id = ? AND checkpoint IS NULL", known)
    result.restored += len(done)


def _segment(path: Path) -> int | None:
    """The number of a checkpoint segment: what it holds is not to be written into another."""
    name = CHECKPOINT.fullmatch(path.name)
    return int(name["number"]) if name else None


def _jobs_by_image_id(conn: Connection, run: Run, split: str, image_ids: list[str]) -> dict[str, tuple[int, str, str]]:
    found = {}
    for start in range(0, len(image_ids), 500):
        some = image_ids[start : start + 500]
        rows = execute(
            conn,
            "SELECT i.image_id, j.id, j.status, i.caption FROM images i "
            "JOIN jobs j ON j.run_id = ? AND j.image_id = i.id "
            f"WHERE i.dataset_id = ? AND i.split = ? AND i.image_id IN ({', '.join('?' * len(some))}) "
            f"ORDER BY j.id{db.for_update(conn, 'j')}",
            (run.id, run.dataset_id, split, *some),
        ).fetchall()
        found.update({row[0]: (row[1], row[2], row[3]) for row in rows})
    return found
