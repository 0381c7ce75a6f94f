"""How long a worker has been in touch with its database: only then may it judge others."""

import logging

from rococap.worker import clock

log = logging.getLogger(__name__)


class Contact:
    """How long this process has been in touch with its database, without a break. Any thread may tell.

    Others are judged only after a lease time of it: after an outage, or when this process was frozen or its machine
    slept, every lease looks expired, and its worker is alive. Workers beat every quarter of a lease time, so half of
    one without contact is a break. So is a database whose clock was set: it went on by another time than ours.
    """

    def __init__(self, ttl_sec: float) -> None:
        self._ttl_sec = ttl_sec
        self._since = self._last = clock.now()
        self._is_lost = False
        self._ahead: float | None = None

    def made(self, database_ms: int | None = None) -> None:
        """`database_ms` is what the database's clock said, if it was asked."""
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
        self._since = clock.now()
        if not self._is_lost:
            self._is_lost = True
            log.warning("waiting for the database, and keeping what is captioned meanwhile: %s", error)

    def unbroken_sec(self) -> float:
        """For how long; 0 unless it is at least a lease time."""
        at = clock.now()
        is_unbroken = at - self._last <= self._ttl_sec / 2 and at - self._since >= self._ttl_sec
        return at - self._since if is_unbroken else 0.0
