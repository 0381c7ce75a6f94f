"""A submission as ImageCLEFmedical Caption takes it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
from sqlalchemy import Engine as Database

from rococap import queue
from rococap.db import execute, transaction
from rococap.errors import RococapError
from rococap.files import replacing, sha256_of, write_json
from rococap.progress import Progress, silent
from rococap.queue import Run
from rococap.results.formats import fold, write_frames
from rococap.results.manifest import manifest_of, manifest_path, stripped
from rococap.results.snapshot import PAGE, IncompleteError, done_pages, finished_until, short_reads

if TYPE_CHECKING:
    pass

_SUBMISSION = pa.schema([("ID", pa.string()), ("Caption", pa.string())])


@dataclass(slots=True)
class Submission:
    """What was submitted: rows, pictures among them that have no caption, and cells that are empty, also therefore."""

    path: Path
    rows: int = 0
    missing: int = 0
    empty: int = 0


def submit(
    database: Database,
    run: Run,
    split: str,
    path: Path,
    *,
    allow_missing: bool = False,
    strip_reasoning: bool = False,
    progress: Progress = silent,
) -> Submission:
    """Writes `ID,Caption` for every picture that the data set has of the split, in its order, and a manifest.

    Raises IncompleteError if pictures have no caption, unless that is allowed; RunError if the run has nothing of the
    split; RococapError for IDs that no submission can hold, or if the file cannot be written. An older file then stays.
    """
    with transaction(database) as conn:
        queue.counts_of(conn, run, [split])
        images = execute(
            conn,
            "SELECT id, image_id FROM images WHERE dataset_id = ? AND split = ? ORDER BY id",
            (run.dataset_id, split),
        ).fetchall()
        cutoff = finished_until(conn, [run], [split])
    ids = {id: _submitted_id(image_id) for id, image_id in images}
    if len(set(ids.values())) < len(ids):
        raise RococapError(f"IDs of {split} differ by white space alone, which ImageCLEF ignores: mend the data set.")
    submission = Submission(path)
    with replacing(path) as partial, short_reads(database) as read:
        pages = done_pages(read, run, split, cutoff, "j.image_id, c.text", strip_reasoning=strip_reasoning)
        captions = chain.from_iterable(pages)
        write_frames(_submitted(ids, captions, submission, split, progress), partial, ".csv", _SUBMISSION)
        if submission.missing and not allow_missing:
            raise _incomplete(run, split, submission)
        digest = sha256_of(partial)
        manifest_path(path).unlink(missing_ok=True)
    told = {name: getattr(submission, name) for name in ("rows", "missing", "empty")}
    about = {"format": "imageclef", "split": split, "file": path.name, **told, "sha256": digest}
    write_json(manifest_path(path), manifest_of(run) | about | stripped(strip_reasoning))
    return submission


def _submitted_id(image_id: str) -> str:
    """Stripped, as the checker strips those of its own list. It splits rows at line breaks and at commas, before it
    looks at quotes.
    """
    stripped = image_id.strip()
    if "," in stripped or stripped.splitlines() != [stripped]:
        raise RococapError(
            f"The ID {image_id!r} cannot be submitted: ImageCLEF's are one line without commas. Use its own data set, "
            "or another --format."
        )
    return stripped


def _submitted(
    ids: dict[int, str], captions: Iterator[Sequence[Any]], told: Submission, split: str, progress: Progress
) -> Iterator[pd.DataFrame]:
    rows = _every_id(ids, captions)
    while page := list(islice(rows, PAGE)):
        texts = [fold(text or "") for _, text in page]
        told.rows += len(page)
        told.missing += sum(text is None for _, text in page)
        told.empty += texts.count("")
        yield pd.DataFrame({"ID": [image_id for image_id, _ in page], "Caption": texts}, dtype=object)
        progress(f"{split}: exporting", told.rows, len(ids))


def _every_id(ids: dict[int, str], captions: Iterator[Sequence[Any]]) -> Iterator[tuple[str, str | None]]:
    """Both come in the order of the key."""
    nothing = (0, None)
    captioned, text = next(captions, nothing)
    for id, image_id in ids.items():
        if id == captioned:
            yield image_id, text
            captioned, text = next(captions, nothing)
        else:
            yield image_id, None


def _incomplete(run: Run, split: str, submission: Submission) -> IncompleteError:
    return IncompleteError(
        f"{submission.missing} of {submission.rows} pictures of {split} have no caption, and ImageCLEF refuses a "
        f"submission that lacks an ID. Caption them: rococap enqueue --run {run.name} --split {split} …, then rococap "
        f"worker --run {run.name} (what failed: rococap failures); or give them an empty caption: --allow-missing."
    )
