"""The server process: its socket, and how it ends."""

import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from rococap.errors import RococapError
from rococap.web.app import App

STOP_SEC = 5
"""How long answers that are under way may take after a request to stop."""
MAX_CONNECTIONS = 500
"""Requests beyond it are answered with 503."""


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address; the system chooses a port that is free if `port` is 0.

    Raises RococapError if the address is taken or does not exist.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2_048)
    except OSError as error:
        # Python adds the address to what the system says, but not where the address was looked up.
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise RococapError(
            f"Nothing can be served at {host} port {port} ({reason}). Choose another port, or a free one: --port 0"
        ) from error


class _Server(uvicorn.Server):
    """Ends with exit code 0 on SIGTERM, SIGINT and SIGUSR1, as workers do, and does not wait for live pages."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self._app = app

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn's own would raise the signal again at the end, and the process die of it.
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
        self._app.state.dashboard.live.close()


def serve(app: App, listening: socket.socket) -> None:
    """Serves until a signal asks it to stop."""
    config = uvicorn.Config(
        app,
        # Requests are not logged: their addresses hold tokens and what people search for.
        access_log=False,
        log_config=None,
        log_level="error",
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=STOP_SEC,
    )
    try:
        _Server(config, app).run(sockets=[listening])
    finally:
        app.close()
