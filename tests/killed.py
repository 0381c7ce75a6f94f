"""Transfers in a process of their own that is killed before one of its statements."""

import os
import signal
import subprocess
import sys
from itertools import count

from sqlalchemy import Engine, event

from rococap import db, transfer


def killed_at(n: int, what: str, *arguments: str) -> bool:
    """Runs `copy FROM TO` or `merge TARGET FILE…` with SIGKILL before its nth statement; returns whether it came."""
    command = [sys.executable, __file__, str(n), what, *arguments]
    code = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, timeout=60).returncode
    assert code in (0, -signal.SIGKILL)
    return code != 0


def main(n: int, what: str, *arguments: str) -> None:
    statements = count(1)

    def count_one(*_: object) -> None:
        if next(statements) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", count_one)
    if what == "copy":
        transfer.copy(*arguments)
        return
    target, *sources = arguments
    database = db.connect(target)
    for source in sources:
        transfer.merge(database, source)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
