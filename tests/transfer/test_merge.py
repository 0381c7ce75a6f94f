"""Parts that were captioned apart become one database, in any order and any number of times."""

import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from databases import recount, sound, tallies
from histories import contents, hash_pictures, judge, live, study
from killed import killed
from places import ROOT
from postgres import lock_tables, outside
from samples import caption, register, texts, write_shard
from small_engine import INFO
from sqlalchemy import Engine
from sqlalchemy.engine import make_url
from steps import (
    captions,
    claim,
    column,
    invoke,
    new_worker,
    reap,
    refusal,
    refused,
    run_worker,
    said,
    select,
    statuses,
    until,
    writing,
)

from rococap import db, queue, review
from rococap.engines import Completion, Failure
from rococap.errors import RococapError, RunError
from rococap.queue import Run
from rococap.recipe import Recipe
from rococap.results import checkpoints, export
from rococap.results.manifest import manifest_path
from rococap.results.restore import restore
from rococap.review import Answers, Form, studies
from rococap.tables import metadata
from rococap.transfer import merge
from rococap.urls import shown

N = 40
HOUR = 3_600_000
PICTURES = [f"train_{n:05}" for n in range(N)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_shard(tmp_path / "set", "train", range(N // 2), "00000-of-00002")
    write_shard(tmp_path / "set", "train", range(N // 2, N), "00001-of-00002")
    return tmp_path / "set"


New = Callable[..., Engine]


@pytest.fixture
def new(tmp_path: Path, empty_queue: Path, root: Path) -> New:
    """Makes a database with a run of the data set, or with nothing."""
    made = []

    def make(name: str, *, enqueue: bool = True, **options: Any) -> Engine:
        engine = db.connect(f"sqlite:///{shutil.copy(empty_queue, tmp_path / f'{name}.db')}")
        made.append(engine)
        if enqueue:
            register(engine, options.pop("root", root), ["train"], **options)
        return engine

    yield make
    for engine in made:
        engine.dispose()


def run_of(database: Engine, name: str = "default") -> Run:
    with db.transaction(database) as conn:
        return queue.get_run(conn, name)


def path_of(database: Engine) -> str:
    return database.url.database


def history(database: Engine, chance: random.Random, judged: Sequence[str]) -> None:
    """Weeks of work, with verdicts and edits of those of these pictures that were captioned."""
    run = run_of(database)
    live(database, run, chance, start=chance.randint(0, 100))
    judge(database, run, chance, judged)
    if chance.random() < 0.5:
        hash_pictures(database, chance)
    with writing(database) as conn:
        queue.cancel(conn, run, image_ids=chance.sample(PICTURES, 5), now=9_000)


JUDGED = (PICTURES[:25], PICTURES[25:30:2], [*PICTURES[26:30:2], *PICTURES[30:]])
WINDOWS = ({"limit": 25}, {"offset": 10, "limit": 20}, {"offset": 20})


@pytest.fixture
def parts(new: New, request: pytest.FixtureRequest) -> list[str]:
    """Three databases that overlap. Nobody judged, edited or studied a picture that others did."""
    chance = random.Random(getattr(request, "param", 0))
    made = []
    for n, window in enumerate(WINDOWS):
        database = new(f"part{n}", **window)
        history(database, chance, JUDGED[n])
        if n == 0:
            study(database, run_of(database), "one", chance)
        made.append(path_of(database))
    return made


def merged(database: Engine, sources: Sequence[str]) -> dict[str, list[tuple]]:
    for source in sources:
        merge(database, source)
    with sound(f"sqlite:///{path_of(database)}"):
        return contents(database)


def assert_same(one: dict[str, list[tuple]], other: dict[str, list[tuple]]) -> None:
    for table, found in one.items():
        assert found == other[table], table


@pytest.mark.parametrize("parts", range(5), indirect=True)
def test_parts_give_the_same_database_in_any_order_and_however_often(parts, new):
    chance = random.Random(1)
    first = merged(new("target", enqueue=False), parts)
    assert first["captions"]
    for n in range(3):
        order = [*parts, *chance.choices(parts, k=n + 1)]
        chance.shuffle(order)
        assert_same(merged(new(f"target{n}", enqueue=False), order), first)


def test_parts_that_are_merged_into_one_of_them_give_the_same_database(parts, new, tmp_path):
    first = merged(new("target", enqueue=False), parts)
    for n, part in enumerate(parts):
        shutil.copy(part, tmp_path / f"into{n}.db")
        engine = db.connect(f"sqlite:///{tmp_path}/into{n}.db")
        found = merged(engine, [other for other in parts if other != part])
        engine.dispose()
        assert_same(found, first)


def test_a_merge_of_merges_is_the_same_as_one_of_parts(parts, new):
    first = merged(new("target", enqueue=False), parts)
    some = new("some", enqueue=False)
    merged(some, parts[1:])
    assert_same(merged(new("all", enqueue=False), [path_of(some), parts[0], parts[1]]), first)


@pytest.mark.every_database
def test_every_kind_of_database_is_merged_into_and_from(parts, new, database):
    first = merged(new("target", enqueue=False), parts)
    for part in (*parts, parts[1]):
        merge(database, part)
    assert_same(contents(database), first)
    back = new("back", enqueue=False)
    url = database.url if database.dialect.name == "sqlite" else database.url.set(password="a-secret")
    result = merge(back, url.render_as_string(hide_password=False))
    assert result.is_new
    assert "a-secret" not in result.source
    assert_same(contents(back), first)


def test_a_merge_that_is_killed_before_any_statement_is_finished_by_the_same_command(parts, new, tmp_path, empty_queue):
    first = merged(new("target", enqueue=False), parts)
    points = range(20, 290, 45)
    targets = [f"sqlite:///{shutil.copy(empty_queue, tmp_path / f'killed{n}.db')}" for n in points]
    kills = killed(*((n, "merge", target, *parts) for n, target in zip(points, targets, strict=True)))
    assert kills == [True] * len(points), "it was over too early"
    for target in targets:
        engine = db.connect(target)
        assert_same(merged(engine, parts), first)
        engine.dispose()


# --- Nothing is forgotten --------------------------------------------------------------------------------------


def test_every_table_and_column_travels(tmp_path, new):
    """Of a database with a row in each table and something in each column, everything arrives."""
    path = tmp_path / "full.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        newest = max((ROOT / "tests" / "schemas").glob("*.sql"))
        connection.executescript(newest.read_text())
    source = db.connect(f"sqlite:///{path}")
    reap(source, now=1 << 61)
    before = contents(source)
    assert all(before.values())
    target = new("target", enqueue=False)
    merge(target, str(path))
    after = contents(target)
    assert_same(after, before)
    source.dispose()


# --- Of a picture captioned twice, one caption is kept ---------------------------------------------------------


def captioned(new: New, name: str, text: str, now: int, **options: Any) -> Engine:
    """A database in which the first picture was captioned."""
    database = new(name, **options)
    caption(database, run_of(database), texts(text), now=now)
    return database


@pytest.mark.parametrize("order", [("early", "late"), ("late", "early")])
def test_the_caption_that_was_made_first_is_kept(new, order):
    found = {"early": captioned(new, "early", "First.", 1_000), "late": captioned(new, "late", "", 2_000)}
    target = new("target", enqueue=False)
    results = [merge(target, path_of(found[name])) for name in order]
    assert [(result.merged, result.twice) for result in results] == [(1, 0), (0, 1)]
    assert captions(target) == {"train_00000": "First."}
    again = merge(target, path_of(found["late"]))
    assert (again.twice, again.is_new) == (1, False)
    again = merge(target, path_of(found["early"]))
    assert (again.known, again.twice, again.is_new) == (1, 0, False)
    assert column(target, "SELECT n_done FROM leases ORDER BY claimed_at") == [1, 1], "both were work"
    with sound(f"sqlite:///{path_of(target)}"):
        assert statuses(target) == {"done": 1, "pending": N - 1}


def review_first(database: Engine) -> None:
    with writing(database) as conn:
        (job,) = db.execute(conn, "SELECT job_id FROM captions").one()
        review.add_review(conn, run_of(database), job, "ann", "correct", now=5)


@pytest.mark.parametrize("order", [("early", "late"), ("late", "early")])
def test_a_caption_that_was_judged_is_kept_before_one_that_was_made_first(new, order):
    found = {"early": captioned(new, "early", "First.", 1_000), "late": captioned(new, "late", "Judged.", 2_000)}
    review_first(found["late"])
    target = new("target", enqueue=False)
    for name in order:
        merge(target, path_of(found[name]))
    assert captions(target) == {"train_00000": "Judged."}
    assert column(target, "SELECT verdict FROM reviews") == ["correct"]


def test_captions_that_were_both_judged_are_refused_before_anything_is_written(new):
    one, other = captioned(new, "one", "First.", 1_000), captioned(new, "other", "Second.", 2_000)
    review_first(one)
    review_first(other)
    before = contents(one)
    with pytest.raises(RococapError) as caught:
        merge(one, path_of(other))
    assert str(caught.value) == (
        f"{path_of(other)} was not merged: its captions differ from those here for 1 picture (train_00000), and "
        "people have judged, edited or studied both, which is kept for good. To take its captions without what people "
        "did, export them and merge the export: rococap --db URL export --split SPLIT"
    )
    assert contents(one) == before


def test_the_scores_of_a_replaced_caption_go(new):
    target, source = captioned(new, "target", "Second.", 2_000), captioned(new, "source", "First.", 1_000)
    with writing(target) as conn:
        db.execute(conn, "INSERT INTO scores SELECT job_id, 'cider_d', 'dd', '{}' FROM captions")
    merge(target, path_of(source))
    assert column(target, "SELECT count(*) FROM scores") == [0]


@pytest.mark.parametrize("is_export", [False, True])
@pytest.mark.parametrize("kept", [0, 2])
def test_replaced_captions_are_in_a_later_segment_and_restored_from_it(new, tmp_path, is_export, kept):
    """`kept` of the four captions are those of the target."""
    folder, n = tmp_path / "out", 4 - kept
    target, source = new("target"), new("source")
    caption(target, run_of(target), texts(*["Late."] * 4), now=2_000)
    caption(source, run_of(source), texts(*["Early."] * n), skip=kept, now=1_000)
    first = checkpoints.write_checkpoints(target, run_of(target), "train", folder, 2)
    assert merge(target, exported(source, tmp_path / "export") if is_export else path_of(source)).twice == n
    (last,) = checkpoints.write_checkpoints(target, run_of(target), "train", folder, 2)
    assert last.name == "checkpoint_train_000003.csv"
    assert checkpoints.write_checkpoints(target, run_of(target), "train", folder, 2) == []
    again = checkpoints.write_checkpoints(target, run_of(target), "train", tmp_path / "again", 2)
    assert [path.name for path in again] == [path.name for path in [*first[: kept // 2], last]]
    assert checkpoints.write_checkpoints(target, run_of(target), "train", tmp_path / "again", 2) == []
    for name, order in (("forward", [*first, last]), ("backward", [last, *reversed(first)])):
        restored = new(name)
        for path in order:
            restore(restored, run_of(restored), path)
        assert captions(restored) == captions(target)
        assert checkpoints.write_checkpoints(restored, run_of(restored), "train", folder, 2) == []


def test_a_caption_of_an_export_keeps_its_scores_when_its_database_comes(new, tmp_path):
    source, target = captioned(new, "source", "First.", 1_000), new("target")
    merge(target, exported(source, tmp_path / "export"))
    with writing(target) as conn:
        db.execute(conn, "INSERT INTO scores SELECT job_id, 'cider_d', 'dd', '{}' FROM captions")
    assert column(target, "SELECT lease_id FROM captions") == [None]
    result = merge(target, path_of(source))
    assert (result.known, result.twice, result.is_new) == (1, 0, True)
    assert column(target, "SELECT count(*) FROM captions WHERE lease_id IS NOT NULL") == [1]
    assert column(target, "SELECT metric FROM scores") == ["cider_d"]
    with db.transaction(target) as conn:
        assert tallies(conn) == recount(conn)


# --- Failures, retries and workers here ------------------------------------------------------------------------


def failed(new: New, name: str, message: str, now: int) -> Engine:
    database = new(name)
    with writing(database) as conn:
        worker = queue.register_worker(conn, name, "host", 1, INFO, now=now)
        lease = queue.claim(conn, worker, run_of(database).id, "train", 1, ttl_ms=9, now=now)
        queue.fail(conn, lease, {lease.jobs[0].id: Failure("corrupt", message)}, now=now)
    return database


def test_a_failure_that_was_retried_here_does_not_come_back_with_the_part_but_a_new_one_does(new):
    source, target = failed(new, "source", "Torn.", 1_000), new("target", enqueue=False)
    assert merge(target, path_of(source)).failed == 1
    with writing(target) as conn:
        assert queue.retry(conn, run_of(target)) == 1
    assert not merge(target, path_of(source)).is_new
    assert statuses(target) == {"pending": N}
    other = failed(new, "other", "Torn again.", 2_000)
    assert merge(target, path_of(other)).failed == 1
    with db.transaction(target) as conn:
        assert [one.message for one in queue.list_failures(conn)] == ["Torn again."]


@pytest.mark.parametrize("order", [(1_000, 2_000), (2_000, 1_000)])
def test_the_latest_failure_is_shown_in_whatever_order_they_come(new, order):
    target = new("target", enqueue=False)
    for at in order:
        merge(target, path_of(failed(new, f"at{at}", f"At {at}.", at)))
    with db.transaction(target) as conn:
        assert [one.message for one in queue.list_failures(conn)] == ["At 2000."]
    assert column(target, "SELECT at FROM failures ORDER BY id") == [1_000, 2_000]


def test_the_latest_failure_is_shown_although_the_clock_was_set_back_before_it(new):
    source = failed(new, "source", "First.", 9_000)
    with writing(source) as conn:
        queue.retry(conn, run_of(source))
        lease = queue.claim(conn, 1, run_of(source).id, "train", 1, ttl_ms=9, now=7_000)
        queue.fail(conn, lease, {lease.jobs[0].id: Failure("corrupt", "Last.")}, now=7_000)
    target = new("target", enqueue=False)
    merge(target, path_of(source))
    with db.transaction(target) as conn:
        assert [one.message for one in queue.list_failures(conn)] == ["Last."]


def test_a_picture_that_was_cancelled_in_a_part_is_done_elsewhere(new):
    target, source = new("target"), new("source")
    with writing(source) as conn:
        queue.cancel(conn, run_of(source), now=5)
    merge(target, path_of(source))
    assert statuses(target) == {"pending": N}
    merge(source, path_of(target))
    assert statuses(source) == {"pending": N}


@pytest.mark.every_database
def test_what_a_worker_here_holds_is_left_to_it_and_merged_later(database, new, root):
    register(database, root, ["train"])
    run = run_of(database)
    lease = claim(database, new_worker(database), run, 2, now=None)
    source = new("source")
    caption(source, run_of(source), texts("There.", "There.", "There."), now=1_000)
    result = merge(database, path_of(source))
    assert (result.merged, result.leased) == (1, 2)
    with writing(database) as conn:
        queue.complete(conn, lease, [Completion(lease.jobs[0].id, "Here.")])
        queue.release(conn, lease, [lease.jobs[1].id])
    result = merge(database, path_of(source))
    assert (result.merged, result.leased, result.known, result.twice) == (1, 0, 1, 1)
    assert set(captions(database).values()) == {"There."}


@pytest.mark.every_database
def test_workers_go_on_while_parts_are_merged(database, new, root, parts):
    """Whatever they hold when a part comes, they keep; in the end every picture has one caption."""
    register(database, root, ["train"])
    mine = db.connect(database.url.render_as_string(hide_password=False))
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(run_worker, database)
        for part in parts * 2:
            merge(mine, part)
        working.result(60)
    mine.dispose()
    for part in parts:
        assert merge(database, part).leased == 0
    assert column(database, "SELECT count(*) FROM leases WHERE state = 'open'") == [0]
    n_failed = statuses(database).get("failed", 0)
    assert statuses(database)["done"] == N - n_failed


def test_a_spooled_caption_of_a_part_is_not_taken_for_one_of_the_database_it_was_merged_into(new):
    """Its lease may have the id here that another lease of its worker had there."""
    source, target = new("source"), new("target", enqueue=False)
    leases = []
    for n in range(2):
        lease = claim(source, new_worker(source) if n == 0 else 1, run_of(source), 1)
        with writing(source) as conn:
            queue.complete(conn, lease, [Completion(lease.jobs[0].id, "A caption.")], now=5)
        leases.append(lease)
    with writing(source) as conn:
        assert queue.belongs(conn, leases[1], "one")
    merge(target, path_of(source))
    with writing(target) as conn:
        assert [queue.belongs(conn, lease, "one") for lease in leases] == [False, False]


def test_merged_captions_are_not_counted_as_work_of_this_database(new):
    source, target = new("source"), new("target", enqueue=False)
    with db.transaction(source) as conn:
        now = db.now(conn)
    caption(source, run_of(source), texts("A caption."), now=now)
    for database, n in ((source, 1), (target, 0)):
        if database is target:
            merge(target, path_of(source))
        with db.transaction(database) as conn:
            assert (queue.counts(conn)[0].per_minute > 0) == bool(n)
        read = lambda: db.transaction(database)  # noqa: B023, E731
        assert queue.throughput(read, since=now - now % HOUR - HOUR, every_ms=HOUR).captions.total() == n


# --- Studies ---------------------------------------------------------------------------------------------------


def test_a_study_waits_until_all_of_its_texts_are_here(new):
    source, target = new("source"), new("target")
    caption(source, run_of(source), texts("A caption."), now=1_000)
    study(source, run_of(source), "one", random.Random(0))
    lease = claim(target, new_worker(target), run_of(target), 1, now=None)
    result = merge(target, path_of(source))
    assert (result.studies_left, column(target, "SELECT name FROM studies")) == (["one"], [])
    with writing(target) as conn:
        queue.release(conn, lease, [lease.jobs[0].id])
    result = merge(target, path_of(source))
    assert (result.studies_left, column(target, "SELECT name FROM studies")) == ([], ["one"])
    assert result.studies == len(contents(source)["study_items"]) + len(contents(source)["ratings"]) + 2 + 1
    assert not merge(target, path_of(source)).is_new


def rated(new: New, name: str, answers: Sequence[tuple[int, int]]) -> Engine:
    """A database in which a reader gave these preferences for one picture, each at a time."""
    database = new(name)
    run = run_of(database)
    caption(database, run, texts("A caption."), now=1_000)
    with writing(database) as conn:
        options: dict[str, Any] = {"n_pictures": 1, "n_readers": 2, "seed": 3, "form": Form()}
        made = studies.new_study(
            conn, "one", [run], "train", with_original=True, now=2_000, modality=lambda _: "CT", **options
        )
        studies.join(conn, made, "ann", now=2_001)
        for at, preference in answers:
            studies.rate(conn, made, "ann", 1, Answers(preference=preference), shown_at=at - 1, now=at)
    return database


def ratings(database: Engine) -> list[tuple[int, str]]:
    return select(database, "SELECT at, answers FROM ratings ORDER BY id")


def test_a_correction_counts_although_the_clock_was_set_back_before_it(new):
    source = rated(new, "source", [(9_001, 1), (7_001, 2)])
    target = new("target", enqueue=False)
    merge(target, path_of(source))
    assert '"preference": 2' in ratings(target)[-1][1]
    assert ratings(target) == ratings(source)


@pytest.mark.parametrize("seed", range(5))
def test_ratings_keep_the_order_of_each_database_in_whatever_order_these_come(new, seed):
    chance = random.Random(seed)
    sources = [rated(new, f"part{n}", [(at, n) for at in chance.sample(range(3_000, 3_020), 6)]) for n in range(3)]
    paths = [path_of(source) for source in sources]
    pair, first = new("pair", enqueue=False), new("first", enqueue=False)
    for path in paths[1:]:
        merge(pair, path)
    for path in paths:
        merge(first, path)
    for n, order in enumerate(([*paths[::-1], paths[1]], [path_of(pair), paths[0]], [paths[0], path_of(pair)])):
        target = new(f"target{n}", enqueue=False)
        for path in order:
            merge(target, path)
        assert ratings(target) == ratings(first)
    for source in sources:
        its = ratings(source)
        assert [one for one in ratings(first) if one in its] == its


def test_a_study_is_not_put_on_a_caption_that_its_readers_did_not_read(new):
    """A worker stores it between two transactions of the merge."""
    source, target = new("source"), new("target")
    caption(source, run_of(source), texts("There."), now=1_000)
    study(source, run_of(source), "one", random.Random(0))
    lease = claim(target, new_worker(target), run_of(target), 1, now=None)

    def progress(step: str, done: int, total: int) -> None:
        if step == "default train: captions":
            with writing(target) as conn:
                queue.complete(conn, lease, [Completion(lease.jobs[0].id, "Here.")])

    result = merge(target, path_of(source), progress)
    assert (result.studies_left, column(target, "SELECT name FROM studies")) == (["one"], [])
    result = merge(target, path_of(source))
    assert (result.twice, result.studies_left, column(target, "SELECT name FROM studies")) == (1, [], ["one"])
    assert list(captions(target).values()) == ["There."]


def studied(new: New, name: str, *, seed: int) -> Engine:
    """A database with a study of its one caption."""
    database = captioned(new, name, "A caption.", 1_000)
    study(database, run_of(database), "one", random.Random(0))
    with writing(database) as conn:
        db.execute(conn, "UPDATE studies SET seed = ?", (seed,))
    return database


def test_another_study_of_the_same_name_is_refused_field_by_field(new):
    databases = [studied(new, "source", seed=0), studied(new, "target", seed=1)]
    for n, database in enumerate(databases):
        with writing(database) as conn:
            db.execute(conn, "UPDATE study_readers SET reader = ? WHERE reader_number = 2", (f"cleo{n}",))
    before = contents(databases[1])
    with pytest.raises(RococapError) as caught:
        merge(databases[1], path_of(databases[0]))
    assert "its study 'one' differs from the one here (seed: 0, not 1; reader 2: cleo0, not cleo1)" in str(caught.value)
    assert contents(databases[1]) == before


# --- Several merges at once ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("table", ["datasets", "runs", "shards", "workers", "leases", "jobs", "studies"])
def test_merges_into_one_server_at_once_take_turns(parts, new, postgres, table):
    url = postgres.create(template="empty_queue")
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with sound(url) as one, sound(url) as other, ThreadPoolExecutor(2) as pool:
        with lock_tables(url, f"LOCK TABLE {table} IN SHARE MODE"):  # both are before the insert of the same rows
            merges = [pool.submit(merge, database, parts[0]) for database in (one, other)]
            with outside(url) as outsider:
                until(lambda: outsider.execute(waiting).fetchone() == (2,), "both wait")
        results = [each.result() for each in merges]
        assert sum(result.pictures for result in results) == 25
        assert_same(contents(one), merged(new("target", enqueue=False), parts[:1]))


@pytest.mark.slow
@pytest.mark.parametrize("table", ["datasets", "runs"])
def test_an_enqueue_and_a_merge_of_one_new_data_set_take_turns(new, root, postgres, table):
    source, url = new("source"), postgres.create(template="empty_queue")
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    works = [lambda one: register(one, root, ["train"]), lambda other: merge(other, path_of(source))]
    with sound(url) as one, sound(url) as other, ThreadPoolExecutor(2) as pool:
        with lock_tables(url, f"LOCK TABLE {table} IN SHARE MODE"), outside(url) as outsider:
            done = []
            for n, (work, database) in enumerate(zip(works, (one, other), strict=True), start=1):
                done.append(pool.submit(work, database))
                until(lambda n=n: outsider.execute(waiting).fetchone() == (n,), "it waits")
        assert [each.exception() for each in done] == [None, None]
        assert statuses(one) == {"pending": N}


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["ours", "statement_timeout"])
def test_a_merge_that_waits_too_long_for_another_one_says_so(parts, postgres, monkeypatch, limit):
    url = postgres.create(template="empty_queue")
    with outside(url) as outsider:
        if limit == "ours":
            monkeypatch.setattr(db, "MERGE_PATIENCE_SEC", 0.1)
        else:
            outsider.execute(f"ALTER DATABASE {make_url(url).database} SET statement_timeout = '3s'")
    with sound(url) as one, sound(url) as other, writing(one) as conn:
        db.take_turns(conn)
        assert db.execute(conn, "SHOW lock_timeout").scalar_one() == "1min"  # of all other locks
        assert refusal(merge, other, parts[0]) == (
            f"A merge into {shown(one.url)} is under way, and this command has waited too long for it. When it has "
            "ended, run the command again, which goes on where this one stopped."
        )


def while_merging(database: Engine, source: str, action: Callable[[], object]) -> Any:
    """Merges, and does something between two of the transactions: no caption is here yet."""
    actions = [action]

    def progress(step: str, done: int, total: int) -> None:
        if step == "leases" and actions:
            actions.pop()()

    result = merge(database, source, progress)
    assert not actions
    return result


def test_a_part_that_is_merged_while_the_whole_split_is_leaves_the_whole(new):
    whole, part, target = new("whole"), new("part", part=queue.Part(1, 2)), new("target", enqueue=False)
    caption(whole, run_of(whole), texts("A caption."))
    while_merging(target, path_of(whole), lambda: merge(target, path_of(part)))
    assert statuses(target) == {"done": 1, "pending": N - 1}
    assert column(target, "SELECT count(*) FROM parts") == [0]


def test_another_study_of_the_same_name_that_is_merged_meanwhile_is_refused(new):
    sources = [studied(new, "one", seed=0), studied(new, "two", seed=1)]
    target = new("target", enqueue=False)
    with pytest.raises(RunError, match=r"its study 'one' differs from the one here \(seed: 0, not 1\)"):
        while_merging(target, path_of(sources[0]), lambda: merge(target, path_of(sources[1])))
    assert column(target, "SELECT seed FROM studies") == [1]


# --- What is refused -------------------------------------------------------------------------------------------


def pinned(database: Engine, **resolved: Any) -> Engine:
    with writing(database) as conn:
        db.execute(conn, "UPDATE runs SET resolved = ?", (json.dumps(resolved),))
    return database


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        (
            lambda new: new("source", recipe=Recipe(model="tests/small", prompt="What?", max_new_tokens=9)),
            "prompt: 'What?', not 'Des",
        ),
        (lambda new: new("source", recipe=Recipe(model="tests/small", max_new_tokens=9)), "max_new_tokens: 9, not 256"),
        (lambda new: pinned(new("source"), digest="aa", dtype="float16", rules=2), "digest: aa, not bb"),
        (lambda new: pinned(new("source"), digest="bb", more="known here only"), "rules: 1, not 2"),
    ],
)
def test_a_run_that_differs_is_refused_field_by_field_and_nothing_is_written(new, change, differences):
    target, source = pinned(new("target"), digest="bb", dtype="float32", rules=2), change(new)
    before = contents(target)
    with pytest.raises(RunError) as caught:
        merge(target, path_of(source))
    assert str(caught.value).startswith(
        f"{path_of(source)} was not merged: its run 'default' differs from the one here ("
    )
    assert differences in str(caught.value)
    assert str(caught.value).endswith(
        "and a run never mixes two. Merge it into another database: rococap --db URL merge " + path_of(source)
    )
    assert contents(target) == before


def test_what_either_database_knows_of_the_model_is_known_after_the_merge(new):
    target, source = pinned(new("target"), digest="aa", rules=2), pinned(new("source"), device="cpu", rules=2)
    merge(target, path_of(source))
    assert run_of(target).resolved == {"digest": "aa", "device": "cpu", "rules": 2}


def test_another_data_set_is_refused(new, tmp_path):
    write_shard(tmp_path / "other", "train", range(7))
    target, source = new("target"), new("source", root=tmp_path / "other")
    with pytest.raises(RunError) as caught:
        merge(target, path_of(source))
    assert f"(data set: {tmp_path}/other, not {tmp_path}/set)" in str(caught.value)


def test_a_data_set_whose_files_changed_is_refused(new, root):
    target = new("target")
    write_shard(root, "train", range(N // 2, N + 1), "00001-of-00002")
    source = new("source")
    with pytest.raises(RunError) as caught:
        merge(target, path_of(source))
    told = str(caught.value)
    assert (
        f"its data set {root} is not the one here (data/train-00001-of-00002.parquet: n_rows 21, not 20; data/" in told
    )


def test_the_same_files_in_another_folder_are_the_same_data_set(new, root, tmp_path):
    shutil.copytree(root, tmp_path / "moved")
    target, source = new("target"), new("source", root=tmp_path / "moved")
    caption(source, run_of(source), texts("A caption."))
    assert merge(target, path_of(source)).merged == 1
    assert column(target, "SELECT name FROM datasets") == [str(root)]


def test_a_folder_without_a_split_in_common_is_known_once_a_database_with_both_splits_is_merged(new, root, tmp_path):
    write_shard(tmp_path / "c", "validation", range(3))
    shutil.copytree(root, tmp_path / "b")
    shutil.copytree(tmp_path / "c", tmp_path / "b", dirs_exist_ok=True)
    target, both, validation = new("target"), new("both", root=tmp_path / "b"), new("validation", enqueue=False)
    register(both, tmp_path / "b", ["validation"])
    register(validation, tmp_path / "c", ["validation"])
    with pytest.raises(RunError) as caught:
        merge(target, path_of(validation))
    assert (
        f"(data set: {tmp_path}/c, not {root}, which have no split in common, so nothing shows that they are one data "
        "set: if they are, first merge a database that has splits of both), and a run never mixes two."
        in str(caught.value)
    )
    assert column(target, "SELECT name FROM datasets") == [str(root)]
    assert [merge(target, path_of(source)).pictures for source in (both, validation)] == [3, 0]
    assert column(target, "SELECT name FROM datasets") == [str(root)]


def test_a_part_that_is_being_captioned_is_refused(new, tmp_path):
    source = new("source")
    claim(source, new_worker(source), run_of(source), 1, now=None)
    target = tmp_path / "target.db"
    shown = f"sqlite:///{path_of(source)}"
    assert refused("--db", str(target), "merge", path_of(source)) == (
        f"{shown} has open leases (1), so nothing was merged. Stop its workers first. If they were killed, wait until "
        f"their leases have expired. To see when: rococap --db {shown} leases"
    )
    assert not target.exists()


def test_what_is_no_part_is_refused(new, tmp_path):
    target = path_of(new("target"))
    (tmp_path / "notes.db").write_text("Notes on the captions.\n" * 100)
    assert refused("--db", target, "merge", target) == f"{target} is the database to merge into. Name the other parts."
    assert refused("--db", target, "merge", "none.db") == (
        "There is no file none.db. Name the databases, exports or checkpoints of the parts."
    )
    assert "is not an SQLite database" in refused("--db", target, "merge", str(tmp_path / "notes.db"))


# --- Parts -----------------------------------------------------------------------------------------------------


def test_the_parts_of_a_split_are_told_until_all_are_there(new, tmp_path):
    sources = [path_of(new(f"part{n}", part=queue.Part(n, 2))) for n in (1, 2)]
    target = str(tmp_path / "target.db")
    told = said("--db", target, "merge", sources[0])
    assert told == f"{sources[0]} (default train 1/2): 20 new pictures; 0 captions merged, 0 known; 0 failed\n"
    assert said("--db", target, "merge", sources[0]) == f"{sources[0]} (default train 1/2): nothing is new\n"
    assert "default train: only part 1/2\n" in said("--db", target, "status")
    (result,) = json.loads(said("--db", target, "merge", "--json", sources[1]))
    assert (result["pictures"], result["parts"], result["is_new"]) == (20, ["default train 2/2"], True)
    assert "only part" not in said("--db", target, "status")
    assert json.loads(said("--db", target, "status", "--json"))["runs"][0]["parts"] == ["1/2", "2/2"]


def test_parts_of_two_divisions_overlap_and_what_both_captioned_is_counted(new, tmp_path):
    sources = []
    for n_parts in (2, 3):
        part = new(f"of{n_parts}", part=queue.Part(1, n_parts))
        run_worker(part)
        sources.append(path_of(part))
    target = str(tmp_path / "target.db")
    told = said("--db", target, "merge", *sources).splitlines()
    assert told == [
        f"{sources[0]} (default train 1/2): 20 new pictures; 20 captions merged, 0 known; 0 failed",
        f"{sources[1]} (default train 1/3): 10 new pictures; 10 captions merged, 0 known; 0 failed",
        "  captioned twice: 10 pictures; one caption of each was kept",
    ]
    with sound(f"sqlite:///{target}") as merged_ones:
        assert statuses(merged_ones) == {"done": 30}


def test_a_part_that_is_merged_into_the_whole_split_or_the_other_way_round_leaves_the_whole(new):
    whole, part = new("whole"), new("part", part=queue.Part(1, 2))
    merge(whole, path_of(part))
    merge(part, path_of(whole))
    assert [column(one, "SELECT count(*) FROM parts") for one in (whole, part)] == [[0], [0]]


# --- Exports and checkpoints -----------------------------------------------------------------------------------


def exported(database: Engine, folder: Path, ending: str = "csv") -> str:
    path = folder / f"captions.{ending}"
    export.export(database, run_of(database), "train", path)
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_exports_of_parts_give_the_same_captions_in_any_order(parts, new, tmp_path, ending):
    for path in parts:
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript("PRAGMA foreign_keys = OFF; DELETE FROM reviews; DELETE FROM edits;")
            connection.executescript("DELETE FROM study_items; DELETE FROM scores;")
    first = captions_of(merged(new("first", enqueue=False), parts))
    files = []
    for n, path in enumerate(parts):
        engine = db.connect(f"sqlite:///{path}")
        files.append(exported(engine, tmp_path / f"export{n}", ending))
        engine.dispose()
    for n, order in enumerate((files, [*files[::-1], files[1]], [files[1], parts[0], files[2], files[0]])):
        target = new(f"target{n}")
        found = merged(target, order)
        assert captions_of(found) == first
    assert not merge(target, files[0]).is_new


def captions_of(found: dict[str, list[tuple]]) -> list[tuple]:
    """The picture, text, flags and time of each caption."""
    place = [column.name for column in metadata.tables["captions"].columns]
    at = {name: place.index(name) for name in ("job_id", "text", "flags", "generated_at")}
    return sorted(
        (row[at["job_id"]][1][2], row[at["text"]], row[at["flags"]], row[at["generated_at"]])
        for row in found["captions"]
    )


def test_segments_of_two_parts_are_merged_and_are_no_segments_of_this_database(new, tmp_path):
    segments = []
    for n in (1, 2):
        part = new(f"part{n}", part=queue.Part(n, 2))
        caption(part, run_of(part), texts("One.", "Two."), now=1_000 + n)
        segments += checkpoints.write_checkpoints(part, run_of(part), "train", tmp_path / f"out{n}", 2)
    assert {path.name for path in segments} == {"checkpoint_train_000001.csv"}
    target = new("target")
    assert [merge(target, str(path)).merged for path in segments] == [2, 2]
    assert column(target, "SELECT count(*) FROM jobs WHERE checkpoint IS NOT NULL") == [0]


def test_merged_already_is_said_only_of_what_is_here(new, tmp_path):
    source, target = captioned(new, "source", "One.", 1_000), new("target")
    for expected in ("0 new pictures; 1 caption merged, 0 known; 0 failed", "merged already, nothing is new"):
        assert said("--db", path_of(target), "merge", path_of(source)) == f"{path_of(source)}: {expected}\n"
    other = new("other", limit=1, offset=1)
    path = exported(source, tmp_path / "out")
    assert said("--db", path_of(other), "merge", path) == (
        f"{path}: nothing is new\n"
        "  1 are not among the pictures here, or have another original caption, and were left out\n"
    )


def test_a_merge_says_when_the_recipe_of_an_export_cannot_be_compared(new, tmp_path):
    source, target = captioned(new, "source", "One.", 1_000), path_of(new("target"))
    path = exported(source, tmp_path / "out")
    assert invoke("--db", target, "merge", path).stderr == ""
    manifest_path(Path(path)).unlink()
    result = invoke("--db", target, "merge", "--json", path)
    assert f"Warning: {path}: the manifest (.json) is missing." in result.stderr
    assert json.loads(result.stdout)[0]["has_manifest"] is False


def test_an_export_needs_its_split_and_its_run(new, tmp_path):
    source = new("source")
    caption(source, run_of(source), texts("One."))
    path = exported(source, tmp_path / "out")
    empty = new("empty", enqueue=False)
    told = "There is no run 'default'. Register one: rococap --db {0} enqueue --split train"
    assert refused("--db", path_of(empty), "merge", path) == told.format(path_of(empty))
    other = new("other", recipe=Recipe(model="tests/small", prompt="What?"))
    assert "was made with another recipe" in refused("--db", path_of(other), "merge", path)
