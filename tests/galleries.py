"""Queues to look at: runs with captions, flags, failures and scores, and what a gallery of them should show."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import samples
from small_engine import INFO
from sqlalchemy import Engine
from steps import until

from rococap import db, queue
from rococap.engines import Completion, Failure
from rococap.queue import Run
from rococap.recipe import Recipe
from rococap.web.index import Index

# The index does not depend on the journal mode of the queue's file.
both_databases = pytest.mark.parametrize(
    "url", ["delete", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True
)

N = 25
CT, XRAY, CHEST = "C0040405", "C1306645", "C0817096"
ORIGINALS = {n: f"Axial CT {n} of the {'left' if n % 2 else 'right'} lung" for n in range(N)}
CUIS = {n: [CT] if n % 3 else [XRAY, CHEST] for n in range(N)}
FLAGGED = {1, 7, 8, 20}
FAILED = {3: "corrupt", 11: "too_large", 12: "corrupt"}
SCORES = {n: round(n * 13 % 8 / 8, 3) for n in range(N) if n % 6 and n not in FAILED}
LATER = 4_000_000_000_000
"""A time after any that the clock of a test shows."""
SECOND = 14
"""How many pictures the second run has captioned."""


def text(run: str, n: int) -> str:
    return f"{'Effusion' if n % 4 else 'Émphysema'} and {'nodule' if run == 'one' else 'mass'}{' of' * (n * 7 % 5)} {n}"


def world(database: Engine, root: Path) -> list[Run]:
    """Two runs on two splits; the first has finished `train`, the second a part of it."""
    samples.write_shard(root, "train", range(N), captions=ORIGINALS, cuis=CUIS)
    samples.write_shard(root, "test", range(5))
    for name, prompt in (("one", "Describe."), ("two", "Say.")):
        samples.register(database, root, ["train", "test"], run=name, recipe=Recipe(model="m", prompt=prompt))
    with db.transaction(database) as conn:
        runs = queue.list_runs(conn)
    finish(database, runs[0], range(N), failed=FAILED)
    finish(database, runs[1], range(SECOND))
    score(database, runs[0], SCORES)
    return runs


def finish(
    database: Engine, run: Run, numbers: Iterable[int], *, failed: Mapping[int, str] | None = None, now: int = 1_000
) -> None:
    """Finishes the next pending jobs of `train`, whose pictures have these numbers, at times in another order."""
    numbers, failed = list(numbers), failed or {}
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, f"{run.name} {numbers} {now}", "host", 1, INFO)
        lease = queue.claim(conn, worker, run.id, "train", len(numbers), ttl_ms=60_000, now=now)
        jobs = {int(job.place.image_id[-5:]): job.id for job in lease.jobs}
        assert list(jobs) == numbers
        for n in numbers:
            if n in failed:
                queue.fail(conn, lease, {jobs[n]: Failure(failed[n], f"picture {n}")}, now=now)
                continue
            flags = "loop" if n in FLAGGED and run.name == "one" else ""
            queue.complete(conn, lease, [Completion(jobs[n], text(run.name, n), flags)], now=at(n, now))


def at(n: int, now: int = 1_000) -> int:
    """When a picture was finished."""
    return now + n * 11 % 17


def score(database: Engine, run: Run, scores: Mapping[int, float | None]) -> None:
    """Stores scores as `evaluate` does."""
    rows = [
        (json.dumps({"rouge_l": value, "bleu": [1, 2], "cider_d": None}), run.id, f"train_{n:05}")
        for n, value in scores.items()
    ]
    sql = (
        "INSERT INTO scores (job_id, metric, digest, value) SELECT j.id, 'overlap', 'x', ? FROM jobs j "
        "JOIN images i ON i.id = j.image_id WHERE j.run_id = ? AND i.image_id = ? "
        "ON CONFLICT (job_id, metric) DO UPDATE SET value = excluded.value"
    )
    with db.transaction(database, write=True) as conn:
        db.execute(conn, sql, rows)


def up_to_date(index: Index) -> Index:
    """The index after it has followed the queue to its end."""
    until(lambda: index.update(60).state == "ready", "the index is ready")
    return index
