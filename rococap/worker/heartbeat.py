"""Extends the open leases of a worker as long as its engine makes steps."""

import logging
import os
import threading

from sqlalchemy.exc import DatabaseError as DriverError

from rococap import queue
from rococap.db import transaction
from rococap.errors import RococapError
from rococap.worker import clock
from rococap.worker.context import Context
from rococap.worker.holdings import Holdings
from rococap.worker.store import STORE_PATIENCE_SEC
from rococap.worker.telemetry import Meter

log = logging.getLogger(__name__)

FIRST_BEAT_SEC = 2.0
"""When `status` shows what a worker measures first; each wait is twice as long as the one before it."""
EXIT_STALLED = 70


def beat(context: Context, holdings: Holdings, meter: Meter, done: threading.Event) -> None:
    """Until `done`. A process whose engine hangs must lose its leases, and ends."""
    try:
        pause = FIRST_BEAT_SEC
        while not done.wait(min(pause, context.settings.beat_sec)):
            pause *= 2
            _leave_if_stalled(context, holdings)
            _beat_once(context, holdings, meter)
    except BaseException as error:
        holdings.break_off(error)


def _leave_if_stalled(context: Context, holdings: Holdings) -> None:
    timeout = context.settings.stall_timeout
    if holdings.stalled_sec() > timeout:
        log.critical("no step for %.0f s: the model hangs. Ending hard, so that others take over.", timeout)
        os._exit(EXIT_STALLED)


def _beat_once(context: Context, holdings: Holdings, meter: Meter) -> None:
    settings, contact = context.settings, context.contact
    leases = [lease.id for lease in holdings.open_leases()]
    store_ms, telemetry = meter.unbooked(), meter.recent()
    runs_out_at = clock.now() + settings.lease_ttl
    patience = min(settings.lease_ttl / 4, STORE_PATIENCE_SEC)
    try:
        with transaction(context.database, write=True, patience=patience) as conn:
            kept = queue.heartbeat(
                conn, context.worker_id, leases, ttl_ms=settings.ttl_ms, store_ms=store_ms, telemetry=telemetry
            )
    except (RococapError, DriverError) as error:
        contact.lost(error)
        return
    meter.booked(store_ms)
    contact.made()
    holdings.extend(kept, runs_out_at)
    still_held = {lease.id for lease in holdings.open_leases()}
    if lost := set(leases) & still_held - kept:
        log.warning("lost leases %s: their pictures were given to other workers, or cancelled", sorted(lost))
        holdings.lose(lost)
