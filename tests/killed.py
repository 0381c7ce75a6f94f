"""Transfers in processes of their own that are killed before one of their statements."""

import json
import os
import signal
import subprocess
import sys
import traceback
from itertools import count
from typing import Any

from sqlalchemy import Engine, event

from rococap import db, transfer


def killed(*runs: tuple[Any, ...]) -> list[bool]:
    """Whether each run was killed: the number of the statement before which SIGKILL comes, and `copy FROM TO` or `merge
    TARGET FILE…`.
    """
    command = [sys.executable, __file__, json.dumps(runs)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, timeout=300, check=True, stdout=subprocess.PIPE)
    return [{0: False, -signal.SIGKILL: True}[code] for code in json.loads(done.stdout)]


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


def forked(run: list[Any]) -> int:
    """The exit code of a fork that does it: the packages are imported once."""
    if (pid := os.fork()) == 0:
        try:
            main(*run)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    print(json.dumps([forked(run) for run in json.loads(sys.argv[1])]))
