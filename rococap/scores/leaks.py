"""Finds near-duplicate pictures in different splits of a data set, by perceptual hashes kept in the database.

A hash is computed once for each picture, and finding the pairs only reads hashes. The pictures are those that some run
was given, and of files that hold several frames, those that runs caption. ImageHash, which is in the extra `leaks`, is
needed to compute hashes and not to compare them.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection
from sqlalchemy import Engine as Database

from rococap import queue
from rococap.data import SPLITS, PictureReader, Place
from rococap.data.images import open_picture
from rococap.db import execute, transaction
from rococap.errors import PictureError, RococapError
from rococap.progress import Progress, silent
from rococap.queue import Run, place_of

ALGORITHM = "dhash-16"
"""The name under which hashes of first frames are kept. One that is computed in another way needs another name."""
SIDE = 16
BITS = 2 * SIDE * SIDE
WORDS = BITS // 64
DISTANCE = 40
"""The largest number of bits in which the hashes of near-duplicates differ. Of 2,528 copies that were scaled,
compressed, brightened or marked, 2 differ in more; no two of 900 different drawings, which look more alike than real
pictures do, differ in less than 63 (docs/log.md)."""
SHARE = 4
"""Of two pictures in which little is to be seen, near-duplicates also differ in at most a SHARE-th of the bits that are
set in both together: otherwise, all that is nearly black would be alike."""
SCREEN = (1, 6)
"""Words that are compared first: of the middle of the picture, since borders are mostly alike."""
PAGE = 100
"""Pictures that are read, hashed and stored together: no more are lost if the process is killed."""
ROWS_PER_READ = 5_000
BLOCK = 128, 4_096
"""Hashes that are compared at a time: one block of distances fits into a core's cache."""

Hashes = npt.NDArray[np.uint64]
"""Shape (pictures, WORDS)."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A picture that has no hash, and why."""

    split: str
    image_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Near:
    """Two pictures of different splits that look the same; `distance` is the number of bits that differ."""

    splits: tuple[str, str]
    image_ids: tuple[str, str]
    distance: int


@dataclass(frozen=True, slots=True)
class Leaks:
    """What is known of one data set. `hashed` counts the pictures with a hash by split, `new` those hashed just now."""

    dataset: str
    revision: str
    hashed: dict[str, int]
    new: int
    unreadable: list[Unreadable]
    pairs: list[Near]


@dataclass(frozen=True, slots=True)
class Known:
    """The pictures of one split that have a hash, by image_id, and those of them with a near-duplicate elsewhere."""

    hashed: frozenset[str]
    near: frozenset[str]


def find(database: Database, progress: Progress = silent) -> list[Leaks]:
    """Hashes the pictures that have no hash yet, and lists the near-duplicates of each data set that has a run.

    If it is killed, the next call goes on where it was. Two at once do the same work twice, without harm.

    Raises RococapError if there is no run or ImageHash is not installed, DatasetError if pictures are to be hashed and
    their data set is not available.
    """
    with transaction(database) as conn:
        runs = queue.list_runs(conn)
    if not runs:
        raise RococapError("There is no run yet. Register pictures first: rococap enqueue --split train")
    by_dataset: dict[int, list[Run]] = {}
    for run in runs:
        by_dataset.setdefault(run.dataset_id, []).append(run)
    return [_find(database, of_one, progress) for of_one in by_dataset.values()]


def _find(database: Database, runs: Sequence[Run], progress: Progress) -> Leaks:
    by_frame: dict[int, list[Run]] = {}
    for run in runs:
        by_frame.setdefault(run.recipe.frame, []).append(run)
    new, unreadable = 0, []
    for _, of_frame in sorted(by_frame.items()):
        n_new, failed = _hash_pictures(database, of_frame, progress)
        new += n_new
        unreadable += failed
    found = _read(database, runs[0].dataset_id)
    hashed = Counter(split for split, _ in set(zip(found.splits, found.image_ids, strict=True)))
    in_order = {split: hashed[split] for split in SPLITS if split in hashed}
    return Leaks(runs[0].dataset, runs[0].dataset_revision, in_order, new, unreadable, _pairs(found))


def known(database: Database, run: Run, splits: Sequence[str]) -> dict[str, Known]:
    """What is known of the pictures in each of these splits, in the frame that the run captions; nothing if they, or
    all other splits, have no hash.
    """
    all_known = _read(database, run.dataset_id)
    found = {}
    for split in splits:
        mine, others = all_known.of(split).by(_algorithm(run.recipe.frame)), all_known.beside(split)
        if len(mine) and len(others):
            near = {mine.image_ids[at] for at, _, _ in _close(mine.hashes, others.hashes)}
            found[split] = Known(frozenset(mine.image_ids), frozenset(near))
    return found


# --- hashing ---------------------------------------------------------------------------------------------------


def _hash_pictures(database: Database, runs: Sequence[Run], progress: Progress) -> tuple[int, list[Unreadable]]:
    """Returns the number of pictures that were hashed, and those that could not be. The runs caption the same frame."""
    with transaction(database) as conn:
        left = _unhashed_by_split(conn, runs)
    if not left:
        return 0, []
    _check_installed()
    run, frame, total = runs[0], runs[0].recipe.frame, sum(left.values())
    step = f"{run.dataset}: hashing" + (f" frame {frame}" if frame > 1 else "")
    located = queue.dataset_of(database, run, list(left))
    new, unreadable = 0, []
    # Pillow and numpy release the interpreter while they decode and scale, so threads use every core.
    with PictureReader(located.root) as reader, ThreadPoolExecutor(os.cpu_count()) as pool:
        for page in _unhashed(database, runs):
            places = [place_of(row[1:], run.columns) for row in page]
            results = list(pool.map(partial(_hash_or_error, frame=frame), reader.read(places)))
            hashed = [(row[0], one) for row, one in zip(page, results, strict=True) if isinstance(one, str)]
            unreadable += [
                Unreadable(place.split, place.image_id, str(one))
                for place, one in zip(places, results, strict=True)
                if isinstance(one, PictureError)
            ]
            _keep(database, [(number, _algorithm(frame), one) for number, one in hashed])
            new += len(hashed)
            progress(step, new + len(unreadable), total)
    return new, unreadable


def _check_installed() -> None:
    try:
        import imagehash  # noqa: F401
    except ImportError as error:
        raise RococapError(f"Hashing pictures needs ImageHash ({error}): pip install 'rococap[leaks]'") from error


def _algorithm(frame: int) -> str:
    return ALGORITHM if frame == 1 else f"{ALGORITHM} frame {frame}"


def _hash_or_error(read: tuple[Place, bytes | PictureError], frame: int) -> str | PictureError:
    _, data = read
    if isinstance(data, PictureError):
        return data
    try:
        return hash_of(data, frame)
    except PictureError as error:
        return error


def hash_of(data: bytes, frame: int = 1) -> str:
    """The hash of a frame, counted from 1, of a picture file, in hexadecimal: for each field of a grid, whether it is
    brighter than its neighbour on the left, and then, than the one above. Raises PictureError if it cannot be opened.
    """
    from imagehash import dhash, dhash_vertical

    picture = open_picture(data, frame)
    return f"{dhash(picture, SIDE)}{dhash_vertical(picture, SIDE)}"


def _keep(database: Database, rows: list[tuple[int, str, str]]) -> None:
    sql = "INSERT INTO image_hashes (image_id, algorithm, hash) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
    if rows:
        with transaction(database, write=True) as conn:
            execute(conn, sql, rows)


def _condition(runs: Sequence[Run]) -> str:
    """The pictures of a data set that one of the runs was given and that have no hash; its parameters are `_values`.

    The plus sign keeps SQLite from its index of the data set, by which each page would scan and sort all pictures.
    """
    return (
        "+i.dataset_id = ? AND EXISTS (SELECT 1 FROM jobs j WHERE j.run_id IN ({}) AND j.image_id = i.id) "
        "AND NOT EXISTS (SELECT 1 FROM image_hashes h WHERE h.image_id = i.id AND h.algorithm = ?)"
    ).format(", ".join("?" * len(runs)))


def _values(runs: Sequence[Run]) -> tuple[int | str, ...]:
    return (runs[0].dataset_id, *(run.id for run in runs), _algorithm(runs[0].recipe.frame))


def _unhashed_by_split(conn: Connection, runs: Sequence[Run]) -> dict[str, int]:
    sql = f"SELECT i.split, count(*) FROM images i WHERE {_condition(runs)} GROUP BY i.split"
    return dict(map(tuple, execute(conn, sql, _values(runs))))


def _unhashed(database: Database, runs: Sequence[Run]) -> Iterator[Sequence[Sequence[Any]]]:
    """Pages of (id, and the columns of a Place), in data set order, each read in a transaction of its own."""
    sql = (
        "SELECT i.id, (SELECT path FROM shards WHERE shards.id = i.shard_id), i.split, i.row_group, i.row_in_group, "
        f"i.image_id FROM images i WHERE {_condition(runs)} AND i.id > ? ORDER BY i.id LIMIT ?"
    )
    after = 0
    while True:
        with transaction(database) as conn:
            rows = execute(conn, sql, (*_values(runs), after, PAGE)).fetchall()
        if not rows:
            return
        after = rows[-1][0]
        yield rows


# --- comparing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Hashed:
    """Pictures with their hashes, in data set order: a row for each frame that was hashed."""

    splits: list[str]
    image_ids: list[str]
    algorithms: list[str]
    hashes: Hashes

    def __len__(self) -> int:
        return len(self.splits)

    def of(self, split: str) -> "_Hashed":
        return self._where([one == split for one in self.splits])

    def by(self, algorithm: str) -> "_Hashed":
        return self._where([one == algorithm for one in self.algorithms])

    def beside(self, split: str) -> "_Hashed":
        return self._where([one != split for one in self.splits])

    def _where(self, chosen: Sequence[bool]) -> "_Hashed":
        rows = np.flatnonzero(chosen)
        return _Hashed(
            [self.splits[at] for at in rows],
            [self.image_ids[at] for at in rows],
            [self.algorithms[at] for at in rows],
            self.hashes[rows],
        )


def _read(database: Database, dataset_id: int) -> _Hashed:
    sql = (
        "SELECT h.image_id, h.algorithm, i.split, i.image_id, h.hash FROM image_hashes h "
        "JOIN images i ON i.id = h.image_id WHERE (h.algorithm = ? OR h.algorithm LIKE ?) "
        "AND (h.image_id, h.algorithm) > (?, ?) AND i.dataset_id = ? ORDER BY h.image_id, h.algorithm LIMIT ?"
    )
    algorithms: list[str] = []
    splits: list[str] = []
    image_ids: list[str] = []
    digits: list[str] = []
    after = (0, "")
    while True:
        with transaction(database) as conn:
            values = (ALGORITHM, f"{ALGORITHM} frame %", *after, dataset_id, ROWS_PER_READ)
            rows = execute(conn, sql, values).fetchall()
        if not rows:
            break
        after = (rows[-1][0], rows[-1][1])
        algorithms += [row[1] for row in rows]
        splits += [row[2] for row in rows]
        image_ids += [row[3] for row in rows]
        digits += [row[4] for row in rows]
    return _Hashed(splits, image_ids, algorithms, words_of(digits))


def words_of(hashes: Sequence[str]) -> Hashes:
    """Hashes in hexadecimal as an array of words."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint64).reshape(-1, WORDS)


def _pairs(hashed: _Hashed) -> list[Near]:
    """The near-duplicates in different splits: by pair of splits, the most alike first."""
    parts = {split: hashed.of(split) for split in SPLITS}
    found: list[Near] = []
    for number, one in enumerate(SPLITS):
        for other in SPLITS[number + 1 :]:
            close = _close(parts[one].hashes, parts[other].hashes)
            nearest: dict[tuple[str, str], Near] = {}  # of the frames of two pictures
            for at, to, distance in sorted(close, key=lambda near: (near[2], near[0], near[1])):
                ids = parts[one].image_ids[at], parts[other].image_ids[to]
                nearest.setdefault(ids, Near((one, other), ids, distance))
            found += nearest.values()
    return found


def _close(ours: Hashes, theirs: Hashes) -> list[tuple[int, int, int]]:
    """(row of ours, row of theirs, distance) of all near-duplicates."""
    found: list[tuple[int, int, int]] = []
    high, wide = BLOCK
    for top in range(0, len(ours), high):
        for left in range(0, len(theirs), wide):
            found += [
                (top + at, left + to, distance)
                for at, to, distance in _close_in_block(ours[top : top + high], theirs[left : left + wide])
            ]
    return found


def _close_in_block(ours: Hashes, theirs: Hashes) -> list[tuple[int, int, int]]:
    # A few words rule out nearly all pairs: hashes differ in at least as many bits as any part of them.
    parts = (np.bitwise_count(ours[:, word, None] ^ theirs[:, word]) for word in SCREEN)
    rows, columns = np.nonzero(sum(parts, np.uint8(0)) <= DISTANCE)
    distances = np.bitwise_count(ours[rows] ^ theirs[columns]).sum(axis=1, dtype=np.int64)
    near = (distances <= DISTANCE) & (SHARE * distances <= _bits_set(ours)[rows] + _bits_set(theirs)[columns])
    return list(zip(rows[near].tolist(), columns[near].tolist(), distances[near].tolist(), strict=True))


def _bits_set(hashes: Hashes) -> npt.NDArray[np.int64]:
    bits: npt.NDArray[np.int64] = np.bitwise_count(hashes).sum(axis=1, dtype=np.int64)
    return bits
