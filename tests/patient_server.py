"""A real `rococap serve` whose engine is patient, and requests to it."""

import base64
import json
import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPResponse
from io import BytesIO
from typing import Any

import httpx
from patient_engine import ENDLESS, RUNS
from PIL import Image
from places import TESTS
from web_server import Served, loaded, running

from rococap.demo import MODEL

PROGRAM = [str(TESTS / "patient_engine.py"), "serve", "--port", "0", "--model", str(MODEL), "--batch-size", "1"]
"""A server without a database, whose engine is patient, and answers one request at a time."""

HEAD = b"POST /v1/captions HTTP/1.1\r\nHost: localhost\r\n"
ASKING = HEAD + b"Content-Length: 100\r\nExpect: 100-continue\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 "
"""Beginnings of requests, and of the answer to one that keeps its body back."""


@contextmanager
def patient(*options: str, **environment: str) -> Iterator[Served]:
    with running([*PROGRAM, *options], **environment) as served:
        loaded(served)
        yield served


def grey(level: int) -> str:
    file = BytesIO()
    Image.new("L", (28, 28), level).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def chat(level: int, **fields: Any) -> dict[str, Any]:
    url = {"url": f"data:image/png;base64,{grey(level)}"}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What?"}]
    return {"model": MODEL.name, "messages": [{"role": "user", "content": parts}]} | fields


def captioned(served: Served, *levels: int) -> httpx.Response:
    return served.client.post("/v1/captions", json={"images": [grey(level) for level in levels]})


def texts(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [caption["caption"] for caption in answer.json()["captions"]]


@contextmanager
def endless(served: Served) -> Iterator[Iterator[str]]:
    """The lines of a stream that never ends, and has the only place of a batch."""
    with served.client.stream("POST", "/v1/chat/completions", json=chat(ENDLESS, stream=True)) as answer:
        assert answer.status_code == 200
        assert served.process.stdout.readline() == RUNS + "\n"
        yield answer.iter_lines()


def asking(*levels: int) -> bytes:
    """A request for captions, as it is sent."""
    body = json.dumps({"images": [grey(level) for level in levels]}).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


@contextmanager
def sent(served: Served, *levels: int) -> Iterator[None]:
    """A request that was sent, whose client hangs up at the end without having read an answer."""
    with connected(served, asking(*levels)):
        yield


@contextmanager
def connected(served: Served, *beginnings: bytes) -> Iterator[list[socket.socket]]:
    """Connections that have sent these beginnings of requests, one after the other."""
    address = served.client.base_url
    with ExitStack() as stack:
        connections = []
        for beginning in beginnings:
            one = stack.enter_context(socket.create_connection((address.host, address.port), timeout=30))
            one.sendall(beginning)
            connections.append(one)
        yield connections


def send_until_answered(connection: socket.socket, data: bytes, *, every_sec: float = 0.0, at_most: int = 10**9) -> int:
    """Sends this again and again, and returns how often. The answer may come, and the connection end, at any moment."""
    for n in range(at_most):
        if select.select([connection], [], [], every_sec)[0]:
            return n
        try:
            connection.sendall(data)
        except ConnectionError:
            return n
    return at_most


def answer_to(connection: socket.socket) -> HTTPResponse:
    answer = HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer


def status_of(connection: socket.socket) -> int:
    return answer_to(connection).status
