"""What a server counts about the requests that it has answered."""

import time
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics

from rococap.web.requests import STAGES, Asked

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
        self._calls = counter("http_requests", "Calls of the API.", "path", "status")
        text = "Seconds until calls of the API were answered in full."
        self._call_seconds = Histogram(
            "rococap_http_request_seconds", text, ["path"], buckets=SECONDS, registry=self.registry
        )
        text = "Seconds that requests spent in each stage."
        self._seconds = Histogram("rococap_stage_seconds", text, ["stage"], buckets=SECONDS, registry=self.registry)

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts a call of the API, however it was answered."""
        self._calls.labels(path, str(status)).inc()
        self._call_seconds.labels(path).observe(seconds)

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
