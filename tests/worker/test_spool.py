"""Captions on disk: whole lines, one owner, left to the next."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from samples import fill
from small_engine import INFO, SmallEngine, caption_of
from sqlalchemy.engine import make_url

from rococap import db, queue
from rococap.engines import Completion, Failure
from rococap.queue import Lease
from rococap.worker import spool
from rococap.worker.process import work
from rococap.worker.settings import Settings
from rococap.worker.spool import Spool

LEASE = Lease(7, 3, 1, "train", 4)
CAPTIONS = (
    Completion(1, "Näh, “quoted”,\nand a lone \ud800 half", "loop", "length", 10, 3, 12.5, 4.0, 50.0, 4),
    Completion(2, failure=Failure("truncated", "The file ends early.", transient=True)),
)


def left_behind(folder: Path) -> list[spool.Entry]:
    return [entry for entries, _ in spool.abandoned(folder) for entry in entries]


def test_what_is_kept_comes_back_as_it_was(tmp_path):
    kept = Spool(tmp_path / "spool", "me")
    kept.add(LEASE, CAPTIONS)
    kept.add(LEASE, CAPTIONS[:1])
    kept.close()
    assert left_behind(tmp_path / "spool") == [
        spool.Entry("me", LEASE, CAPTIONS),
        spool.Entry("me", LEASE, CAPTIONS[:1]),
    ]
    assert spool.waiting(tmp_path / "spool") == {tmp_path / "spool" / "me.jsonl": 3}


def test_nothing_is_on_disk_before_something_is_kept_nor_after_all_is_stored(tmp_path):
    kept = Spool(tmp_path / "spool", "me")
    assert list(tmp_path.iterdir()) == []
    kept.add(LEASE, CAPTIONS)
    kept.clear()
    assert kept.entries == []
    assert list(tmp_path.iterdir()) == []
    kept.add(LEASE, CAPTIONS)
    assert spool.waiting(tmp_path / "spool") == {tmp_path / "spool" / "me.jsonl": 2}
    kept.clear()


def test_a_file_whose_worker_lives_is_left_alone(tmp_path):
    kept = Spool(tmp_path / "spool", "me")
    kept.add(LEASE, CAPTIONS)
    code = (
        f"from rococap.worker import spool; print(len(list(spool.abandoned(spool.Path({str(tmp_path / 'spool')!r})))))"
    )
    other = [sys.executable, "-c", code]
    assert subprocess.run(other, capture_output=True, text=True, check=True).stdout == "0\n"
    kept.close()
    assert subprocess.run(other, capture_output=True, text=True, check=True).stdout == "1\n"


def test_a_line_that_was_cut_off_is_left_out_and_the_others_are_read(tmp_path):
    kept = Spool(tmp_path, "me")
    kept.add(LEASE, CAPTIONS)
    kept.close()
    path = tmp_path / "me.jsonl"
    with path.open("ab") as file:
        file.write(path.read_bytes()[:-20])
    assert left_behind(tmp_path) == [spool.Entry("me", LEASE, CAPTIONS)]


def test_a_line_of_another_version_is_left_to_that(tmp_path, caplog):
    kept = Spool(tmp_path, "me")
    kept.add(LEASE, CAPTIONS)
    kept.close()
    path = tmp_path / "me.jsonl"
    line = path.read_bytes()
    path.write_bytes(line.replace(b'"batch_size"', b'"size_of_batch"') + line)
    for _ in range(2):
        for entries, keep in spool.abandoned(tmp_path):
            assert entries == [spool.Entry("me", LEASE, CAPTIONS)]
            keep([])
    assert path.read_bytes().count(b"\n") == 2
    assert caplog.text.count("this version of rococap cannot read") == 1


def test_what_is_kept_of_a_file_that_was_left_is_all_that_remains_of_it(tmp_path):
    kept = Spool(tmp_path, "me")
    kept.add(LEASE, CAPTIONS)
    kept.add(LEASE, released=[5, 6])
    kept.close()
    for entries, keep in spool.abandoned(tmp_path):
        keep([entries[0]])
    assert left_behind(tmp_path) == [spool.Entry("me", LEASE, CAPTIONS)]
    for _, keep in spool.abandoned(tmp_path):
        keep([])
    assert not tmp_path.exists()


def test_a_write_that_failed_half_way_leaves_no_torn_line_and_is_made_up_for_by_the_next(tmp_path, monkeypatch):
    kept = Spool(tmp_path, "me")
    kept.add(LEASE, CAPTIONS)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            kept.add(LEASE, CAPTIONS[:1])
    assert (len(kept.entries), kept.n_written()) == (2, 2)
    kept.add(LEASE, CAPTIONS[1:])
    assert kept.n_written() == 4
    kept.close()
    assert [entry.completions for entry in left_behind(tmp_path)] == [CAPTIONS, CAPTIONS[:1], CAPTIONS[1:]]


def test_the_folder_is_beside_the_sqlite_file_or_where_the_environment_says(monkeypatch):
    assert spool.folder_of(make_url("sqlite:////data/queue.db")) == Path("/data/queue.db.spool")
    assert spool.folder_of(make_url("postgresql+psycopg://me@host/queue")) == Path("rococap.spool")
    monkeypatch.setenv("ROCOCAP_SPOOL", "/fast/spool")
    assert spool.folder_of(make_url("sqlite:////data/queue.db")) == Path("/fast/spool")


def test_what_another_database_leased_is_left_where_it_is(database, url, tmp_path, monkeypatch):
    folder = tmp_path / "spool"
    monkeypatch.setenv("ROCOCAP_SPOOL", str(folder))
    fill(database, tmp_path / "set", 4)
    kept = Spool(folder, "of another database")
    kept.add(Lease(1, 1, 1, "train", 0), [Completion(1, "Of another picture.")])
    kept.close()
    work(database, Settings.of(batch_size=4, self_check=False), load=lambda *_: SmallEngine())
    with db.transaction(database) as conn:
        texts = [row[0] for row in db.execute(conn, "SELECT text FROM captions ORDER BY job_id").fetchall()]
    assert texts == [caption_of(number) for number in range(4)]
    assert spool.waiting(folder) == {folder / "of another database.jsonl": 1}


@pytest.mark.every_database
def test_the_next_worker_stores_what_is_free_and_drops_what_another_did(database, tmp_path, monkeypatch):
    folder = tmp_path / "spool"
    monkeypatch.setenv("ROCOCAP_SPOOL", str(folder))
    run = fill(database, tmp_path / "set", 8)
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, "gone", "host", 1, INFO)
        lease = queue.claim(conn, worker, run.id, "train", 4, ttl_ms=60_000)
    kept = Spool(folder, "gone")
    kept.add(lease, [Completion(job.id, "From the spool.") for job in lease.jobs])
    kept.close()
    with db.transaction(database, write=True) as conn:
        queue.crash(conn, lease.id)
        other = queue.register_worker(conn, "other", "host", 1, INFO)
        taken = queue.claim(conn, other, run.id, "train", 1, ttl_ms=60_000, lane=queue.SUSPECTS)
        queue.complete(conn, taken, [Completion(taken.jobs[0].id, "The other's.")])
    outcome = work(database, Settings.of(batch_size=4, self_check=False), load=lambda *_: SmallEngine())
    assert (outcome.recovered, outcome.done, outcome.lost) == (3, 7, 1)
    with db.transaction(database) as conn:
        texts = [row[0] for row in db.execute(conn, "SELECT text FROM captions ORDER BY job_id").fetchall()]
    assert texts == ["The other's.", *["From the spool."] * 3, *(caption_of(number) for number in range(4, 8))]
    assert not folder.exists()


def test_lines_are_json_that_a_person_can_read(tmp_path):
    kept = Spool(tmp_path, "me")
    kept.add(LEASE, CAPTIONS[1:])
    kept.close()
    (line,) = (tmp_path / "me.jsonl").read_text().splitlines()
    assert json.loads(line)["lease"] == {"id": 7, "worker_id": 3, "run_id": 1, "split": "train", "lane": 4}
