"""A database is copied to another place whole, or not at all."""

import random
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from histories import contents, hash_pictures, judge, live, study
from killed import killed
from postgres import Server
from samples import fill
from sqlalchemy import Engine
from steps import claim, column, new_worker, reap, refusal, refused, said, select, writing

from rococap import db, queue
from rococap.tables import metadata
from rococap.transfer import copy

PICTURES = [f"train_{n:05}" for n in range(20)]


@pytest.fixture
def source(database: Engine, tmp_path: Path) -> Engine:
    """A database with rows in every table; the newest leases, workers and edits are gone."""
    run = fill(database, tmp_path / "set", 20)
    chance = random.Random(3)
    live(database, run, chance)
    judge(database, run, chance, PICTURES)
    hash_pictures(database, chance)
    study(database, run, "one", chance)
    with writing(database) as conn:
        db.execute(conn, "INSERT INTO parts VALUES (?, 'train', 1, 2)", (run.id,))
        lease = claim_and_release(conn, run)
        db.execute(conn, "DELETE FROM leases WHERE id = ?", (lease,))
    assert all(contents(database).values())
    return database


def claim_and_release(conn, run) -> int:
    worker = db.execute(conn, "SELECT min(id) FROM workers").scalar_one()
    lease = queue.claim(conn, worker, run.id, "train", 1, ttl_ms=1, now=9_000)
    queue.release(conn, lease, [job.id for job in lease.jobs], now=9_000)
    return lease.id


def url_of(database: Engine) -> str:
    return database.url.render_as_string(hide_password=False)


def rows(database: Engine) -> dict[str, list[tuple]]:
    return {
        table.name: sorted(select(database, f"SELECT * FROM {table.name}"), key=repr)
        for table in metadata.sorted_tables
    }


@pytest.fixture
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{shutil.copy(request.getfixturevalue('empty_queue'), tmp_path / 'copy.db')}"
    else:
        server: Server = request.getfixturevalue("postgres")
        url = server.create(template="empty_queue")
        yield url
        server.drop(url)


BOTH = pytest.mark.parametrize("target", ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True)


@BOTH
@pytest.mark.every_database
def test_a_copy_has_every_row_and_its_ids_go_on_where_those_of_the_original_do(source, target):
    copied = copy(url_of(source), target)
    assert {one.table: one.rows for one in copied} == {name: len(found) for name, found in rows(source).items()}
    there = db.connect(target)
    assert rows(there) == rows(source)
    ids = [(worker := new_worker(one), claim_and_release_in(one), worker) for one in (source, there)]
    assert ids[0][0] == ids[1][0]
    assert ids[0][1] == ids[1][1], "an id of a lease was used again"
    there.dispose()


def claim_and_release_in(database: Engine) -> int:
    with writing(database) as conn:
        return claim_and_release(conn, queue.get_run(conn, "default"))


def test_the_command_prints_what_was_copied_and_that_it_was_verified(source, tmp_path):
    told = said("copy-db", url_of(source), str(tmp_path / "copy.db"))
    assert told.startswith("datasets: 1 row, ")
    assert told.endswith("\nCopied and verified.\n")
    assert "images: 20 rows" in told


def test_a_database_that_workers_hold_pictures_of_is_not_copied(source, tmp_path):
    with db.transaction(source) as conn:
        run = queue.get_run(conn, "default")
    claim(source, new_worker(source), run, 1, now=None)
    shown = url_of(source)
    assert refused("copy-db", shown, str(tmp_path / "copy.db")) == (
        f"{shown} has open leases (1), so nothing was copied. Stop its workers first. If they were killed, wait until "
        f"their leases have expired. To see when: rococap --db {shown} leases"
    )
    with writing(source) as conn:
        db.execute(conn, "UPDATE leases SET expires_at = 1 WHERE state = 'open'")
    assert refused("copy-db", shown, str(tmp_path / "copy.db")) == (
        f"{shown} has open leases (1), so nothing was copied. Their workers have died: free the pictures first: "
        f"rococap --db {shown} reap"
    )
    assert not (tmp_path / "copy.db").exists()
    reap(source)
    said("copy-db", shown, str(tmp_path / "copy.db"))


@BOTH
def test_a_database_that_is_not_empty_is_not_copied_over(source, target):
    there = db.connect(target)
    with writing(there) as conn:
        db.execute(conn, "INSERT INTO datasets (name, revision) VALUES ('mine', '')")
    assert refusal(copy, url_of(source), target).endswith(f" merge {url_of(source)}")
    assert select(there, "SELECT name FROM datasets") == [("mine",)]
    assert column(there, "SELECT count(*) FROM images") == [0]
    there.dispose()


def test_a_database_is_not_copied_over_itself_nor_from_nowhere(source, tmp_path):
    assert refusal(copy, url_of(source), url_of(source)) == (
        f"{url_of(source)} cannot be copied to itself. Name a new database."
    )
    assert refused("copy-db", "nothing.db", str(tmp_path / "copy.db")) == (
        "There is no database nothing.db. Check its path."
    )
    assert not (tmp_path / "copy.db").exists()


@BOTH
@pytest.mark.parametrize("url", ["wal", pytest.param("postgresql", marks=pytest.mark.slow)], indirect=True)
def test_what_begins_while_a_database_is_copied_is_noticed_and_the_copy_stays_empty(source, target, url):
    """On SQLite in DELETE mode, nobody can write meanwhile."""
    begun = []

    def progress(step: str, done: int, total: int) -> None:
        if step == "copying leases" and not begun:
            begun.append(claim_and_release_in(source))

    assert "Workers claimed pictures in" in refusal(copy, url_of(source), target, progress)
    there = db.connect(target)
    assert not any(rows(there).values())
    copy(url_of(source), target)
    assert rows(there) == rows(source)
    there.dispose()


def test_a_row_that_is_not_what_was_read_is_noticed(source, tmp_path, empty_queue):
    path = shutil.copy(empty_queue, tmp_path / "copy.db")
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(
            "CREATE TRIGGER decay AFTER INSERT ON captions WHEN new.job_id = 3 "
            "BEGIN UPDATE captions SET text = text || ' ' WHERE job_id = 3; END"
        )
    assert column(source, "SELECT count(*) FROM captions WHERE job_id = 3") == [1]
    told = refusal(copy, url_of(source), f"sqlite:///{path}")
    assert told.startswith("The copy of captions has ")
    there = db.connect(f"sqlite:///{path}")
    assert not any(rows(there).values())
    there.dispose()


@BOTH
def test_a_copy_that_is_killed_leaves_nothing_and_is_made_again(source, target):
    assert killed(*((n, "copy", url_of(source), target) for n in (20, 50, 80, 110))) == [True] * 4
    there = db.connect(target)
    assert not any(rows(there).values())
    assert killed((10**6, "copy", url_of(source), target)) == [False]
    assert rows(there) == rows(source)
    there.dispose()
