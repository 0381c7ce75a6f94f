"""What a server tells Prometheus, in its text format. docs/serving.md explains every name."""

from collections.abc import Iterable, Iterator
from typing import Final

import httpx
from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from rococap import queue
from rococap.errors import RococapError
from rococap.tables import JobState
from rococap.web.calls import Service
from rococap.web.captioner import Captioner
from rococap.web.pool import Pool
from rococap.web.site import Site

CONTENT_TYPE: Final = CONTENT_TYPE_PLAIN_0_0_4
PROCESS_SEC: Final = 2.0
"""How long a process of a pool may take to say what it counts."""


class _Now(Collector):
    """What a server counts, and its present state: of its model or its processes, its database, and itself."""

    def __init__(self, service: Service | Pool | None, site: Site | None) -> None:
        self._service = service
        self._site = site

    def collect(self) -> Iterator[Metric]:
        own = list(ProcessCollector(registry=None).collect())
        match self._service:
            case Service(captioner=captioner):
                yield from captioner.meter.registry.collect()
                yield from _load(captioner)
            case Pool():
                own = _merged([*_of_processes(self._service), *own])
        if self._site is not None:
            yield from _jobs(self._site)
        yield from own


def _of_processes(pool: Pool) -> Iterator[Metric]:
    """What each process of a pool counts, labelled by its device."""
    up = GaugeMetricFamily("rococap_up", "Whether the process of this device answers requests.", labels=["device"])
    for replica in pool.children():
        transport = httpx.HTTPTransport(uds=str(replica.socket))
        try:
            with httpx.Client(transport=transport, base_url="http://localhost", timeout=PROCESS_SEC) as client:
                text = client.get("/metrics").raise_for_status().text
        except httpx.HTTPError:
            up.add_metric([replica.label], 0)
            continue
        up.add_metric([replica.label], replica.state == "ok")
        for family in text_string_to_metric_families(text):
            family.samples = [one._replace(labels={"device": replica.label} | one.labels) for one in family.samples]
            yield family
    yield up


def _merged(families: Iterable[Metric]) -> list[Metric]:
    """One family for all of the same name, as the format demands."""
    by_name: dict[str, Metric] = {}
    for family in families:
        by_name.setdefault(family.name, family)
        if by_name[family.name] is not family:
            by_name[family.name].samples += family.samples
    return list(by_name.values())


def _load(captioner: Captioner) -> Iterator[Metric]:
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


def exposition(service: Service | Pool | None, site: Site | None) -> bytes:
    """The text that Prometheus reads."""
    return generate_latest(_Now(service, site))
