"""What a worker holds: its leases, the pictures that are ready, and those that are running."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rococap.engines import Prepared
from rococap.queue import Lease, Run

log = logging.getLogger(__name__)


def clock() -> float:
    """Seconds that go on while the machine sleeps, where it has such a clock: leases run out meanwhile."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Contact:
    """How long this process has been in touch with its database, without a break. Any thread may tell.

    Others are judged only after a lease time of it: after an outage, or when this process was frozen or its machine
    slept, every lease looks expired, and its worker is alive. Workers beat every quarter of a lease time, so half of
    one without contact is a break. So is a database whose clock was set: it went on by another time than ours.
    """

    def __init__(self, ttl_sec: float) -> None:
        self._ttl_sec = ttl_sec
        self._since = self._last = clock()
        self._is_lost = False
        self._ahead: float | None = None

    def made(self, database_ms: int | None = None) -> None:
        """`database_ms` is what the database's clock said, if it was asked."""
        at = clock()
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
        self._since = clock()
        if not self._is_lost:
            self._is_lost = True
            log.warning("waiting for the database, and keeping what is captioned meanwhile: %s", error)

    def unbroken_sec(self) -> float:
        """For how long; 0 unless it is at least a lease time."""
        at = clock()
        is_unbroken = at - self._last <= self._ttl_sec / 2 and at - self._since >= self._ttl_sec
        return at - self._since if is_unbroken else 0.0


@dataclass(slots=True)
class Usage:
    """What the engine did: seconds without a picture to work on, decode steps, and the rows summed over them."""

    waited_sec: float = 0.0
    steps: int = 0
    rows: int = 0


@dataclass(frozen=True, slots=True)
class Claims:
    """What a worker claims. `limit` bounds the jobs over its whole life; `wait` keeps it polling for new work;
    `preparers` threads decode and prepare the pictures."""

    worker_id: int
    uuid: str
    run: Run
    splits: Sequence[str]
    size: int
    ttl_ms: int
    limit: int | None = None
    wait: bool = False
    preparers: int = 1


@dataclass(slots=True)
class Held:
    lease: Lease
    outstanding: set[int]
    runs_out_at: float
    """By our own clock, from before the database was asked: nothing of it is started later."""
    load_ms: float = 0.0
    prepare_ms: float = 0.0


@dataclass(slots=True)
class State:
    """What the threads share: changed under the pipeline's condition; a single look needs no lock."""

    held: dict[int, Held] = field(default_factory=dict)
    lease_of: dict[int, int] = field(default_factory=dict)
    ready: deque[Prepared] = field(default_factory=deque)
    running: set[int] = field(default_factory=set)
    abandoned: set[int] = field(default_factory=set)
    finished: set[int] = field(default_factory=set)
    """Captioned, or failed: whoever stores it has it."""
    blank: set[int] = field(default_factory=set)
    """Their pictures show nothing."""
    stopping: bool = False
    ended: bool = False
    error: BaseException | None = None
