"""Connections of clients: how many there may be, and how long the server waits for what they have begun to send.

Knows no application. What is being answered is never cut, however long it takes.
"""

import asyncio
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from rococap import open_files

MOST: Final = 4_096
"""Connections at a time, if the system lets the process open twice as many files."""
PATIENCE_SEC: Final = 20.0
"""How long a client may take for the head of a request, and how long it may send nothing of a body."""
SLOWEST: Final = 500
"""Bytes of a body in a second. A client that stays below it for long is one that sends nothing."""
LINGER_SEC: Final = 5.0
"""How long the rest of a body is read, and thrown away, after a request was answered. If the connection were closed
while the client still sends, the answer could be lost.
"""


def room() -> int:
    """How many connections there may be. The other half of the open files is left for everything else."""
    return open_files.room_for(2 * MOST) // 2


class Connection(H11Protocol):
    """uvicorn's, which ends when its client is too slow. The limit of its configuration is that of connections."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = self.limit_concurrency or MOST
        self.limit_concurrency = None  # uvicorn would refuse requests for connections that ask for nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(PATIENCE_SEC)
        if len(self.connections) > self._most:
            idle = [one for one in self.connections if isinstance(one, Connection) and one.is_idle and one is not self]
            if idle:
                min(idle, key=lambda one: one.deadline).give_up()
            else:
                self._refuse(503, "There are too many connections. Try again later.")

    def _wait(self, sec: float) -> None:
        self.deadline = self.loop.time() + sec

    @property
    def is_idle(self) -> bool:
        """Whether it has asked for nothing yet, or for nothing more."""
        return self.conn.their_state is h11.IDLE and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        before = self.conn.their_state
        super().data_received(data)
        if self.conn.their_state is not before:
            self._wait(PATIENCE_SEC)
        elif before is h11.SEND_BODY and not self.cycle.response_complete:
            self.deadline = min(self.deadline + len(data) / SLOWEST, self.loop.time() + PATIENCE_SEC)

    def on_response_complete(self) -> None:
        self._wait(LINGER_SEC if self.conn.their_state is h11.SEND_BODY else PATIENCE_SEC)
        super().on_response_complete()

    def check(self) -> None:
        """Ends the connection if its client has been too slow. To be called about once a second."""
        if not self._is_awaited():
            self._wait(PATIENCE_SEC)
        elif self.loop.time() >= self.deadline:
            self.give_up()

    def _is_awaited(self) -> bool:
        """Whether the server waits for the client, and not the other way round."""
        if self.conn.their_state is not h11.SEND_BODY:
            return self.conn.their_state is h11.IDLE
        is_answering = self.cycle.response_started and not self.cycle.response_complete
        return not (is_answering or self.flow.read_paused)

    def give_up(self) -> None:
        """Ends the connection. A client that has sent a part of a request is told why."""
        has_sent_part = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        if has_sent_part and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(408, "The request was not sent in time.")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        if self.cycle is not None:
            self.cycle.disconnected = True  # the application must not answer as well
        body = b'{"error": {"message": "%s"}}' % message.encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        head = h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status])
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
