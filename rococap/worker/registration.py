"""What a worker does before its first claim and after its last: it registers, runs its self-check, pins its model and
finally deregisters.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from sqlalchemy import Connection
from sqlalchemy.exc import DatabaseError as DriverError

from rococap import queue
from rococap.data import Place
from rococap.db import transaction
from rococap.errors import DatabaseError, DatabaseUnavailable, ModelError, RococapError
from rococap.worker import selfcheck
from rococap.worker.context import Context
from rococap.worker.holdings import Holdings
from rococap.worker.selfcheck import SelfCheck
from rococap.worker.store import REPLAY_EVERY_SEC, STOP_PATIENCE_SEC, STORE_PATIENCE_SEC
from rococap.worker.telemetry import Meter

log = logging.getLogger(__name__)


def register(context: Context) -> Context | None:
    """Registers the worker, runs its self-check and pins the model; returns the context with the worker's id, or None
    if it was asked to stop before that was done.

    Raises ModelError if the self-check fails, RunError if the run was started with another model state.
    """
    settings, info = context.settings, context.engine.info
    worker_id = 0
    places: list[Place] = []

    def enter(conn: Connection) -> None:
        nonlocal worker_id, places
        queue.check_pinned(conn, context.run, info, accept_new_rules=settings.accept_new_rules)
        host = socket.gethostname()
        places = _places_to_check(conn, context, host) if settings.self_check else []
        started = selfcheck.under_way(context.run.name, settings.engine_mode).to_json() if places else None
        worker_id = queue.register_worker(
            conn, context.uuid, host, os.getpid(), info, self_check=started, lease_ttl_ms=settings.ttl_ms
        )

    def pin(conn: Connection) -> None:
        queue.pin(conn, context.run, info, accept_new_rules=settings.accept_new_rules)

    if not _write_when_available(context, enter):
        return None
    context = replace(context, worker_id=worker_id)
    try:
        if places:
            with _kept_alive(context):
                _check(context, places)
        if not context.stop.is_set() and _write_when_available(context, pin):
            return context
    except RococapError:
        _deregister(context)
        raise
    _deregister(context)
    return None


def _write_when_available(context: Context, write: Callable[[Connection], None]) -> bool:
    """Runs `write` in a transaction as soon as the database is available; False if asked to stop while it waited."""
    while True:
        try:
            with transaction(context.database, write=True) as conn:
                write(conn)
            return True
        except DatabaseUnavailable as error:
            log.warning("waiting for the database: %s", error)
            if context.stop.wait(REPLAY_EVERY_SEC):
                return False


def _places_to_check(conn: Connection, context: Context, host: str) -> list[Place]:
    """Pictures for the self-check; none if an equal worker has passed it, or was killed by it."""
    if (last := queue.last_self_check(conn, host, context.engine.info, context.run.name)) is not None:
        pid, earlier = last[0], SelfCheck.from_json(last[1])
        if earlier.passed and earlier.way == context.settings.engine_mode:
            return []
        if not selfcheck.was_survived(earlier, pid):
            log.warning("the previous worker did not survive its self-check: continuing without one")
            return []
    return selfcheck.pictures(conn, context.run, context.splits)


@contextmanager
def _kept_alive(context: Context) -> Iterator[None]:
    """Sends heartbeats while the block runs, so that a worker that holds no lease yet does not look lost."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(context.settings.beat_sec):
            with suppress(DatabaseError, DriverError), transaction(context.database, write=True) as conn:
                queue.heartbeat(conn, context.worker_id, (), ttl_ms=context.settings.ttl_ms)

    thread = threading.Thread(target=beat, name="first heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(STORE_PATIENCE_SEC)


def _check(context: Context, places: Sequence[Place]) -> None:
    """Raises ModelError if the self-check fails. Records its outcome unless a request to stop interrupted it."""
    log.info("self-check: captioning a few pictures of the run")
    run, stop = context.run, context.stop
    checked = selfcheck.check(
        context.engine, run.recipe, run.name, context.settings.engine_mode, context.dataset.root, places, stop.is_set
    )
    outcome = None if stop.is_set() else checked.to_json()  # None: it was interrupted
    _write_when_available(context, lambda conn: queue.store_self_check(conn, context.worker_id, outcome))
    if stop.is_set():
        return
    if checked.inconclusive:
        log.warning("the self-check is inconclusive, and the next worker will repeat it: %s", checked.reason)
    elif not checked.passed:
        raise ModelError(
            f"The self-check failed, and nothing was claimed: {checked.reason} To continue anyway: --no-self-check"
        )


def _deregister(context: Context) -> None:
    """Records that a worker stopped before its first claim."""
    with goodbye(), transaction(context.database, write=True, patience=STOP_PATIENCE_SEC) as conn:
        queue.stop_worker(conn, context.worker_id)


def say_goodbye(context: Context, holdings: Holdings, meter: Meter) -> None:
    """Records that the worker has stopped, with its last measurements, and releases jobs that it may have claimed
    without learning of it. Captions in the spool keep their leases.
    """
    held = {lease.id for lease in holdings.open_leases()}
    store_ms, telemetry = meter.unrecorded(), meter.overall()
    with goodbye(), transaction(context.database, write=True, patience=STOP_PATIENCE_SEC) as conn:
        queue.lock_leases(conn, context.worker_id, store_ms)
        queue.release_forgotten(conn, context.worker_id, held)
        queue.stop_worker(conn, context.worker_id, store_ms=store_ms, telemetry=telemetry)


@contextmanager
def goodbye() -> Iterator[None]:
    """Writes of a worker that is stopping: it stops nevertheless if the database is unavailable."""
    try:
        yield
    except (DatabaseError, DriverError) as error:
        log.warning("stopped without recording it in the database: %s", error)
