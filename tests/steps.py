"""Steps that many tests take: into a queue and out of it, with worker processes, and on the command line."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from alembic import command
from alembic.config import Config
from click.testing import CliRunner, Result
from nursery import Worker
from places import TESTS
from small_engine import INFO, QUICK, SmallEngine, caption_of
from sqlalchemy import Connection, Engine

from rococap import db, queue
from rococap.cli.options import cli
from rococap.errors import DatabaseError, DatabaseUnavailable
from rococap.queue import Claim, Run
from rococap.worker.process import work
from rococap.worker.settings import Settings
from rococap.worker.store import Outcome

TTL = 60_000

# --- the queue -------------------------------------------------------------------------------------------------


def writing(database: Engine) -> AbstractContextManager[Connection]:
    return db.transaction(database, write=True)


def select(database: Engine, sql: str) -> list[tuple]:
    with db.transaction(database) as conn:
        return [tuple(row) for row in db.execute(conn, sql).fetchall()]


def column(database: Engine, sql: str) -> list:
    return [value for (value,) in select(database, sql)]


def statuses(database: Engine) -> dict[str, int]:
    return dict(select(database, "SELECT status, count(*) FROM jobs GROUP BY status"))


def captions(database: Engine) -> dict[str, str]:
    rows = select(
        database,
        "SELECT i.image_id, c.text FROM captions c JOIN jobs j ON j.id = c.job_id JOIN images i ON i.id = j.image_id",
    )
    assert len(rows) == len(dict(rows))
    return dict(rows)


def expected(n: int, *without: int) -> dict[str, str]:
    """What the small engine says of the first pictures of `samples`."""
    return {f"train_{number:05}": caption_of(number) for number in range(n) if number not in without}


def wait_too_long_for_a_row(engine: Engine) -> None:
    """A writer that waits for a row is refused when its patience ends, and what the other wrote stands."""
    with db.transaction(engine, write=True) as conn:
        db.execute(conn, "INSERT INTO datasets (name, revision) VALUES ('set', '')")
    with db.transaction(engine, write=True) as conn:
        db.execute(conn, "UPDATE datasets SET revision = 'mine'")
        with (
            pytest.raises(DatabaseUnavailable, match="lock timeout"),
            db.transaction(engine, write=True, patience=0.2) as other,
        ):
            db.execute(other, "UPDATE datasets SET revision = 'theirs'")
    assert select(engine, "SELECT revision FROM datasets") == [("mine",)]


def new_worker(database: Engine, name: str = "one") -> int:
    with writing(database) as conn:
        return queue.register_worker(conn, name, "host", 1, INFO, now=0)


def claim(
    database: Engine, worker: int, run: Run, most: int = 4, *, lane: int = queue.NORMAL, now: int | None = 0
) -> Claim | None:
    with writing(database) as conn:
        return queue.claim(conn, worker, run.id, "train", most, ttl_ms=TTL, lane=lane, now=now)


def reap(database: Engine, now: int = TTL) -> list[int]:
    with writing(database) as conn:
        return queue.reap(conn, now=now)


def refusal(call: Callable[..., object], *args: Any, **options: Any) -> str:
    """What the DatabaseError says that it raises."""
    with pytest.raises(DatabaseError) as caught:
        call(*args, **options)
    return str(caught.value)


def downgrade(database: Engine, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(db.migrations_dir()).replace("%", "%%"))
    with db.migration_connection(database) as conn:
        config.attributes["connection"] = conn
        command.downgrade(config, revision)


# --- workers, processes and threads ----------------------------------------------------------------------------


def until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)


def at_once(n: int, action: Callable[[], object]) -> list:
    """What `action` returns in so many threads that begin together."""
    together = threading.Barrier(n, timeout=60)

    def one(_: int) -> object:
        together.wait()
        return action()

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(one, range(n)))


def run_worker(database: Engine, engine: SmallEngine | None = None, **settings: Any) -> Outcome:
    """In this process, without a self-check."""
    chosen = engine or SmallEngine()
    options = {"batch_size": chosen.batch_size, "lease_ttl": 60.0, "self_check": False} | settings
    return work(database, Settings.of(**options), load=lambda *_: chosen)


def start(url: str, *, engine: dict | None = None, constants: dict[str, float] = QUICK, **settings: Any) -> Worker:
    """A worker process with the small engine."""
    return Worker(url, {"engine": engine or {}, "constants": constants, "settings": settings})


@contextmanager
def running(*command: str, cwd: Path | None = None, **environment: str) -> Iterator[subprocess.Popen]:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment, cwd=cwd
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def small_crew(
    url: str, *, n: int = 2, engine: dict | None = None, **settings: Any
) -> AbstractContextManager[subprocess.Popen]:
    """Worker processes with the small engine under one parent."""
    parts = (url, ["cpu"] * n, engine or {}, settings)
    return running(sys.executable, str(TESTS / "small_crew.py"), "crew", *map(json.dumps, parts))


def members(parent: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(parent.pid).children()


# --- the command line ------------------------------------------------------------------------------------------


def invoke(*args: str, **options: Any) -> Result:
    return CliRunner().invoke(cli, args, **options)


def said(*args: str) -> str:
    """What a command prints that does its job."""
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*args: str, code: int = 1) -> str:
    """The error of a command that prints nothing else, without the usage that click puts before it."""
    result = invoke(*args)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    return result.stderr.strip().rpartition("\n\nError: ")[2].removeprefix("Error: ")
