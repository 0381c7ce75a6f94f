"""Several processes that start one piece of work together. They are spawned: no connection crosses a fork."""

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


@contextmanager
def crew(n: int) -> Iterator[Together]:
    """A function that has each of `n` processes do `task(*args)` once and returns the `n` results.

    The task calls `start_together` where its preparations end.
    """
    barrier = SPAWN.Barrier(n)
    with ProcessPoolExecutor(n, SPAWN, _join, (barrier,)) as pool:

        def together(task: Callable[..., Any], *args: Any) -> list[Any]:
            futures = [pool.submit(_do, task, args) for _ in range(n)]
            return [future.result() for future in futures]

        yield together


def start_together() -> None:
    """Returns in all processes of the crew at once; one that waits here is busy, so each gets exactly one task."""
    _barrier.wait(START_SEC)


def _join(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def _do(task: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    try:
        return task(*args)
    except BaseException:
        _barrier.abort()  # else the others would wait for this one
        raise
