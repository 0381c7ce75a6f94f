"""Measures how long after a worker is killed with SIGKILL its jobs are claimed again."""

import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from contenders import BATCH, claim_batch, register
from crew import SPAWN
from report import Line, value_line
from rows import RUN_ID, SPLIT, fill_many
from sqlalchemy import Engine

from rococap import db, queue
from rococap.worker.fetcher import POLL_SEC

TTL_MS = 2_000
AT_ONCE = 10
BOUND_SEC = TTL_MS / 1000 + POLL_SEC + 1
PATIENCE_SEC = 5 * BOUND_SEC


@dataclass(frozen=True, slots=True)
class Crash:
    """Seconds from the kill until another worker claimed the jobs, and how many of the `held` jobs it claimed."""

    seconds: float
    claimed: int
    held: int


def measure(folder: Path, n: int) -> list[Crash]:
    """Kills `n` workers, a few at a time, each with a database of its own. No process is started while one is timed."""
    crashes: list[Crash] = []
    base = folder / "base.db"
    engine = db.connect(f"sqlite:///{base}")
    fill_many(engine, BATCH)
    engine.dispose()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for start in range(0, n, AT_ONCE):
            numbers = range(start, min(start + AT_ONCE, n))
            victims = list(
                threads.map(lambda number: Victim(Path(shutil.copy(base, folder / f"crash-{number}.db"))), numbers)
            )
            crashes += threads.map(Victim.kill, victims)
    return crashes


def lines(crashes: list[Crash]) -> list[Line]:
    in_time = sum(crash.seconds <= BOUND_SEC and crash.claimed == crash.held for crash in crashes)
    slowest = max(crash.seconds for crash in crashes)
    what = f"killed worker's jobs claimed again (lease {TTL_MS / 1000:.0f} s, poll {POLL_SEC:.0f} s)"
    return [
        value_line(f"{what}, runs of {len(crashes)} within {BOUND_SEC:.0f} s", [in_time], "", f">= {len(crashes)}"),
        value_line(f"{what}, slowest", [slowest], "s", f"<= {BOUND_SEC:.0f}"),
    ]


class Victim:
    """A process to be killed, which claims jobs and sends heartbeats as a worker does.

    `kill` also takes over its jobs, as another worker.
    """

    def __init__(self, path: Path) -> None:
        self._engine = db.connect(f"sqlite:///{path}")
        ours, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=hold, args=(str(self._engine.url), theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._held: list[int] = ours.recv()

    def kill(self) -> Crash:
        time.sleep(random.uniform(0, TTL_MS / 1000))
        self._process.kill()
        killed = time.perf_counter()
        self._process.join()
        claimed = take_over(self._engine)
        seconds = time.perf_counter() - killed
        self._engine.dispose()
        return Crash(seconds, len(claimed & set(self._held)), len(self._held))


def hold(url: str, pipe: Connection) -> None:
    engine = db.connect(url)
    worker_id = register(engine)
    with db.transaction(engine, write=True) as conn:
        lease = claim_batch(conn, worker_id, TTL_MS)
    pipe.send([job.id for job in lease.jobs])
    while True:
        time.sleep(TTL_MS / 3000)
        with db.transaction(engine, write=True) as conn:
            queue.heartbeat(conn, worker_id, [lease.id], ttl_ms=TTL_MS)


def take_over(engine: Engine) -> set[int]:
    """Polls as an idle worker does until it can claim jobs; returns their ids. After a crash, jobs are claimed in the
    lane of suspects.
    """
    worker_id = register(engine)
    give_up = time.perf_counter() + PATIENCE_SEC
    while time.perf_counter() < give_up:
        with db.transaction(engine) as conn:
            overdue = queue.overdue(conn)
        if overdue:
            with db.transaction(engine, write=True) as conn:
                queue.reap(conn, exclude_worker=worker_id)
        if claimed := claim_suspects(engine, worker_id):
            return claimed
        time.sleep(POLL_SEC * random.uniform(0.5, 1.0))
    return set()


def claim_suspects(engine: Engine, worker_id: int) -> set[int]:
    claimed: set[int] = set()
    while True:
        with db.transaction(engine, write=True) as conn:
            lease = queue.claim(conn, worker_id, RUN_ID, SPLIT, BATCH, ttl_ms=600_000, lane=queue.SUSPECTS)
        if lease is None:
            return claimed
        claimed |= {job.id for job in lease.jobs}
