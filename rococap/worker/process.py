"""One worker process's life: model, heartbeats, storing, draining. Claim -> load -> caption -> complete.

Threads: the main one runs the engine; the pipeline's fetcher works ahead of it; one stores what it finishes; one
beats for the open leases as long as the engine steps; one waits for a signal and drains. The engine never
waits for SQL.
"""

import logging
import os
import queue as fifo
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy import Engine as Database
from sqlalchemy.exc import DatabaseError as DriverError

from rococap import db, queue
from rococap.data import datasets
from rococap.data.datasets import Dataset, Place
from rococap.db import transaction
from rococap.engines import Engine, Options, load_engine
from rococap.errors import DatabaseError, DatabaseUnavailable, ModelError, RococapError
from rococap.queue import Run
from rococap.queue.status import choose_run
from rococap.recipe import Recipe
from rococap.worker import selfcheck, spool
from rococap.worker.fetcher import Pipeline
from rococap.worker.holdings import Claims, clock
from rococap.worker.selfcheck import SelfCheck
from rococap.worker.settings import Settings
from rococap.worker.signals import stop_requests
from rococap.worker.spool import Spool
from rococap.worker.store import (
    REPLAY_EVERY_SEC,
    STOP_PATIENCE_SEC,
    STORE_PATIENCE_SEC,
    Completions,
    Outcome,
    Report,
    Store,
)
from rococap.worker.telemetry import Meter

log = logging.getLogger(__name__)
STOP_SLACK_SEC = 15.0
"""How long after the drain timeout a worker whose database does not even answer leaves hard."""
FIRST_BEAT_SEC = 2.0
"""When `status` shows what a worker measures first; each wait is twice as long as the one before it."""
EXIT_STALLED = 70


def work(
    database: Database,
    settings: Settings,
    report: Report = lambda outcome, counts: None,
    load: Callable[[Recipe, Options], Engine] = load_engine,
    spool_folder: Path | None = None,
) -> Outcome:
    """Captions until nothing is left (or for ever, with `wait`), or until SIGTERM, SIGINT or SIGUSR1 asks to stop.

    `spool_folder` None: where the environment says, or beside the database.
    Raises RunError if there is nothing to work on, ModelError or DatasetError if the run's cannot be had.
    """
    with transaction(database) as conn:
        run = choose_run(conn, settings.run, settings.splits)
        splits = settings.splits or datasets.SPLITS
        present = [counts.split for counts in queue.counts_of(conn, run, splits)]
        left = queue.unfinished(conn, run, splits)
        if not (settings.wait or any(left.values())):
            return Outcome(run.name)
        queue.check_rules(conn, run, accept_new_rules=settings.accept_new_rules)
    dataset = datasets.locate(run.dataset, present, run.dataset_revision or None)
    stop = threading.Event()
    with _signals(stop):
        engine = load(run.recipe, settings.options())
        engine.load()
        try:
            if stop.is_set():
                return Outcome(run.name, drained=True)
            folder = spool_folder or spool.folder_of(database.url)
            return _work(database, settings, report, run, splits, dataset, engine, folder, stop)
        finally:
            engine.close()


def _work(
    database: Database,
    settings: Settings,
    report: Report,
    run: Run,
    splits: Sequence[str],
    dataset: Dataset,
    engine: Engine,
    spool_folder: Path,
    stop: threading.Event,
) -> Outcome:
    name = uuid.uuid4().hex
    worker_id = _register(database, run, splits, dataset, engine, name, settings, stop)
    if worker_id is None:
        return Outcome(run.name, drained=True)
    db.stay(database, "SELECT 1 FROM workers WHERE id = ? AND uuid = ?", (worker_id, name))
    log.info("captioning run %s with %s on %s (%s)", run.name, run.recipe.model, engine.info.device, engine.info.dtype)
    claims = Claims(
        worker_id=worker_id,
        uuid=name,
        run=run,
        splits=splits,
        size=engine.batch_size,
        ttl_ms=settings.ttl_ms,
        limit=settings.limit,
        wait=settings.wait,
        preparers=n_preparers(engine.info.device),
    )
    outcome = Outcome(run.name, engine.info.device)
    completions: Completions = fifo.SimpleQueue()
    pipeline = Pipeline(database, claims, dataset.root, engine, lambda completion: store.put(completion))
    kept = Spool(spool_folder, name)
    meter = Meter(engine, pipeline.usage)
    store = Store(database, claims, outcome, pipeline, kept, completions, report, stop, meter)
    try:
        _caption(database, engine, pipeline, store, worker_id, settings, stop)
    finally:
        _say_goodbye(database, pipeline, meter, worker_id)
        kept.close()
    return outcome


def n_preparers(device: str) -> int:
    """Threads that decode and prepare: beside a GPU as many as keep it busy, on the CPU the model needs the cores."""
    return 1 if device == "cpu" else min(8, max(1, (os.cpu_count() or 1) // 2))


def _register(
    database: Database,
    run: Run,
    splits: Sequence[str],
    dataset: Dataset,
    engine: Engine,
    name: str,
    settings: Settings,
    stop: threading.Event,
) -> int | None:
    """The new worker's id, once it has checked itself; None if it was asked to stop meanwhile.

    Raises ModelError if the check fails, RunError if the run was started with another model state.
    """
    worker_id = 0
    places: list[Place] = []

    def register(conn: Connection) -> None:
        nonlocal worker_id, places
        queue.check_pinned(conn, run, engine.info, accept_new_rules=settings.accept_new_rules)
        host = socket.gethostname()
        places = _to_check(conn, run, splits, engine, host, settings.way) if settings.self_check else []
        told = selfcheck.under_way(run.name, settings.way).to_json() if places else None
        worker_id = queue.register_worker(
            conn, name, host, os.getpid(), engine.info, self_check=told, lease_ttl_ms=settings.ttl_ms
        )

    def pin(conn: Connection) -> None:
        queue.pin(conn, run, engine.info, accept_new_rules=settings.accept_new_rules)

    if not _insist(database, stop, register):
        return None
    try:
        if places:
            with _seen(database, worker_id, settings):
                _check(database, run, settings.way, dataset, engine, worker_id, places, stop)
        if not stop.is_set() and _insist(database, stop, pin):
            return worker_id
    except RococapError:
        _withdraw(database, worker_id)
        raise
    _withdraw(database, worker_id)
    return None


@contextmanager
def _seen(database: Database, worker_id: int, settings: Settings) -> Iterator[None]:
    """Meanwhile a worker that holds nothing yet does not look lost."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(settings.beat_sec):
            with suppress(DatabaseError, DriverError), transaction(database, write=True) as conn:
                queue.heartbeat(conn, worker_id, (), ttl_ms=settings.ttl_ms)

    thread = threading.Thread(target=beat, name="seen", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(STORE_PATIENCE_SEC)


def _withdraw(database: Database, worker_id: int) -> None:
    """A goodbye before the first claim."""
    try:
        with transaction(database, write=True, patience=STOP_PATIENCE_SEC) as conn:
            queue.stop_worker(conn, worker_id)
    except (DatabaseError, DriverError) as error:
        log.warning("left without telling the database: %s", error)


def _insist(database: Database, stop: threading.Event, write: Callable[[Connection], None]) -> bool:
    """Writes as soon as the database lets it; False if it was asked to stop while it waited."""
    while True:
        try:
            with transaction(database, write=True) as conn:
                write(conn)
            return True
        except DatabaseUnavailable as error:
            log.warning("waiting for the database: %s", error)
            if stop.wait(REPLAY_EVERY_SEC):
                return False


def _to_check(conn: Connection, run: Run, splits: Sequence[str], engine: Engine, host: str, way: str) -> list[Place]:
    """Pictures for the self-check; none if a worker like this one has passed it, or did not survive it."""
    if (last := queue.last_self_check(conn, host, engine.info, run.name)) is not None:
        pid, told = last[0], SelfCheck.from_json(last[1])
        if told.passed and told.way == way:
            return []
        if not selfcheck.was_survived(told, pid):
            log.warning("the worker before did not survive its self-check: going on without it")
            return []
    return selfcheck.pictures(conn, run, splits)


def _check(
    database: Database,
    run: Run,
    way: str,
    dataset: Dataset,
    engine: Engine,
    worker_id: int,
    places: Sequence[Place],
    stop: threading.Event,
) -> None:
    log.info("checking the engine on pictures of the run")
    checked = selfcheck.check(engine, run.recipe, run.name, way, dataset.root, places, stop.is_set)
    told = None if stop.is_set() else checked.to_json()  # it was broken off: nothing is known
    _insist(database, stop, lambda conn: queue.store_self_check(conn, worker_id, told))
    if stop.is_set():
        return
    if checked.inconclusive:
        log.warning("the self-check is inconclusive, and the next worker looks again: %s", checked.reason)
    elif not checked.passed:
        raise ModelError(
            f"The self-check failed, and nothing was claimed: {checked.reason} To go on all the same: --no-self-check"
        )


def _say_goodbye(database: Database, pipeline: Pipeline, meter: Meter, worker_id: int) -> None:
    """Gives back what a claim may have taken unknowingly; what waits in the spool keeps its lease."""
    held = {lease.id for lease in pipeline.open_leases()}
    store_ms, telemetry = meter.unbooked(), meter.overall()
    try:
        with transaction(database, write=True, patience=STOP_PATIENCE_SEC) as conn:
            queue.lock_leases(conn, worker_id, store_ms)
            queue.release_forgotten(conn, worker_id, held)
            queue.stop_worker(conn, worker_id, store_ms=store_ms, telemetry=telemetry)
    except (DatabaseError, DriverError) as error:
        log.warning("left without telling the database: %s", error)


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
        threading.Thread(
            target=_beat, args=(database, pipeline, store.meter, worker_id, settings, done), name="heartbeat"
        ),
        threading.Thread(target=_drain, args=(pipeline, store, settings, stop, done), name="drain"),
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
        store.close(is_patient=False)
        _give_up(database, pipeline, store, error)
        raise
    else:
        pipeline.stop()
        store.close(is_patient=True)
        pipeline.join(timeout=5)
        store.release(running=True)
    finally:
        done.set()
        for thread in threads:
            thread.join(STORE_PATIENCE_SEC)
    store.raise_error()
    store.outcome.seconds = time.monotonic() - started
    store.outcome.drained = stop.is_set()


# --- Heartbeats, signals, endings ------------------------------------------------------------------------------


def _beat(
    database: Database, pipeline: Pipeline, meter: Meter, worker_id: int, settings: Settings, done: threading.Event
) -> None:
    """Extends the open leases as long as the engine steps; a hung process must lose them, and end."""
    try:
        _beat_until(database, pipeline, meter, worker_id, settings, done)
    except BaseException as error:
        pipeline.break_off(error)


def _beat_until(
    database: Database, pipeline: Pipeline, meter: Meter, worker_id: int, settings: Settings, done: threading.Event
) -> None:
    pause = FIRST_BEAT_SEC
    while not done.wait(min(pause, settings.beat_sec)):
        pause *= 2
        if pipeline.stalled_sec() > settings.stall_timeout:
            log.critical(
                "no step for %.0f s: the model hangs. Ending hard, so that others take over.", settings.stall_timeout
            )
            os._exit(EXIT_STALLED)
        leases = [lease.id for lease in pipeline.open_leases()]
        store_ms, telemetry = meter.unbooked(), meter.recent()
        runs_out_at = clock() + settings.lease_ttl
        try:
            with transaction(database, write=True, patience=min(settings.lease_ttl / 4, STORE_PATIENCE_SEC)) as conn:
                kept = queue.heartbeat(
                    conn, worker_id, leases, ttl_ms=settings.ttl_ms, store_ms=store_ms, telemetry=telemetry
                )
        except (RococapError, DriverError) as error:
            pipeline.contact.lost(error)
            continue
        meter.booked(store_ms)
        pipeline.contact.made()
        pipeline.extend(kept, runs_out_at)
        still_held = {lease.id for lease in pipeline.open_leases()}
        if lost := set(leases) & still_held - kept:
            log.warning("lost leases %s: their pictures were given to other workers, or cancelled", sorted(lost))
            pipeline.lose(lost)


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """The first request to stop drains, the second leaves at once."""

    def hear(signum: int) -> None:
        if stop.is_set():
            os._exit(128 + signum)
        log.info("asked to stop; ask again in a second or later to leave at once")
        stop.set()

    with stop_requests(hear):
        yield


def _drain(pipeline: Pipeline, store: Store, settings: Settings, stop: threading.Event, done: threading.Event) -> None:
    """Once asked: gives back what has not started, and what does not finish within the drain timeout."""
    while not stop.wait(0.1):
        if done.is_set():
            return
    log.info("finishing what runs, for at most %.0f s", settings.drain_timeout)
    threading.Thread(target=_leave_hard, args=(store, settings, done), name="leave", daemon=True).start()
    pipeline.stop()
    store.release(running=False)
    if not done.wait(settings.drain_timeout):
        store.release(running=True)


def _leave_hard(store: Store, settings: Settings, done: threading.Event) -> None:
    """When a thread hangs in a database that does not even answer, or in the model: nobody waits for ever."""
    if not done.wait(settings.drain_timeout + STOP_SLACK_SEC):
        store.save()
        log.critical("the model or the database does not answer: leaving without them")
        os._exit(EXIT_STALLED)


def _give_up(database: Database, pipeline: Pipeline, store: Store, error: BaseException) -> None:
    """After an error that ends the worker: what ran is suspect of having broken the engine, the rest is given back."""
    pipeline.join(timeout=5)
    store.release(running=isinstance(error, RococapError | DriverError | OSError))
    try:
        for lease in pipeline.unfinished_leases():
            with transaction(database, write=True, patience=STOP_PATIENCE_SEC) as conn:
                queue.crash(conn, lease.id)
    except (DatabaseError, DriverError) as away:
        log.warning("left without telling the database: %s", away)
