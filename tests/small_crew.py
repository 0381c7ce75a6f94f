"""Workers with the small engine under a supervisor: python tests/small_crew.py crew URL DEVICES ENGINE SETTINGS.

The arguments are JSON. The supervisor starts the members with this file, too. ROCOCAP_TEST_CONSTANTS, which is JSON as
well, sets constants in the members.
"""

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from small_engine import QUICK, SmallEngine, set_constants

from rococap import db
from rococap.worker import children, supervisor
from rococap.worker.process import work
from rococap.worker.settings import Settings


def small_command(**engine: Any) -> supervisor.Command:
    """The command line of a member with the small engine."""

    def command(settings: Settings) -> list[str]:
        return [sys.executable, __file__, "member", json.dumps(engine), settings.to_json()]

    return command


def be_member(engine: str, settings: str) -> None:
    children.leave_with_parent()
    set_constants(QUICK | json.loads(os.environ.get("ROCOCAP_TEST_CONSTANTS", "{}")))
    database = db.connect(os.environ["ROCOCAP_DB"])
    supervisor.report_outcome(
        work(
            database,
            Settings.from_json(settings),
            supervisor.report_outcome,
            load=lambda *_: SmallEngine(**json.loads(engine)),
        )
    )


def be_crew(url: str, devices: list[str], engine: dict[str, Any], settings: dict[str, Any]) -> None:
    ended = supervisor.work(
        db.connect(url),
        url,
        Settings.of(**{"self_check": False} | settings),
        devices,
        small_command(**engine),
        echo=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(asdict(ended)))


if __name__ == "__main__":
    if sys.argv[1] == "member":
        be_member(*sys.argv[2:])
    else:
        be_crew(*map(json.loads, sys.argv[2:]))
