"""Measures enqueueing a split in the hub's layout: reading against pandas, the database against plain sqlite3, and a
second enqueue against the first.
"""

import argparse
import os
import random
import sqlite3
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

sys.path.append(sys.path.pop(0))  # moved to the end: queue.py here would shadow the standard library's

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from report import Clock, Line, Took, alternate, compare, show, timed
from rows import SPLIT, caption, concepts, connect, image_id
from sqlalchemy import Engine

from rococap import db
from rococap.data import Dataset, Sample, Shard, datasets
from rococap.queue import enqueue
from rococap.recipe import Recipe

ROWS_PER_GROUP = 100
PICTURE_BYTES = 100_000
"""Half the mean size of ROCOv2's pictures on the hub. pandas also reads the pictures, so its time grows with their
bytes, whereas that of rococap grows with the rows.
"""

SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("image_id", pa.string()),
        ("caption", pa.string()),
        ("cui", pa.list_(pa.string())),
    ]
)

CLOCKS: tuple[Clock, ...] = ("wall", "cpu")

ReadSplit = list[tuple[Shard, list[Sample]]]


def _picture() -> bytes:
    file = BytesIO()
    Image.new("L", (64, 64), 128).save(file, "PNG")
    return file.getvalue()


PICTURE = _picture()

# --- The data set ----------------------------------------------------------------------------------------------


def write_split(root: Path, rows: int, shards: int, picture_bytes: int) -> None:
    (root / "data").mkdir()
    source = random.Random(0)
    bounds = [rows * n // shards for n in range(shards + 1)]
    for n in range(shards):
        path = root / "data" / f"{SPLIT}-{n:05d}-of-{shards:05d}.parquet"
        _write_shard(path, range(bounds[n], bounds[n + 1]), picture_bytes, source)


def _write_shard(path: Path, numbers: range, picture_bytes: int, source: random.Random) -> None:
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for start in range(numbers.start, numbers.stop, ROWS_PER_GROUP):
            group = range(start, min(start + ROWS_PER_GROUP, numbers.stop))
            rows = [_row(number, picture_bytes, source) for number in group]
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA), row_group_size=ROWS_PER_GROUP)


def _row(number: int, picture_bytes: int, source: random.Random) -> dict[str, object]:
    # Enqueue opens a few pictures, so each is a valid one, followed by noise that no decoder reads.
    picture = {"bytes": PICTURE + os.urandom(picture_bytes - len(PICTURE)), "path": None}
    return {"image": picture, "image_id": image_id(number), "caption": caption(source), "cui": concepts(source)}


# --- Reading ---------------------------------------------------------------------------------------------------


def read_with_pandas(root: Path) -> None:
    for path in sorted((root / "data").iterdir()):
        pd.read_parquet(path)


def read_ours(root: Path) -> None:
    for shard in datasets.find_shards(root, SPLIT):
        deque(datasets.samples(root, shard), maxlen=0)


# --- The database ----------------------------------------------------------------------------------------------


def on_new_database(work: Callable[[Engine, Path], Took], path: Path, rows: int) -> Took:
    engine = db.connect(f"sqlite:///{path}")
    took = work(engine, path)
    engine.dispose()
    _require_all_pending(path, rows)
    path.unlink()
    return took


def _require_all_pending(path: Path, rows: int) -> None:
    connection = connect(path)
    found = connection.execute(
        "SELECT count(*) FROM jobs j JOIN images i ON i.id = j.image_id WHERE j.status = 'pending'"
    ).fetchone()[0]
    connection.close()
    if found != rows:
        raise SystemExit(f"{path} has {found} pending jobs for {rows} rows")


def enqueue_all(engine: Engine, root: Path) -> None:
    enqueue.enqueue(engine, Dataset("bench", root, ""), [SPLIT], run="bench", recipe=Recipe())


def time_ours(read: ReadSplit, root: Path, engine: Engine, _path: Path) -> Took:
    """Times enqueueing without reading: the samples are already in memory."""
    rows = {shard.path: samples for shard, samples in read}
    in_memory = SimpleNamespace(
        find_shards=lambda root, split, config, columns: [shard for shard, _ in read],
        samples=lambda root, shard, columns: iter(rows[shard.path]),
        image_ids=lambda root, shard, columns: (sample.image_id for sample in rows[shard.path]),
    )
    with patch.object(enqueue, "datasets", in_memory):
        return timed(lambda: enqueue_all(engine, root))


def time_raw(read: ReadSplit, _engine: Engine, path: Path) -> Took:
    """Times the least work that sqlite3 can do: it inserts rows prepared beforehand, in a single transaction."""
    images = list(_image_rows(read))
    jobs = [(1, number, SPLIT) for number in range(1, len(images) + 1)]
    connection = connect(path)
    took = timed(lambda: _insert(connection, read, images, jobs))
    connection.close()
    return took


def _image_rows(read: ReadSplit) -> Iterator[tuple[object, ...]]:
    for shard_id, (_, samples) in enumerate(read, start=1):
        for s in samples:
            yield 1, SPLIT, s.image_id, shard_id, s.row_group, s.row_in_group, s.caption, ";".join(s.cui)


def _insert(
    connection: sqlite3.Connection, read: ReadSplit, images: list[tuple[object, ...]], jobs: list[tuple[int, int, str]]
) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO datasets VALUES (1, 'bench', '', NULL)")
    connection.execute(
        "INSERT INTO runs (id, name, dataset_id, recipe, recipe_hash, created_at) VALUES (1, 'bench', 1, '', '', 0)"
    )
    connection.executemany(
        "INSERT INTO shards (dataset_id, path, split, n_rows, n_row_groups, size, digest) VALUES (1, ?, ?, ?, ?, ?, ?)",
        [(s.path, s.split, s.rows, s.row_groups, s.size, s.digest) for s, _ in read],
    )
    connection.executemany(
        "INSERT INTO images (dataset_id, split, image_id, shard_id, row_group, row_in_group, caption, cui) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        images,
    )
    connection.executemany("INSERT INTO jobs (run_id, image_id, split) VALUES (?, ?, ?)", jobs)
    connection.execute("COMMIT")


def time_twice(root: Path, path: Path, rows: int) -> tuple[Took, Took]:
    """The times of the first enqueue of a split, reading included, and of the second."""
    engine = db.connect(f"sqlite:///{path}")
    first, second = (timed(lambda: enqueue_all(engine, root)) for _ in range(2))
    engine.dispose()
    _require_all_pending(path, rows)
    path.unlink()
    return first, second


# --- The table -------------------------------------------------------------------------------------------------


def compare_reading(root: Path, what: str, n_rounds: int) -> list[Line]:
    rounds = alternate(n_rounds, lambda: timed(lambda: read_with_pandas(root)), lambda: timed(lambda: read_ours(root)))
    return [compare(what, rounds, clock, ">= 25", times_faster=True) for clock in CLOCKS]


def compare_database(root: Path, read: ReadSplit, rows: int, n_rounds: int) -> list[Line]:
    path = root / "bench.db"
    writing = alternate(
        n_rounds,
        lambda: on_new_database(partial(time_raw, read), path, rows),
        lambda: on_new_database(partial(time_ours, read, root), path, rows),
    )
    again = [time_twice(root, path, rows) for _ in range(n_rounds)]
    return [
        *(compare("database, speed ours / raw", writing, clock, ">= 0.4", times_faster=True) for clock in CLOCKS),
        *(compare("enqueue, second / first", again, clock, "<= 0.2") for clock in CLOCKS),
    ]


def measure(root: Path, rows: int, n_rounds: int) -> tuple[list[Line], str]:
    read = [(shard, list(datasets.samples(root, shard))) for shard in datasets.find_shards(root, SPLIT)]
    size = sum(shard.size for shard, _ in read)
    what = f"read, pandas / ours, {size / rows / 1000:.0f} kB a row"
    lines = compare_reading(root, what, n_rounds) + compare_database(root, read, rows, n_rounds)
    return lines, f"{rows} rows in {len(read)} shards, {size / 1e9:.2f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--shards", type=int, default=27)
    parser.add_argument("--picture-bytes", type=int, default=PICTURE_BYTES)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_split(Path(folder), options.rows, options.shards, options.picture_bytes)
        lines, sizes = measure(Path(folder), options.rows, options.rounds)
    show(lines, f"{sizes}; {options.rounds} rounds")


if __name__ == "__main__":
    main()
