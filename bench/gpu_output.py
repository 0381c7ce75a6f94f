"""The lines that `gpu.py` writes while it measures. Imports nothing that takes long, so that its clock starts early."""

import json
import logging
import sys
import time
from typing import Any, TextIO

STARTED = time.monotonic()

Line = dict[str, Any]


class Lines(logging.Handler):
    """Writes lines to a file, each at once, and shows them; warnings that rococap logs are among them."""

    def __init__(self, file: TextIO) -> None:
        super().__init__(logging.WARNING)
        self.part = ""
        self.written: list[Line] = []
        self._file = file

    def write(self, figures: Line) -> None:
        at = {"at": round(time.monotonic() - STARTED, 1)}
        line = {"part": self.part} | figures | at
        self.written.append(line)
        text = json.dumps(line)
        self._file.write(text + "\n")
        self._file.flush()
        print(text, file=sys.stderr, flush=True)

    def emit(self, record: logging.LogRecord) -> None:
        self.write({"warning": record.getMessage()})
