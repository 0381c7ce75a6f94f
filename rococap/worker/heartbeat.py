"""The heartbeat: extends the open leases of a worker as long as its engine makes progress."""

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
"""Pause before the first heartbeat, so that `status` soon shows what a worker measures; each further pause is twice as
long, up to the regular interval."""
EXIT_STALLED = 70
"""Exit code of a worker whose model or database hangs."""


def beat(context: Context, holdings: Holdings, meter: Meter, done: threading.Event) -> None:
    """Sends heartbeats until `done` is set. If the engine hangs, the process exits, so that its leases expire."""
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
        log.critical("no step for %.0f s: the model hangs. Exiting, so that other workers take over.", timeout)
        os._exit(EXIT_STALLED)


def _beat_once(context: Context, holdings: Holdings, meter: Meter) -> None:
    settings, contact = context.settings, context.contact
    leases = [lease.id for lease in holdings.open_leases()]
    store_ms, telemetry = meter.unrecorded(), meter.recent()
    expires_at = clock.now() + settings.lease_ttl
    patience = min(settings.lease_ttl / 4, STORE_PATIENCE_SEC)
    try:
        with transaction(context.database, write=True, patience=patience) as conn:
            kept = queue.heartbeat(
                conn, context.worker_id, leases, ttl_ms=settings.ttl_ms, store_ms=store_ms, telemetry=telemetry
            )
    except (RococapError, DriverError) as error:
        contact.lost(error)
        return
    meter.mark_recorded(store_ms)
    contact.made()
    holdings.extend(kept, expires_at)
    still_held = {lease.id for lease in holdings.open_leases()}
    if lost := set(leases) & still_held - kept:
        log.warning("lost leases %s: other workers took over their pictures, or they were cancelled", sorted(lost))
        holdings.lose(lost)
