"""A proxy in front of PostgreSQL whose connections are slow, fall silent and lose answers."""

import asyncio
import itertools
import threading
from collections.abc import Container, Iterator
from contextlib import contextmanager

from postgres import Server
from sqlalchemy.engine import make_url

COMMITTED = b"COMMIT\x00"
"""The server's answer to COMMIT."""


class _Pair:
    """A client's connection and the one to the server for it."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = writers
        self.is_silent = False

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class Proxy:
    """Passes on what clients of `127.0.0.1` and a server say to each other, `delay_sec` late each way.

    It loses the answer to each COMMIT whose number, from 1, is in `loses`: the server has committed, but the connection
    ends before the client is told. Nothing more passes through the connection that first passes on the answer `hush`,
    and it does not end.
    """

    def __init__(self, server: Server) -> None:
        self.delay_sec = 0.0
        self.loses: Container[int] = ()
        self.n_lost = 0
        self.hush: bytes | None = None
        self.n_silent = 0
        self._socket = f"{server.socket_folder}/.s.PGSQL.5432"
        self._pairs: list[_Pair] = []
        self._commits = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._listening = self._do(asyncio.start_server(self._accept, "127.0.0.1", 0))

    def _do(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def in_front_of(self, url: str, **settings: str) -> str:
        """The URL of the same database through the proxy."""
        host, port = self._listening.sockets[0].getsockname()
        return make_url(url).set(host=host, port=port, query=settings).render_as_string(hide_password=False)

    def fall_silent(self) -> int:
        """From now on, nothing more passes through the connections that there are, and none of them ends; returns how
        many there are.
        """
        pairs = list(self._pairs)
        for pair in pairs:
            self._silence(pair)
        return len(pairs)

    def _silence(self, pair: _Pair) -> None:
        pair.is_silent = True
        self.n_silent += 1

    def stop(self) -> None:
        async def end() -> None:
            self._listening.close()
            for pair in self._pairs:
                pair.cut()
            await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
            await asyncio.sleep(self.delay_sec)  # what is late comes too late

        self._do(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_unix_connection(self._socket)
        pair = _Pair(writer, to_server)
        self._pairs.append(pair)
        try:
            await asyncio.gather(self._pump(pair, reader, to_server), self._pump(pair, from_server, writer))
        except ConnectionError:
            pair.cut()
        finally:
            self._pairs.remove(pair)
            if pair.is_silent:  # by now, both ends have given it up
                pair.cut()

    async def _pump(self, pair: _Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            is_answer = writer is pair.writers[0]
            if is_answer and COMMITTED in data and next(self._commits) in self.loses:
                self.n_lost += 1
                pair.cut()
                return
            if not pair.is_silent:
                self._loop.call_later(self.delay_sec, writer.write, data)
            if is_answer and self.hush is not None and self.hush in data:
                self.hush = None
                self._silence(pair)
        if not pair.is_silent:
            self._loop.call_later(self.delay_sec, writer.close)


@contextmanager
def proxied(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server)
    try:
        yield proxy
    finally:
        proxy.stop()
