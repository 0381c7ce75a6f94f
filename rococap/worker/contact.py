"""How long a worker has been in unbroken contact with its database, which decides whether it may reap other workers."""

import logging

from rococap.worker import clock

log = logging.getLogger(__name__)


class Contact:
    """How long this process has been in contact with its database without a break. Thread-safe.

    A worker may reap others only after a lease time of unbroken contact: after an outage, or after this process was
    frozen or its machine suspended, every lease looks expired although its worker is alive. Workers send a heartbeat
    every quarter of a lease time, so half a lease time without contact is a break. So is a change of the database's
    clock, which shows as a jump between that clock and ours.
    """

    def __init__(self, ttl_sec: float) -> None:
        self._ttl_sec = ttl_sec
        self._since = self._last = clock.now()
        self._is_lost = False
        self._ahead: float | None = None

    def made(self, database_ms: int | None = None) -> None:
        """Records a contact. `database_ms` is the time by the database's clock, None if it was not queried."""
        at = clock.now()
        if at - self._last > self._ttl_sec / 2 or self._was_set(database_ms, at):
            self._since = at
        self._last = at
        if self._is_lost:
            self._is_lost = False
            log.info("the database is back")

    def _was_set(self, database_ms: int | None, at: float) -> bool:
        if database_ms is None:
            return False
        before, self._ahead = self._ahead, database_ms / 1000 - at
        return before is not None and abs(self._ahead - before) > self._ttl_sec / 2

    def lost(self, error: Exception) -> None:
        """Records that the database could not be reached because of `error`, which is logged once."""
        self._since = clock.now()
        if not self._is_lost:
            self._is_lost = True
            log.warning("waiting for the database, and keeping new captions until it is back: %s", error)

    def unbroken_sec(self) -> float:
        """Seconds of unbroken contact; 0 if that is less than a lease time."""
        at = clock.now()
        is_unbroken = at - self._last <= self._ttl_sec / 2 and at - self._since >= self._ttl_sec
        return at - self._since if is_unbroken else 0.0
