"""The server process: its socket, and how it ends."""

import asyncio
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from rococap.errors import RococapError
from rococap.web.app import App
from rococap.web.captioner import Captioner
from rococap.web.connections import Connection, room
from rococap.web.intake import Bounded
from rococap.web.pool import Pool
from rococap.worker.signals import ONE_REQUEST_SEC, STOP_SIGNALS

STOP_SEC = 5
"""How long answers that are under way may take after a request to stop."""
BACKLOG = 2_048


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address; the system chooses a port that is free if `port` is 0.

    Raises RococapError if the address is taken or does not exist.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        # Python adds the address to what the system says, but not where the address was looked up.
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise RococapError(
            f"Nothing can be served at {host} port {port} ({reason}). Choose another port, or a free one: --port 0"
        ) from error
    # Connections inherit it: asyncio sets it only for sockets that name their protocol, which this one does not.
    # Without it, the body of each answer waits 40 ms for the client to acknowledge the head.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def listen_at(path: str) -> socket.socket:
    """A Unix socket at this path, from which one that was left by a process that died is removed."""
    listening = socket.socket(socket.AF_UNIX)
    with suppress(FileNotFoundError):
        os.unlink(path)
    listening.bind(path)
    listening.listen(BACKLOG)
    return listening


class _Server(uvicorn.Server):
    """Ends with exit code 0 on SIGTERM, SIGINT and SIGUSR1, as workers do, and does not wait for live pages.

    A server with a backend first answers the requests that it has accepted, for at most `drain_timeout` seconds.
    """

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, backend: Captioner | Pool | None, drain_timeout: float
    ) -> None:
        super().__init__(config)
        self._app = app
        self._backend = backend
        self._drain_timeout = drain_timeout
        self._draining: asyncio.Future[None] | None = None
        self._asked_at = -math.inf

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own would raise the signal again at the end, and the process die of it. The loop's would be gone
        # before the process is, so that a wrapper which passes a signal on as well could decide the exit code.
        loop = asyncio.get_running_loop()

        def ask(number: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self.handle_exit, number, frame)

        for number in STOP_SIGNALS:
            signal.signal(number, ask)
        yield
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._backend is not None and self._draining is None:
            self._draining = asyncio.ensure_future(self._drain(self._backend))
            for connection in self.server_state.connections:
                assert isinstance(connection, Connection)
                connection.end_after_answer()
            self._asked_at = time.monotonic()
        if time.monotonic() - self._asked_at < ONE_REQUEST_SEC:
            return
        self.force_exit = self.should_exit
        self._stop()

    async def _drain(self, backend: Captioner | Pool) -> None:
        await asyncio.to_thread(backend.drain, self._drain_timeout)
        self._stop()

    def end(self) -> None:
        """Stops because the engine has ended. May be called in any thread."""
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once a second
            for connection in list(self.server_state.connections):
                assert isinstance(connection, Connection)
                connection.check()
            if isinstance(self._backend, Captioner):
                self._backend.report()
        return await super().on_tick(counter)

    def _stop(self) -> None:
        self.should_exit = True
        if isinstance(self._app, App):
            self._app.state.dashboard.live.close()


def serve(
    app: FastAPI, listening: socket.socket, backend: Captioner | Pool | None = None, drain_timeout: float = 0.0
) -> None:
    """Serves until a signal asks it to stop. Raises what the backend failed with."""
    config = uvicorn.Config(
        Bounded(app),
        # Requests are not logged: their addresses hold tokens and what people search for.
        access_log=False,
        log_config=None,
        log_level="error",
        lifespan="off",
        ws="none",
        http=Connection,
        loop="asyncio",
        server_header=False,
        limit_concurrency=room(),
        timeout_graceful_shutdown=STOP_SEC,
    )
    server = _Server(config, app, backend, drain_timeout)
    try:
        if backend is not None:
            backend.start(on_end=server.end)
        server.run(sockets=[listening])
    finally:
        if isinstance(app, App):
            app.close()
    if backend is None:
        return
    if backend.error is not None:
        raise backend.error
    if not backend.close():
        _leave()


def _leave() -> NoReturn:
    """Ends the process although its model is still being loaded, or does not answer: Python would wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
