"""Which kernels a piece of work launches, by torch.profiler; on a CPU, which operators take its place."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from gpu_setting import Bench
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

ATTENTION = ("attention", "flash", "fmha", "sdpa", "cudnn_generated")
"""Parts of the names of kernels, and operators, for attention."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """What ran: milliseconds and calls by name, the longest first; and for how long the device was busy."""

    ms: dict[str, float]
    calls: dict[str, int]
    busy_ms: float

    @property
    def attention(self) -> list[str]:
        """Short names of the kernels for attention."""
        return [name[:80] for name in self.ms if any(part in name.lower() for part in ATTENTION)]


def kernels(bench: Bench, work: Callable[[], object]) -> Kernels:
    """Runs the work once under the profiler, which slows down its launches, but not its kernels."""
    bench.synchronise()
    activity = ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        work()
        bench.synchronise()
    kind = DeviceType.CUDA if bench.on_gpu else DeviceType.CPU
    ms: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    spans = []
    for event in profiler.events():
        if event.device_type == kind and not getattr(event, "is_user_annotation", False):
            ms[event.name] += (event.time_range.elapsed_us() if bench.on_gpu else event.self_cpu_time_total) / 1000
            calls[event.name] += 1
            spans.append((event.time_range.start, event.time_range.end))
    return Kernels(dict(ms.most_common()), calls, _union(spans) / 1000)


def _union(spans: list[tuple[float, float]]) -> float:
    """The length of what the spans cover together."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
