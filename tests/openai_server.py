"""A server with OpenAI's chat interface on loopback, which can misbehave on purpose.

Its model is a function from a picture and a request to a caption: `measure` measures the picture, so that tests notice
swapped captions, and `Batched` is a real engine that all requests in flight share. Run as a script, it serves the demo
model: `python openai_server.py JSON` prints its URL, and ends when its standard input does.
"""

import base64
import json
import os
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import count
from typing import Any, Self

from PIL import Image

from rococap import engines
from rococap.engines import Completion, Engine, Prepared

Request = dict[str, Any]
Model = Callable[[Image.Image, Request], Completion]

HTML = b"<html><body>Welcome to nginx!</body></html>"


def measure(picture: Image.Image, request: Request) -> Completion:
    grey = picture.getpixel((0, 0))[0]
    return Completion(0, f"{picture.width} by {picture.height}, grey {grey}", prompt_tokens=7, new_tokens=3)


@dataclass(frozen=True)
class Trouble:
    """The response to one request instead of a caption: after `delay` seconds, a reset connection or this response.

    If `body` is None, it is the caption after all, with `changes` to the JSON. It is held back until the server has
    given `after` captions.
    """

    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    after: int = 0


def failing(status: int, message: str = "", **headers: str) -> Trouble:
    body = json.dumps({"error": {"message": message}}).encode()
    return Trouble(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


def saying(content: object, finish_reason: object = "stop", **message: object) -> Trouble:
    """A response with this content. `message` adds fields to the message; a `finish_reason` of None is left out."""
    choice: dict[str, Any] = {"message": {"role": "assistant", "content": content} | message}
    return Trouble(changes={"choices": [choice | ({"finish_reason": finish_reason} if finish_reason else {})]})


def streaming(text: str) -> Trouble:
    """An event stream, which is the response to `stream: true`."""
    event = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}]}
    body = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n".encode()
    return Trouble(body=body, headers={"Content-Type": "text/event-stream; charset=utf-8"})


class ChatServer:
    """`with ChatServer() as server`; `server.url` ends in /v1. Requests are recorded with their times."""

    def __init__(self, model: Model = measure, port: int = 0) -> None:
        self.model = model
        self.listed: list[dict[str, Any]] = [{"id": "tests/small", "root": "small", "owned_by": "tests", "created": 1}]
        self.models: Trouble | None = None
        self.version: str | None = None
        self.key: str | None = None
        self.requests: list[Request] = []
        self.came_at: list[float] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        # For the next chat requests: one each; by grey level, one per request with that picture; or one for all.
        self.troubles: deque[Trouble] = deque()
        self.of_grey: dict[int, list[Trouble]] = {}
        self.always: Trouble | None = None
        self.sec = 0.0
        self.in_flight = self.most_in_flight = self.answered = 0
        self.go_on = threading.Event()
        self.lock = threading.Lock()
        self._server = _Listener(("127.0.0.1", port), _handler(self))
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next_trouble(self, grey: int) -> Trouble | None:
        with self.lock:
            if self.always is not None:
                return self.always
            if self.of_grey.get(grey):
                return self.of_grey[grey].pop(0)
            return self.troubles.popleft() if self.troubles else None


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self.connections: list[socket.socket] = []

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def server_close(self) -> None:
        """Also shuts down the connections that are kept alive, each of which has a thread."""
        super().server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that hung up


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "tests/1", ""
        disable_nagle_algorithm = True
        wbufsize = -1  # buffered, so that a response is one write

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            server.paths.append(self.path)
            if not self.is_known():
                return self.answer(failing(401, f"Incorrect API key: {self.headers.get('Authorization')}"))
            if self.path == "/version" and server.version is not None:
                return self.send(200, json.dumps({"version": server.version}).encode())
            if self.path == "/v1/models":
                return self.answer(server.models) if server.models else self.send(200, _json({"data": server.listed}))
            return self.send(404, b"Not Found")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = json.loads(body)
            with server.lock:
                server.paths.append(self.path)
                server.headers.append(dict(self.headers))
                server.requests.append(request)
                server.came_at.append(time.monotonic())
                server.in_flight += 1
                server.most_in_flight = max(server.most_in_flight, server.in_flight)
            try:
                self.caption(request)
            finally:
                with server.lock:
                    server.in_flight -= 1

        def caption(self, request: Request) -> None:
            if not self.is_known():
                return self.answer(failing(401, f"Incorrect API key: {self.headers.get('Authorization')}"))
            picture = picture_of(request)
            trouble = server.next_trouble(picture.getpixel((0, 0))[0])
            server.go_on.wait(server.sec + (trouble.delay if trouble else 0))
            while trouble is not None and server.answered < trouble.after and not server.go_on.wait(0.01):
                pass
            if trouble is not None and (trouble.cut or trouble.body is not None or trouble.status != 200):
                return self.answer(trouble)
            said = _answer(request, server.model(picture, request)) | (trouble.changes if trouble else {})
            with server.lock:
                server.answered += 1
            return self.send(200, _json(said))

        def is_known(self) -> bool:
            return server.key is None or self.headers.get("Authorization") == f"Bearer {server.key}"

        def answer(self, trouble: Trouble) -> None:
            if trouble.cut:
                return self.reset()
            return self.send(trouble.status, trouble.body or b"", trouble.headers)

        def reset(self) -> None:
            # A linger of 0 seconds makes close send RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
            self.close_connection = True

        def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def finish(self) -> None:
            if self.connection.fileno() != -1:
                super().finish()

    return Handler


def picture_of(request: Request) -> Image.Image:
    """The first one."""
    parts = (part for message in request["messages"] for part in message["content"])
    return decoded(next(part for part in parts if part["type"] == "image_url"))


def decoded(part: dict[str, Any]) -> Image.Image:
    data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
    return Image.open(BytesIO(base64.b64decode(data))).convert("RGB")


def _json(content: object) -> bytes:
    return json.dumps(content).encode()


def _answer(request: Request, said: Completion) -> dict[str, Any]:
    message = {"role": "assistant", "content": said.text}
    return {
        "object": "chat.completion",
        "model": request["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": said.finish_reason}],
        "usage": {"prompt_tokens": said.prompt_tokens, "completion_tokens": said.new_tokens},
    }


# --- a real model ----------------------------------------------------------------------------------------------

GROUP = 4
MOMENT_SEC = 0.1
"""While rows run, fewer than GROUP requests wait this long for others: one alone costs as much as a few."""


class Batched:
    """A model for ChatServer: a Source that feeds the requests to one engine. Requests are numbered from 1."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._numbers = count(1)
        self._changed = threading.Condition()
        self._ready: deque[Prepared] = deque()
        self._asked: dict[int, Future[Completion]] = {}
        self._came_at = 0.0  # of the first request that is ready
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __call__(self, picture: Image.Image, request: Request) -> Completion:
        with self._changed:
            number = next(self._numbers)
        prepared = self._engine.prepare(number, engines.Request([picture]))
        with self._changed:
            asked = self._asked[number] = Future()
            if not self._ready:
                self._came_at = time.monotonic()
            self._ready.append(prepared)
            self._changed.notify_all()
        return asked.result()

    def _run(self) -> None:
        for completion in self._engine.run(self):
            self._asked.pop(completion.job_id).set_result(completion)

    def take(self, most: int, wait: float | None) -> list[Prepared]:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._is_closed, timeout=wait)
            if wait == 0 and len(self._ready) < min(most, GROUP) and time.monotonic() < self._came_at + MOMENT_SEC:
                return []
            return [self._ready.popleft() for _ in range(min(most, len(self._ready)))]

    def step(self, rows: int) -> set[int]:
        return set()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()
        self._engine.close()


def serve_demo_model(batch_size: int, max_new_tokens: int, lengths: list[int] | None = None) -> None:
    """Serves until standard input ends. `lengths` forces the lengths of captions, as in bench/ways.py."""
    from rococap.demo import MODEL
    from rococap.engines import Options
    from rococap.engines.hf import TransformersEngine
    from rococap.recipe import Recipe

    recipe = Recipe(model=str(MODEL), max_new_tokens=max_new_tokens, dtype="float32")
    options = Options(device="cpu", batch_size=batch_size)
    if lengths is None:
        engine = TransformersEngine(recipe, options)
        engine.load()
    else:
        import ways

        engine = ways.load(recipe, options, lengths)
    model = Batched(engine)
    with ChatServer(model) as server:
        server.listed = [{"id": "demo", "owned_by": "tests"}]
        print(server.url, flush=True)
        sys.stdin.read()
    model.close()


if __name__ == "__main__":
    serve_demo_model(**json.loads(sys.argv[1]))
