"""The settings of a worker: how it works. What it says is decided by the run's recipe."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from rococap.engines import Options

MIN_LEASE_SEC = 2.0
MAX_BEAT_SEC = 30.0
"""Longest pause between heartbeats."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a worker works, independently of the run's recipe. Times are in seconds.

    Raises ValueError for a lease time so short that a busy machine could not send its heartbeats in time.
    """

    run: str | None = None
    splits: Sequence[str] = ()
    options: Options = Options()
    """The options of the engine."""
    limit: int | None = None
    wait: bool = False
    self_check: bool = True
    lease_ttl: float = 120.0
    drain_timeout: float = 25.0
    stall_timeout: float = 600.0
    accept_new_rules: bool = False
    dataset_root: str | None = None
    """The folder of the data set, as `queue.dataset_of` takes it."""

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Settings from flat values, as the command line has them: those of the engine's options are among them."""
        names = {field.name for field in fields(Options)}
        options = Options(**{name: value for name, value in values.items() if name in names})
        return cls(options=options, **{name: value for name, value in values.items() if name not in names})

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        return cls(**values | {"splits": tuple(values["splits"]), "options": Options(**values["options"])})

    def __post_init__(self) -> None:
        if not self.lease_ttl >= MIN_LEASE_SEC:
            raise ValueError(f"A lease must last at least {MIN_LEASE_SEC:.0f} s, not {self.lease_ttl} s.")

    @property
    def beat_sec(self) -> float:
        """Seconds between heartbeats: a quarter of the lease time at most, so that a late one loses no lease."""
        return min(self.lease_ttl / 4, MAX_BEAT_SEC)

    @property
    def ttl_ms(self) -> int:
        """The lease time in milliseconds."""
        return int(self.lease_ttl * 1000)

    @property
    def engine_mode(self) -> str:
        """The options that may change an engine's captions: a self-check counts only for workers with the same ones."""
        options = self.options
        size = "auto" if options.batch_size is None else options.batch_size
        mode = f"decode {options.decode}, batch size {size}"
        return mode + (", spread" if options.device_map else "") + ("" if options.graphs else ", no graphs")
