"""Parts that were captioned apart become one database, in any order and any number of times."""

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from databases import sound
from histories import contents, hash_pictures, judge, live
from samples import register, write_shard

from rococap import db, queue
from rococap.transfer import merge

N = 40


def a_part(path: Path, empty_queue: Path, root: Path, chance: random.Random, window: dict, name: str) -> Path:
    """A database in which some pictures were captioned, and some of those judged, edited and studied."""
    shutil.copy(empty_queue, path)
    with sound(f"sqlite:///{path}") as database:
        register(database, root, ["train"], **window)
        with db.transaction(database) as conn:
            run = queue.get_run(conn, "default")
        live(database, run, chance, start=chance.randint(0, 100))
        mine = [f"train_{n:05}" for n in range(N) if n % 3 == int(name)]  # nobody judges what others judge
        judge(database, run, chance, mine)
        if chance.random() < 0.5:
            hash_pictures(database, chance)
        with db.transaction(database, write=True) as conn:
            queue.cancel(conn, run, image_ids=chance.sample([f"train_{n:05}" for n in range(N)], 5), now=9_000)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_shard(tmp_path / "set", "train", range(N // 2), "00000-of-00002")
    write_shard(tmp_path / "set", "train", range(N // 2, N), "00001-of-00002")
    return tmp_path / "set"


def merged(url: str, parts: Sequence[Path]) -> dict[str, list[tuple]]:
    with sound(url) as database:
        for part in parts:
            merge(database, str(part))
        return contents(database)


@pytest.mark.parametrize("seed", range(6))
def test_parts_give_the_same_database_in_any_order_and_however_often(tmp_path, empty_queue, root, seed):
    chance = random.Random(seed)
    windows = [{"limit": 25}, {"offset": 10, "limit": 20}, {"offset": 20}]
    parts = [a_part(tmp_path / f"{n}.db", empty_queue, root, chance, windows[n], str(n)) for n in range(3)]
    found = []
    for n in range(4):
        target = shutil.copy(empty_queue, tmp_path / f"target{n}.db")
        order = [*parts, *chance.choices(parts, k=n)]
        chance.shuffle(order)
        found.append(merged(f"sqlite:///{target}", order))
    for other in found[1:]:
        for table in other:
            assert other[table] == found[0][table], table
