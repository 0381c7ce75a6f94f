"""A real Ray cluster of several nodes on this machine, each with its own processes, that can be killed one by one.

Run as a script, it is the driver of workers with the small engine: python tests/ray_cluster.py KIND N ADDRESS URL
ENGINE SETTINGS. The last two are JSON.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before Ray is imported, which would listen on an outer interface of this machine, and report its use.
os.environ |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}

import psutil
from places import ROOT, TESTS
from ray.cluster_utils import Cluster
from small_crew import small_command

from rococap import db
from rococap.launch import ray
from rococap.worker.settings import Settings

NOTICED_SOON = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
"""A node that is gone is noticed after a second or two, instead of 15."""


class Nodes:
    """A head without devices, and nodes with one CPU core and one GPU each. The GPUs exist in Ray's books only."""

    def __init__(self, n: int) -> None:
        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0, "_system_config": NOTICED_SOON}
        )
        self.address: str = self._cluster.address
        self.running: list[Any] = []
        for _ in range(n):
            self.add()

    def add(self) -> None:
        self.running.append(self._cluster.add_node(num_cpus=1, num_gpus=1))

    def kill(self, node: Any) -> None:
        """As if its power failed: every process of the node dies at once, those of its actors and workers included."""
        self.running.remove(node)
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        processes = [raylet, *raylet.children(recursive=True)]
        for end in (psutil.Process.suspend, psutil.Process.kill):  # first none can start or mourn another
            for process in processes:
                with suppress(psutil.NoSuchProcess):
                    end(process)
        self._cluster.remove_node(node, allow_graceful=False)

    def workers(self, node: Any) -> list[psutil.Process]:
        """The processes on the node that caption."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        found = []
        for one in raylet.children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has just ended
                if {"--member", "member"} & set(one.cmdline()):
                    found.append(one)
        return found

    def stop(self) -> None:
        self._cluster.shutdown()


@contextmanager
def nodes(n: int) -> Iterator[Nodes]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{ROOT}:{TESTS}"  # of the actors and their children
    started = Nodes(n)
    try:
        yield started
    finally:
        started.stop()
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def driver(kind: str, n: int, address: str, url: str, engine: dict | None = None, **settings: Any) -> list[str]:
    """The command line of a driver whose workers have the small engine."""
    return [
        sys.executable,
        str(Path(__file__)),
        kind,
        str(n),
        address,
        url,
        json.dumps(engine or {}),
        json.dumps(settings),
    ]


def drive(kind: Any, n: str, address: str, url: str, engine: str, settings: str) -> None:
    ended = ray.work(
        db.connect(url),
        url,
        Settings.of(**{"self_check": False} | json.loads(settings)),
        kind,
        int(n),
        address,
        small_command(**json.loads(engine)),
        echo=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(asdict(ended)))


if __name__ == "__main__":
    drive(*sys.argv[1:])
