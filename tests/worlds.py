"""A queue with its crew of worker processes: what happens to them, and what must hold."""

import json
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from databases import recount, tallies
from nursery import Worker
from samples import fill
from small_engine import QUICK, caption_of
from sqlalchemy import Engine
from steps import select, statuses, until

from rococap import db
from rococap.worker import spool

TTL_SEC = 2.0


class Crew:
    """Worker processes on one queue."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.constants = QUICK | {"rococap.engines.LINGER_SEC": 0.02}
        self.spool = folder / "spool"
        self.running: list[Worker] = []
        self.ended: list[Worker] = []

    def start(self, *, engine: dict | None = None, **more) -> Worker:
        """Another one; `more` may have troubles, as in `small_engine`."""
        settings = {"batch_size": 4, "lease_ttl": TTL_SEC}
        options = {"constants": self.constants, "engine": engine or {}, "settings": settings, "spool": str(self.spool)}
        worker = Worker(self.url, options | more)
        self.running.append(worker)
        return worker

    def kill(self, worker: Worker) -> None:
        if worker.poll() is None:
            worker.kill()
        worker.communicate()
        self.dismiss(worker)

    def dismiss(self, worker: Worker) -> None:
        self.running.remove(worker)
        self.ended.append(worker)

    def n_running(self) -> int:
        for worker in list(self.running):
            if worker.poll() is not None:
                self.dismiss(worker)
        return len(self.running)

    def finish(self, worker: Worker, seconds: float = 60) -> dict:
        """What a worker did that ends by itself."""
        out, err = worker.communicate(seconds)
        self.dismiss(worker)
        assert worker.returncode == 0, err
        assert "Traceback" not in err, err
        return json.loads(out)

    def finish_all(self, seconds: float = 60) -> list[dict]:
        return [self.finish(worker, seconds) for worker in list(self.running)]

    def close(self) -> None:
        for worker in list(self.running):
            self.kill(worker)  # also one that is stopped


@dataclass
class World:
    """A queue, with workers to come."""

    url: str
    database: Engine
    crew: Crew
    folder: Path

    def fill(self, n: int) -> None:
        fill(self.database, self.folder / "set", n)

    def select(self, sql: str) -> list[tuple]:
        return select(self.database, sql)

    def statuses(self) -> dict[str, int]:
        return statuses(self.database)

    def n_done(self) -> int:
        return self.statuses().get("done", 0)

    def n_spooled(self) -> int:
        try:
            return sum(spool.waiting(self.crew.spool).values())
        except FileNotFoundError:  # all was stored in this moment
            return 0

    def until_busy(self, more: int = 8) -> None:
        """Until every worker that runs has stored something, and all together so many more."""
        target = self.n_done() + more
        pids = ", ".join(str(worker.pid) for worker in self.crew.running)
        sql = f"SELECT count(*) FROM workers WHERE n_done > 0 AND pid IN ({pids})"
        until(lambda: self.select(sql) == [(len(self.crew.running),)] and self.n_done() >= target, "all have begun")

    def all_live(self) -> bool:
        return [worker.poll() for worker in self.crew.running] == [None] * len(self.crew.running)

    def as_stored(self) -> list[tuple]:
        return self.select("SELECT job_id, lease_id, text, generated_at FROM captions ORDER BY job_id")


@contextmanager
def made(url: str, folder: Path) -> Iterator[World]:
    folder.mkdir(exist_ok=True)
    world = World(url, db.connect(url), Crew(url, folder), folder)
    try:
        yield world
    finally:
        world.crew.close()
        world.database.dispose()


def check_books(world: World) -> None:
    """What holds at any moment: a caption is a done job of a picture of its own, counted once everywhere."""
    with db.transaction(world.database) as conn:

        def one(sql: str) -> tuple:
            return tuple(db.execute(conn, sql).one())

        n_captions, n_images = one(
            "SELECT count(*), count(DISTINCT j.image_id) FROM captions c JOIN jobs j ON j.id = c.job_id"
        )
        (n_done,) = one("SELECT count(*) FROM jobs j JOIN captions c ON c.job_id = j.id WHERE j.status = 'done'")
        assert n_captions == n_images == n_done == one("SELECT count(*) FROM jobs WHERE status = 'done'")[0]
        assert one("SELECT COALESCE(sum(n_done), 0) FROM leases") == (n_captions,)
        assert one("SELECT COALESCE(sum(n_done), 0) FROM workers") == (n_captions,)
        wrong = (
            "SELECT count(*) FROM leases l WHERE n_done <> (SELECT count(*) FROM captions c WHERE c.lease_id = l.id)"
        )
        assert one(wrong) == (0,)
        assert tallies(conn) == recount(conn)
        if world.database.dialect.name == "sqlite":
            assert one("PRAGMA integrity_check") == ("ok",)
            assert db.execute(conn, "PRAGMA foreign_key_check").fetchall() == []


def check(world: World, n: int, *, killers: tuple[int, ...] = (), charged: bool = True) -> None:
    """What holds when all work is done: every picture has its own caption once, but the killers, which failed alone.

    Without `charged`, no picture is charged with a crash.
    """
    check_books(world)
    found = world.select(
        "SELECT i.image_id, c.text FROM captions c JOIN jobs j ON j.id = c.job_id JOIN images i ON i.id = j.image_id",
    )
    expected = {f"train_{number:05}": caption_of(number) for number in range(n) if number not in killers}
    assert len(found) == len(expected)
    assert dict(found) == expected
    assert world.statuses() == {"done": n - len(killers)} | ({"failed": len(killers)} if killers else {})
    failures = world.select(
        "SELECT i.image_id, f.code FROM failures f JOIN jobs j ON j.id = f.job_id JOIN images i ON i.id = j.image_id",
    )
    assert sorted(failures) == [(f"train_{number:05}", "crashed") for number in sorted(killers)]
    assert world.select("SELECT id FROM leases WHERE state = 'open'") == []
    assert world.select("SELECT DISTINCT attempts FROM jobs WHERE status = 'done'") == [(1,)]
    assert world.select("SELECT DISTINCT attempts FROM jobs WHERE status = 'failed'") in ([], [(0,)])
    if not charged:
        assert world.select("SELECT count(*) FROM jobs WHERE crashes > 0") == [(0,)]
        assert world.select("SELECT count(*) FROM leases WHERE state = 'expired'") == [(0,)]


def kill_one(world: World, chance: random.Random, **options) -> None:
    """SIGKILL to any worker at any time after its start, and another in its place.

    Not to one that is alone with a picture that another was killed with: by design, that picture would fail.
    """
    victim = chance.choice(world.crew.running)
    aboard = f"SELECT count(*) FROM workers WHERE pid = {victim.pid}"
    until(lambda: world.select(aboard) == [(1,)], "it has begun")
    time.sleep(chance.uniform(0.0, 0.5))
    until(lambda: world.select("SELECT id FROM jobs WHERE status = 'leased' AND solo_crashes > 0") == [], "no risk")
    world.crew.kill(victim)
    world.crew.start(**options)


def killed_at_any_moment(world: World, n: int, seed: int, kills: int) -> None:
    world.fill(n)
    chance = random.Random(seed)
    for _ in range(2 + seed % 2):
        world.crew.start(engine={"step_sec": 0.25})
    for _ in range(kills):
        if chance.random() < 0.1:
            time.sleep(1.5 * TTL_SEC)  # some live long enough to reap others
        kill_one(world, chance, engine={"step_sec": 0.25})
    assert [worker.returncode for worker in world.crew.ended] == [-signal.SIGKILL] * kills, "all was done too early"
    check_books(world)
    world.crew.start()
    world.crew.finish_all()
    check(world, n)
    assert world.select("SELECT count(*) > 0 FROM leases WHERE state = 'expired'") == [(True,)]
