"""One worker process's life: model, heartbeats, storing, draining. Claim -> load -> caption -> complete.

Threads: the main one runs the engine; the pipeline's fetcher works ahead of it; one stores what it finishes; one
beats for the open leases as long as the engine steps; one waits for a signal and drains. The engine never
waits for SQL.
"""

import logging
import os
import queue as fifo
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from sqlalchemy import Connection
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DatabaseError as DriverError

from rococap import datasets, queue
from rococap.datasets import Dataset
from rococap.db import transaction
from rococap.engines import Completion, Engine, Options, load_engine
from rococap.errors import LeaseLost, RococapError, RunError
from rococap.pipeline import Claims, Pipeline
from rococap.queue import Lease, Run
from rococap.recipe import Recipe

log = logging.getLogger(__name__)

STORE_EVERY_SEC = 1.0
MAX_BEAT_SEC = 30.0
EXIT_STALLED = 70


@dataclass(frozen=True, slots=True)
class Settings:
    """How a worker works; what it says is the run's recipe. Times in seconds."""

    run: str | None = None
    splits: Sequence[str] = ()
    device: str = "auto"
    batch_size: int = 16
    limit: int | None = None
    wait: bool = False
    lease_ttl: float = 120.0
    drain_timeout: float = 25.0
    stall_timeout: float = 600.0


@dataclass(slots=True)
class Outcome:
    """What a worker did. `lost`: captions that came too late, since another worker had the picture by then."""

    run: str = ""
    device: str = ""
    done: int = 0
    failed: int = 0
    lost: int = 0
    seconds: float = 0.0
    drained: bool = False


Completions = fifo.SimpleQueue[Completion | None]
"""What is finished and not stored; None is the end."""

Report = Callable[[Outcome, Sequence[queue.Counts]], None]
"""Called after each group of stored captions, from the store thread."""


def work(
    database: Database,
    settings: Settings,
    report: Report = lambda outcome, counts: None,
    load: Callable[[Recipe, Options], Engine] = load_engine,
) -> Outcome:
    """Captions until nothing is left (or for ever, with `wait`), or until SIGTERM or SIGINT asks to stop.

    Raises RunError if there is nothing to work on, ModelError or DatasetError if the run's cannot be had.
    """
    with transaction(database) as conn:
        run = choose_run(conn, settings.run, settings.splits)
        splits = settings.splits or datasets.SPLITS
        present = [counts.split for counts in queue.counts_of(conn, run, splits)]
        left = queue.unfinished(conn, run, splits)
    if not (settings.wait or any(left.values())):
        return Outcome(run.name)
    dataset = datasets.locate(run.dataset, present, run.dataset_revision or None)
    stop = threading.Event()
    with _signals(stop):
        engine = load(run.recipe, Options(settings.device, settings.batch_size))
        engine.load()
        if stop.is_set():
            return Outcome(run.name, drained=True)
        return _work(database, settings, report, run, splits, dataset, engine, stop)


def _work(
    database: Database,
    settings: Settings,
    report: Report,
    run: Run,
    splits: Sequence[str],
    dataset: Dataset,
    engine: Engine,
    stop: threading.Event,
) -> Outcome:
    with transaction(database, write=True) as conn:
        queue.pin(conn, run, engine.info)
        worker_id = queue.register_worker(conn, uuid.uuid4().hex, socket.gethostname(), os.getpid(), engine.info)
    log.info("captioning run %s with %s on %s (%s)", run.name, run.recipe.model, engine.info.device, engine.info.dtype)
    claims = Claims(
        worker_id=worker_id,
        run=run,
        splits=splits,
        size=settings.batch_size,
        ttl_ms=int(settings.lease_ttl * 1000),
        limit=settings.limit,
        wait=settings.wait,
    )
    outcome = Outcome(run.name, engine.info.device)
    completions: Completions = fifo.SimpleQueue()
    pipeline = Pipeline(database, claims, dataset.root, engine, completions.put)
    store = Store(database, run, outcome, pipeline, completions, settings.batch_size, report)
    try:
        _caption(database, engine, pipeline, store, worker_id, settings, stop)
    finally:
        with transaction(database, write=True) as conn:
            queue.stop_worker(conn, worker_id)
        engine.close()
    return outcome


def choose_run(conn: Connection, name: str | None, splits: Sequence[str]) -> Run:
    """The run of that name; without one, `default`, or the only run that has work. Raises RunError, naming them."""
    if name is not None:
        return queue.get_run(conn, name)
    runs = queue.list_runs(conn)
    if not runs:
        raise RunError("Nothing is registered here yet. Register pictures first: rococap enqueue --split train")
    busy = [run for run in runs if any(queue.unfinished(conn, run, splits or datasets.SPLITS).values())]
    for run in busy or runs:
        if run.name == "default":
            return run
    if len(busy) > 1:
        names = ", ".join(run.name for run in busy)
        raise RunError(f"Several runs have work ({names}). Choose one: rococap worker --run NAME")
    return busy[0] if busy else runs[-1]


def _caption(
    database: Database,
    engine: Engine,
    pipeline: Pipeline,
    store: "Store",
    worker_id: int,
    settings: Settings,
    stop: threading.Event,
) -> None:
    started = time.monotonic()
    done = threading.Event()
    threads = [
        threading.Thread(target=_beat, args=(database, pipeline, worker_id, settings, done), name="heartbeat"),
        threading.Thread(target=_drain, args=(database, pipeline, settings, stop, done), name="drain"),
    ]
    store.start()
    pipeline.start()
    for thread in threads:
        thread.daemon = True
        thread.start()
    try:
        for completion in engine.run(pipeline):
            store.put(completion)
    except BaseException as error:
        pipeline.stop()
        store.close()
        _give_up(database, pipeline, error)
        raise
    else:
        pipeline.stop()
        store.close()
        pipeline.join(timeout=5)
        _release(database, pipeline, running=True)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    store.outcome.seconds = time.monotonic() - started
    store.outcome.drained = stop.is_set()


# --- Storing ---------------------------------------------------------------------------------------------------


class Store:
    """Stores completions in a thread of its own, together: every batch or every second, whichever comes first."""

    def __init__(
        self,
        database: Database,
        run: Run,
        outcome: Outcome,
        pipeline: Pipeline,
        completions: Completions,
        group_size: int,
        report: Report,
    ) -> None:
        self.outcome = outcome
        self._database = database
        self._run = run
        self._pipeline = pipeline
        self._completions = completions
        self._group_size = group_size
        self._report = report
        self._thread = threading.Thread(target=self._run_thread, name="store", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, completion: Completion) -> None:
        self._completions.put(completion)

    def close(self) -> None:
        """Stores what was put, and returns when it is."""
        self._completions.put(None)
        self._thread.join()

    def _run_thread(self) -> None:
        try:
            for group in self._groups():
                self._store(group)
        except BaseException as error:
            self._pipeline.break_off(error)

    def _groups(self) -> Iterator[list[Completion]]:
        while (first := self._completions.get()) is not None:
            group = [first]
            deadline = time.monotonic() + STORE_EVERY_SEC
            while len(group) < self._group_size and (left := deadline - time.monotonic()) > 0:
                try:
                    completion = self._completions.get(timeout=left)
                except fifo.Empty:
                    break
                if completion is None:
                    yield group
                    return
                group.append(completion)
            yield group

    def _store(self, group: list[Completion]) -> None:
        by_lease: dict[int, tuple[Lease, list[Completion]]] = {}
        for completion in group:
            lease = self._pipeline.lease_of(completion.job_id)
            if lease is None:
                self.outcome.lost += 1
            else:
                by_lease.setdefault(lease.id, (lease, []))[1].append(completion)
        for lease, completions in by_lease.values():
            self._store_lease(lease, completions)
        with transaction(self._database) as conn:
            counts = queue.counts_of(conn, self._run)
        self._report(self.outcome, counts)

    def _store_lease(self, lease: Lease, completions: list[Completion]) -> None:
        captions = [completion for completion in completions if completion.failure is None]
        failed = {c.job_id: c.failure for c in completions if c.failure is not None}
        try:
            with transaction(self._database, write=True) as conn:
                if captions:
                    queue.complete(conn, lease, captions, timing=self._timing(lease, captions))
                if failed:
                    queue.fail(conn, lease, failed)
        except LeaseLost as error:
            log.warning("%s", error)
            self.outcome.lost += len(completions)
            self._pipeline.lose([lease.id])
        else:
            self.outcome.done += len(captions)
            self.outcome.failed += len(failed)
            self._pipeline.settle(lease, [completion.job_id for completion in completions])

    def _timing(self, lease: Lease, captions: Sequence[Completion]) -> queue.Timing:
        timing = self._pipeline.take_timing(lease)
        prefill = sum(caption.prefill_ms for caption in captions)
        decode = sum(caption.processing_ms for caption in captions) - prefill
        return queue.Timing(timing.load_ms, timing.prepare_ms, prefill, decode)


# --- Heartbeats, signals, endings ------------------------------------------------------------------------------


def _beat(database: Database, pipeline: Pipeline, worker_id: int, settings: Settings, done: threading.Event) -> None:
    """Extends the open leases as long as the engine steps; a hung process must lose them, and end."""
    while not done.wait(min(settings.lease_ttl / 4, MAX_BEAT_SEC)):
        if pipeline.stalled_sec() > settings.stall_timeout:
            log.critical(
                "no step for %.0f s: the model hangs. Ending hard, so that others take over.", settings.stall_timeout
            )
            os._exit(EXIT_STALLED)
        leases = [lease.id for lease in pipeline.open_leases()]
        try:
            with transaction(database, write=True) as conn:
                kept = queue.heartbeat(conn, worker_id, leases, ttl_ms=int(settings.lease_ttl * 1000))
        except (RococapError, DriverError) as error:
            log.warning("no heartbeat: %s", error)
            pipeline.lost_contact()
            continue
        still_held = {lease.id for lease in pipeline.open_leases()}
        if lost := set(leases) & still_held - kept:
            log.warning("lost leases %s: other workers have their pictures", sorted(lost))
            pipeline.lose(lost)


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """The first SIGTERM or SIGINT asks to drain, the second leaves at once."""

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + signum)
        log.info("asked to stop; once more to leave at once")
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _drain(
    database: Database, pipeline: Pipeline, settings: Settings, stop: threading.Event, done: threading.Event
) -> None:
    """Once asked: gives back what has not started, and what does not finish within the drain timeout."""
    while not stop.wait(0.1):
        if done.is_set():
            return
    log.info("finishing what runs, for at most %.0f s", settings.drain_timeout)
    pipeline.stop()
    _release(database, pipeline, running=False)
    if not done.wait(settings.drain_timeout):
        _release(database, pipeline, running=True)


def _release(database: Database, pipeline: Pipeline, *, running: bool) -> None:
    for lease, job_ids in pipeline.withdraw(running=running):
        try:
            with transaction(database, write=True) as conn:
                queue.release(conn, lease, job_ids)
        except LeaseLost as error:
            log.warning("%s", error)
            pipeline.lose([lease.id])
        else:
            pipeline.settle(lease, job_ids)


def _give_up(database: Database, pipeline: Pipeline, error: BaseException) -> None:
    """After an error that ends the worker: what ran is suspect of having broken the engine, the rest is given back."""
    pipeline.join(timeout=5)
    _release(database, pipeline, running=isinstance(error, RococapError | DriverError | OSError))
    for lease in pipeline.open_leases():
        with transaction(database, write=True) as conn:
            queue.crash(conn, lease.id)
