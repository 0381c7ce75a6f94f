"""The processes that train together, as `accelerate launch` starts them. Each learns from a part of a step's pictures.

Only the main one writes to the output folder. Whatever steers the training must be equal in all of them, or they would
wait for one another forever: it is `decided` by the main process, or follows from what is `gathered` from all.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from rococap.engines.hf import find_device
from rococap.errors import ModelError

T = TypeVar("T")
LONGEST_WAIT = timedelta(hours=1)
"""How long a process waits for another, which may be downloading the model or writing the result."""


@contextmanager
def joined(device: str) -> Iterator[None]:
    """While the block runs, this process is connected to the others, if `accelerate launch` started any."""
    is_cpu = device == "cpu" or not torch.cuda.is_available()
    PartialState(cpu=is_cpu, timeout=LONGEST_WAIT)
    if not is_main():
        logging.getLogger("rococap").setLevel(logging.WARNING)
    yield
    if distributed.is_initialized():  # not after an error: the others may not be there any more
        distributed.destroy_process_group()


def count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_main() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def own_device(name: str) -> torch.device:
    """The device of this process. Raises ModelError if there is none of this name, or if several would share it."""
    if count() == 1 or name == "cpu" or not torch.cuda.is_available():
        return find_device(name)
    if name != "auto":
        raise ModelError(f"accelerate launch gives each process a GPU of its own: leave out --device {name}.")
    return find_device(f"cuda:{os.environ['LOCAL_RANK']}")


def decided(decide: Callable[[], T]) -> T:
    """What the function returns in the main process, which alone calls it. If it raises there, the others just end."""
    if not distributed.is_initialized():
        return decide()
    sent: list[Any] = [False, None]
    try:
        if is_main():
            sent = [True, decide()]
    finally:
        distributed.broadcast_object_list(sent)
    if not sent[0]:
        raise SystemExit(1)
    value: T = sent[1]
    return value


def gathered(value: T) -> list[T]:
    """The values that all processes call this with."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * count()
    distributed.all_gather_object(values, value)
    return values


def known_to_all(error: Exception) -> BaseException:
    """What to raise for an error that all processes meet: the main one reports it, and the others just end."""
    return error if is_main() else SystemExit(1)
