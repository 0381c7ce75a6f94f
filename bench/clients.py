"""Clients of an inference server, in a process of their own, each with one connection and one request at a time.

Run as a script, it reads requests from a pickle, sends them, and prints what `Figures` holds, as JSON.
"""

import http.client
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

Sent = tuple[str, bytes, dict[str, str]]
"""A request's path, body and headers."""


@dataclass(frozen=True, slots=True)
class Figures:
    """Requests a second, and the seconds that half and 99 in 100 of the requests took at most."""

    per_sec: float
    p50: float
    p99: float


def drive(port: int, requests: Sequence[Sent], clients: int) -> Figures:
    """Sends every request once, with so many clients at the same time. All have to be answered with status 200."""
    # -P, since queue.py and http.py here would shadow the standard library's.
    with tempfile.NamedTemporaryFile() as file:
        file.write(pickle.dumps((port, requests, clients)))
        file.flush()
        done = subprocess.run([sys.executable, "-P", __file__, file.name], stdout=subprocess.PIPE, check=True)
    return Figures(**json.loads(done.stdout))


def _drive(port: int, requests: Sequence[Sent], clients: int) -> Figures:
    left, lock, took = iter(requests), threading.Lock(), list[float]()

    def send_all() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while True:
            with lock:
                sent = next(left, None)
            if sent is None:
                return
            path, body, headers = sent
            started = time.perf_counter()
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            text = answer.read()
            took.append(time.perf_counter() - started)
            if answer.status != 200:
                raise SystemExit(f"{answer.status}: {text[:200]!r}")

    threads = [threading.Thread(target=send_all) for _ in range(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    assert len(took) == len(requests), f"{len(requests) - len(took)} requests failed"
    quantiles = statistics.quantiles(took, n=100)
    return Figures(len(requests) / seconds, quantiles[49], quantiles[98])


if __name__ == "__main__":
    print(json.dumps(asdict(_drive(*pickle.loads(Path(sys.argv[1]).read_bytes())))))
