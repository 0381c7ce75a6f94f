"""Clients of an inference server, in a process of their own, each with one connection and one request at a time.

Run as a script, it reads requests from a pickle, sends them, and prints what `Figures` holds, as JSON.
"""

import json
import pickle
import socket
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
    # -P, since queue.py here would shadow the standard library's.
    with tempfile.NamedTemporaryFile() as file:
        file.write(pickle.dumps((port, requests, clients)))
        file.flush()
        done = subprocess.run([sys.executable, "-P", __file__, file.name], stdout=subprocess.PIPE, check=True)
    return Figures(**json.loads(done.stdout))


def _drive(port: int, requests: Sequence[Sent], clients: int) -> Figures:
    # Bytes rather than an HTTP library, whose time would be taken from the server's on a machine with few cores.
    left, lock, took = iter([_raw(sent) for sent in requests]), threading.Lock(), list[float]()

    def send_all() -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                with lock:
                    sent = next(left, None)
                if sent is None:
                    return
                started = time.perf_counter()
                connection.sendall(sent)
                answer = _answer(connection)
                if not answer.startswith(b"HTTP/1.1 200 "):
                    raise RuntimeError(answer[:500].decode(errors="replace"))
                took.append(time.perf_counter() - started)

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


def _raw(sent: Sent) -> bytes:
    path, body, headers = sent
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def _answer(connection: socket.socket) -> bytes:
    """An answer, head and body. It must say how long it is."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += _more(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    n = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < n:
        body += _more(connection)
    return head + body


def _more(connection: socket.socket) -> bytes:
    some = connection.recv(65_536)
    if not some:
        raise ConnectionError("The server has closed the connection.")
    return some


if __name__ == "__main__":
    print(json.dumps(asdict(_drive(*pickle.loads(Path(sys.argv[1]).read_bytes())))))
