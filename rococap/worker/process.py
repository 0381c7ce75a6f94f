"""The life of one worker process: load the model, register, caption, drain.

Threads: the main thread runs the engine, the fetcher works ahead of it, and the store thread stores its completions.
One thread sends heartbeats as long as the engine makes progress, and one waits for a request to stop and drains. The
engine never waits for SQL.
"""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Engine as Database
from sqlalchemy.exc import DatabaseError as DriverError

from rococap import db, queue
from rococap.data import SPLITS
from rococap.db import transaction
from rococap.engines import Engine, Options, load_engine
from rococap.errors import RococapError
from rococap.queue.status import choose_run
from rococap.recipe import Recipe
from rococap.worker import spool
from rococap.worker.contact import Contact
from rococap.worker.context import Context
from rococap.worker.fetcher import Fetcher
from rococap.worker.heartbeat import EXIT_STALLED, beat
from rococap.worker.holdings import Holdings
from rococap.worker.registration import goodbye, register, say_goodbye
from rococap.worker.settings import Settings
from rococap.worker.signals import stop_requests
from rococap.worker.spool import Spool
from rococap.worker.store import STOP_PATIENCE_SEC, STORE_PATIENCE_SEC, Outcome, Report, Store
from rococap.worker.telemetry import Meter

log = logging.getLogger(__name__)

STOP_SLACK_SEC = 15.0
"""How long after the drain timeout a worker exits if its model or its database does not answer."""


def work(
    database: Database,
    settings: Settings,
    report: Report = lambda outcome, left: None,
    load: Callable[[Recipe, Options], Engine] = load_engine,
    spool_folder: Path | None = None,
) -> Outcome:
    """Captions until no work is left (or for ever, with `wait`), or until SIGTERM, SIGINT or SIGUSR1 asks it to stop.

    `report` is called from the store thread after each group of stored captions. `spool_folder` None means the one that
    `spool.folder_of` chooses. Raises RunError if there is no run to work on or it must not be continued, ModelError or
    DatasetError if its model or data set cannot be loaded, and whatever ends the engine or the store.
    """
    db.hurry(database)
    with transaction(database) as conn:
        run = choose_run(conn, settings.run, settings.splits)
        splits = settings.splits or SPLITS
        present = [counts.split for counts in queue.counts_of(conn, run, splits)]
        left = queue.unfinished(conn, run, splits)
        if not (settings.wait or any(left.values())):
            return Outcome(run.name)
        queue.check_rules(conn, run, accept_new_rules=settings.accept_new_rules)
    dataset = queue.dataset_of(database, run, present, settings.dataset_root)
    stop = threading.Event()
    with _signals(stop):
        engine = load(run.recipe, settings.options)
        engine.load()
        try:
            if stop.is_set():
                return Outcome(run.name, drained=True)
            contact = Contact(settings.lease_ttl)
            context = Context(database, settings, run, splits, dataset, engine, uuid.uuid4().hex, stop, contact)
            return _work(context, report, spool_folder or spool.folder_of(database.url))
        finally:
            engine.close()


@contextmanager
def _signals(stop: threading.Event) -> Iterator[None]:
    """The first request to stop makes the worker drain, the second makes it exit at once."""

    def on_request(signum: int) -> None:
        if stop.is_set():
            os._exit(128 + signum)
        log.info("asked to stop; ask again after a second to exit at once")
        stop.set()

    with stop_requests(on_request):
        yield


def _work(unregistered: Context, report: Report, spool_folder: Path) -> Outcome:
    context = register(unregistered)
    if context is None:
        return Outcome(unregistered.run.name, drained=True)
    db.stay(context.database, "SELECT 1 FROM workers WHERE id = ? AND uuid = ?", (context.worker_id, context.uuid))
    run, info = context.run, context.engine.info
    log.info("captioning run %s with %s on %s (%s)", run.name, run.recipe.model, info.device, info.dtype)
    holdings = Holdings()
    meter = Meter(context.engine, holdings.usage)
    kept = Spool(spool_folder, context.uuid)
    store = Store(context, holdings, kept, meter, report)
    try:
        _caption(context, holdings, store)
    finally:
        say_goodbye(context, holdings, meter)
        kept.close()
    return store.outcome


def _caption(context: Context, holdings: Holdings, store: Store) -> None:
    started = time.monotonic()
    done = threading.Event()
    fetcher = Fetcher(context, holdings, store.put)
    threads = [
        threading.Thread(target=beat, args=(context, holdings, store.meter, done), name="heartbeat"),
        threading.Thread(target=_drain, args=(context, holdings, store, done), name="drain"),
    ]
    store.start()
    fetcher.start()
    for thread in threads:
        thread.daemon = True
        thread.start()
    try:
        for completion in context.engine.run(holdings):
            store.put(completion)
    except BaseException as error:
        holdings.stop()
        store.close(is_patient=False)
        fetcher.join(timeout=5)
        _give_up(context, holdings, store, error)
        raise
    else:
        holdings.stop()
        store.close(is_patient=True)
        fetcher.join(timeout=5)
        store.release(running=True)
    finally:
        done.set()
        for thread in threads:
            thread.join(STORE_PATIENCE_SEC)
    store.raise_error()
    store.outcome.seconds = time.monotonic() - started
    store.outcome.drained = context.stop.is_set()


def _drain(context: Context, holdings: Holdings, store: Store, done: threading.Event) -> None:
    """Once the worker is asked to stop: releases the jobs that have not started, and after the drain timeout those that
    have not finished.
    """
    while not context.stop.wait(0.1):
        if done.is_set():
            return
    timeout = context.settings.drain_timeout
    log.info("finishing the pictures in progress, for at most %.0f s", timeout)
    threading.Thread(target=_exit_if_stuck, args=(store, timeout, done), name="exit", daemon=True).start()
    holdings.stop()
    store.release(running=False)
    if not done.wait(timeout):
        store.release(running=True)


def _exit_if_stuck(store: Store, timeout: float, done: threading.Event) -> None:
    """Exits when a thread is still blocked in the model or the database well after the drain timeout."""
    if not done.wait(timeout + STOP_SLACK_SEC):
        store.save()
        log.critical("the model or the database does not answer: exiting without it")
        os._exit(EXIT_STALLED)


def _give_up(context: Context, holdings: Holdings, store: Store, error: BaseException) -> None:
    """After an error that ends the worker: releases its jobs. Running jobs become suspects instead, as the possible
    cause, unless the error is rococap's own, the database's or the system's.
    """
    store.release(running=isinstance(error, RococapError | DriverError | OSError))
    with goodbye():
        for lease in holdings.unfinished_leases():
            with transaction(context.database, write=True, patience=STOP_PATIENCE_SEC) as conn:
                queue.crash(conn, lease.id)
