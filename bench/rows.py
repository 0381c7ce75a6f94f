"""Makes up rows that resemble ROCOv2's, and fills databases with them by direct SQL."""

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy import Engine

from rococap import db
from rococap.recipe import Recipe

SPLIT = "train"
RUN_ID = 1
RUN_NAME = "bench"
TEXT = "Axial computed tomography of the abdomen shows a hypodense lesion in the right lobe of the liver (arrow)."
TERMS = (
    "axial coronal sagittal computed tomography magnetic resonance contrast-enhanced T2-weighted chest radiograph "
    "ultrasound image of the abdomen pelvis showing a large small hypodense lesion in right left lobe liver kidney "
    "with arrow arrows mass effect pleural effusion and no evidence fracture (white arrow), consistent dilated bowel "
    "loops; postoperative follow-up at 6 months"
)


def caption(random: random.Random) -> str:
    """A caption of about 20 words, with a long tail of longer ones; as in ROCOv2, one in ten is not pure ASCII."""
    n_words = min(348, max(3, round(random.lognormvariate(2.8, 0.6))))
    end = " – the patient’s “crescent sign”." if random.random() < 0.1 else "."
    return " ".join(random.choices(TERMS.split(), k=n_words)).capitalize() + end


def concepts(random: random.Random) -> list[str]:
    return [f"C{random.randrange(10**7):07d}" for _ in range(random.randint(1, 5))]


def image_id(number: int) -> str:
    return f"ROCOv2_2023_{SPLIT}_{number:06d}"


def connect(path: Path) -> sqlite3.Connection:
    """A plain connection with the pragmas that rococap sets. The journal mode is stored in the file."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def fill(path: Path, rows: int, *, done: bool) -> None:
    """Makes a new SQLite database with one worker and one run of `rows` jobs in one split, all pending or all done."""
    db.connect(f"sqlite:///{path}").dispose()
    connection = connect(path)
    connection.execute("BEGIN")
    _add_parents(connection, rows)
    connection.executemany("INSERT INTO images VALUES (?, 1, ?, ?, 1, ?, ?, ?, ?)", _images(rows))
    status, finished_at = ("done", 1_790_000_000_000) if done else ("pending", None)
    connection.execute(
        "INSERT INTO jobs (run_id, image_id, split, status, finished_at) SELECT 1, id, split, ?, ? + id FROM images",
        (status, finished_at),
    )
    if done:
        connection.executemany("INSERT INTO captions VALUES (?, NULL, ?, '', 'stop', ?, ?, ?, ?, 32, ?)", _texts(rows))
    connection.execute("INSERT INTO tallies VALUES (1, ?, ?, 0, ?)", (SPLIT, status, rows))
    connection.execute("COMMIT")
    connection.close()


def _add_parents(connection: sqlite3.Connection, rows: int) -> None:
    recipe = Recipe()
    connection.execute("INSERT INTO datasets VALUES (1, 'bench', '', NULL)")
    connection.execute(
        "INSERT INTO shards VALUES (1, 1, 'train-00000-of-00001.parquet', ?, ?, ?, 1, '')", (SPLIT, rows, rows // 100)
    )
    connection.execute(
        "INSERT INTO runs (id, name, dataset_id, recipe, recipe_hash, created_at) VALUES (1, 'bench', 1, ?, ?, 0)",
        (recipe.to_json(), recipe.hash),
    )
    connection.execute(
        "INSERT INTO workers (id, uuid, host, pid, device, engine, versions, started_at, seen_at) "
        "VALUES (1, 'bench', 'here', 1, 'cpu', 'none', '{}', 0, 0)"
    )


def _images(rows: int) -> Iterator[tuple[object, ...]]:
    source = random.Random(1)
    for n in range(rows):
        yield n + 1, SPLIT, image_id(n), *divmod(n, 100), caption(source), ";".join(concepts(source))


def _texts(rows: int) -> Iterator[tuple[object, ...]]:
    source = random.Random(2)
    for n in range(rows):
        processing_ms = source.randint(160, 7_200) / 8  # eighths: SQLite and numpy round them to the same seconds
        generated_at = 1_790_000_000_000 + 37 * n
        yield n + 1, caption(source), 300, source.randint(8, 90), processing_ms, 16 * processing_ms, generated_at


# --- Many rows of little content -------------------------------------------------------------------------------

LEASE_ROWS = 32


def fill_many(engine: Engine, pending: int, *, done: int = 0, text: str = "", per_sec: int = 400) -> None:
    """Fills a new SQLite or PostgreSQL database with a run of `pending` pending and `done` done jobs, entirely in SQL.

    Every caption is `text`. The done jobs were captioned at `per_sec` a second until now, LEASE_ROWS a lease: at 400,
    3,750 leases are in the time window over which `status` computes the rate.
    """
    rows = done + pending
    with db.transaction(engine, write=True) as conn:
        if engine.dialect.name == "postgresql":
            db.execute(conn, "SET LOCAL session_replication_role = replica")  # checks no foreign keys
        # In SQL, the time at which the job i was finished.
        finished_at = f"{db.now(conn) - 1_000} - ({done} - i) * 1000 / {per_sec}"
        for statement in (*_parents_of(rows), *_leases_of(done, finished_at), *_rows_of(rows, done, text, finished_at)):
            db.execute(conn, statement)
    if engine.dialect.name == "postgresql":
        with engine.connect() as conn:
            db.execute(conn, "VACUUM ANALYZE")  # which autovacuum would do within a minute


def _parents_of(rows: int) -> Iterator[str]:
    recipe = Recipe()
    yield "INSERT INTO datasets (id, name, revision) VALUES (1, 'bench', '')"
    yield (
        "INSERT INTO shards (id, dataset_id, path, split, n_rows, n_row_groups, size, digest) "
        f"VALUES (1, 1, 'train-00000-of-00001.parquet', '{SPLIT}', {rows}, {rows // 100}, 1, '')"
    )
    yield (
        "INSERT INTO runs (id, name, dataset_id, recipe, recipe_hash, created_at) "
        f"VALUES ({RUN_ID}, '{RUN_NAME}', 1, {_quoted(recipe.to_json())}, '{recipe.hash}', 0)"
    )


def _leases_of(done: int, finished_at: str) -> Iterator[str]:
    yield (
        "INSERT INTO workers (uuid, host, pid, device, engine, versions, started_at, seen_at) "
        "VALUES ('before', 'here', 1, 'cpu', 'none', '{}', 0, 0)"
    )
    # A lease is closed with the last of its jobs.
    lasts = f"(SELECT i * {LEASE_ROWS} AS i FROM {_numbers(-(-done // LEASE_ROWS))}) AS lasts"
    yield (
        "INSERT INTO leases (worker_id, run_id, split, lane, state, n_jobs, n_done, claimed_at, beat_at, expires_at, "
        f"closed_at) SELECT (SELECT id FROM workers), {RUN_ID}, '{SPLIT}', 0, 'closed', {LEASE_ROWS}, {LEASE_ROWS}, "
        f"{finished_at} - 5000, {finished_at}, {finished_at} + 60000, {finished_at} FROM {lasts} ORDER BY i"
    )


def _rows_of(rows: int, done: int, text: str, finished_at: str) -> Iterator[str]:
    caption = _quoted(text)
    yield (
        "INSERT INTO images (id, dataset_id, split, image_id, shard_id, row_group, row_in_group, caption, cui) "
        f"SELECT i, 1, '{SPLIT}', 'image_' || (100000000 + i), 1, i / 100, i - i / 100 * 100, {caption}, '' "
        f"FROM {_numbers(rows)}"
    )
    yield (
        "INSERT INTO jobs (id, run_id, image_id, split, status, attempts, finished_at) "
        f"SELECT i, {RUN_ID}, i, '{SPLIT}', 'done', 1, {finished_at} FROM {_numbers(done)}"
    )
    yield (
        "INSERT INTO jobs (id, run_id, image_id, split, status) "
        f"SELECT i, {RUN_ID}, i, '{SPLIT}', 'pending' FROM {_numbers(rows, after=done)}"
    )
    yield (
        "INSERT INTO captions (job_id, lease_id, text, finish_reason, processing_ms, generated_at) "
        f"SELECT i, (i - 1) / {LEASE_ROWS} + 1, {caption}, 'stop', 60.5, {finished_at} FROM {_numbers(done)}"
    )
    for status, n in (("done", done), ("pending", rows - done)):
        yield f"INSERT INTO tallies (run_id, split, status, slot, n) VALUES ({RUN_ID}, '{SPLIT}', '{status}', 0, {n})"


def _numbers(last: int, *, after: int = 0) -> str:
    """SQL for a table `n` with a column `i` of the integers after < i <= last, valid in both dialects."""
    return (
        f"(WITH RECURSIVE n(i) AS (SELECT CAST({after + 1} AS bigint) WHERE {after} < {last} "
        f"UNION ALL SELECT i + 1 FROM n WHERE i < {last}) SELECT i FROM n) AS n"
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
