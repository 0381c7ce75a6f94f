"""How much was captioned in each minute: every caption once, in a checkpoint segment or not."""

from contextlib import AbstractContextManager

import pytest
from samples import caption, fill, register, write_shard
from sqlalchemy import Connection, Engine
from steps import select, writing

from rococap import db, queue
from rococap.queue import throughput

MINUTE = 60_000

pytestmark = pytest.mark.every_database


def said(*new_tokens: int) -> list[dict]:
    return [{"text": "a chest", "new_tokens": n} for n in new_tokens]


def made(database: Engine, since: int) -> dict[tuple[str, str, int], tuple[int, int]]:
    """Captions and tokens by run, split and minute."""

    def read() -> AbstractContextManager[Connection]:
        return db.transaction(database)

    found = throughput(read, since=since * MINUTE, every_ms=MINUTE, now=20 * MINUTE)
    assert found.captions.keys() == found.tokens.keys()
    return {
        (at.run, at.split, at.at // MINUTE): (found.captions[at], found.tokens[at])
        for at in sorted(found.captions, key=lambda at: (at.run, at.split, at.at))
    }


def test_captions_and_their_tokens_are_counted_in_the_minute_in_which_they_were_stored(url, database, tmp_path):
    run = fill(database, tmp_path, 9)
    write_shard(tmp_path, "test", range(4))
    register(database, tmp_path, ["test"])
    for at, tokens in ((0, [9]), (MINUTE, [10, 20]), (2 * MINUTE - 1, [5]), (3 * MINUTE, [7])):
        caption(database, run, said(*tokens), now=at)
    caption(database, run, said(1, 2, 3), split="test", now=3 * MINUTE)
    assert made(database, 1) == {
        ("default", "test", 3): (3, 6),
        ("default", "train", 1): (3, 35),
        ("default", "train", 3): (1, 7),
    }
    assert made(database, 3) == {("default", "test", 3): (3, 6), ("default", "train", 3): (1, 7)}
    assert made(database, 4) == {}


def test_captions_in_checkpoint_segments_are_counted_too_and_none_twice(url, database, tmp_path, monkeypatch):
    monkeypatch.setattr("rococap.queue.rates.PAGE_SEGMENTS", 2)
    run = fill(database, tmp_path, 12)
    for minute in range(12):
        caption(database, run, said(minute), now=minute * MINUTE)
    with writing(database) as conn:  # a segment for every two captions; the last two are in none
        db.execute(
            conn, f"UPDATE jobs SET checkpoint = 1 + finished_at / {2 * MINUTE} WHERE finished_at < {10 * MINUTE}"
        )
    assert made(database, 3) == {("default", "train", minute): (1, minute) for minute in range(3, 12)}
    assert made(database, 11) == {("default", "train", 11): (1, 11)}


def test_restored_captions_and_deleted_runs_are_left_out(url, database, tmp_path):
    run = fill(database, tmp_path, 3)
    caption(database, run, said(4, 5), now=MINUTE)
    with writing(database) as conn:
        db.execute(conn, "UPDATE captions SET lease_id = NULL WHERE new_tokens = 4")
    assert made(database, 1) == {("default", "train", 1): (1, 5)}
    with writing(database) as conn:
        queue.delete_run(conn, run)
    assert made(database, 1) == {}
    assert select(database, "SELECT count(*) FROM captions") == [(2,)]
