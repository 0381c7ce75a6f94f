"""The queues that are compared, behind one interface: fill a queue at a place, open it there, and drain it.

A place is a folder, or the URL of a database on a server. Each queue is used through its own interface with its default
settings: rococap claims and completes 32 jobs at a time, the others have no batches. Results are stored by the queues
that can store them.
"""

import asyncio
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from rows import RUN_ID, SPLIT, TEXT, fill_many
from server import libpq
from sqlalchemy import Connection, Engine

from rococap import db, queue
from rococap.engines import Completion, EngineInfo

BATCH = 32
TTL_MS = 600_000

Drain = Callable[[list[int]], None]
"""Completes all jobs of the queue, and appends the number of each to the list when it is done."""


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    fill: Callable[[str, int], None]
    open: Callable[[str], AbstractContextManager[Drain]]


# --- Ours ------------------------------------------------------------------------------------------------------


def url_at(place: str) -> str:
    return place if "://" in place else f"sqlite:///{place}/queue.db"


def fill_ours(place: str, jobs: int) -> None:
    engine = db.connect(url_at(place))
    fill_many(engine, jobs, text=TEXT)
    engine.dispose()


@contextmanager
def open_ours(place: str) -> Iterator[Drain]:
    engine = db.connect(url_at(place))
    worker_id = register(engine)
    yield lambda done: drain_ours(engine, worker_id, done)
    engine.dispose()


def register(engine: Engine) -> int:
    """Registers a worker for this process; returns its id."""
    info = EngineInfo("none", {}, "none", "", "", "cpu", "")
    with db.transaction(engine, write=True) as conn:
        return queue.register_worker(conn, uuid.uuid4().hex, "here", os.getpid(), info)


def drain_ours(engine: Engine, worker_id: int, done: list[int]) -> None:
    while True:
        with db.transaction(engine, write=True) as conn:
            lease = queue.claim(conn, worker_id, RUN_ID, SPLIT, BATCH, ttl_ms=TTL_MS)
        if lease is None:
            return
        with db.transaction(engine, write=True) as conn:
            queue.complete(conn, lease, completions(lease), timing=queue.Timing(1.5, 2.5, 3.5, 4.5, 5.5))
        done += [job.id for job in lease.jobs]


def claim_batch(conn: Connection, worker_id: int, ttl_ms: int = TTL_MS) -> queue.Lease:
    """Claims a batch. Raises RuntimeError if the queue is empty, which would make the measurement worthless."""
    lease = queue.claim(conn, worker_id, RUN_ID, SPLIT, BATCH, ttl_ms=ttl_ms)
    if lease is None:
        raise RuntimeError("the queue is empty: this machine needs more rows than it was filled with")
    return lease


def completions(lease: queue.Lease) -> list[Completion]:
    return [Completion(job.id, TEXT, "", "stop", 300, 24, 123.4, 60.1, 2000.5, BATCH) for job in lease.jobs]


# --- huey ------------------------------------------------------------------------------------------------------


def fill_huey(place: str, jobs: int) -> None:
    from huey.storage import SqliteStorage

    storage = SqliteStorage(filename=f"{place}/huey.db", fsync=False)  # only while the queue is filled
    for number in range(jobs):
        storage.enqueue(str(number).encode())
    storage.close()


@contextmanager
def open_huey(place: str) -> Iterator[Drain]:
    from huey.storage import SqliteStorage

    storage = SqliteStorage(filename=f"{place}/huey.db")

    def drain(done: list[int]) -> None:
        while (data := storage.dequeue()) is not None:
            storage.put_data(data.decode(), TEXT.encode(), is_result=True)
            done.append(int(data))

    yield drain
    storage.close()


# --- persist-queue ---------------------------------------------------------------------------------------------


def fill_persist_queue(place: str, jobs: int) -> None:
    from persistqueue import SQLiteAckQueue

    waiting = SQLiteAckQueue(place)
    for number in range(jobs):
        waiting.put(number)
    waiting.close()


@contextmanager
def open_persist_queue(place: str) -> Iterator[Drain]:
    from persistqueue import Empty, SQLiteAckQueue

    # auto_resume would hand out jobs again that other processes are working on.
    waiting = SQLiteAckQueue(place, auto_resume=False)

    def drain(done: list[int]) -> None:
        while True:
            try:
                item = waiting.get(block=False, raw=True)
            except Empty:
                return
            waiting.ack(id=item["pqid"])
            done.append(item["data"])

    yield drain
    waiting.close()


# --- procrastinate ---------------------------------------------------------------------------------------------


def fill_procrastinate(place: str, jobs: int) -> None:
    from procrastinate import App, SyncPsycopgConnector

    app = App(connector=SyncPsycopgConnector(conninfo=libpq(place)))
    with app.open():
        app.schema_manager.apply_schema()
        app.configure_task("caption").batch_defer(*({"number": number} for number in range(jobs)))


@contextmanager
def open_procrastinate(place: str) -> Iterator[Drain]:
    from procrastinate import PsycopgConnector
    from procrastinate.jobs import Status
    from procrastinate.manager import JobManager

    connector = PsycopgConnector(conninfo=libpq(place), min_size=1)
    manager = JobManager(connector)

    async def drain(worker_id: int, done: list[int]) -> None:
        while (job := await manager.fetch_job(None, worker_id)) is not None:
            await manager.finish_job(job, Status.SUCCEEDED, delete_job=False)
            done.append(job.task_kwargs["number"])

    with asyncio.Runner() as runner:
        runner.run(connector.open_async())
        worker_id = runner.run(manager.register_worker())
        yield lambda done: runner.run(drain(worker_id, done))
        runner.run(connector.close_async())


OURS = Contender("rococap", fill_ours, open_ours)
OURS_ON_SERVER = Contender("rococap on PostgreSQL", fill_ours, open_ours)
HUEY = Contender("huey", fill_huey, open_huey)
PERSIST_QUEUE = Contender("persist-queue", fill_persist_queue, open_persist_queue)
PROCRASTINATE = Contender("procrastinate on PostgreSQL", fill_procrastinate, open_procrastinate)
