"""The runs of a queue, as `rococap runs` lists them."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import steps
from samples import fill, register, write_shard
from small_engine import INFO
from sqlalchemy import Engine, event

from rococap import db, prompts, queue
from rococap.engines import Completion, Failure
from rococap.queue import Run
from rococap.recipe import RULES, Recipe

said = partial(steps.said, "runs")


@pytest.fixture
def here(database: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROCOCAP_DB", database.url.render_as_string(hide_password=False))
    return tmp_path


def work(database: Engine, run: Run, *, done: int = 0, failed: int = 0, held: int = 0) -> None:
    with db.transaction(database, write=True) as conn:
        worker = queue.register_worker(conn, run.name, "host", 1, INFO)
        lease = queue.claim(conn, worker, run.id, "train", done + failed + held, ttl_ms=60_000)
        ids = [job.id for job in lease.jobs]
        if done:
            queue.complete(conn, lease, [Completion(id, "A caption.") for id in ids[:done]])
        if failed:
            queue.fail(conn, lease, {id: Failure("empty", "") for id in ids[done : done + failed]})


def test_runs_are_listed_with_what_differs_from_the_default_and_how_far_they_are(database, here):
    run = fill(database, here / "set", 10)
    work(database, run, done=4, failed=2)
    recipe = Recipe(model="Qwen/Qwen2-VL-7B-Instruct", prompt=prompts.presets()["anatomy"].prompt, max_new_tokens=64)
    work(database, fill(database, here / "set", 10, run="other", recipe=recipe), held=10)
    fill(database, here / "set", 10, run="third", recipe=Recipe(model="tests/small", prompt="What?\nWhere?"))
    with db.transaction(database, write=True) as conn:
        queue.pause(conn, queue.get_run(conn, "third"), True)
    assert said().splitlines() == [
        "run      model                 recipe                      done  failed  state",
        "default  small                 default                     4/10       2  waiting",
        "other    Qwen2-VL-7B-Instruct  anatomy, max_new_tokens 64  0/10       0  running",
        r"third    small                 'What?\nWhere?'             0/10       0  paused",
    ]


def test_json_has_everything(database, here):
    for split in ("train", "test"):
        write_shard(here / "set", split, range(3))
    register(database, here / "set", ["train", "test"], recipe=Recipe(model="tests/small", dtype="float32"))
    with db.transaction(database, write=True) as conn:
        run = queue.get_run(conn, "default")
        queue.pin(conn, run, INFO)
        db.execute(conn, "UPDATE runs SET created_at = 1700000000123")
        counts = [{**asdict(one), "total": one.total} for one in queue.counts_of(conn, run)]
    work(database, run, done=1)
    (told,) = json.loads(said("--json"))
    splits = told.pop("splits")
    assert [(one["split"], one["done"], one["total"]) for one in splits] == [("train", 1, 3), ("test", 0, 3)]
    assert splits[1] == counts[1]
    assert told == {
        "id": 1,
        "name": "default",
        "dataset_id": 1,
        "dataset": str(here / "set"),
        "dataset_revision": "",
        "recipe": asdict(run.recipe),
        "recipe_hash": run.recipe.hash,
        "resolved": INFO.resolved() | {"rules": RULES},
        "max_attempts": 5,
        "paused": False,
        "columns": {},
        "created_at": "2023-11-14T22:13:20.123Z",
        "state": "waiting",
    }


def test_a_run_without_pictures_is_empty_and_one_with_nothing_left_finished(database, here):
    run = fill(database, here / "set", 4)
    work(database, run, done=3, failed=1)
    with db.transaction(database, write=True) as conn:
        queue.create_run(conn, "new", run.dataset_id, Recipe())
    assert [line.split()[-4:] for line in said().splitlines()[1:]] == [
        ["default", "3/4", "1", "finished"],
        ["default", "0/0", "0", "empty"],
    ]
    assert json.loads(said("--json"))[1]["splits"] == []


def test_without_runs_the_next_step_is_named(here):
    assert said() == "Nothing is registered here yet. Register pictures first: rococap enqueue --split train\n"
    assert said("--json") == "[]\n"


def test_the_table_fits_into_80_columns_whatever_the_runs_are(database, here):
    recipe = Recipe(model=f"/models/{'long-' * 20}", prompt="What? " * 30, max_new_tokens=64, min_pixels=784)
    run = fill(database, here / "set", 4, run="a-very-long-name-" * 4, recipe=recipe)
    with db.transaction(database, write=True) as conn:
        queue.tally(conn, run.id, "train", 0, {"done": 9_999_999, "failed": 9_999_999})
    told = said().splitlines()
    with db.transaction(database, write=True) as conn:
        queue.tally(conn, run.id, "train", 0, {"done": -9_999_999, "failed": -9_999_999})
    assert max(map(len, told)) == 80
    assert told[1].startswith("a-very-long-name-a-ver")


@pytest.mark.every_database
def test_every_run_is_seen_with_its_counts_by_split_also_one_that_has_none(database, tmp_path):
    for split in ("test", "train"):
        write_shard(tmp_path / "set", split, range(3))
        register(database, tmp_path / "set", [split], run="b")
    run = fill(database, tmp_path / "set", 3, run="a")
    work(database, run, done=2, failed=1)
    with db.transaction(database, write=True) as conn:
        empty = queue.create_run(conn, "empty", run.dataset_id, Recipe(), now=7)
    with db.transaction(database) as conn:
        seen = queue.runs_seen(conn)
        assert [one.run for one in seen] == queue.list_runs(conn)
        assert [one.counts for one in seen[:2]] == [tuple(queue.counts_of(conn, one.run)) for one in seen[:2]]
    assert [(one.run.name, [count.split for count in one.counts]) for one in seen] == [
        ("b", ["train", "test"]),
        ("a", ["train"]),
        ("empty", []),
    ]
    assert (seen[1].counts[0].done, seen[1].counts[0].failed) == (2, 1)
    assert (seen[2].run, seen[2].created_at) == (empty, 7)


@pytest.mark.every_database
def test_runs_cost_the_same_however_many_pictures_they_have(database, tmp_path):
    for n in range(3):
        fill(database, tmp_path / "set", 3, run=f"run{n}")
    statements = []
    event.listen(database, "before_cursor_execute", lambda *args: statements.append(args[2]))
    with db.transaction(database) as conn:
        queue.runs_seen(conn)
    selects = [sql for sql in statements if sql.startswith("SELECT") and "FROM" in sql]
    assert 0 < len(selects) <= 5
    assert not [sql for sql in selects if " jobs" in sql or " captions" in sql]
