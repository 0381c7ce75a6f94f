"""Reads the captions that were done by one moment, in pages short enough not to hold up workers. Writes nothing."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap.db import execute, transaction
from rococap.errors import RococapError
from rococap.flags import without_reasoning
from rococap.progress import Progress
from rococap.queue import Run
from rococap.results.texts import MACHINE, Texts, people_of

COLUMNS = (
    "image_id",
    "original_caption",
    "generated_caption",
    "processing_time_sec",
    "model",
    "timestamp",
    "split",
)
PAGE = 1_000
"""Rows per read. Larger pages are faster, but delay commits for longer under SQLite's DELETE journal."""


class IncompleteError(RococapError):
    """The split is not completely captioned, and the caller required it to be."""


def check_complete(run: Run, split: str, done: int, total: int) -> None:
    """Raises IncompleteError unless all images of the split are done."""
    if done < total:
        raise IncompleteError(
            f"{total - done} of {total} images of {split} are not captioned (see rococap status). "
            f"Caption them with rococap worker --run {run.name}, or leave out --require-complete."
        )


SELECTED = "j.image_id, j.checkpoint, i.image_id, i.caption, c.text, c.processing_ms, c.generated_at"
CAPTIONED = "FROM jobs j JOIN captions c ON c.job_id = j.id JOIN images i ON i.id = j.image_id "
DONE = f"{CAPTIONED}WHERE j.run_id = ? AND j.split = ? AND "


def n_done(conn: Connection, run: Run, split: str, cutoff: int, texts: Texts) -> int:
    """The number of captions that `done_pages` reads."""
    sql = f"SELECT count(*) FROM jobs j {texts.joins}WHERE j.run_id = ? AND j.split = ? AND {_BY_CUTOFF}"
    return int(execute(conn, sql, (*texts.params, run.id, split, cutoff)).scalar_one())


def pages(
    database: Database,
    run: Run,
    split: str,
    cutoff: int,
    total: int,
    progress: Progress,
    *,
    texts: Texts = MACHINE,
    people: Mapping[str, str],
    strip_reasoning: bool,
) -> Iterator[pd.DataFrame]:
    """Frames of COLUMNS, in data set order, with what was done by the cutoff; `total` is only used for progress.

    `people`, some or all of `texts.people`, are further columns.
    """
    done = 0
    columns = ", ".join([SELECTED, *people.values()])
    with short_reads(database) as read:
        for rows in done_pages(read, run, split, cutoff, columns, texts=texts, strip_reasoning=strip_reasoning):
            done += len(rows)
            yield with_people(frame_of(rows, run, split), rows, people)
            progress(f"{split}: exporting", done, total)


def with_people(frame: pd.DataFrame, rows: Sequence[Sequence[Any]], names: Collection[str]) -> pd.DataFrame:
    """The frame with the columns `names` of `Texts.people`, which are the last of each row."""
    columns = zip(*(people_of(names, row).values() for row in rows), strict=True)
    return frame.assign(**{name: list(column) for name, column in zip(names, columns, strict=True)}) if names else frame


def flags(conn: Connection, run: Run, split: str, cutoff: int, texts: Texts) -> dict[str, int]:
    """How many of the captions that `done_pages` reads have each flag."""
    sql = texts.select(f"SELECT c.flags, count(*) {CAPTIONED}{texts.joins}")
    sql += f"WHERE j.run_id = ? AND j.split = ? AND {_BY_CUTOFF} GROUP BY 1"
    found: Counter[str] = Counter()
    for joined, n in execute(conn, sql, (*texts.params, run.id, split, cutoff)).fetchall():
        found.update(dict.fromkeys(filter(None, joined.split(",")), n))
    return dict(found)


Read = Callable[[], AbstractContextManager[Connection]]


def finished_until(conn: Connection, runs: Sequence[Run], splits: Sequence[str]) -> int:
    """The latest time, in ms since the epoch, at which a job that is done now was finished; 0 if none is done. As a
    cutoff, it excludes everything that finishes later.

    The current time would not do: if the clock ran ahead and was corrected since, jobs that are done have times in the
    future.
    """
    within = ", ".join("?" * len(runs)), ", ".join("?" * len(splits))
    sql = (
        "SELECT COALESCE(max(finished_at), 0) FROM jobs WHERE run_id IN ({}) AND split IN ({}) AND status = 'done'"
    ).format(*within)
    return int(execute(conn, sql, (*(run.id for run in runs), *splits)).scalar_one())


_BY_CUTOFF = "j.status = 'done' AND j.finished_at <= ?"


def done_pages(
    read: Read,
    run: Run,
    split: str,
    cutoff: int,
    columns: str,
    *,
    texts: Texts = MACHINE,
    strip_reasoning: bool = False,
    after: int = 0,
) -> Iterator[Sequence[Sequence[Any]]]:
    """Pages of the rows of a split that were done by the cutoff, in data set order, of images with a key above `after`.

    `columns` is a select list over j (the job), i (its image), c (its caption; c.text is the text that `texts` means)
    and the tables of `texts.joins`. It must begin with j.image_id, by which the pages are ordered, and contain c.text
    if `strip_reasoning`.
    """
    at = columns.split(", ").index("c.text") if strip_reasoning else 0
    select = (
        f"SELECT {texts.select(columns)} {CAPTIONED}{texts.joins}WHERE j.run_id = ? AND j.split = ? AND {_BY_CUTOFF} "
        "AND j.image_id > ? ORDER BY j.image_id LIMIT ?"
    )
    for rows in _pages(read, select, (*texts.params, run.id, split, cutoff), after):
        yield [(*row[:at], without_reasoning(row[at]), *row[at + 1 :]) for row in rows] if strip_reasoning else rows


def _pages(read: Read, select: str, values: tuple[object, ...], after: int = 0) -> Iterator[Sequence[Sequence[Any]]]:
    """Pages of a query whose last two parameters are the id before the page, which is its first column, and a limit."""
    while True:
        with read() as conn:
            rows = execute(conn, select, (*values, after, PAGE)).fetchall()
        if not rows:
            return
        after = rows[-1][0]
        yield rows


def newest_job(conn: Connection) -> int:
    """The highest id of a job, 0 if there is none. As a cutoff, it excludes what is enqueued later."""
    return int(execute(conn, "SELECT COALESCE(max(id), 0) FROM jobs").scalar_one())


def enqueued_pages(read: Read, run: Run, split: str, newest: int, columns: str) -> Iterator[Sequence[Sequence[Any]]]:
    """Pages of the rows of a split that were enqueued up to the job `newest`, captioned or not, in data set order.

    `columns` is a select list over j (the job) and i (its image), and must begin with j.image_id.
    """
    select = (
        f"SELECT {columns} FROM jobs j JOIN images i ON i.id = j.image_id "
        "WHERE j.run_id = ? AND j.split = ? AND j.id <= ? AND j.image_id > ? ORDER BY j.image_id LIMIT ?"
    )
    return _pages(read, select, (run.id, split, newest))


@contextmanager
def short_reads(database: Database) -> Iterator[Read]:
    """A function that opens a connection for one page.

    On SQLite each page is a transaction of its own, since under the DELETE journal a long read blocks every commit. On
    PostgreSQL all pages share one transaction and thus one snapshot.
    """
    if database.dialect.name == "sqlite":
        yield lambda: transaction(database)
    else:
        with transaction(database) as conn:
            yield lambda: nullcontext(conn)


def frame_of(rows: Sequence[Sequence[Any]], run: Run, split: str) -> pd.DataFrame:
    """A frame of COLUMNS from rows whose first columns are those of SELECTED."""
    _, _, image_ids, captions, texts, processing_ms, generated_at, *_ = zip(*rows, strict=True)
    seconds = np.round(np.array(processing_ms, dtype=float) / 1000, 6)
    times = np.datetime_as_string(np.array(generated_at, dtype="datetime64[ms]"), timezone="UTC")
    columns = (image_ids, captions, texts, seconds, run.recipe.model, times.tolist(), split)
    # dtype object: otherwise pandas would convert every text to its own string type and back.
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)), dtype=object)
