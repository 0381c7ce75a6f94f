"""The clock by which a worker judges its own leases, independent of the database's."""

import time


def now() -> float:
    """Monotonic seconds that include time in which the machine was suspended, if the system has such a clock: leases
    expire during that time too.
    """
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
