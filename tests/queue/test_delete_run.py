"""A run is removed, and nothing of it comes back as another's."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from samples import caption, fill, texts
from small_engine import INFO, SmallEngine
from sqlalchemy import Engine
from steps import invoke, select

from rococap import db, queue
from rococap.doctor import Verdict, examine
from rococap.engines import Completion, Failure
from rococap.errors import LeaseLost, RunError
from rococap.queue import Claim, Lease, Run, enqueue, leases
from rococap.recipe import Recipe
from rococap.scores import evaluate
from rococap.worker.process import work
from rococap.worker.settings import Settings

TTL = 60_000
OTHER = Recipe(model="tests/small", prompt="What?")


@pytest.fixture
def run(database: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("ROCOCAP_DB", database.url.render_as_string(hide_password=False))
    return fill(database, tmp_path / "set", 6)


def claim(database: Engine, run: Run, most: int = 2, now: int | None = None) -> Claim:
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, f"worker of {run.name} {run.id}", "host", 1, INFO)
        return queue.claim(conn, worker, run.id, "train", most, ttl_ms=TTL, now=now)


def delete(database: Engine, run: Run) -> None:
    with db.transaction(database, write=True) as conn:
        queue.delete_run(conn, run)
    with db.transaction(database, write=True) as conn:
        while queue.clear_deleted(conn):
            pass


def late(lease: Lease) -> list[Completion]:
    return [Completion(job.id, "Of the run that was deleted.") for job in lease.jobs]


@pytest.mark.every_database
def test_a_late_completion_of_a_deleted_run_is_dropped_although_another_run_has_its_ids(database, run, tmp_path):
    lease = claim(database, run, now=0)
    with db.transaction(database, write=True) as conn:
        assert queue.reap(conn, now=TTL) == [lease.id]
    delete(database, run)
    new = fill(database, tmp_path / "set", 6, recipe=OTHER)
    assert (new.name, new.id) == (run.name, run.id + 1)
    if database.dialect.name == "sqlite":
        assert {(job.id,) for job in lease.jobs} < set(select(database, f"SELECT id FROM jobs WHERE run_id = {new.id}"))
    with pytest.raises(LeaseLost), db.transaction(database, write=True) as conn:
        queue.complete(conn, lease, late(lease))
    with db.transaction(database, write=True) as conn:
        assert queue.belongs(conn, lease, f"worker of {run.name} {run.id}"), "else it would wait in the spool for ever"
        result = queue.recover(conn, lease.worker_id, lease, late(lease))
    assert result == queue.Recovered(frozenset(), frozenset(job.id for job in lease.jobs), frozenset())
    assert select(database, "SELECT count(*) FROM captions") == [(0,)]
    assert select(database, "SELECT DISTINCT status, run_id FROM jobs") == [("pending", new.id)]


@pytest.mark.slow
@pytest.mark.every_database
def test_everything_of_a_run_goes_but_its_leases_and_a_tombstone_and_another_run_stays_whole(database, run, tmp_path):
    other = fill(database, tmp_path / "set", 6, run="other", recipe=OTHER)
    for one in (run, other):
        caption(database, one, texts("One.", "Two."))
        failing = claim(database, one, 1)
        with db.transaction(database, write=True) as conn:
            queue.fail(conn, failing, {failing.jobs[0].id: Failure("corrupt", "Broken.")})
        evaluate.evaluate(database, [one.name], ["train"])
    kept = [select(database, f"SELECT * FROM {table} ORDER BY 1") for table in ("captions", "failures", "scores")]
    delete(database, run)
    n = {
        table: select(database, f"SELECT count(*) FROM {table}") for table in ("jobs", "captions", "failures", "leases")
    }
    assert n == {"jobs": [(6,)], "captions": [(2,)], "failures": [(1,)], "leases": [(4,)]}
    left = [select(database, f"SELECT * FROM {table} ORDER BY 1") for table in ("captions", "failures", "scores")]
    assert [[row for row in rows if row in before] for rows, before in zip(left, kept, strict=True)] == left
    assert all(left)
    assert select(database, "SELECT name, deleted_at IS NULL FROM runs ORDER BY id") == [
        (f"default (deleted {run.id})", 0),
        ("other", 1),
    ]
    with db.transaction(database) as conn:
        assert [(one.run, one.done, one.failed) for one in queue.counts(conn)] == [("other", 2, 1)]
        assert [one.run.name for one in queue.runs_seen(conn)] == ["other"]


@pytest.mark.slow
def test_the_command_asks_first_and_frees_the_name(database, run, tmp_path):
    caption(database, run, texts("One.", "Two."))
    asked = invoke("runs", "--delete", "default", input="n\n")
    assert (asked.exit_code, asked.stderr) == (
        1,
        "Error: Nothing was deleted. To delete without being asked, add --yes.\n",
    )
    assert "Run default has 6 pictures, 2 of them captioned." in asked.stdout
    assert invoke("runs", "--delete", "default", input="").exit_code == 1
    assert select(database, "SELECT count(*) FROM jobs") == [(6,)]
    done = invoke("runs", "--delete", "default", input="y\n")
    assert done.exit_code == 0
    assert done.stdout.endswith("default: deleted, 6 pictures and 2 captions. To reclaim the space: rococap vacuum\n")
    again = invoke("runs", "--delete", "default", "--yes")
    assert again.exit_code == 1
    assert "There is no run 'default'." in again.stderr
    assert invoke("runs").stdout.startswith("Nothing is registered here yet.")
    new = fill(database, tmp_path / "set", 6, recipe=OTHER)
    assert invoke("runs", "--delete", "default", "--yes").exit_code == 0
    assert select(database, "SELECT name FROM runs ORDER BY id") == [
        (f"default (deleted {run.id})",),
        (f"default (deleted {new.id})",),
    ]
    assert {check.name: check.verdict for check in examine(database)}["tallies"] == Verdict.OK


@pytest.mark.parametrize("args", [["--yes"], ["--delete", "default", "--json"]])
def test_options_that_do_not_go_together_are_refused(run, args):
    assert invoke("runs", *args).exit_code == 2


def test_a_run_whose_pictures_are_held_stays_and_the_command_that_withdraws_them_is_named(database, run):
    claim(database, run)
    refused = invoke("runs", "--delete", "default", "--yes")
    assert refused.exit_code == 1
    assert "(1 leases are open), so it was not deleted." in refused.stderr
    assert select(database, "SELECT name, deleted_at FROM runs") == [("default", None)]
    assert refused.stderr.rstrip().endswith("rococap cancel --run default --all")
    assert invoke("cancel", "--run", "default", "--all").exit_code == 0
    assert invoke("runs", "--delete", "default", "--yes").exit_code == 0


def test_a_deletion_that_was_killed_half_way_is_not_seen_and_vacuum_finishes_it(database, run, tmp_path):
    fill(database, tmp_path / "set", 6, run="other", recipe=OTHER)
    caption(database, run, texts("One.", ""))
    with db.transaction(database, write=True) as conn:
        queue.delete_run(conn, run)
    with db.transaction(database, write=True) as conn:
        assert queue.clear_deleted(conn, limit=1) == 1
    with db.transaction(database) as conn:
        assert [one.run for one in queue.counts(conn)] == ["other"]
    assert {check.name: check.verdict for check in examine(database)}["tallies"] == Verdict.OK
    assert invoke("vacuum").exit_code == 0
    assert select(database, "SELECT DISTINCT r.name FROM jobs j JOIN runs r ON r.id = j.run_id") == [("other",)]
    assert select(database, f"SELECT count(*) FROM tallies WHERE run_id = {run.id}") == [(0,)]


@pytest.mark.every_database
def test_the_lease_of_a_claim_that_was_under_way_when_its_run_was_deleted_ends(database, run):
    job_ids = [id for (id,) in select(database, "SELECT id FROM jobs ORDER BY id LIMIT 2")]
    with db.transaction(database, write=True) as conn:
        queue.delete_run(conn, run)
        worker = queue.register_worker(conn, "one", "host", 1, INFO)
        leases.new_lease(conn, worker, run.id, "train", queue.NORMAL, job_ids, TTL, at=db.now(conn))
    with db.transaction(database, write=True) as conn:
        while queue.clear_deleted(conn):
            pass
    assert select(database, "SELECT state FROM leases") == [("released",)]
    assert {check.name: check.verdict for check in examine(database)}["leases"] == Verdict.OK


class Deleting(SmallEngine):
    """While it captions its first pictures, somebody withdraws what it holds and deletes the run."""

    def __init__(self, database: Engine, run: Run) -> None:
        super().__init__()
        self.database, self.deleted = database, run

    def run(self, source):
        for number, completion in enumerate(super().run(source)):
            if number == 0:
                with db.transaction(self.database, write=True) as conn:
                    queue.cancel(conn, self.deleted)
                delete(self.database, self.deleted)
            yield completion


@pytest.mark.every_database
def test_a_worker_whose_run_is_deleted_ends_and_says_so_also_if_it_waits_for_work(database, run):
    settings = Settings.of(batch_size=2, lease_ttl=60.0, self_check=False, wait=True)
    with pytest.raises(RunError, match=r"Run 'default' has been deleted\."):
        work(database, settings, load=lambda *_: Deleting(database, run))
    assert select(database, "SELECT count(*) FROM captions") == [(0,)]


@pytest.mark.every_database
def test_an_enqueue_under_way_ends_when_its_run_is_deleted(database, run, tmp_path, monkeypatch):
    monkeypatch.setattr(enqueue, "PAGE", 2)

    def progress(what: str, done: int, total: int) -> None:
        if what == "train: registering":
            with db.transaction(database, write=True) as conn:
                queue.delete_run(conn, queue.get_run(conn, "new"))

    located = enqueue.datasets.locate(str(tmp_path / "set"), ["train"])
    with pytest.raises(RunError, match=r"Run 'new' has been deleted\."):
        enqueue.enqueue(database, located, ["train"], run="new", recipe=OTHER, progress=progress)
    with pytest.raises(RunError, match=r"Run 'newer' has been deleted\."):
        _from(database, run, "newer", tmp_path)
    assert select(database, "SELECT count(*) FROM jobs") == [(6 + 2 + 2,)]


def _from(database: Engine, old: Run, name: str, root: Path) -> Sequence[enqueue.Enqueued]:
    def progress(what: str, done: int, total: int) -> None:
        with db.transaction(database, write=True) as conn:
            queue.delete_run(conn, queue.get_run(conn, name))

    return enqueue.enqueue_from(database, old, ["train"], run=name, recipe=OTHER, progress=progress)
