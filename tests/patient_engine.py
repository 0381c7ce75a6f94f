"""A real engine without a model, for servers: it says what it measures in a picture, and some pictures take for ever.

Run as a script, it is `rococap` with this engine, in every process: `python patient_engine.py serve --model FOLDER`.
It gives clients that are slow, or read nothing, ROCOCAP_TEST_PATIENCE seconds, may open ROCOCAP_TEST_FILES files, write
ROCOCAP_TEST_FILE_SIZE bytes to each, and hold ROCOCAP_TEST_HELD bytes of requests. The system holds
ROCOCAP_TEST_SENDING bytes of its answers.
"""

import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from rococap import cli
from rococap.engines import Completion, EngineInfo, Options, Prepared, Request, Source, Streaming
from rococap.errors import ModelError
from rococap.recipe import Recipe
from rococap.web import captioner, connections, intake, server
from rococap.worker import children

ENDLESS, FATAL, CHANGED, LOUD, STALLING, CLUMSY = 200, 201, 202, 203, 204, 205
"""Grey levels: of a picture whose caption never ends, of one that ends the engine, of one whose caption is another than
its tokens said, as after running out of memory, of one whose preparation is announced, of one at which the engine
stays in a step until the file ROCOCAP_TEST_STALLS is gone, and of one whose preparation fails with its messages."""
PREPARES = "a loud picture is prepared"
RUNS = "a caption without an end begins"
STEP_SEC = 0.005


@dataclass
class Row:
    job_id: int
    grey: int
    caption: bytes
    said: list[int] = field(default_factory=list)


class PatientEngine:
    """Each byte of a caption is a token. A caption begins with two bytes that are one character."""

    info = EngineInfo("patient", {"rococap": "0"}, "tests/patient", "", "none", "cpu", "patient")

    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.batch_size = options.batch_size or 2

    def load(self) -> None:
        match os.environ.get("ROCOCAP_TEST_LOADS"):
            case "for ever":
                threading.Event().wait()
            case "never":
                raise ModelError("the weights are not there.")

    def close(self) -> None:
        pass

    def prepare(self, job_id: int, request: Request) -> Prepared:
        grey = request.pictures[0].getpixel((0, 0))[0]
        if grey == LOUD:
            print(PREPARES, flush=True)
        if grey == CLUMSY:
            raise RuntimeError(f"{request.messages}")
        return Prepared(job_id, Row(job_id, grey, f"µ grey {grey}".encode()), 7)

    def text_of(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def run(self, source: Source) -> Iterator[Completion]:
        assert isinstance(source, Streaming)
        rows: list[Row] = []
        while rows or (taken := source.take(self.batch_size, None)):
            rows += [one.inputs for one in (source.take(self.batch_size - len(rows), 0) if rows else taken)]
            for row in rows:
                if row.grey == ENDLESS and not row.said:
                    print(RUNS, flush=True)
                self._say(row, source)
            lost = source.step(len(rows))
            done = [row for row in rows if row.grey != ENDLESS and len(row.said) == len(row.caption)]
            rows = [row for row in rows if row not in done and row.job_id not in lost]
            for row in done:
                text = "another" if row.grey == CHANGED else row.caption.decode()
                yield Completion(row.job_id, text, prompt_tokens=7, new_tokens=len(row.said))
            time.sleep(STEP_SEC)

    def _say(self, row: Row, source: Streaming) -> None:
        if row.grey == FATAL:
            raise ModelError("the device has vanished.")
        while row.grey == STALLING and os.path.exists(os.environ["ROCOCAP_TEST_STALLS"]):
            time.sleep(STEP_SEC)
        token = row.caption[len(row.said) % len(row.caption)]
        source.tokens(row.job_id, len(row.said), [token])
        row.said.append(token)


def listen(n: int, host: str, port: int, listen: Callable[[str, int], socket.socket] = server.listen) -> socket.socket:
    listening = listen(host, port)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, n)
    return listening


if __name__ == "__main__":
    captioner.load_engine = PatientEngine
    children.program = lambda: [sys.executable, __file__]
    children.FIRST_PAUSE_SEC = 0.1
    children.TRIES = 2
    intake.MAX_HELD = int(os.environ.get("ROCOCAP_TEST_HELD", intake.MAX_HELD))
    if patience := float(os.environ.get("ROCOCAP_TEST_PATIENCE", 0)):
        connections.PATIENCE_SEC = connections.UNREAD_SEC = patience
    if n := int(os.environ.get("ROCOCAP_TEST_SENDING", 0)):
        server.listen = partial(listen, n)
    for limit, name in ((resource.RLIMIT_NOFILE, "FILES"), (resource.RLIMIT_FSIZE, "FILE_SIZE")):
        if n := int(os.environ.get(f"ROCOCAP_TEST_{name}", 0)):
            resource.setrlimit(limit, (n, n))
    cli.main()
