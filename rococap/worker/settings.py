"""How a worker works; what it says is the run's recipe."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from rococap.engines import Options

MIN_LEASE_SEC = 2.0
MAX_BEAT_SEC = 30.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How a worker works; what it says is the run's recipe. Times in seconds.

    Raises ValueError for a lease time that a busy machine could not keep up.
    """

    run: str | None = None
    splits: Sequence[str] = ()
    options: Options = Options()
    """The engine's."""
    limit: int | None = None
    wait: bool = False
    self_check: bool = True
    lease_ttl: float = 120.0
    drain_timeout: float = 25.0
    stall_timeout: float = 600.0
    accept_new_rules: bool = False

    @classmethod
    def of(cls, **given: Any) -> Self:
        """From names as the command line has them, those of the engine's options among them."""
        names = {field.name for field in fields(Options)}
        options = Options(**{name: value for name, value in given.items() if name in names})
        return cls(options=options, **{name: value for name, value in given.items() if name not in names})

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        given = json.loads(text)
        return cls(**given | {"splits": tuple(given["splits"]), "options": Options(**given["options"])})

    def __post_init__(self) -> None:
        if not self.lease_ttl >= MIN_LEASE_SEC:
            raise ValueError(f"A lease lasts {MIN_LEASE_SEC:.0f} s at least, not {self.lease_ttl} s.")

    @property
    def beat_sec(self) -> float:
        """Between heartbeats: four in a lease time, so that a late one loses nothing."""
        return min(self.lease_ttl / 4, MAX_BEAT_SEC)

    @property
    def ttl_ms(self) -> int:
        return int(self.lease_ttl * 1000)

    @property
    def engine_mode(self) -> str:
        """The options that may change what an engine says, and so decide whether an earlier self-check counts."""
        options = self.options
        size = "auto" if options.batch_size is None else options.batch_size
        return f"decode {options.decode}, batch size {size}" + (", spread" if options.device_map else "")
