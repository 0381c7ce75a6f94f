"""A worker's own clock."""

import time


def now() -> float:
    """Seconds that go on while the machine sleeps, where it has such a clock: leases run out meanwhile."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
