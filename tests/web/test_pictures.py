"""Thumbnails, full pictures and the details of one picture."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import galleries
import numpy as np
import pytest
import samples
from galleries import FAILED, both_databases, world
from PIL import Image
from sqlalchemy import Engine
from steps import writing

from rococap import db, queue
from rococap.data.images import open_picture
from rococap.web import gallery
from rococap.web.pictures import PictureGone, Pictures, Source, Thumbnails, folder_of, source_of


def deep(width: int, height: int) -> bytes:
    """A picture of 16 bits whose values all lie in a small part of their range."""
    values = np.linspace(1_000, 1_400, width * height, dtype=np.uint16).reshape(height, width)
    file = BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


WIDE = deep(600, 300)


@pytest.fixture
def shown(database: Engine, tmp_path: Path) -> tuple[queue.Run, list[Source]]:
    """A run with its pictures: the first is wide and deep, the second damaged."""
    samples.write_shard(tmp_path, "train", range(12), pictures={0: WIDE, 1: b"no picture"})
    samples.register(database, tmp_path, ["train"])
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "default")
        sources = [source_of(conn, run, image) for image in range(1, 13)]
        assert source_of(conn, run, 99) is None
    return run, [source for source in sources if source is not None]


@pytest.fixture
def pictures(tmp_path: Path):
    pictures = Pictures(Thumbnails(tmp_path / "thumbnails"))
    yield pictures
    pictures.close()


def test_a_thumbnail_and_the_full_picture_show_what_the_model_saw(shown, pictures):
    run, (wide, *_) = shown
    seen = open_picture(WIDE)
    assert np.array_equal(Image.open(BytesIO(pictures.full(run, wide))), seen)
    assert Image.open(BytesIO(pictures.full(run, wide, "jpeg"))).format == "JPEG"
    small = Image.open(BytesIO(pictures.thumbnail(run, wide)))
    assert (small.format, small.size) == ("JPEG", (256, 128))
    expected = np.array(seen.resize((256, 128)), dtype=int)
    assert np.abs(np.array(small, dtype=int) - expected).mean() < 3
    assert expected.max() - expected.min() > 200


def test_thumbnails_are_kept_for_every_process_and_outlive_their_shard(shown, pictures, tmp_path):
    run, sources = shown
    pictures.prepare(run, sources)
    first = pictures.thumbnail(run, sources[0])
    (tmp_path / "data" / "train-00000-of-00001.parquet").unlink()
    other = Pictures(Thumbnails(tmp_path / "thumbnails"))
    assert other.thumbnail(run, sources[0]) == first
    assert len({other.thumbnail(run, source) for source in sources[2:]}) == 10
    with pytest.raises(PictureGone) as caught:
        other.full(run, sources[0])
    assert caught.value.code == "shard"
    assert "is gone: restore it" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_picture_that_cannot_be_read_says_why(shown, pictures):
    run, sources = shown
    with pytest.raises(PictureGone, match="picture") as caught:
        pictures.thumbnail(run, sources[1])
    assert caught.value.code == "not_an_image"


def test_a_data_set_that_is_not_downloaded_says_how_to_get_it(shown, pictures):
    run, (source, *_) = shown
    hub = replace(run, dataset="owner/name", dataset_revision="c0ffee")
    with pytest.raises(PictureGone, match="hf download") as caught:
        pictures.thumbnail(hub, source)
    assert caught.value.code == "not_downloaded"


def test_many_threads_get_the_pictures_that_they_ask_for(shown, pictures):
    run, sources = shown
    asked = [sources[n] for n in (11, 2, 7, 3, 10, 4, 9, 5, 8, 6)] * 2
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda source: pictures.thumbnail(run, source), asked))
    for source, data in zip(asked, got, strict=True):
        number = int(source.place.image_id[-5:])
        assert Image.open(BytesIO(data)).size == Image.open(BytesIO(samples.picture(number))).size


def test_a_replaced_shard_gets_new_thumbnails(shown, pictures, database, tmp_path):
    run, sources = shown
    before = pictures.thumbnail(run, sources[2])
    samples.write_shard(tmp_path, "train", range(12), pictures={2: WIDE}, captions={2: "New."})
    samples.register(database, tmp_path, ["train"])
    with db.transaction(database) as conn:
        replaced = source_of(conn, run, 3)
    assert replaced is not None
    assert pictures.thumbnail(run, replaced) != before


def test_the_folder_keeps_its_limit_and_what_was_read_last(tmp_path):
    thumbnails = Thumbnails(tmp_path, max_bytes=1_000)
    names = [f"{n:02}" * 32 for n in range(30)]
    for number, name in enumerate(names):
        thumbnails.put(name, bytes(100))
        age(tmp_path, name, number)
        if thumbnails.get(names[0]) is None:
            raise AssertionError(f"the file that is always read went after {number}")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert 500 <= sum(path.stat().st_size for path in files) <= 1_000
    assert thumbnails.get(names[29]) == bytes(100)
    assert thumbnails.get(names[1]) is None


def age(folder: Path, name: str, at: int) -> None:
    os.utime(folder / name[:2] / f"{name}.jpg", (at, at))


def test_two_processes_share_a_limit_and_leftovers_go(tmp_path):
    (tmp_path / "00").mkdir()
    leftover = tmp_path / "00" / ".killed.jpg.1.part"
    leftover.write_bytes(bytes(300))
    os.utime(leftover, (0, 0))
    one, other = Thumbnails(tmp_path, 1_000), Thumbnails(tmp_path, 1_000)
    for n in range(10):
        one.put(f"{n:02}" * 32, bytes(100))
        other.put(f"{n + 50:02}" * 32, bytes(100))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 1_100
    assert not leftover.exists()


def test_a_folder_that_cannot_be_written_is_no_trouble(shown, tmp_path):
    run, sources = shown
    (tmp_path / "file").write_text("in the way")
    pictures = Pictures(Thumbnails(tmp_path / "file"))
    assert pictures.thumbnail(run, sources[0])[:2] == b"\xff\xd8"
    pictures.close()


def test_thumbnails_lie_beside_an_sqlite_file(database, tmp_path):
    assert folder_of(database) == tmp_path / "queue.db.thumbnails"


@both_databases
def test_the_details_of_a_picture_are_all_that_happened_to_it(database, tmp_path):
    runs = world(database, tmp_path)
    with db.transaction(database) as conn:
        ids = {image_id: id for id, image_id in db.execute(conn, "SELECT id, image_id FROM images").fetchall()}
        failed = gallery.details(conn, runs, ids["train_00003"])
        assert gallery.details(conn, runs, 10_000) is None
        only_first = gallery.details(conn, runs[:1], ids["test_00002"])
    assert failed is not None
    assert only_first is not None
    one, two = failed.histories
    assert (one.status, one.attempts, one.made) == ("failed", 1, None)
    assert [(failure.code, failure.message) for failure in one.failures] == [(FAILED[3], "picture 3")]
    assert [lease.id for lease in one.leases] == [one.failures[0].lease]
    assert (two.status, two.failures, two.finished_at) == ("done", (), galleries.at(3))
    assert (two.made.finish_reason, two.made.engine, two.made.lease) == ("stop", "small", two.leases[0].id)
    assert (two.leases[0].run, two.leases[0].jobs, two.leases[0].done) == ("two", galleries.SECOND, galleries.SECOND)
    assert failed.picture.source.place.row_in_group == 3
    (untouched,) = only_first.histories
    assert (untouched.status, untouched.attempts, untouched.leases) == ("pending", 0, ())
    with writing(database) as conn:
        queue.delete_run(conn, runs[0])
