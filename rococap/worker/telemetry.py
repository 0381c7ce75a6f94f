"""What a worker process measures about itself: its rates, its memory, and the time it spends on storing."""

import resource
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from rococap.engines import Completion, Engine
from rococap.queue import Telemetry
from rococap.worker.holdings import Usage

RECENT_SEC = 60.0
MB = 1_000_000


@dataclass(frozen=True, slots=True)
class _Sums:
    """Totals since the start, at the time `at` of the meter's clock."""

    at: float
    pictures: int = 0
    tokens: int = 0
    model_ms: float = 0.0
    steps: int = 0
    rows: int = 0


class Meter:
    """Counts what the engine finishes and how long storing takes, from its creation on. Thread-safe."""

    def __init__(self, engine: Engine, usage: Usage, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._usage = usage
        self._clock = clock
        self._lock = threading.Lock()
        self._pictures = self._tokens = 0
        self._model_ms = 0.0
        self._store_ms: dict[int, float] = {}
        self._start = self._sums()
        self._past = deque([self._start])

    def count(self, completion: Completion) -> None:
        """Adds a completion that the engine has finished; failures are not counted."""
        if completion.failure is None:
            with self._lock:
                self._pictures += 1
                self._tokens += completion.new_tokens
                self._model_ms += completion.processing_ms

    def recent(self) -> Telemetry:
        """Rates and shares since the latest call at least a minute ago, or since the start; for each heartbeat."""
        now = self._sums()
        while len(self._past) > 1 and now.at - self._past[1].at >= RECENT_SEC:
            self._past.popleft()
        self._past.append(now)
        return self._between(self._past[0], now)

    def overall(self) -> Telemetry:
        """Rates and shares over the whole time."""
        return self._between(self._start, self._sums())

    def _sums(self) -> _Sums:
        with self._lock:
            counted = (self._pictures, self._tokens, self._model_ms)
        return _Sums(self._clock(), *counted, self._usage.steps, self._usage.rows)

    def _between(self, then: _Sums, now: _Sums) -> Telemetry:
        sec = max(now.at - then.at, 0.001)
        room = (now.steps - then.steps) * self._engine.batch_size
        return Telemetry(
            captioning_sec=round(now.at - self._start.at, 1),
            pictures_per_sec=round((now.pictures - then.pictures) / sec, 3),
            new_tokens_per_sec=round((now.tokens - then.tokens) / sec, 1),
            # It would exceed 1 if the batch size was halved in this time, or if captions had been started before.
            fill=round(min(1.0, (now.rows - then.rows) / room), 3) if room else None,
            busy=round(min(1.0, (now.model_ms - then.model_ms) / 1000 / sec), 3),
            waited_sec=round(self._usage.waited_sec, 1),
            batch_size=self._engine.batch_size,
            memory_mb=round(peak_memory_mb(), 1),
            **gpu_of(self._engine.info.device),
        )

    # --- storing ---

    def stored(self, lease_id: int, ms: float) -> None:
        """Adds milliseconds of storing for a lease."""
        with self._lock:
            self._store_ms[lease_id] = self._store_ms.get(lease_id, 0.0) + ms

    def unrecorded(self) -> dict[int, float]:
        """Milliseconds of storing, by lease, that are not recorded in the database yet."""
        with self._lock:
            return dict(self._store_ms)

    def mark_recorded(self, store_ms: Mapping[int, float]) -> None:
        """Records that these milliseconds of storing, by lease, are in the database now."""
        with self._lock:
            left = {lease_id: ms - store_ms.get(lease_id, 0.0) for lease_id, ms in self._store_ms.items()}
            self._store_ms = {lease_id: ms for lease_id, ms in left.items() if ms > 0}


def peak_memory_mb() -> float:
    """The largest resident set of this process so far, in millions of bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def gpu_of(device: str) -> dict[str, Any]:
    """The fields of Telemetry about a CUDA device, as far as they are known; none on the CPU."""
    known: dict[str, Any] = {}
    if device.startswith("cuda"):
        with suppress(Exception):  # a missing driver, library or permission must not end a worker
            import torch

            properties = torch.cuda.get_device_properties(device)
            known["gpu_memory_total_mb"] = round(properties.total_memory / MB, 1)
            known["gpu_memory_mb"] = round(torch.cuda.max_memory_reserved(device) / MB, 1)
            known["gpu_utilisation"] = _utilisation(f"GPU-{properties.uuid}")
    return known


def _utilisation(uuid: str) -> float:
    """The driver's momentary utilisation of a GPU, from 0 to 1. The GPU is found by UUID, because NVML's numbering
    includes GPUs that are hidden from CUDA.
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        return float(pynvml.nvmlDeviceGetUtilizationRates(pynvml.nvmlDeviceGetHandleByUUID(uuid)).gpu) / 100
    finally:
        pynvml.nvmlShutdown()
