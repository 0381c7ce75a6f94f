"""Exports the captions of one split to one file, with a manifest beside it.

Files are derived from the database and can be recreated at any time. Done rows never change, so an export is a
consistent snapshot although it reads in several short transactions.
"""

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Engine as Database

from rococap import queue
from rococap.db import transaction
from rococap.files import ending, replacing, sha256_of, write_json
from rococap.progress import Progress, silent
from rococap.queue import Run
from rococap.results.formats import disarmed, schema_with, write_frames
from rococap.results.manifest import manifest_of, manifest_path, stripped
from rococap.results.snapshot import check_complete, finished_until, n_done, pages
from rococap.results.texts import Kind, texts_now

FOLDER = Path("results_medical")


@dataclass(frozen=True, slots=True)
class Exported:
    """An exported file: the number of its rows, and in `missing` the jobs of the split that are not in it."""

    path: Path
    rows: int
    missing: int


def export(
    database: Database,
    run: Run,
    split: str,
    path: Path,
    *,
    captions: Kind = "machine",
    require_complete: bool = False,
    excel_safe: bool = False,
    strip_reasoning: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Writes the done images of a split, in data set order, to a .csv, .parquet or .jsonl file, and its manifest.

    `captions`: the machine's texts; "edited", with the edits of readers; or "reviewed", of these only pictures with a
    verdict. In the last two cases .parquet and .jsonl files also say who edited and judged a caption, and when.
    `excel_safe` puts an apostrophe before every text that a spreadsheet would execute as a formula, and a byte-order
    mark at the start of the file; `restore` removes both. `strip_reasoning` leaves out a model's reasoning, which
    cannot be restored.

    Raises RunError if the run has no images of the split, IncompleteError if `require_complete` and some are not done,
    RococapError if the file cannot be written. On failure an older file stays as it was.
    """
    with transaction(database) as conn:
        (counts,) = queue.counts_of(conn, run, [split])
        cutoff = finished_until(conn, [run], [split])
        texts = texts_now(conn, captions)
        n = n_done(conn, run, split, cutoff, texts) if captions == "reviewed" else counts.done
    if require_complete:
        check_complete(run, split, counts.done, counts.total)
    manifest = manifest_path(path)
    people = {} if ending(path) == ".csv" else texts.people
    frames = pages(
        *(database, run, split, cutoff, n, progress), texts=texts, people=people, strip_reasoning=strip_reasoning
    )
    if excel_safe:
        frames = (frame.map(disarmed) for frame in frames)
    with replacing(path) as partial:
        rows = write_frames(frames, partial, ending(path), schema_with(people), mark=excel_safe)
        digest = sha256_of(partial)
        # If the process is killed before the new manifest is written, no manifest is better than the old file's.
        manifest.unlink(missing_ok=True)
    missing = counts.total - rows
    details = {"split": split, "file": path.name, "rows": rows, "missing": missing, "sha256": digest}
    details |= stripped(strip_reasoning) | ({"excel_safe": True} if excel_safe else {})
    write_json(manifest, manifest_of(run) | texts.in_manifest() | details)
    return Exported(path, rows, missing)
