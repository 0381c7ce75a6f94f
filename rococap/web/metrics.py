"""What a server counts, in Prometheus's text format. docs/serving.md explains every name."""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from rococap import queue
from rococap.errors import RococapError
from rococap.tables import JobState
from rococap.web.requests import STAGES, Asked
from rococap.web.site import Site

if TYPE_CHECKING:
    from rococap.web.captioner import Captioner

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Upper bounds of a histogram's buckets."""

disable_created_metrics()  # type: ignore[no-untyped-call]


class Meter:
    """Counts the requests that end, and how long each of their stages took. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"rococap_{name}", text, labels, registry=self.registry)

        self._requests = counter("requests", "Requests that have ended, by how they did.", "outcome")
        self._pictures = counter("pictures", "Pictures in requests that were answered.")
        self._prompt_tokens = counter("prompt_tokens", "Tokens read, pictures included.")
        self._new_tokens = counter("new_tokens", "Tokens written.")
        text = "Seconds that requests spent in each stage."
        self._seconds = Histogram("rococap_stage_seconds", text, ["stage"], buckets=SECONDS, registry=self.registry)

    def count(self, asked: Asked) -> None:
        """Counts a request that has ended."""
        ends = [*asked.times[1:], time.monotonic()]
        for stage, start, end in zip(STAGES, asked.times, ends, strict=False):
            self._seconds.labels(stage).observe(end - start)
        outcome = _outcome(asked)
        self._requests.labels(outcome).inc()
        if outcome not in ("abandoned", "error"):
            completion = asked.answer.result()
            self._pictures.inc(asked.n_pictures)
            self._prompt_tokens.inc(completion.prompt_tokens)
            self._new_tokens.inc(completion.new_tokens)


def _outcome(asked: Asked) -> str:
    """A finish reason, the code of a failure, `abandoned` by the client or out of time, or `error`."""
    if asked.answer.cancelled():
        return "abandoned"
    if asked.answer.exception() is not None:
        return "error"
    completion = asked.answer.result()
    return completion.finish_reason if completion.failure is None else completion.failure.code


class _Now(Collector):
    """Everything that the server with this model, this database or both counts and is at present."""

    def __init__(self, captioner: "Captioner | None", site: Site | None) -> None:
        self._captioner = captioner
        self._site = site

    def collect(self) -> Iterator[Metric]:
        if self._captioner is not None:
            yield from self._captioner.meter.registry.collect()
            yield from _load(self._captioner)
        if self._site is not None:
            yield from _jobs(self._site)
        yield from ProcessCollector(registry=None).collect()


def _load(captioner: "Captioner") -> Iterator[Metric]:
    requests = captioner.requests
    yield _gauge("num_requests_running", "Requests that the model is answering.", requests.n_running)
    yield _gauge("num_requests_waiting", "Requests that wait for the model.", requests.n_waiting)
    yield _gauge("max_waiting", "Requests that may wait.", requests.max_waiting)
    yield _counter("decode_steps", "Steps that wrote tokens.", requests.n_steps)
    yield _counter("decode_rows", "Tokens that those steps wrote.", requests.n_rows)
    if captioner.batch_size:
        yield _gauge("batch_size", "Requests that the model answers at a time, at most.", captioner.batch_size)
        yield _gauge("batch_fill", "Share of the batch in use.", requests.n_running / captioner.batch_size)


def _jobs(site: Site) -> Iterator[Metric]:
    text = "Pictures in the queue."
    jobs = GaugeMetricFamily("rococap_jobs", text, labels=["run", "split", "status"])
    try:
        with site.read() as conn:
            counts = queue.counts(conn)
    except RococapError:
        yield _gauge("database_up", "Whether the database can be read.", 0)
        return
    for one in counts:
        for state in JobState:
            jobs.add_metric([one.run, one.split, state.value], getattr(one, state.value))
    yield _gauge("database_up", "Whether the database can be read.", 1)
    yield jobs


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"rococap_{name}", text, value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"rococap_{name}", text, value)


def exposition(captioner: "Captioner | None", site: Site | None) -> bytes:
    """The text that Prometheus reads."""
    return generate_latest(_Now(captioner, site))
