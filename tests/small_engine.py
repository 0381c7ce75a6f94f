"""A real engine without a model. Its caption is what it measures in the picture, so that tests notice swapped rows.

Run as a script, it forks worker processes for `nursery`. Each gets the settings of the engine and the worker, and the
troubles to inject.
"""

import importlib
import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from network import enter
from sqlalchemy import Engine, event

from rococap import db
from rococap.data import datasets
from rococap.engines import Completion, EngineInfo, Failure, Options, Prepared, Request, Source, gather
from rococap.errors import PictureError
from rococap.queue import Run
from rococap.recipe import Recipe
from rococap.worker.contact import Contact
from rococap.worker.context import Context
from rococap.worker.process import work
from rococap.worker.settings import Settings

QUICK = {
    "rococap.worker.fetcher.POLL_SEC": 0.1,
    "rococap.worker.store.REPLAY_EVERY_SEC": 0.1,
    "rococap.worker.store.STORE_EVERY_SEC": 0.1,
}
"""Shorter intervals, so that more happens in a second."""

INFO = EngineInfo("small", {"rococap": "0"}, "tests/small", "", "none", "cpu", "small")


def caption_of(number: int) -> str:
    """The engine's caption of `samples.picture(number)`."""
    return f"{28 + number % 7} by {28 + number % 5}, grey {number % 256}"


@dataclass
class SmallEngine:
    """Takes `steps` steps of `step_sec` seconds per batch.

    `breaks_on`, `unprepared` and `transient` hold grey levels: pictures on which the engine raises, which it cannot
    prepare, and which fail transiently. `kills_on` holds numbers of `samples.picture` whose batch kills the process.
    `adds` is appended to every caption.
    """

    batch_size: int = 4
    steps: int = 1
    step_sec: float = 0.0
    breaks_on: tuple[int, ...] = ()
    unprepared: tuple[int, ...] = ()
    transient: tuple[int, ...] = ()
    hangs: bool = False
    kills_on: tuple[int, ...] = ()
    adds: str = ""
    info = INFO

    def load(self) -> None:
        pass

    def close(self) -> None:
        pass

    def prepare(self, job_id: int, request: Request) -> Prepared:
        (picture,) = request.pictures
        grey = int(np.asarray(picture)[0, 0, 0])
        if grey in self.unprepared:
            raise PictureError("unprocessable", "The small engine cannot take this picture.")
        return Prepared(job_id, (picture.width, picture.height, grey), 10)

    def run(self, source: Source) -> Iterator[Completion]:
        killers = {caption_of(number) for number in self.kills_on}
        while batch := gather(source, self.batch_size):
            if any(picture.inputs[2] in self.breaks_on for picture in batch):
                raise RuntimeError("the small engine broke")
            lost = set()
            if self.hangs:
                print("the small engine hangs", file=sys.stderr, flush=True)
            for _ in range(self.steps):
                time.sleep(3600 if self.hangs else self.step_sec)
                lost = set(source.step(len(batch)))
                if all(picture.job_id in lost for picture in batch):
                    break
            if any(_measured(picture) in killers for picture in batch):
                os.kill(os.getpid(), signal.SIGKILL)
            for picture in batch:
                if picture.job_id not in lost:
                    yield self._completion(picture)

    def _completion(self, picture: Prepared) -> Completion:
        if picture.inputs[2] in self.transient:
            return Completion(picture.job_id, failure=Failure("busy", "Come back later.", transient=True))
        return Completion(picture.job_id, _measured(picture) + self.adds, processing_ms=1.0, new_tokens=3)


def context_of(database: Engine, run: Run, worker_id: int, engine: SmallEngine, *, lease_ttl: float = 60.0) -> Context:
    """The context of a registered worker on the train split."""
    settings = Settings(lease_ttl=lease_ttl)
    dataset = datasets.locate(run.dataset, ["train"])
    contact = Contact(lease_ttl)
    return Context(
        database, settings, run, ["train"], dataset, engine, "mine", threading.Event(), contact, worker_id=worker_id
    )


def _measured(picture: Prepared) -> str:
    width, height, grey = picture.inputs
    return f"{width} by {height}, grey {grey}"


# --- Faults in a worker process ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trouble:
    """A fault before or `after` the `nth` statement (BEGIN is 0) of a writing transaction of a thread.

    `do` is kill or stop (this process), error (raised as by the driver) or drop (the server ends the connection).
    `first` restricts it to transactions whose statement 1 begins so.
    """

    thread: str
    nth: int
    do: str
    first: str = ""
    after: bool = False


class Troubles:
    """Injects faults at statements as they are executed: each once, in order within a thread, with a line on stderr.

    `flaky` is a seed and a rate: that share of all statements of the worker's threads also raises an error.
    """

    def __init__(self, database: Engine, troubles: list[dict[str, Any]], flaky: tuple[int, float] | None) -> None:
        self._url = database.url
        self._begin = "BEGIN IMMEDIATE" if database.dialect.name == "sqlite" else "BEGIN;"  # of writing transactions
        self._left = [Trouble(**trouble) for trouble in troubles]
        self._chance = random.Random(flaky[0]) if flaky else None
        self._rate = flaky[1] if flaky else 0.0
        self._here = threading.local()
        event.listen(database, "do_execute", self._execute)
        event.listen(database, "do_executemany", self._executemany)
        event.listen(database, "do_execute_no_params", self._execute_no_params)

    def _execute_no_params(self, cursor: Any, statement: str, _: object) -> bool:
        return self._around(cursor, statement, lambda: cursor.execute(statement))

    def _execute(self, cursor: Any, statement: str, parameters: Any, _: object) -> bool:
        return self._around(cursor, statement, lambda: cursor.execute(statement, parameters))

    def _executemany(self, cursor: Any, statement: str, parameters: Any, _: object) -> bool:
        return self._around(cursor, statement, lambda: cursor.executemany(statement, parameters))

    def _around(self, cursor: Any, statement: str, run: Callable[[], object]) -> bool:
        """Executes a statement after which a fault is due. Returns whether it did, so that the driver does not."""
        trouble = self._due(statement)
        if trouble is None:
            return False
        if trouble.after:
            try:
                run()
            except Exception:  # a COMMIT that a reader blocked is retried: the fault belongs after that
                if self._chance is None:
                    self._left.insert(0, trouble)
                    self._here.nth = trouble.nth - 1
                raise
        when, told = "after" if trouble.after else "before", statement.partition(";")[0]
        print(f"trouble: {trouble.do} {when} {told}", file=sys.stderr, flush=True)
        if trouble.do == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif trouble.do == "stop":
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread, so that it stops at once
        else:
            self._fail(cursor, trouble)
        return trouble.after

    def _due(self, statement: str) -> Trouble | None:
        here, thread = self._here, threading.current_thread().name
        if statement.startswith("BEGIN"):
            here.nth = 0 if statement.startswith(self._begin) else None
        elif getattr(here, "nth", None) is not None:
            here.nth += 1
        nth = getattr(here, "nth", None)
        if nth == 1:
            here.first = statement
        if statement in ("COMMIT", "ROLLBACK"):
            here.nth = None
        next_one = next((trouble for trouble in self._left if trouble.thread == thread), None)
        if (
            next_one is not None
            and nth == next_one.nth
            and statement != "ROLLBACK"
            and (nth == 0 or here.first.startswith(next_one.first))
        ):
            self._left.remove(next_one)
            return next_one
        if self._chance and thread != "MainThread" and self._chance.random() < self._rate:
            return Trouble(thread, nth or 0, "error", after=self._chance.random() < 0.5)
        return None

    def _fail(self, cursor: Any, trouble: Trouble) -> None:
        if self._url.get_backend_name() == "sqlite":
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR
            raise error
        if trouble.do == "drop":
            _terminate(self._url.set(drivername="postgresql").render_as_string(False), cursor)
            if not trouble.after:
                return  # the statement itself will fail
        import psycopg

        raise psycopg.OperationalError("server closed the connection unexpectedly")


def _terminate(url: str, cursor: Any) -> None:
    import psycopg  # imported here, because workers on SQLite start faster without it

    pid = cursor.connection.info.backend_pid
    with psycopg.connect(url, autocommit=True) as another:
        another.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))


def _is_full_while(database: Engine, sign: Path) -> None:
    """Keeps an SQLite file from growing while the file `sign` exists: a full disk that needs no privileges."""

    def limit(cursor: sqlite3.Cursor, statement: str, parameters: Any, _: object) -> bool:
        cursor.execute(statement, parameters)
        if statement == "BEGIN IMMEDIATE":
            cursor.connection.execute(f"PRAGMA max_page_count = {1 if sign.exists() else 1 << 30}").fetchall()
        return True

    event.listen(database, "do_execute", limit)


def set_constants(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        module, _, constant = name.rpartition(".")
        assert hasattr(importlib.import_module(module), constant)
        setattr(importlib.import_module(module), constant, value)


# --- Worker processes ------------------------------------------------------------------------------------------


def work_on(url: str, options: dict[str, Any]) -> None:
    if "spool" in options:
        os.environ["ROCOCAP_SPOOL"] = options["spool"]
    set_constants(options.get("constants", QUICK))
    if "namespace" in options:
        enter(options["namespace"])
    database = db.connect(url)
    if "troubles" in options or "flaky" in options:
        Troubles(database, options.get("troubles", []), options.get("flaky"))
    if "full_while" in options:
        _is_full_while(database, Path(options["full_while"]))

    def load(recipe: Recipe, _: Options) -> SmallEngine:
        return SmallEngine(**options.get("engine", {}))

    outcome = work(database, Settings.of(**{"self_check": False} | options.get("settings", {})), load=load)
    told = ("done", "failed", "lost", "recovered", "spooled", "drained")
    print(json.dumps({name: getattr(outcome, name) for name in told}))


def nurse() -> None:
    """Forks workers, which start at once because everything is imported. Answers each line of stdin with a line.

    The request [url, options, path] starts a worker that writes to path.out and path.err; the reply is its pid. The
    request for a pid is answered with its exit code, or null while it runs.
    """
    codes: dict[int, int | None] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, list):
            answer: int | None = os.fork()
            if answer == 0:
                _be_worker(*asked)
            codes[answer] = None
        else:
            if codes.get(asked) is None:
                pid, status = os.waitpid(asked, os.WNOHANG)
                codes[asked] = os.waitstatus_to_exitcode(status) if pid else None
            answer = codes[asked]
        print(json.dumps(answer), flush=True)
    for pid in (pid for pid, code in codes.items() if code is None):
        os.kill(pid, signal.SIGKILL)  # workers left by a test that failed or did not wait for them


def _be_worker(url: str, options: dict[str, Any], path: str) -> NoReturn:
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(path + suffix, os.O_WRONLY | os.O_CREAT), descriptor)
    code = 1
    try:
        work_on(url, options)
        sys.stdout.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


if __name__ == "__main__":
    nurse()
