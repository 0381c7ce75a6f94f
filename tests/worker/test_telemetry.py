"""What a worker measures of itself, with time passed in."""

import sys
from types import ModuleType, SimpleNamespace

import psutil
import pytest
from small_engine import SmallEngine

from rococap.engines import Completion, Failure
from rococap.worker import telemetry
from rococap.worker.holdings import Usage
from rococap.worker.telemetry import Meter, gpu_of, peak_memory_mb


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A meter, with what it reads."""

    def __init__(self) -> None:
        self.clock, self.usage, self.engine = Clock(), Usage(), SmallEngine(batch_size=4)
        self.meter = Meter(self.engine, self.usage, self.clock)

    def run(self, seconds: float, pictures: int) -> None:
        """So many captions of 10 tokens, each half a second of the model's time, evenly over the seconds."""
        self.clock.now += seconds
        for n in range(pictures):
            self.meter.count(Completion(n, new_tokens=10, processing_ms=500.0))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_rates_and_shares_are_over_the_last_minute_or_so_and_at_the_end_over_the_whole_time(bench):
    for pictures in (30, 30, 15, 15, 15):
        bench.run(30, pictures)
        told = bench.meter.recent()
    assert (told.pictures_per_sec, told.new_tokens_per_sec, told.busy) == (0.5, 5.0, 0.25)
    assert told.captioning_sec == 150.0
    told = bench.meter.overall()
    assert (told.pictures_per_sec, told.new_tokens_per_sec, told.busy) == (0.7, 7.0, 0.35)


def test_before_the_first_minute_is_over_rates_are_since_the_start(bench):
    bench.run(10, 20)
    assert bench.meter.recent().pictures_per_sec == 2.0
    bench.run(10, 0)
    assert bench.meter.recent().pictures_per_sec == 1.0


def test_what_failed_is_no_picture(bench):
    bench.run(10, 5)
    bench.meter.count(Completion(99, failure=Failure("non_finite", "NaN")))
    assert bench.meter.overall().pictures_per_sec == 0.5


def test_fill_is_the_rows_of_the_steps_as_a_share_of_the_batch_size(bench):
    assert bench.meter.overall().fill is None
    bench.usage.steps, bench.usage.rows = 10, 30
    assert bench.meter.overall().fill == 0.75


def test_a_batch_size_that_was_halved_counts_from_then_on_and_fills_no_more_than_all(bench):
    bench.usage.steps, bench.usage.rows = 10, 40
    bench.engine.batch_size = 2
    told = bench.meter.overall()
    assert (told.batch_size, told.fill) == (2, 1.0)


def test_what_the_engine_waited_is_told_as_it_is(bench):
    bench.usage.waited_sec = 12.34
    assert bench.meter.recent().waited_sec == 12.3


def test_what_storing_took_is_told_until_it_is_booked_and_what_came_meanwhile_stays(bench):
    bench.meter.stored(1, 5.0)
    bench.meter.stored(1, 2.0)
    bench.meter.stored(2, 1.0)
    told = bench.meter.unrecorded()
    assert told == bench.meter.unrecorded() == {1: 7.0, 2: 1.0}
    bench.meter.stored(1, 3.0)
    bench.meter.mark_recorded(told)
    assert bench.meter.unrecorded() == {1: 3.0}


def test_memory_is_the_peak_of_this_process():
    resident_mb = psutil.Process().memory_info().rss / 1e6
    assert 0.95 * resident_mb < peak_memory_mb() < psutil.virtual_memory().total / 1e6


def test_the_cpu_is_no_gpu_and_a_gpu_that_cannot_be_asked_is_not_known():
    assert gpu_of("cpu") == {}
    assert gpu_of("cuda:99") == {}


def test_a_gpu_is_asked_by_its_uuid_and_the_library_is_left_also_after_an_error(monkeypatch):
    calls = []
    library = ModuleType("pynvml")
    library.nvmlInit = lambda: calls.append("init")
    library.nvmlShutdown = lambda: calls.append("shutdown")
    library.nvmlDeviceGetHandleByUUID = {"GPU-1": "handle"}.__getitem__
    library.nvmlDeviceGetUtilizationRates = {"handle": SimpleNamespace(gpu=87)}.__getitem__
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert telemetry._utilisation("GPU-1") == 0.87
    with pytest.raises(KeyError):
        telemetry._utilisation("GPU-2")
    assert calls == ["init", "shutdown"] * 2
