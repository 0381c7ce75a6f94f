"""Runs one task in several processes that start together. They are spawned, so no connection is shared by a fork."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from typing import Any

SPAWN = multiprocessing.get_context("spawn")
START_SEC = 180

Together = Callable[..., list[Any]]

_barrier: Barrier
_shared: Any


@contextmanager
def crew(n: int, shared: Any = None) -> Iterator[Together]:
    """Yields a function that runs `task(*args)` once in each of `n` processes and returns the `n` results.

    The task must call `start_together` when its preparations are finished. `shared` is what the processes share, such
    as a `Value`: `shared()` returns it there.
    """
    barrier = SPAWN.Barrier(n)
    with ProcessPoolExecutor(n, SPAWN, _join, (barrier, shared)) as pool:

        def together(task: Callable[..., Any], *args: Any) -> list[Any]:
            futures = [pool.submit(_do, task, args) for _ in range(n)]
            return [future.result() for future in futures]

        yield together


def start_together() -> None:
    """Returns in all processes of the crew at the same time. A process that waits here takes no second task, so each
    gets exactly one.
    """
    _barrier.wait(START_SEC)


def shared() -> Any:
    """What the processes of the crew share."""
    return _shared


def _join(barrier: Barrier, shared: Any) -> None:
    global _barrier, _shared
    _barrier, _shared = barrier, shared


def _do(task: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return task(*args)
    except BaseException:
        _barrier.abort()  # otherwise the other processes would wait for this one
        raise
