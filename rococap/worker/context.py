"""The immutable context that the threads of one worker share."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Engine as Database

from rococap.data import Dataset
from rococap.engines import Engine
from rococap.queue import Run
from rococap.worker.contact import Contact
from rococap.worker.settings import Settings


@dataclass(frozen=True, slots=True)
class Context:
    """A worker and its run. `worker_id` is 0 until it is registered; `stop` is set once it is asked to stop."""

    database: Database
    settings: Settings
    run: Run
    splits: Sequence[str]
    dataset: Dataset
    engine: Engine
    uuid: str
    stop: threading.Event
    contact: Contact
    worker_id: int = 0
