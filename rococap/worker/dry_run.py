"""Runs an engine on a few of a run's pictures without claiming them, for benchmarks and self-checks."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection

from rococap.data import PictureReader, Place
from rococap.data.images import open_picture
from rococap.db import execute
from rococap.engines import Completion, Engine, Prepared, Request
from rococap.errors import PictureError
from rococap.queue import PLACE, Run, place_of


def places(conn: Connection, run: Run, split: str, limit: int) -> list[Place]:
    """The run's first `limit` pictures of a split, in the data set's order."""
    return list(_from(conn, run, split, 0, limit).values())


def spread(conn: Connection, run: Run, split: str, limit: int, skip: int) -> list[Place]:
    """Up to `limit` pictures of a split, spread from its beginning to its end, without its first `skip` pictures."""
    first = list(_from(conn, run, split, 0, skip + 1))
    if len(first) <= skip:
        return []
    begin, end = first[-1], _last(conn, run, split)
    found: dict[int, Place] = {}
    for part in range(limit):  # by id, since counting would read every row
        found |= _from(conn, run, split, begin + (end - begin) * part // max(1, limit - 1), 1)
    # If the run has only some of the data set's pictures, several parts may find the same one: fill up from the start.
    return list((found | _from(conn, run, split, begin, limit)).values())[:limit]


def _from(conn: Connection, run: Run, split: str, image_id: int, limit: int) -> dict[int, Place]:
    """Up to `limit` pictures with this image id or a higher one, by id."""
    rows = execute(
        conn,
        f"SELECT j.image_id, {PLACE} FROM jobs j "
        "JOIN images i ON i.id = j.image_id JOIN shards s ON s.id = i.shard_id "
        "WHERE j.run_id = ? AND j.split = ? AND j.image_id >= ? ORDER BY j.image_id LIMIT ?",
        (run.id, split, image_id, limit),
    ).fetchall()
    return {image_id: place_of(place, run.columns) for image_id, *place in rows}


def _last(conn: Connection, run: Run, split: str) -> int:
    last = "SELECT image_id FROM jobs WHERE run_id = ? AND split = ? ORDER BY image_id DESC LIMIT 1"
    return int(execute(conn, last, (run.id, split)).scalar_one())


@dataclass(frozen=True, slots=True)
class Read:
    """Pictures that are prepared for the engine, the milliseconds each took on average, and the errors of the others.

    `digests` are SHA-256 of their pixels by job id; `size` is the width and height of the last one, in pixels.
    """

    prepared: list[Prepared]
    errors: list[PictureError]
    load_ms: float
    prepare_ms: float
    digests: dict[int, bytes]
    size: tuple[int, int]


def prepare(
    engine: Engine, root: Path, places: Sequence[Place], frame: int, report: Callable[[int], None] = lambda done: None
) -> Read:
    """Reads, decodes and prepares pictures on this thread. Each gets its position, from 1, as its job id.

    `frame` is the recipe's; `report` is called with the number of pictures that are done.
    """
    prepared: list[Prepared] = []
    errors: list[PictureError] = []
    digests: dict[int, bytes] = {}
    load_sec = prepare_sec = 0.0
    size = (0, 0)
    with PictureReader(root) as reader:
        started = time.perf_counter()
        for number, (_, data) in enumerate(reader.read(places), 1):
            try:
                picture = open_picture(_bytes(data), frame)
                loaded = time.perf_counter()
                prepared.append(engine.prepare(number, Request([picture])))
                digests[number], size = hashlib.sha256(picture.tobytes()).digest(), picture.size
                load_sec, prepare_sec = load_sec + loaded - started, prepare_sec + time.perf_counter() - loaded
            except PictureError as error:
                errors.append(error)
            report(number)
            started = time.perf_counter()
    load_ms, prepare_ms = (1000 * seconds / max(1, len(prepared)) for seconds in (load_sec, prepare_sec))
    return Read(prepared, errors, load_ms, prepare_ms, digests, size)


def _bytes(data: bytes | PictureError) -> bytes:
    if isinstance(data, PictureError):
        raise data
    return data


class _Abandoned(Set[int]):
    """A live set: empty until `is_over`, and then all of the jobs. An engine may query it while a request hangs."""

    def __init__(self, job_ids: Sequence[int], is_over: Callable[[], bool]) -> None:
        self._job_ids = job_ids
        self._is_over = is_over

    def __contains__(self, job_id: object) -> bool:
        return job_id in self._job_ids and self._is_over()

    def __iter__(self) -> Iterator[int]:
        return iter(self._job_ids if self._is_over() else ())

    def __len__(self) -> int:
        return len(self._job_ids) if self._is_over() else 0


class Memory:
    """A Source of pictures that are prepared already. Once `is_over`, it ends and abandons the running ones."""

    def __init__(self, prepared: Sequence[Prepared], is_over: Callable[[], bool] = lambda: False) -> None:
        self._left = list(prepared)
        self._is_over = is_over
        self._abandoned = _Abandoned([picture.job_id for picture in prepared], is_over)

    def take(self, limit: int, wait: float | None) -> list[Prepared]:
        if self._is_over():
            return []
        taken, self._left = self._left[:limit], self._left[limit:]
        return taken

    def step(self, rows: int) -> Set[int]:
        return self._abandoned


def from_memory(
    engine: Engine,
    prepared: Sequence[Prepared],
    report: Callable[[int], None] = lambda done: None,
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[float, list[Completion]]:
    """Captions prepared pictures; returns the seconds it took, and the completions in order of job id.

    `report` is called with the number of completions so far. Once `is_over`, the rest is abandoned.
    """
    started = time.perf_counter()
    completions = []
    for completion in engine.run(Memory(prepared, is_over)):
        completions.append(completion)
        report(len(completions))
    return time.perf_counter() - started, sorted(completions, key=lambda completion: completion.job_id)
