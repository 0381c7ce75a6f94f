"""The limit on files and connections that this process may have open at once (`ulimit -n`)."""

import errno
import os
import resource

ADVICE = "Raise the limit: ulimit -n 1024"


def limit() -> int:
    """The current soft limit on open file descriptors."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def room_for(wanted: int) -> int:
    """How many of `wanted` more files can be opened, after raising the soft limit as far as the system allows."""
    n_open = len(os.listdir("/dev/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = n_open + wanted
    if soft != resource.RLIM_INFINITY and needed > soft:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, max(0, soft - n_open))


def are_used_up() -> bool:
    """Whether no further file can be opened, which drivers report as a database file that cannot be opened."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False
