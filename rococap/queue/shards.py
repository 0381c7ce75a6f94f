"""The files of a data set as they were registered, and the folder in which they are on this machine."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap.data import Dataset, Shard, datasets, parse_name
from rococap.db import execute, transaction
from rococap.errors import DatasetError
from rococap.queue.runs import Run

ROOT = "ROCOCAP_DATASET_ROOT"
"""The environment variable that names the folder of the data set on this machine."""


def registered_shards(conn: Connection, dataset_id: int, splits: Sequence[str] = ()) -> dict[str, Shard]:
    """The registered shards of some splits, or of all, by their paths, in the order of their registration."""
    rows = execute(
        conn,
        "SELECT path, split, n_rows, n_row_groups, size, digest FROM shards WHERE dataset_id = ? ORDER BY id",
        (dataset_id,),
    ).fetchall()
    return {row[0]: Shard(*row) for row in rows if not splits or row[1] in splits}


def root_here() -> Path | None:
    """The folder that ROCOCAP_DATASET_ROOT names, if it is set."""
    root = os.environ.get(ROOT)
    return Path(root).expanduser() if root else None


def dataset_of(database: Database, run: Run, splits: Sequence[str], root: str | None = None) -> Dataset:
    """The data set of a run on this machine: the copy in the folder `root`, or in that of ROCOCAP_DATASET_ROOT, or else
    the folder or the commit on the hub that it was registered from, which is downloaded unless cached.

    Raises DatasetError if it is not available, or if the copy lacks shards of the splits or has others.
    """
    folder = Path(root).expanduser() if root else root_here()
    source, config = parse_name(run.dataset)
    if folder is None:
        if os.path.isabs(source) and not os.path.isdir(source):
            raise DatasetError(
                f"There is no folder {source}, from which run {run.name!r} was registered. If a copy is elsewhere on "
                f"this machine, name its folder with --dataset-root or {ROOT}."
            )
        return datasets.locate(run.dataset, splits, run.dataset_revision or None)
    dataset = Dataset(run.dataset, folder.resolve(), run.dataset_revision, config, run.columns)
    with transaction(database) as conn:
        registered = registered_shards(conn, run.dataset_id, splits)
    here = {shard.path: shard for split in splits for shard in datasets.find_shards(folder, split, config, run.columns)}
    refuse_other(folder, run, registered, here)
    return dataset


def refuse_other(folder: Path, run: Run, registered: Mapping[str, Shard], here: Mapping[str, Shard]) -> None:
    """Raises DatasetError if the shards in the folder, `here`, are not those that were registered."""
    if differing := [path for path, shard in registered.items() if here.get(path) != shard]:
        what = "has another" if differing[0] in here else "lacks"
        raise DatasetError(
            f"{folder} is no copy of the data set of run {run.name!r}, {run.dataset}: it {what} {differing[0]}. Name "
            f"the folder of a copy with --dataset-root or {ROOT}, or neither to use {run.dataset} itself."
        )
