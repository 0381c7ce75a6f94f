"""A real `rococap serve` for tests, and browsers and other clients of it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Any

import httpx
from steps import until

HTML = {"Accept": "text/html"}


@dataclass
class Served:
    """A server, its address without the last slash, the line in which it gave it, and a client of it."""

    process: subprocess.Popen
    said: str
    log: IO[str]
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.address, timeout=120)

    @property
    def address(self) -> str:
        return "http://127.0.0.1:" + re.findall(r":(\d+)/", self.said)[0]

    def stop(self) -> int:
        """Asks it to stop, and returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def logged(self, text: str) -> int:
        """How often its log has this."""
        self.log.seek(0)
        return self.log.read().count(text)

    def complaints(self) -> list[str]:
        """The lines of its log that are no mere information."""
        self.log.seek(0)
        return [line for line in self.log if " INFO " not in line]


def command(url: str | None, *options: str) -> list[str]:
    database = () if url is None else ("--db", url)
    return ["-m", "rococap", *database, "serve", "--port", "0", *options]


@contextmanager
def serving(url: str | None, *options: str, **environment: str) -> Iterator[Served]:
    """A server on a port of its own. It is to end with exit code 0 when asked to, without an error in its log."""
    with running(command(url, *options), **environment) as served:
        yield served
        assert served.stop() == 0
        assert served.complaints() == []


@contextmanager
def running(arguments: Sequence[str], **environment: str) -> Iterator[Served]:
    """A server that may end in any way."""
    with tempfile.NamedTemporaryFile("r") as log:
        # A file that is opened once would have one position: to read would move the place where the server writes.
        with open(log.name, "w") as written:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=subprocess.PIPE,
                stderr=written,
                text=True,
                env=os.environ | environment,
                bufsize=1,
            )
        with process:
            try:
                said = process.stdout.readline()
                log.seek(0)
                assert said, log.read()
                served = Served(process, said, log)
                with served.client:
                    yield served
            finally:
                process.kill()


def loaded(served: Served) -> None:
    """Waits until a server's model is loaded."""
    until(lambda: served.client.get("/healthz").status_code == 200, "the model is loaded")


def violations(page: Any) -> list[tuple[str, str]]:
    """What axe finds wrong with a page: the rule and the element."""
    from axe_playwright_python.sync_playwright import Axe  # here, because servers are also tested without a browser

    found = Axe().run(page).response["violations"]
    return [(one["id"], node["html"][:200]) for one in found for node in one["nodes"]]
