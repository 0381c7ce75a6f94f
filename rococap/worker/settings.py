"""How a worker works; what it says is the run's recipe."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from rococap.engines import Decode, DeviceMap, EngineName, Options

MIN_LEASE_SEC = 2.0
MAX_BEAT_SEC = 30.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How a worker works; what it says is the run's recipe. Times in seconds.

    Raises ValueError for a lease time that a busy machine could not keep up.
    """

    run: str | None = None
    splits: Sequence[str] = ()
    engine: EngineName = "transformers"
    base_url: str | None = None
    served_model: str | None = None
    device: str = "auto"
    batch_size: int | None = None
    decode: Decode = "auto"
    device_map: DeviceMap | None = None
    limit: int | None = None
    wait: bool = False
    self_check: bool = True
    lease_ttl: float = 120.0
    drain_timeout: float = 25.0
    stall_timeout: float = 600.0
    accept_new_rules: bool = False

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
    def way(self) -> str:
        """What of it may change how an engine works, and so whether an earlier self-check counts."""
        size = "auto" if self.batch_size is None else self.batch_size
        return f"decode {self.decode}, batch size {size}" + (", spread" if self.device_map else "")

    def options(self) -> Options:
        """The engine's."""
        return Options(**{field.name: getattr(self, field.name) for field in fields(Options)})
