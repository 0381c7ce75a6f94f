"""Registers the rows of a data set as images and a selection of them as the jobs of a run. Reads captions and concepts,
and a few pictures of a new split.

The whole split is registered in `images`, whatever `limit` is, so that ids follow the data set's order; a run's jobs
select from them. Each shard is one transaction, and so is each page of jobs: if an enqueue is killed half-way, the next
one continues where it stopped.
"""

from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap.data import Columns, Dataset, Sample, Shard, datasets
from rococap.data.probe import require_pictures
from rococap.db import execute, lock, take_turns, transaction
from rococap.errors import DatasetError, RunError
from rococap.progress import Progress, silent
from rococap.queue import parts, records, runs, status
from rococap.queue.parts import Part, Units, check_same_division, parts_of
from rococap.queue.records import clean_text
from rococap.queue.shards import registered_shards
from rococap.recipe import Recipe
from rococap.tables import JobState

PAGE = 20_000

LONGEST_ID = 240
"""Bytes of an image id in UTF-8. Exports use it as a file name, which may have 255, and a key of a PostgreSQL index may
have 2,704."""


@dataclass(slots=True)
class Enqueued:
    """What an enqueue did to one split.

    `new` and `known` count jobs, `changed` and `duplicates` rows of the data set. `altered_shards` are the paths of
    shards that have changed since they were registered. `is_unlabelled`: no row has an original caption.
    """

    split: str
    new: int = 0
    known: int = 0
    changed: int = 0
    duplicates: int = 0
    altered_shards: list[str] = field(default_factory=list)
    is_unlabelled: bool = False


def enqueue(
    database: Database,
    dataset: Dataset,
    splits: Sequence[str],
    *,
    run: str,
    recipe: Recipe,
    limit: int | None = None,
    offset: int = 0,
    part: Part | None = None,
    progress: Progress = silent,
) -> list[Enqueued]:
    """Makes the rows `offset` to `offset + limit` of each split, or those of a part of it, pending jobs of a run;
    existing jobs stay as they are.

    Raises RunError if the run exists with another recipe or data set, if it has parts that the part would overlap or if
    the part would be empty, and DatasetError for data that cannot be read or ids that are too long. All of this is
    checked before anything is written: the footer of every shard, and the ids and some pictures of a split that is new
    or has changed.
    """
    with transaction(database) as conn:
        dataset, known = _as_registered(conn, dataset, splits)
    shards = {split: datasets.find_shards(dataset.root, split, dataset.config, dataset.columns) for split in splits}
    for split in splits:
        if new := [shard for shard in shards[split] if known[split].get(shard.path) != shard]:
            _check_ids(dataset, new)
            require_pictures(dataset, split, shards[split], recipe)
    if part is not None:
        for split in splits:
            Units.of(shards[split]).check(part, split)
    with transaction(database, write=True) as conn:
        take_turns(conn)
        dataset_id = register_dataset(conn, dataset)
        target = runs.create_run(conn, run, dataset_id, recipe)
        if part is not None:
            for split in splits:
                check_same_division(target, split, parts_of(conn, target, split), part)
    results = []
    for split in splits:
        result = Enqueued(split)
        _register_split(database, dataset, dataset_id, shards[split], result, progress)
        if part is not None:
            _register_part(database, target, split, part, shards[split], result, progress)
        else:
            _register_jobs(database, target, split, limit, offset, result, progress)
        with transaction(database) as conn:
            result.is_unlabelled = not _has_originals(conn, dataset_id, split)
        results.append(result)
    return results


def _check_ids(dataset: Dataset, shards: Sequence[Shard]) -> None:
    for shard in shards:
        for image_id in datasets.image_ids(dataset.root, shard, dataset.columns):
            if (size := len(image_id.encode())) > LONGEST_ID:
                raise DatasetError(
                    f"{dataset.root / shard.path} contains the id {image_id[:20]!r}…, which is {size} bytes long in "
                    f"UTF-8; the limit is {LONGEST_ID}, because ids become file names. Shorten it, or take the ids "
                    "from another column: --columns image_id=NAME"
                )


def _has_originals(conn: Connection, dataset_id: int, split: str) -> bool:
    sql = "SELECT 1 FROM images WHERE dataset_id = ? AND split = ? AND caption <> '' LIMIT 1"
    return execute(conn, sql, (dataset_id, split)).one_or_none() is not None


def enqueue_from(
    database: Database,
    old: runs.Run,
    splits: Sequence[str],
    *,
    run: str,
    recipe: Recipe,
    flags: Sequence[str] = (),
    progress: Progress = silent,
) -> list[Enqueued]:
    """Makes the pictures of the run `old` pending jobs of another run; with `flags`, only those whose caption in `old`
    has one of these flags.

    Raises RunError if the run exists with another recipe or data set, if the recipe is that of `old`, and if `old` has
    no such pictures.
    """
    if recipe == old.recipe and runs.rules_of(old.resolved or {"rules": recipe.rules}) == recipe.rules:
        raise RunError(
            f"Run {old.name!r} has the same recipe, which would give the same captions again. Change something: "
            "--prompt, --model, --max-new-tokens, --repetition-penalty …"
        )
    with transaction(database, write=True) as conn:
        take_turns(conn)
        counts = [c for c in status.counts_of(conn, old, splits) if not flags or c.flags.keys() & set(flags)]
        if not counts:
            raise RunError(f"No caption of run {old.name!r} is flagged {' or '.join(flags)}. See: rococap status")
        target = runs.create_run(conn, run, old.dataset_id, recipe)
    return [_register_from(database, old, target, split, frozenset(flags), progress) for split in splits]


def register_dataset(conn: Connection, dataset: Dataset) -> int:
    """The id of a data set, registered if it is new. Raises DatasetError if it was registered with other columns."""
    execute(
        conn,
        "INSERT INTO datasets (name, revision, columns) VALUES (?, ?, ?) ON CONFLICT (name, revision) DO NOTHING",
        (dataset.name, dataset.revision, dataset.columns.to_json()),
    )
    row = execute(conn, _DATASET, (dataset.name, dataset.revision)).one()
    _check_columns(dataset, Columns.from_json(row[1]))
    return int(row[0])


_DATASET = "SELECT id, columns FROM datasets WHERE name = ? AND revision = ?"


def _as_registered(
    conn: Connection, dataset: Dataset, splits: Sequence[str]
) -> tuple[Dataset, dict[str, dict[str, Shard]]]:
    """The data set with the columns it was registered with, and the registered shards of each split by path."""
    row = execute(conn, _DATASET, (dataset.name, dataset.revision)).one_or_none()
    if row is None:
        return dataset, {split: {} for split in splits}
    columns = Columns.from_json(row[1])
    _check_columns(dataset, columns)
    return replace(dataset, columns=columns), {split: registered_shards(conn, row[0], [split]) for split in splits}


def _check_columns(dataset: Dataset, stored: Columns) -> None:
    if dataset.columns.given() and dataset.columns.differs(stored):
        raise DatasetError(
            f"The data set {dataset.name} was registered with {stored} for its columns, and its pictures are read with "
            f"these, not with {dataset.columns}: omit --columns, or register it in another queue with --db."
        )


# --- Images ----------------------------------------------------------------------------------------------------

_ADD_IMAGE = (
    "INSERT INTO images (dataset_id, split, image_id, shard_id, row_group, row_in_group, caption, cui) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (dataset_id, split, image_id) DO NOTHING"
)


def _register_split(
    database: Database, dataset: Dataset, dataset_id: int, shards: list[Shard], result: Enqueued, progress: Progress
) -> None:
    with transaction(database, write=True) as conn:
        lock(conn, "datasets", dataset_id)
        known = registered_shards(conn, dataset_id, [result.split])
        altered = [shard for shard in shards if known.get(shard.path, shard) != shard]
        new = [shard for shard in shards if shard.path not in known]
        gone = known.keys() - {shard.path for shard in shards}
        _check_row_ids(dataset, shards, known)
        if altered or (new and gone):
            # In one transaction: after a kill between two, the next enqueue would not know that the first had changed.
            _merge(conn, dataset, dataset_id, altered + new, {*gone, *(shard.path for shard in altered)}, result)
            return
    done, total = 0, sum(shard.rows for shard in new)
    for shard in new:
        with transaction(database, write=True) as conn:
            lock(conn, "datasets", dataset_id)
            if shard.path not in registered_shards(conn, dataset_id, [result.split]):
                result.duplicates += shard.rows - _add_shard(conn, dataset, dataset_id, shard)
        done += shard.rows
        progress(f"{result.split}: reading captions", done, total)


def _check_row_ids(dataset: Dataset, shards: list[Shard], known: dict[str, Shard]) -> None:
    """Raises DatasetError if shards have changed and their rows are identified by number, which shifts as soon as a row
    before them is added or removed.
    """
    is_by_row = any(shard.ids == "row" for shard in shards)
    for shard, old in zip(shards, known.values(), strict=False):
        if is_by_row and shard != old:
            raise DatasetError(
                f"{dataset.root / shard.path} has changed since it was registered, and its rows have no ids to match "
                "them by: register the data set in another queue with --db, or give it a column image_id."
            )


def _add_shard(conn: Connection, dataset: Dataset, dataset_id: int, shard: Shard) -> int:
    """Registers a new shard; returns how many of its rows have an image_id that is new."""
    shard_id = _save_shard(conn, dataset_id, shard)
    pages = _pages(datasets.samples(dataset.root, shard, dataset.columns))
    return sum(_add_images(conn, dataset_id, shard, shard_id, page) for page in pages)


def _save_shard(conn: Connection, dataset_id: int, shard: Shard) -> int:
    row = execute(
        conn,
        "INSERT INTO shards (dataset_id, path, split, n_rows, n_row_groups, size, digest) VALUES (?, ?, ?, ?, ?, ?, ?) "
        "ON CONFLICT (dataset_id, path) DO UPDATE SET n_rows = excluded.n_rows, n_row_groups = excluded.n_row_groups, "
        "size = excluded.size, digest = excluded.digest RETURNING id",
        (dataset_id, shard.path, shard.split, shard.rows, shard.row_groups, shard.size, shard.digest),
    )
    return int(row.scalar_one())


def _pages(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    rows = iter(samples)
    while page := list(islice(rows, PAGE)):
        yield page


def _add_images(conn: Connection, dataset_id: int, shard: Shard, shard_id: int, samples: Iterable[Sample]) -> int:
    rows = [(dataset_id, shard.split, s.image_id, *_place_and_texts(shard_id, s)) for s in samples]
    return execute(conn, _ADD_IMAGE, rows).rowcount if rows else 0


def _place_and_texts(shard_id: int, sample: Sample) -> tuple[int, int, int, str, str]:
    caption, cui = clean_text(sample.caption), clean_text(";".join(sample.cui))
    return shard_id, sample.row_group, sample.row_in_group, caption, cui


def _merge(
    conn: Connection, dataset: Dataset, dataset_id: int, shards: list[Shard], movable: set[str], result: Enqueued
) -> None:
    """Registers shards that have changed, or that replace shards that are gone.

    Rows that were in one of the `movable` shards get their new place and texts; rows of other shards keep theirs.
    """
    known: dict[str, tuple[Any, ...]] = {
        row[0]: tuple(row[1:])
        for row in execute(
            conn,
            "SELECT i.image_id, s.path, i.shard_id, i.row_group, i.row_in_group, i.caption, i.cui FROM images i "
            "JOIN shards s ON s.id = i.shard_id WHERE i.dataset_id = ? AND i.split = ?",
            (dataset_id, result.split),
        ).fetchall()
    }
    seen: set[str] = set()
    for shard in shards:
        shard_id = _save_shard(conn, dataset_id, shard)
        if shard.path in movable:
            result.altered_shards.append(shard.path)
        moved, added = [], []
        for sample in datasets.samples(dataset.root, shard, dataset.columns):
            path, *old = known.get(sample.image_id, (None,))
            new = _place_and_texts(shard_id, sample)
            if sample.image_id in seen or (path is not None and path not in movable):
                result.duplicates += 1
            elif path is None:
                added.append(sample)
            elif tuple(old) != new:
                moved.append((*new, dataset_id, shard.split, sample.image_id))
            seen.add(sample.image_id)
        _add_images(conn, dataset_id, shard, shard_id, added)
        _move_images(conn, moved)
        result.changed += len(moved)


def _move_images(conn: Connection, rows: list[tuple[Any, ...]]) -> None:
    if rows:
        execute(
            conn,
            "UPDATE images SET shard_id = ?, row_group = ?, row_in_group = ?, caption = ?, cui = ? "
            "WHERE dataset_id = ? AND split = ? AND image_id = ?",
            rows,
        )


# --- Jobs ------------------------------------------------------------------------------------------------------

# The unary plus keeps SQLite from using the index on image_id: the rows are needed in order of id.
_SPLIT_FROM = "FROM images WHERE id >= ? AND +dataset_id = ? AND split = ? ORDER BY id"


def _register_jobs(
    database: Database, run: runs.Run, split: str, limit: int | None, offset: int, result: Enqueued, progress: Progress
) -> None:
    with transaction(database) as conn:
        n_images = execute(
            conn, "SELECT count(*) FROM images WHERE dataset_id = ? AND split = ?", (run.dataset_id, split)
        ).scalar_one()
        first = execute(
            conn, f"SELECT id {_SPLIT_FROM} LIMIT 1 OFFSET ?", (0, run.dataset_id, split, offset)
        ).scalar_one_or_none()
        totals = [c.total for c in status.counts(conn) if (c.run, c.split) == (run.name, split)]
        has_parts = bool(parts_of(conn, run, split))
    if first is None:
        raise RunError(
            f"Split {split} has {n_images} rows"
            + (f", so --offset {offset} is past its end: choose a smaller one." if n_images else ": choose another.")
        )
    total = n_images - offset if limit is None else min(limit, n_images - offset)
    if totals == [n_images]:  # every image already has its job
        result.known = total
        return
    while (done := result.new + result.known) < total:
        with _writing_to(database, run) as conn:
            n_new = result.new
            first = _register_page(conn, run, split, first, min(PAGE, total - done), result)
            if has_parts and result.new > n_new:
                parts.forget(conn, run.id, split)
        progress(f"{split}: registering", result.new + result.known, total)


@contextmanager
def _writing_to(database: Database, run: runs.Run) -> Iterator[Connection]:
    """A write transaction in which the run cannot be deleted. Raises RunError if it was deleted before."""
    with transaction(database, write=True) as conn:
        lock(conn, "runs", run.id)
        runs.refuse_deleted(conn, run)
        yield conn


def _register_from(
    database: Database, old: runs.Run, run: runs.Run, split: str, flags: Set[str], progress: Progress
) -> Enqueued:
    result = Enqueued(split)
    with transaction(database) as conn:
        total = sum(c.total for c in status.counts(conn) if (c.run, c.split) == (old.name, split))
    n_read, last = 0, 0
    while True:
        with _writing_to(database, run) as conn:
            page = execute(conn, _FLAGGED if flags else _JOBS, (old.id, split, last, PAGE)).fetchall()
            if not page:
                return result
            chosen = [row[1] for row in page if not flags or flags & set(row[2].split(","))]
            n_new = result.new
            _add_jobs(conn, run, split, chosen, result)
            if result.new > n_new:
                parts.forget(conn, run.id, split)
        n_read, last = n_read + len(page), page[-1][0]
        progress(f"{split}: registering", n_read, total)


def _register_part(
    database: Database,
    run: runs.Run,
    split: str,
    part: Part,
    shards: Sequence[Shard],
    result: Enqueued,
    progress: Progress,
) -> None:
    with transaction(database) as conn:
        known = registered_shards(conn, run.dataset_id, [split])
        ids = execute(conn, "SELECT id, path FROM shards WHERE dataset_id = ?", (run.dataset_id,)).fetchall()
        count = "SELECT count(*) FROM images WHERE dataset_id = ? AND split = ?"
        total = execute(conn, count, (run.dataset_id, split)).scalar_one()
    paths = dict(map(tuple, ids))
    # Shards that are gone come last, in an order that is the same everywhere.
    gone = sorted(known.keys() - {shard.path for shard in shards})
    units = Units.of([*shards, *(known[path] for path in gone)])
    with _writing_to(database, run) as conn:
        if parts_of(conn, run, split) or not status.has_jobs(conn, run, split):
            parts.record(conn, run.id, split, [part])
    n_read, first = 0, 0
    while True:
        with _writing_to(database, run) as conn:
            sql = f"SELECT id, shard_id, row_group, row_in_group {_SPLIT_FROM} LIMIT ?"
            page = execute(conn, sql, (first, run.dataset_id, split, PAGE)).fetchall()
            if not page:
                return
            chosen = [id for id, shard_id, *place in page if units.at(paths[shard_id], *place) in part]
            _add_jobs(conn, run, split, chosen, result)
        n_read, first = n_read + len(page), page[-1][0] + 1
        progress(f"{split}: registering", n_read, total)


def _add_jobs(conn: Connection, run: runs.Run, split: str, image_ids: Sequence[int], result: Enqueued) -> None:
    rows = [(run.id, image_id, split) for image_id in image_ids]
    new = execute(conn, _ADD_JOB, rows).rowcount if rows else 0
    records.tally(conn, run.id, split, 0, {JobState.PENDING: new})
    result.new += new
    result.known += len(rows) - new


_JOBS = "SELECT id, image_id FROM jobs WHERE run_id = ? AND split = ? AND id > ? ORDER BY id LIMIT ?"
_FLAGGED = (
    "SELECT j.id, j.image_id, c.flags FROM jobs j JOIN captions c ON c.job_id = j.id "
    "WHERE j.run_id = ? AND j.split = ? AND j.id > ? AND c.flags <> '' ORDER BY j.id LIMIT ?"
)
_ADD_JOB = "INSERT INTO jobs (run_id, image_id, split) VALUES (?, ?, ?) ON CONFLICT (run_id, image_id) DO NOTHING"


def _register_page(conn: Connection, run: runs.Run, split: str, first: int, size: int, result: Enqueued) -> int:
    """Makes `size` images, starting with id `first`, pending jobs; returns the id to continue from."""
    page = (first, run.dataset_id, split, size)
    new = execute(
        conn,
        f"INSERT INTO jobs (run_id, image_id, split) SELECT ?, id, split {_SPLIT_FROM} LIMIT ? "
        "ON CONFLICT (run_id, image_id) DO NOTHING",
        (run.id, *page),
    ).rowcount
    last = execute(conn, f"SELECT max(id) FROM (SELECT id {_SPLIT_FROM} LIMIT ?) AS page", page).scalar_one()
    records.tally(conn, run.id, split, 0, {JobState.PENDING: new})
    result.new += new
    result.known += size - new
    return int(last) + 1
