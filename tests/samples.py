"""Small real data sets for tests, in the hub's Parquet layout, and runs of them."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from small_engine import INFO
from sqlalchemy import Engine

from rococap import db, queue
from rococap.data import datasets
from rococap.engines import Completion
from rococap.queue import Run
from rococap.queue.enqueue import Enqueued, enqueue
from rococap.recipe import Recipe

SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("image_id", pa.string()),
        ("caption", pa.string()),
        ("cui", pa.list_(pa.string())),
    ]
)


def picture(number: int) -> bytes:
    """A PNG whose size and grey level identify its number."""
    file = BytesIO()
    Image.new("L", (28 + number % 7, 28 + number % 5), number % 256).save(file, "PNG")
    return file.getvalue()


def write_shard(
    root: Path,
    split: str,
    numbers: Sequence[int],
    name: str = "00000-of-00001",
    pictures: dict[int, bytes] | None = None,
    captions: dict[int, str] | None = None,
    cuis: dict[int, list[str]] | None = None,
) -> Path:
    """Writes a shard with a row `{split}_00007` per number, in row groups of ten.

    `pictures`, `captions` and `cuis` replace the content of rows by number.
    """
    (root / "data").mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "image": {"bytes": (pictures or {}).get(n, picture(n)), "path": None},
            "image_id": f"{split}_{n:05}",
            "caption": (captions or {}).get(n, f"Original caption {n}."),
            "cui": (cuis or {}).get(n, ["C0040405"]),
        }
        for n in numbers
    ]
    path = root / "data" / f"{split}-{name}.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=10)
    return path


def fill(
    engine: Engine, root: Path, n: int, *, split: str = "train", run: str = "default", recipe: Recipe | None = None
) -> Run:
    """Registers a run with `n` pending jobs of one split."""
    write_shard(root, split, range(n))
    register(engine, root, [split], run=run, recipe=recipe)
    with db.transaction(engine) as conn:
        return queue.get_run(conn, run)


def register(
    engine: Engine,
    root: Path,
    splits: Sequence[str],
    *,
    run: str = "default",
    recipe: Recipe | None = None,
    **window: Any,
) -> list[Enqueued]:
    located = datasets.locate(str(root), splits)
    return enqueue(engine, located, splits, run=run, recipe=recipe or Recipe(model="tests/small"), **window)


def caption(
    database: Engine, run: Run, completions: list[dict], *, skip: int = 0, split: str = "train", now: int = 1_000
) -> None:
    """Captions the next pending jobs, after skipping `skip` of them; `completions` are fields of Completion."""
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, f"{run.name} {split} {now} {skip}", "host", 1, INFO)
        lease = queue.claim(conn, worker, run.id, split, skip + len(completions), ttl_ms=60_000, now=now)
        queue.release(conn, lease, [job.id for job in lease.jobs[:skip]], now=now)
        done = [Completion(job.id, **given) for job, given in zip(lease.jobs[skip:], completions, strict=True)]
        queue.complete(conn, lease, done, now=now)


def texts(*given: str) -> list[dict]:
    return [{"text": text} for text in given]
