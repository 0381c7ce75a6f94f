"""Connections of clients: how many there may be, and how long the server waits for what they have begun to send.

Knows no application. What is being answered is never cut, however long it takes, while the client reads it.
"""

import asyncio
from typing import Any, Final, Literal

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from rococap import open_files

MOST: Final = 4_096
"""Connections at a time, if the system lets the process open twice as many files."""
PATIENCE_SEC: Final = 20.0
"""How long a client may take for the head of a request, and how long it may send nothing of a body."""
UNREAD_SEC: Final = 60.0
"""How long a client may read nothing of an answer that waits to be sent. What systems hold for one that reads slowly
can be more than it reads in PATIENCE_SEC.
"""
SLOWEST: Final = 500
"""Bytes of a body in a second. A client that stays below it for long is one that sends nothing."""
MAX_HEAD: Final = 65_536
"""Bytes that may come without the end of a head or a part of a body: a longer head, or what follows a body in chunks,
would be kept in memory.
"""
LINGER_SEC: Final = 5.0
"""How long the rest of a body is read, and thrown away, after a request was answered. If the connection were closed
while the client still sends, the answer could be lost.
"""


def room() -> int:
    """How many connections there may be. The other half of the open files is left for everything else."""
    return open_files.room_for(2 * MOST) // 2


class Connection(HttpToolsProtocol):
    """uvicorn's, which ends when its client is too slow. The limit of its configuration is that of connections.

    A client that sends a request before the last one is answered gets that answer, and the connection ends.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = self.limit_concurrency or MOST
        self.limit_concurrency = None  # uvicorn would refuse requests for connections that ask for nothing
        self._in_head = False
        self._in_body = False
        self._n_useless = 0
        self._unread = 0
        self._read_at = self.loop.time()

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
    def _is_answered(self) -> bool:
        """Whether no request waits for its answer."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def _sends(self) -> Literal["head", "body", "nothing"]:
        """What the client has to send next: nothing while it waits for an answer."""
        if self._in_body:
            return "body"
        return "head" if self._is_answered else "nothing"

    @property
    def is_idle(self) -> bool:
        """Whether it has asked for nothing yet, or for nothing more."""
        return self._sends == "head" and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        before = self._sends
        self._n_useless += len(data)
        self._feed(data)
        if self._n_useless > MAX_HEAD and self._sends != "nothing" and not self.transport.is_closing():
            self._refuse_or_close(431, "The head of the request is too long.")
        if self._sends != before:
            self._wait(PATIENCE_SEC)
        elif before == "body" and not self.cycle.response_complete:
            self.deadline = min(self.deadline + len(data) / SLOWEST, self.loop.time() + PATIENCE_SEC)

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            rest = data[offer.args[0] :]
            self._feed(self._without_upgrade() + rest)
        except httptools.HttpParserError:
            self.send_400_response("This is no HTTP request.")

    def _without_upgrade(self) -> bytes:
        """The head of a request that offers another protocol, without that offer, for a new parser: the old one would
        not read its body. Java's client makes such offers.
        """
        lines = [b"%b %b HTTP/1.1" % (self.parser.get_method(), self.url)]
        lines += [b"%b: %b" % field for field in self.headers if field[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        if not self._is_answered:
            raise ValueError("requests are answered one after the other")
        super().on_message_begin()
        self._in_head = True

    def on_headers_complete(self) -> None:
        # The host decides who may ask: of two, a proxy in front could have looked at the other one.
        if sum(name == b"host" for name, _ in self.headers) != 1 and self.parser.get_http_version() == "1.1":
            raise ValueError("a request names one host")
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("this is no proxy")
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._in_head, self._in_body, self._n_useless = False, True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # fields after a body in chunks would join the head of a request under way
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        self._n_useless = 0

    def on_message_complete(self) -> None:
        if self._in_body:
            super().on_message_complete()
        self._in_body, self._n_useless = False, 0

    def on_response_complete(self) -> None:
        self._wait(LINGER_SEC if self._in_body else PATIENCE_SEC)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Ends a connection whose client does not keep to HTTP, once it has the answer that it waits for."""
        if self._sends == "nothing":
            self.cycle.keep_alive = False  # and what else comes is thrown away, so that a hang-up is noticed
        else:
            self._refuse_or_close(400, msg)

    def end_after_answer(self) -> None:
        """Ends the connection once the request under way is answered, if there is one."""
        if self._sends != "head":
            self.cycle.keep_alive = False

    def check(self) -> None:
        """Ends the connection if its client has been too slow. To be called about once a second."""
        if self._is_unread():
            self.transport.abort()  # to close it would wait for what is not read
        elif not self._is_awaited():
            self._wait(PATIENCE_SEC)
        elif self.loop.time() >= self.deadline:
            self.give_up()

    def _is_unread(self) -> bool:
        """Whether the client has read nothing of what waits to be sent, for UNREAD_SEC."""
        unread, before = self.transport.get_write_buffer_size(), self._unread
        self._unread = unread
        if not unread or unread < before:
            self._read_at = self.loop.time()
        return self.loop.time() - self._read_at > UNREAD_SEC

    def _is_awaited(self) -> bool:
        """Whether the server waits for the client, and not the other way round."""
        if self._sends != "body":
            return self._sends == "head"
        is_answering = self.cycle.response_started and not self.cycle.response_complete
        return not (is_answering or self.flow.read_paused)

    def give_up(self) -> None:
        """Ends the connection. A client that has sent a part of a request is told why."""
        if self._in_head or self._in_body:
            self._refuse_or_close(408, "The request was not sent in time.")
        else:
            self.transport.close()

    def _refuse_or_close(self, status: int, message: str) -> None:
        """Ends the connection, with an answer unless the request has one, or a part of one."""
        if self._in_body and self.cycle.response_started:
            self.transport.close()
        else:
            self._refuse(status, message)

    def _refuse(self, status: int, message: str) -> None:
        if self.cycle is not None:
            self.cycle.disconnected = True  # the application must not answer as well
        body = b'{"error": {"message": "%b"}}' % message.encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()
