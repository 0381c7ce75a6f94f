"""Captions made under different rules never mix unless that is asked for."""

import json
import re
from collections.abc import Callable, Iterator

import pytest
from samples import fill, register, write_shard
from small_engine import INFO, SmallEngine
from sqlalchemy import Engine

from rococap import db, queue
from rococap.engines import Completion, Source
from rococap.errors import DatabaseError, RunError
from rococap.queue.enqueue import Enqueued, enqueue_from
from rococap.recipe import RULES, Recipe
from rococap.results import checkpoints, export, restore
from rococap.worker.process import work
from rococap.worker.settings import Settings
from rococap.worker.store import Outcome

pytestmark = pytest.mark.every_database

OLDER = INFO.resolved()
"""What runs pinned before there were rules."""


def run_worker(database: Engine, **settings) -> Outcome:
    return work(database, Settings.of(self_check=False, **settings), load=lambda *_: SmallEngine())


def pinned(database: Engine, run: str = "default") -> dict:
    with db.transaction(database) as conn:
        return queue.get_run(conn, run).resolved


def pin(database: Engine, resolved: dict) -> None:
    with db.transaction(database, write=True) as conn:
        db.execute(conn, "UPDATE runs SET resolved = ?", (json.dumps(resolved),))


def done(database: Engine) -> int:
    with db.transaction(database) as conn:
        return sum(one.done for one in queue.counts(conn))


@pytest.fixture
def begun(database, tmp_path) -> Engine:
    """A run of 8 pictures with 3 captions that an older rococap made."""
    fill(database, tmp_path / "set", 8)
    run_worker(database, limit=3)
    pin(database, OLDER)
    return database


def test_a_new_run_pins_the_rules(database, tmp_path):
    fill(database, tmp_path / "set", 2)
    run_worker(database)
    assert pinned(database) == OLDER | {"rules": RULES}


def test_a_run_begun_under_older_rules_stops_with_the_next_step(begun):
    loaded = []
    with pytest.raises(RunError) as caught:
        work(begun, Settings(self_check=False), load=lambda *_: loaded.append(1) or SmallEngine())
    assert str(caught.value) == (
        "Run 'default' was started under older rules for opening pictures, quantising weights and ending captions (1, "
        "here 2), and a run never mixes two. Caption its pictures again: rococap enqueue --run NEW --from default; or "
        "continue, which its manifests will record: rococap worker --run default --accept-new-rules"
    )
    assert loaded == [], "the model is not loaded for nothing"
    assert (done(begun), pinned(begun)) == (3, OLDER)


def test_new_rules_that_are_accepted_are_recorded_and_stand_in_every_manifest(begun, tmp_path):
    assert run_worker(begun, accept_new_rules=True, limit=2).done == 2
    accepted = pinned(begun)
    (record,) = accepted.pop("accepted_rules")
    assert record.pop("at") > 1_700_000_000_000
    assert record == {"from": 1, "to": RULES, "captions_before": 3}
    assert accepted == OLDER | {"rules": RULES}
    assert run_worker(begun).done == 3, "it was asked once"
    with db.transaction(begun) as conn:
        run = queue.get_run(conn, "default")
    export.export(begun, run, "train", tmp_path / "captions.csv")
    checkpoints.write_checkpoints(begun, run, "train", tmp_path, 4)
    for manifest in ("captions.json", "run.json"):
        told = json.loads((tmp_path / manifest).read_text())["resolved"]
        assert told["accepted_rules"] == pinned(begun)["accepted_rules"]
        assert told["accepted_rules"][0]["captions_before"] == 3


def test_the_manifest_of_checkpoints_tells_of_rules_that_were_accepted_after_the_first(begun, tmp_path):
    with db.transaction(begun) as conn:
        run = queue.get_run(conn, "default")
    checkpoints.write_checkpoints(begun, run, "train", tmp_path, 2)
    assert json.loads((tmp_path / "run.json").read_text())["resolved"] == OLDER
    run_worker(begun, accept_new_rules=True)
    checkpoints.write_checkpoints(begun, run, "train", tmp_path, 2)
    told = json.loads((tmp_path / "run.json").read_text())["resolved"]
    assert [one["captions_before"] for one in told["accepted_rules"]] == [3]


def test_a_run_without_captions_takes_the_new_rules_silently(database, tmp_path):
    fill(database, tmp_path / "set", 4)
    pin(database, OLDER)
    assert run_worker(database).done == 4
    assert pinned(database) == OLDER | {"rules": RULES}


def test_another_model_state_is_refused_whatever_the_rules(begun):
    pin(begun, OLDER | {"digest": "another"})
    with pytest.raises(RunError, match="was started with another model state"):
        run_worker(begun, accept_new_rules=True)
    assert pinned(begun) == OLDER | {"digest": "another"}


def test_what_only_one_side_knows_is_no_difference(begun):
    pin(begun, {"engine": "small", "rules": RULES, "something": "newer"})
    assert run_worker(begun).done == 5


def test_a_run_begun_under_newer_rules_asks_for_a_newer_rococap(begun):
    pin(begun, OLDER | {"rules": RULES + 1})
    with pytest.raises(RunError, match="Upgrade rococap"):
        run_worker(begun, accept_new_rules=True)


def meanwhile(database: Engine, change: Callable[[], None]) -> None:
    """A worker of which somebody changes the database as it begins to caption."""

    class Captioning(SmallEngine):
        def run(self, source: Source) -> Iterator[Completion]:
            change()
            return super().run(source)

    work(database, Settings.of(self_check=False, batch_size=4), load=lambda *_: Captioning())


def test_a_worker_ends_once_its_run_goes_on_under_newer_rules(database, tmp_path):
    fill(database, tmp_path / "set", 40)
    with pytest.raises(RunError, match="Upgrade rococap"):
        meanwhile(database, lambda: pin(database, OLDER | {"rules": RULES + 1}))
    assert done(database) <= 4


def test_a_worker_ends_once_the_database_has_a_newer_schema(database, tmp_path):
    def migrate() -> None:
        with db.transaction(database, write=True) as conn:
            db.execute(conn, "UPDATE alembic_version SET version_num = '0099'")

    fill(database, tmp_path / "set", 40)
    with pytest.raises(DatabaseError, match=r"schema 0099, from a newer version of rococap .* Upgrade rococap"):
        meanwhile(database, migrate)
    assert done(database) <= 4


def test_pictures_of_a_run_under_older_rules_are_captioned_anew_by_the_same_recipe(begun):
    def again(source: str, run: str) -> list[Enqueued]:
        with db.transaction(begun) as conn:
            old = queue.get_run(conn, source)
        return enqueue_from(begun, old, ["train"], run=run, recipe=old.recipe)

    assert again("default", "again") == [Enqueued("train", new=8)]
    assert run_worker(begun, run="again").done == 8
    assert pinned(begun, "again")["rules"] == RULES
    with pytest.raises(RunError, match="has the same recipe"):
        again("again", "third")


def test_a_finished_run_of_before_exports_as_before(begun, tmp_path):
    pin(begun, OLDER | {"rules": RULES})
    run_worker(begun)
    pin(begun, OLDER)
    with db.transaction(begun) as conn:
        run = queue.get_run(conn, "default")
    assert export.export(begun, run, "train", tmp_path / "captions.csv").rows == 8
    assert json.loads((tmp_path / "captions.json").read_text())["resolved"] == OLDER
    assert run_worker(begun).seconds == 0, "nothing is left, and nothing is refused"


def test_captions_under_older_rules_are_not_restored_beside_newer_ones(begun, tmp_path):
    with db.transaction(begun) as conn:
        run = queue.get_run(conn, "default")
    export.export(begun, run, "train", tmp_path / "captions.csv")
    register(begun, tmp_path / "set", ["train"], run="other")
    run_worker(begun, run="other", limit=1)
    with db.transaction(begun) as conn:
        other = queue.get_run(conn, "other")
    with pytest.raises(RunError, match="a run never mixes"):
        restore.restore(begun, other, tmp_path / "captions.csv")
    register(begun, tmp_path / "set", ["train"], run="lost")
    with db.transaction(begun) as conn:
        lost = queue.get_run(conn, "lost")
    assert restore.restore(begun, lost, tmp_path / "captions.csv").restored == 3
    with pytest.raises(RunError, match="was started under older rules"):
        run_worker(begun, run="lost")


def test_a_run_that_accepted_new_rules_restores_its_own_older_files(begun, tmp_path):
    with db.transaction(begun) as conn:
        run = queue.get_run(conn, "default")
    export.export(begun, run, "train", tmp_path / "captions.csv")
    run_worker(begun, accept_new_rules=True)
    result = restore.restore(begun, run, tmp_path / "captions.csv")
    assert (result.restored, result.known) == (0, 3)


# --- quantised weights -------------------------------------------------------------------------------------------

QUANTISED = Recipe(model="tests/small", load_in="4bit")


@pytest.fixture
def quantised(database, tmp_path) -> Engine:
    """A run of quantised weights, 8 pictures and 3 captions that were made under the rules of all runs."""
    fill(database, tmp_path / "set", 8, recipe=QUANTISED)
    run_worker(database, limit=3)
    pin(database, OLDER | {"rules": 2})
    return database


@pytest.mark.parametrize(("load_in", "rules"), [(None, 2), ("8bit", 3), ("4bit", 3)])
def test_rules_3_are_for_quantised_weights_alone(database, tmp_path, load_in, rules):
    fill(database, tmp_path / "set", 2, recipe=Recipe(model="tests/small", load_in=load_in))
    run_worker(database)
    assert pinned(database) == OLDER | {"rules": rules}


def test_a_run_begun_under_rules_2_goes_on_without_a_word(begun, caplog):
    pin(begun, OLDER | {"rules": 2})
    assert run_worker(begun).done == 5
    assert pinned(begun) == OLDER | {"rules": 2}
    assert "rules" not in caplog.text


def test_a_quantised_run_begun_under_rules_2_mixes_only_if_that_is_asked_for(quantised):
    with pytest.raises(RunError, match=re.escape("quantising weights and ending captions (2, here 3)")):
        run_worker(quantised)
    assert (done(quantised), pinned(quantised)) == (3, OLDER | {"rules": 2})
    assert run_worker(quantised, accept_new_rules=True).done == 5
    accepted = pinned(quantised)
    (record,) = accepted.pop("accepted_rules")
    assert (record["from"], record["to"], record["captions_before"]) == (2, 3, 3)
    assert accepted == OLDER | {"rules": 3}


def test_a_quantised_run_begun_before_there_were_rules_is_refused_too(quantised):
    pin(quantised, OLDER)
    with pytest.raises(RunError, match=re.escape("(1, here 3)")):
        run_worker(quantised)


def test_a_quantised_run_without_captions_takes_rules_3_silently(database, tmp_path):
    fill(database, tmp_path / "set", 4, recipe=QUANTISED)
    pin(database, OLDER | {"rules": 2})
    assert run_worker(database).done == 4
    assert pinned(database) == OLDER | {"rules": 3}


def test_pictures_of_a_quantised_run_under_rules_2_are_captioned_anew_by_the_same_recipe(quantised):
    with db.transaction(quantised) as conn:
        old = queue.get_run(conn, "default")
    assert enqueue_from(quantised, old, ["train"], run="again", recipe=QUANTISED) == [Enqueued("train", new=8)]
    pin(quantised, OLDER | {"rules": 3})
    with db.transaction(quantised) as conn:
        old = queue.get_run(conn, "default")
    with pytest.raises(RunError, match="has the same recipe"):
        enqueue_from(quantised, old, ["train"], run="third", recipe=QUANTISED)


# --- more splits -------------------------------------------------------------------------------------------------


def test_a_second_split_of_a_run_under_older_rules_may_be_enqueued(begun, tmp_path):
    write_shard(tmp_path / "set", "test", range(2))
    register(begun, tmp_path / "set", ["test"], recipe=Recipe(model="tests/small"))
    with db.transaction(begun) as conn:
        assert [one.split for one in queue.counts(conn)] == ["train", "test"]
