"""How each hot statement finds its rows, in a queue large enough that a planner has a choice."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from databases import DATABASES, new_queue, sound
from samples import fill
from small_engine import INFO
from sqlalchemy import Connection, Engine

from rococap import db, queue
from rococap.queue import NORMAL, SOLO, SUSPECTS, leases, rates, recovery
from rococap.queue import status as status_module

N = 6_000


@pytest.fixture(scope="module", params=DATABASES)
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("large")
    with new_queue(request, request.param, folder) as url, sound(url) as database:
        fill_up(database, folder)
        yield database


def fill_up(database: Engine, folder: Path) -> None:
    """6,000 jobs more, one in ten of them pending and the others captioned, and as many closed leases."""
    fill(database, folder / "set", 10)
    with db.transaction(database, write=True) as conn:
        db.execute(
            conn,
            "INSERT INTO images (id, dataset_id, split, image_id, shard_id, row_group, row_in_group, caption, cui) "
            "VALUES (?, 1, 'train', ?, 1, 0, 0, '', '')",
            [(n, f"more_{n}") for n in range(100, 100 + N)],
        )
        states = [("done", n) if n % 10 else ("pending", None) for n in range(N)]
        db.execute(
            conn,
            "INSERT INTO jobs (id, run_id, image_id, split, status, finished_at, checkpoint) "
            "VALUES (?, 1, ?, 'train', ?, ?, ?)",
            [
                (100 + n, 100 + n, status, at, n // 25 if at and n < N - 100 else None)
                for n, (status, at) in enumerate(states)
            ],
        )
        worker = queue.register_worker(conn, "one", "host", 1, INFO)
        db.execute(
            conn,
            "INSERT INTO leases (worker_id, run_id, split, lane, state, n_jobs, claimed_at, beat_at, expires_at, "
            "closed_at) VALUES (?, 1, 'train', 0, 'closed', 1, 0, 0, ?, 0)",
            [(worker, n) for n in range(N)],
        )
        db.execute(
            conn,
            "INSERT INTO captions (job_id, lease_id, text, generated_at) "
            "SELECT id, (SELECT min(id) FROM leases), '', finished_at FROM jobs WHERE status = 'done'",
        )
        n_pending = sum(status == "pending" for status, _ in states)
        queue.tally(conn, 1, "train", 0, {"pending": n_pending, "done": N - n_pending})
    if database.dialect.name == "postgresql":
        with database.connect() as conn:
            conn.exec_driver_sql("ANALYZE")


def plan(conn: Connection, sql: str, params: Sequence = ()) -> str:
    is_sqlite = conn.dialect.name == "sqlite"
    explain = "EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN (COSTS OFF) "
    return "\n".join(str(row[3 if is_sqlite else 0]) for row in db.execute(conn, explain + sql, params).fetchall())


def filled(sql: str, *values: object) -> str:
    """The statement with values in place of its parameters."""
    for value in values:
        sql = sql.replace("?", str(value), 1)
    return sql


def assert_uses(steps: str, index: str) -> None:
    assert index in steps
    assert "TEMP B-TREE" not in steps
    assert "Sort" not in steps
    assert "Seq Scan on jobs" not in steps


@pytest.mark.parametrize("lane", [NORMAL, SUSPECTS, SOLO])
def test_the_claim_reads_its_partial_index_in_order(large, lane):
    with db.transaction(large, write=True) as conn:
        sql = leases._PENDING + db.for_update(conn, "j")
        fewest, most = leases.CRASHES[lane]
        steps = plan(conn, sql, (1, "train", fewest, 5_000, most, 32))
        assert_uses(steps, "ix_jobs_pending")
        if conn.dialect.name == "postgresql":
            assert "ROW(crashes, id) > ROW" in steps, "it begins at the start of the index"


@pytest.mark.parametrize(
    ("index", "sql"),
    [
        ("ix_leases_expires_at", recovery._EXPIRED.replace("?", "9")),
        ("ix_jobs_waiting", recovery._WAKE.format(skip_locked="").replace("?", "9")),
        ("ix_jobs_failed", status_module._FAILED.replace("?", "1", 1).replace("?", "'train'")),
        ("ix_jobs_due", filled(rates._NOT_IN_A_SEGMENT, 60_000, 1, "'train'", 5_000, 5_100)),
        ("ix_jobs_checkpoint", filled(rates._IN_SEGMENTS, 60_000, 1, "'train'", 200, 210)),
        ("ix_jobs_leased", "SELECT 1 FROM jobs WHERE lease_id = 9"),
        ("ix_jobs_pending", leases._ANY_SUSPECT.replace("?", "1", 1).replace("?", "'train'")),
        (
            "ix_jobs_due",
            "SELECT id FROM jobs WHERE run_id = 1 AND split = 'train' AND status = 'done' AND checkpoint IS NULL "
            "ORDER BY finished_at, id LIMIT 25",
        ),
        (
            "ix_jobs_checkpoint",
            "SELECT max(checkpoint) FROM jobs WHERE run_id = 1 AND split = 'train' AND checkpoint IS NOT NULL",
        ),
    ],
)
def test_each_hot_statement_uses_its_index(large, index, sql):
    with db.transaction(large) as conn:
        steps = plan(conn, sql)
    assert index in steps
    assert "Seq Scan on jobs" not in steps


@pytest.mark.parametrize("index", ["jobs", "leases"])
def test_complete_finds_its_rows_by_primary_key(large, index):
    sql = {
        "jobs": "UPDATE jobs SET status = 'done', lease_id = NULL WHERE id = 1 AND lease_id = 1 AND status = 'leased'",
        "leases": "UPDATE leases SET n_done = n_done + 1 WHERE id = 1 AND worker_id = 1 AND state = 'open'",
    }[index]
    with db.transaction(large) as conn:
        steps = plan(conn, sql)
    found = {"sqlite": (f"SEARCH {index} USING INTEGER PRIMARY KEY", "ix_jobs_leased"), "postgresql": ("Index Scan",)}
    assert any(way in steps for way in found[large.dialect.name])
