"""Made-up rows of the shape of ROCOv2's, and databases filled with them by direct SQL."""

import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from rococap import db
from rococap.recipe import Recipe

SPLIT = "train"
TERMS = (
    "axial coronal sagittal computed tomography magnetic resonance contrast-enhanced T2-weighted chest radiograph "
    "ultrasound image of the abdomen pelvis showing a large small hypodense lesion in right left lobe liver kidney "
    "with arrow arrows mass effect pleural effusion and no evidence fracture (white arrow), consistent dilated bowel "
    "loops; postoperative follow-up at 6 months"
)


def caption(random: random.Random) -> str:
    """About 20 words with a long tail, every tenth beyond ASCII, as in ROCOv2."""
    n_words = min(348, max(3, round(random.lognormvariate(2.8, 0.6))))
    end = " – the patient’s “crescent sign”." if random.random() < 0.1 else "."
    return " ".join(random.choices(TERMS.split(), k=n_words)).capitalize() + end


def concepts(random: random.Random) -> list[str]:
    return [f"C{random.randrange(10**7):07d}" for _ in range(random.randint(1, 5))]


def image_id(number: int) -> str:
    return f"ROCOv2_2023_{SPLIT}_{number:06d}"


def connect(path: Path) -> sqlite3.Connection:
    """A plain connection with the pragmas that rococap sets; the journal's mode it finds is the file's."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


def fill(path: Path, rows: int, *, done: bool) -> None:
    """A new database whose run 1 has `rows` jobs of one split, pending or done, and worker 1."""
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
    connection.execute("INSERT INTO datasets VALUES (1, 'bench', '')")
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
        processing_ms = source.randint(160, 7_200) / 8  # eighths: seconds come out the same however they are rounded
        generated_at = 1_790_000_000_000 + 37 * n
        yield n + 1, caption(source), 300, source.randint(8, 90), processing_ms, 16 * processing_ms, generated_at
