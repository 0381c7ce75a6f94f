"""A picture in which there is nothing to see is captioned, flagged, and found again by its flag."""

import json
from io import BytesIO

import numpy as np
import pytest
import steps
from PIL import Image
from samples import register, write_shard
from small_engine import SmallEngine
from sqlalchemy import Engine

from rococap import db, queue
from rococap.recipe import Recipe
from rococap.scores import report
from rococap.worker.process import work
from rococap.worker.settings import Settings
from rococap.worker.store import Outcome

BLANK = (2, 5)


def png(values: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def work_on(database: Engine, **settings) -> Outcome:
    return work(database, Settings.of(self_check=False, **settings), load=lambda *_: SmallEngine())


@pytest.fixture
def captioned(database, tmp_path) -> Engine:
    """Seven pictures, of which two have one level: one of 8 bits and one of 16."""
    ramp = np.arange(36 * 36).reshape(36, 36)
    pictures = {n: png((ramp % (50 + n)).astype(np.uint8)) for n in range(7)}
    pictures |= {2: png(np.full((36, 36), 9, np.uint8)), 5: png(np.full((36, 36), 900, np.uint16))}
    write_shard(tmp_path / "set", "train", range(7), pictures=pictures)
    register(database, tmp_path / "set", ["train"])
    assert work_on(database).done == 7
    return database


def said(url: str, *words: str) -> str:
    return steps.said("--db", url, *words)


@pytest.mark.every_database
def test_a_picture_of_one_level_is_captioned_and_flagged(captioned):
    with db.transaction(captioned) as conn:
        rows = db.execute(
            conn,
            "SELECT i.image_id FROM captions c JOIN jobs j ON j.id = c.job_id JOIN images i ON i.id = j.image_id "
            "WHERE c.flags = 'blank' ORDER BY i.image_id",
        ).fetchall()
        (counts,) = queue.counts(conn)
    assert [row[0] for row in rows] == [f"train_{n:05}" for n in BLANK]
    assert (counts.done, counts.flags) == (7, {"blank": 2})


def test_status_and_compare_count_them(captioned, url, tmp_path):
    assert "default train: flagged captions: 2 blank" in said(url, "status")
    told = json.loads(said(url, "compare", "default", "--json", "--output", str(tmp_path / "compared.csv")))
    assert told["runs"][0]["flags"] == {"blank": 2}


def test_the_report_shows_them(captioned, tmp_path):
    path = tmp_path / "report.html"
    report.report(captioned, ["default"], "train", path, pictures=7)
    assert "blank" in path.read_text(encoding="utf-8")


def test_they_are_done_again_by_their_flag(captioned, url):
    again = ("enqueue", "--run", "again", "--from", "default", "--flag", "blank", "--prompt", "What is this?")
    assert said(url, *again) == "again train: 2 new, 0 known, 0 changed\n"


def test_another_flag_stands_beside_it(database, tmp_path):
    write_shard(tmp_path / "set", "train", [1])
    register(database, tmp_path / "set", ["train"], recipe=Recipe(model="tests/small"))
    work(database, Settings(self_check=False), load=lambda *_: SmallEngine(adds=" la" * 9))
    with db.transaction(database) as conn:
        assert db.execute(conn, "SELECT flags FROM captions").scalar() == "blank,loop"
