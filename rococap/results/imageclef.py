"""Writes a submission file in the format of ImageCLEFmedical Caption: a CSV with the columns ID and Caption."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

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
from rococap.results.texts import Kind, texts_now

_SUBMISSION = pa.schema([("ID", pa.string()), ("Caption", pa.string())])


@dataclass(slots=True)
class Submission:
    """A submission file: its rows, how many of their pictures have no caption, and how many cells are empty.

    A picture without a caption has an empty cell, so `empty` includes `missing`.
    """

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
    captions: Kind = "machine",
    allow_missing: bool = False,
    strip_reasoning: bool = False,
    progress: Progress = silent,
) -> Submission:
    """Writes `ID,Caption` for every picture of the split, in data set order, and a manifest beside the file.

    `captions` says which texts to write, as for `export`; "reviewed" has none for pictures without a verdict.

    Raises IncompleteError if pictures have no caption, unless `allow_missing`; RunError if the run has no images of the
    split; RococapError for IDs that a submission cannot hold, or if the file cannot be written. On failure an older
    file stays as it was.
    """
    with transaction(database) as conn:
        queue.counts_of(conn, run, [split])
        images = execute(
            conn,
            "SELECT id, image_id FROM images WHERE dataset_id = ? AND split = ? ORDER BY id",
            (run.dataset_id, split),
        ).fetchall()
        cutoff = finished_until(conn, [run], [split])
        texts = texts_now(conn, captions)
    ids = {id: _submitted_id(image_id) for id, image_id in images}
    if len(set(ids.values())) < len(ids):
        raise RococapError(
            f"Some IDs of {split} differ only in white space, which ImageCLEF ignores: fix them in the data set."
        )
    submission = Submission(path)
    with replacing(path) as partial, short_reads(database) as read:
        pages = done_pages(read, run, split, cutoff, "j.image_id, c.text", texts=texts, strip_reasoning=strip_reasoning)
        rows = chain.from_iterable(pages)
        write_frames(_submitted(ids, rows, submission, split, progress), partial, ".csv", _SUBMISSION)
        if submission.missing and not allow_missing:
            raise _incomplete(run, split, submission, captions)
        digest = sha256_of(partial)
        manifest_path(path).unlink(missing_ok=True)
    counts = {name: getattr(submission, name) for name in ("rows", "missing", "empty")}
    details = {"format": "imageclef", "split": split, "file": path.name, **counts, "sha256": digest}
    write_json(manifest_path(path), manifest_of(run) | texts.in_manifest() | details | stripped(strip_reasoning))
    return submission


def _submitted_id(image_id: str) -> str:
    """The ID without surrounding white space, which ImageCLEF's checker strips from its own list too.

    The checker splits the file at line breaks and commas before it considers quotes, so an ID can hold neither.
    """
    stripped = image_id.strip()
    if "," in stripped or stripped.splitlines() != [stripped]:
        raise RococapError(
            f"The ID {image_id!r} cannot be submitted: an ImageCLEF ID is one line of text without commas. Use "
            "ImageCLEF's own data set, or another --format."
        )
    return stripped


def _submitted(
    ids: dict[int, str], captions: Iterator[Sequence[Any]], submission: Submission, split: str, progress: Progress
) -> Iterator[pd.DataFrame]:
    rows = _every_id(ids, captions)
    while page := list(islice(rows, PAGE)):
        texts = [fold(text or "") for _, text in page]
        submission.rows += len(page)
        submission.missing += sum(text is None for _, text in page)
        submission.empty += texts.count("")
        yield pd.DataFrame({"ID": [image_id for image_id, _ in page], "Caption": texts}, dtype=object)
        progress(f"{split}: exporting", submission.rows, len(ids))


def _every_id(ids: dict[int, str], captions: Iterator[Sequence[Any]]) -> Iterator[tuple[str, str | None]]:
    """Every ID with its caption, or None if it has none. Both inputs are in the order of the images' database keys."""
    end = (0, None)
    captioned, text = next(captions, end)
    for id, image_id in ids.items():
        if id == captioned:
            yield image_id, text
            captioned, text = next(captions, end)
        else:
            yield image_id, None


def _incomplete(run: Run, split: str, submission: Submission, captions: Kind) -> IncompleteError:
    if captions == "reviewed":
        return IncompleteError(
            f"{submission.missing} of {submission.rows} pictures of {split} have no verdict, and ImageCLEF rejects a "
            "submission that lacks an ID. Use --captions edited, which has all captions, or leave the others empty "
            "with --allow-missing."
        )
    return IncompleteError(
        f"{submission.missing} of {submission.rows} pictures of {split} have no caption, and ImageCLEF rejects a "
        f"submission that lacks an ID. Caption them: rococap enqueue --run {run.name} --split {split} …, then rococap "
        f"worker --run {run.name} (see rococap failures for those that failed). Or leave their captions empty with "
        "--allow-missing."
    )
