"""A worker before its first claim and after its last: it registers, checks itself, pins its model, says goodbye."""

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
    """The context with the new worker's id, once it has checked itself; None if it was asked to stop meanwhile.

    Raises ModelError if the check fails, RunError if the run was started with another model state.
    """
    settings, info = context.settings, context.engine.info
    worker_id = 0
    places: list[Place] = []

    def enter(conn: Connection) -> None:
        nonlocal worker_id, places
        queue.check_pinned(conn, context.run, info, accept_new_rules=settings.accept_new_rules)
        host = socket.gethostname()
        places = _to_check(conn, context, host) if settings.self_check else []
        told = selfcheck.under_way(context.run.name, settings.engine_mode).to_json() if places else None
        worker_id = queue.register_worker(
            conn, context.uuid, host, os.getpid(), info, self_check=told, lease_ttl_ms=settings.ttl_ms
        )

    def pin(conn: Connection) -> None:
        queue.pin(conn, context.run, info, accept_new_rules=settings.accept_new_rules)

    if not _insist(context, enter):
        return None
    context = replace(context, worker_id=worker_id)
    try:
        if places:
            with _seen(context):
                _check(context, places)
        if not context.stop.is_set() and _insist(context, pin):
            return context
    except RococapError:
        _withdraw(context)
        raise
    _withdraw(context)
    return None


def _insist(context: Context, write: Callable[[Connection], None]) -> bool:
    """Writes as soon as the database lets it; False if it was asked to stop while it waited."""
    while True:
        try:
            with transaction(context.database, write=True) as conn:
                write(conn)
            return True
        except DatabaseUnavailable as error:
            log.warning("waiting for the database: %s", error)
            if context.stop.wait(REPLAY_EVERY_SEC):
                return False


def _to_check(conn: Connection, context: Context, host: str) -> list[Place]:
    """Pictures for the self-check; none if a worker like this one has passed it, or did not survive it."""
    if (last := queue.last_self_check(conn, host, context.engine.info, context.run.name)) is not None:
        pid, told = last[0], SelfCheck.from_json(last[1])
        if told.passed and told.way == context.settings.engine_mode:
            return []
        if not selfcheck.was_survived(told, pid):
            log.warning("the worker before did not survive its self-check: going on without it")
            return []
    return selfcheck.pictures(conn, context.run, context.splits)


@contextmanager
def _seen(context: Context) -> Iterator[None]:
    """Meanwhile a worker that holds nothing yet does not look lost."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(context.settings.beat_sec):
            with suppress(DatabaseError, DriverError), transaction(context.database, write=True) as conn:
                queue.heartbeat(conn, context.worker_id, (), ttl_ms=context.settings.ttl_ms)

    thread = threading.Thread(target=beat, name="seen", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(STORE_PATIENCE_SEC)


def _check(context: Context, places: Sequence[Place]) -> None:
    log.info("checking the engine on pictures of the run")
    run, stop = context.run, context.stop
    checked = selfcheck.check(
        context.engine, run.recipe, run.name, context.settings.engine_mode, context.dataset.root, places, stop.is_set
    )
    told = None if stop.is_set() else checked.to_json()  # it was broken off: nothing is known
    _insist(context, lambda conn: queue.store_self_check(conn, context.worker_id, told))
    if stop.is_set():
        return
    if checked.inconclusive:
        log.warning("the self-check is inconclusive, and the next worker looks again: %s", checked.reason)
    elif not checked.passed:
        raise ModelError(
            f"The self-check failed, and nothing was claimed: {checked.reason} To go on all the same: --no-self-check"
        )


def _withdraw(context: Context) -> None:
    """A goodbye before the first claim."""
    with goodbye(), transaction(context.database, write=True, patience=STOP_PATIENCE_SEC) as conn:
        queue.stop_worker(conn, context.worker_id)


def say_goodbye(context: Context, holdings: Holdings, meter: Meter) -> None:
    """Gives back what a claim may have taken unknowingly; what waits in the spool keeps its lease."""
    held = {lease.id for lease in holdings.open_leases()}
    store_ms, telemetry = meter.unbooked(), meter.overall()
    with goodbye(), transaction(context.database, write=True, patience=STOP_PATIENCE_SEC) as conn:
        queue.lock_leases(conn, context.worker_id, store_ms)
        queue.release_forgotten(conn, context.worker_id, held)
        queue.stop_worker(conn, context.worker_id, store_ms=store_ms, telemetry=telemetry)


@contextmanager
def goodbye() -> Iterator[None]:
    """What a worker that leaves would like to tell; it leaves all the same if the database is away."""
    try:
        yield
    except (DatabaseError, DriverError) as error:
        log.warning("left without telling the database: %s", error)
