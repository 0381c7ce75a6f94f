"""The search index follows its queue, and whatever happens to it, it is filled again or search is off."""

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import samples
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from galleries import LATER, N, both_databases, finish, score, up_to_date, world
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, event
from steps import column, writing

from rococap import db, queue
from rococap.queue import Run
from rococap.recipe import Recipe
from rococap.results import checkpoints, current, export
from rococap.scores.compare import compare
from rococap.tables import metadata
from rococap.transfer import merge
from rococap.web import gallery
from rococap.web import index as module
from rococap.web.documents import Document, Wanted, facet
from rococap.web.gallery import Query
from rococap.web.index import Index, Mark, SearchUnavailable
from rococap.web.words import Term, words_of


@pytest.fixture
def runs(database: Engine, tmp_path: Path) -> list[Run]:
    return world(database, tmp_path)


def found(database: Engine, index: Index, runs: list[Run], words: str = "", **more) -> list[int]:
    query = Query("train", words=words, **more)
    page = gallery.page(database, index, runs, query, limit=100)
    return [int(picture.image_id[-5:]) for picture in page.pictures]


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample is compared with the queue at every update."""
    monkeypatch.setattr(module, "CHECK_SEC", 0.0)


def n_documents(index: Index) -> int:
    with index.reading() as conn:
        return db.execute(conn, f"SELECT count(*) FROM {index.documents.schema}documents").scalar_one()


# --- Following the queue ---------------------------------------------------------------------------------------


@both_databases
def test_captions_failures_and_retries_are_followed(database, runs):
    index = up_to_date(Index(database))
    second = runs[1:]
    assert found(database, index, second, "mass 14") == []
    finish(database, runs[1], [14, 15], failed={15: "corrupt"}, now=LATER)
    assert index.update(60).state == "ready"  # without reading everything again
    assert found(database, index, second, "mass 14") == [14]
    assert found(database, index, second, code="corrupt") == [15]
    with writing(database) as conn:
        queue.retry(conn, runs[1], codes=["corrupt"])
    assert index.update(60).state == "ready"
    assert found(database, index, second, failed=True) == []
    finish(database, runs[1], [15], now=LATER)
    assert index.update(60).state == "ready"
    assert found(database, index, second, "mass 15") == [15]
    with index.reading() as conn:
        assert index.totals(conn, second, "train") == {2: (N, 1)}
    index.close()


@both_databases
def test_a_picture_that_failed_again_for_another_reason_has_the_new_code(database, runs):
    index = up_to_date(Index(database))
    with writing(database) as conn:
        queue.retry(conn, runs[0], image_ids=["train_00011"])
    finish(database, runs[0], [11], failed={11: "truncated"}, now=LATER)
    assert index.update(60).state == "ready"
    assert found(database, index, runs, code="truncated") == [11]
    assert found(database, index, runs, code="too_large") == []
    index.close()


@both_databases
def test_captions_that_are_in_a_checkpoint_by_the_next_poll_are_found(database, runs, tmp_path):
    checkpoints.write_checkpoints(database, runs[1], "train", tmp_path / "out", 7)
    index = up_to_date(Index(database))
    finish(database, runs[1], range(14, 21), now=LATER)
    checkpoints.write_checkpoints(database, runs[1], "train", tmp_path / "out", 7)
    assert column(database, "SELECT count(*) FROM jobs WHERE checkpoint = 3") == [7]
    assert index.update(60).state == "ready"
    assert found(database, index, runs[1:], "mass 20") == [20]
    index.close()


@both_databases
def test_captions_are_found_although_the_clock_was_set_back(database, runs):
    index = up_to_date(Index(database))
    finish(database, runs[1], [14], now=2_000)
    assert index.update(60).state == "filling"
    assert found(database, up_to_date(index), runs[1:], "mass 14") == [14]
    index.close()


def part(folder: Path, run: str, prompt: str, captions: Sequence[dict], now: int = 500) -> Engine:
    """Another database, in which the first pictures of `train` were captioned in the run too."""
    engine = db.connect(f"sqlite:///{folder}/part.db")
    samples.register(engine, folder, ["train"], run=run, recipe=Recipe(model="m", prompt=prompt), limit=len(captions))
    with db.transaction(engine) as conn:
        captioned = queue.get_run(conn, run)
    samples.caption(engine, captioned, list(captions), now=now)
    return engine


def source_of(part: Engine, kind: str) -> str:
    if kind == "database":
        return str(part.url.database)
    path = Path(str(part.url.database)).with_suffix(".csv")
    with db.transaction(part) as conn:
        (run,) = queue.list_runs(conn)
    export.export(part, run, "train", path)
    return str(path)


EARLIER = samples.texts("An earlier caption", "An earlier one", "The earliest")


@both_databases
@pytest.mark.parametrize("kind", ["database", "export"])
@pytest.mark.parametrize("into", ["no checkpoint", "a checkpoint"])
def test_captions_that_a_merge_replaced_are_found_by_their_own_words(database, runs, tmp_path, kind, into):
    index = up_to_date(Index(database))
    assert found(database, index, runs[:1], "nodule 2") == [2]
    source = part(tmp_path, "one", "Describe.", EARLIER)
    assert merge(database, source_of(source, kind)).twice == 3
    if into == "a checkpoint":  # by the next poll
        checkpoints.write_checkpoints(database, runs[0], "train", tmp_path / "out", 1)
    assert index.update(60).state == "ready"  # without reading everything again
    assert found(database, index, runs[:1], "earlier") == [0, 1]
    assert found(database, index, runs[:1], "nodule 2") == []
    assert found(database, index, runs[:1], sort="time")[:3] == [0, 1, 2]
    source.dispose()
    index.close()


@both_databases
def test_captions_that_a_merge_replaced_are_found_although_others_finished_later_meanwhile(database, runs, tmp_path):
    with db.transaction(database) as conn:
        soon = db.now(conn) + module.OVERLAP_MS // 2
    index = up_to_date(Index(database))
    finish(database, runs[1], [14], now=soon)
    assert found(database, up_to_date(index), runs[1:], "mass 14") == [14]
    source = part(tmp_path, "two", "Say.", EARLIER)
    merge(database, source_of(source, "database"))
    assert index.update(60).state == "ready"
    assert found(database, index, runs[1:], "earlier") == [0, 1]
    source.dispose()
    index.close()


@both_databases
def test_flags_that_come_with_the_database_of_an_export_are_followed(database, runs, tmp_path):
    source = part(tmp_path, "one", "Describe.", [{"text": "An earlier caption", "flags": "blank"}])
    merge(database, source_of(source, "export"))
    checkpoints.write_checkpoints(database, runs[0], "train", tmp_path / "out", 1)
    index = up_to_date(Index(database))
    assert found(database, index, runs[:1], flag="blank") == []
    merge(database, source_of(source, "database"))
    assert index.update(60).state == "ready"
    assert found(database, index, runs[:1], flag="blank") == [0]
    source.dispose()
    index.close()


@both_databases
def test_what_has_been_read_is_not_written_again(database, runs, tmp_path, monkeypatch):
    index = up_to_date(Index(database))
    source = part(tmp_path, "one", "Describe.", EARLIER)
    merge(database, source_of(source, "database"))
    finish(database, runs[1], [14, 15], now=LATER)
    up_to_date(index)
    written = []
    monkeypatch.setattr(index, "_put", lambda conn, entries: written.extend(entries))
    assert index.update(60).state == "ready"
    checkpoints.write_checkpoints(database, runs[1], "train", tmp_path / "out", 1)
    assert index.update(60).state == "ready"
    assert written == []
    monkeypatch.setattr(index, "_store", None)
    assert index.update(60).state == "ready"
    source.dispose()
    index.close()


@both_databases
def test_new_runs_and_pictures_are_followed(database, runs, tmp_path):
    index = up_to_date(Index(database))
    samples.register(database, tmp_path, ["train"], run="three", recipe=Recipe(model="m", prompt="Third."))
    with db.transaction(database) as conn:
        third = queue.get_run(conn, "three")
    assert index.update(60).state == "ready"
    assert found(database, index, [third], "axial left") == list(range(1, N, 2))
    index.close()


@both_databases
def test_new_scores_are_noticed(database, runs, checks):
    index = up_to_date(Index(database))
    assert found(database, index, runs[1:], score="rouge_l", least=0.0) == []
    score(database, runs[1], {n: n / 100 for n in range(14)})
    up_to_date(index)
    assert found(database, index, runs[1:], sort="rouge_l", descending=True) == list(range(13, -1, -1))
    score(database, runs[1], {n: 1 - n / 100 for n in range(14)})
    up_to_date(index)
    assert found(database, index, runs[1:], sort="rouge_l") == list(range(13, -1, -1))
    score(database, runs[1], {5: None})
    assert 5 not in found(database, up_to_date(index), runs[1:], sort="rouge_l")
    index.close()


@both_databases
def test_the_pictures_on_which_runs_disagree_come_first_once_they_were_compared(database, runs, checks, tmp_path):
    index = up_to_date(Index(database))
    assert found(database, index, runs, sort="disagreement") == []
    with writing(database) as conn:
        sql = "UPDATE captions SET text = ? WHERE job_id = (SELECT id FROM jobs WHERE run_id = ? AND image_id = ?)"
        for n, text in ((5, "No effusion."), (9, "No effusion, CT."), (2, "CT.")):
            db.execute(conn, sql, (text, runs[1].id, n + 1))
    compare(database, ["one", "two"], tmp_path / "compared.csv")
    up_to_date(index)
    assert found(database, index, runs, sort="disagreement", descending=True)[:3] == [9, 5, 2]
    index.close()


@both_databases
def test_new_originals_are_noticed(database, runs, checks, tmp_path):
    index = up_to_date(Index(database))
    samples.write_shard(tmp_path, "test", range(5), captions={2: "A replaced original."})
    samples.register(database, tmp_path, ["test"], run="one", recipe=Recipe(model="m", prompt="Describe."))
    up_to_date(index)
    assert len(gallery.page(database, index, runs, Query("test", words="replaced")).pictures) == 1
    index.close()


@both_databases
def test_a_deleted_run_is_found_no_more_and_the_others_stay(database, runs, checks):
    index = up_to_date(Index(database))
    with writing(database) as conn:
        queue.delete_run(conn, runs[0])
    n_cleared = None
    while n_cleared != 0:
        with writing(database) as conn:
            n_cleared = queue.clear_deleted(conn)
    before = n_documents(index)
    assert index.update(60).state == "ready"
    assert found(database, index, runs[1:], "axial nodule") == []
    assert found(database, index, runs[1:], "axial mass 13") == [13]
    assert n_documents(index) == before
    index.close()


@both_databases
def test_a_mark_that_people_set_filters_pictures(database, runs):
    with writing(database) as conn:
        db.execute(conn, "CREATE TABLE marks_of_a_test (id integer PRIMARY KEY, job_id integer, held integer)")

    def changed(conn, after):
        sql = "SELECT id, job_id FROM marks_of_a_test WHERE id > ? ORDER BY id LIMIT 1"
        return [tuple(row) for row in db.execute(conn, sql, (after,)).fetchall()]

    def held(conn, jobs):
        sql = "SELECT job_id FROM marks_of_a_test m WHERE held = 1 AND id = (SELECT max(id) FROM marks_of_a_test o "
        return {row[0] for row in db.execute(conn, sql + "WHERE o.job_id = m.job_id)").fetchall()} & set(jobs)

    def record(*rows):
        with writing(database) as conn:
            db.execute(conn, "INSERT INTO marks_of_a_test VALUES (?, ?, ?)", list(rows))

    one = column(database, "SELECT id FROM jobs WHERE run_id = 1 AND split = 'train' ORDER BY image_id")
    record((1, one[3], 1), (2, one[5], 1))
    index = up_to_date(Index(database, [Mark("reviewed", changed, held)]))
    assert found(database, index, runs[:1], marks={"reviewed": True}) == [3, 5]
    record((3, one[9], 1), (4, one[3], 0))
    assert index.update(60).state == "ready"
    assert found(database, index, runs[:1], marks={"reviewed": True}) == [5, 9]
    assert found(database, index, runs[:1], marks={"reviewed": False}) == [n for n in range(N) if n not in (5, 9)]
    assert found(database, index, runs[:1], "nodule 9", marks={"reviewed": False}) == []
    with writing(database) as conn:
        db.execute(conn, "DROP TABLE marks_of_a_test")
    index.close()


# --- Filling ---------------------------------------------------------------------------------------------------


@both_databases
def test_filling_goes_on_where_it_stopped_and_says_how_far_it_is(database, runs, monkeypatch):
    monkeypatch.setattr(current, "PAGE", 7)
    told = []
    first = Index(database)
    status = first.update(0, lambda *step: told.append(step))
    assert (status.state, status.done, status.total) == ("filling", 7, 2 * N + 10)
    first.close()
    second = Index(database)
    status = second.update(0, lambda *step: told.append(step))
    assert (status.state, status.done) == ("filling", 14)
    assert told == [("filling the search index", 7, 60), ("filling the search index", 14, 60)]
    assert n_documents(up_to_date(second)) == 60
    second.close()


@both_databases
def test_several_processes_fill_one_index_together(database, runs, monkeypatch):
    monkeypatch.setattr(current, "PAGE", 3)
    indexes = [Index(database) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(up_to_date, indexes))
    for index in indexes:
        assert n_documents(index) == 60
        assert found(database, index, runs, "lung") == list(range(N))
        with index.reading() as conn:
            assert {id: n for id, (n, _) in index.totals(conn, runs, "train").items()} == {1: N, 2: N}
        index.close()


@both_databases
def test_the_index_is_no_part_of_the_queue(database, runs):
    up_to_date(Index(database))
    with database.connect() as conn:
        assert compare_metadata(MigrationContext.configure(conn), metadata) == []
    db.connect(database.url.render_as_string(hide_password=False)).dispose()


@both_databases
def test_each_word_of_a_text_is_found_and_each_phrase(database, runs):
    texts = ["½ x'y\\z ß Σίσυφος", "L4–L5 e\u0301 é", "ＣＴ हिन्दी 日本語 🫁 ŉ", "w" * 3000, "it's 3.5x4.2 cm_wide"]
    index = up_to_date(Index(database))
    facets = (facet("run", 1), facet("split", "odd"))
    put = [Document(1_000 + n, 1, "open", text, "", facets) for n, text in enumerate(texts)]
    put.append(Document(5_000_000_000, 1, "done", "A lung", "effusion on the left", facets))
    with index._writing() as conn:
        index.documents.put(conn, put)
    with index.reading() as conn:
        for document in put:
            words = words_of(document.original)
            for term in map(Term, [*((word,) for word in words), *pairwise(words)]):
                sql = index.documents.images(Wanted("odd", (1,), terms=(term,), first_image=1_000), None, 10)
                assert document.image_id in [row[0] for row in db.execute(conn, *sql).fetchall()], term
        apart = Wanted("odd", (1,), terms=(Term(("lung", "effusion")),))
        assert db.execute(conn, *index.documents.images(apart, None, 10)).fetchall() == []
    index.close()


@given(st.text(max_size=8), st.text(max_size=8))
def test_different_values_are_different_facets(one, other):
    assert (facet("code", one) == facet("code", other)) == (one.lower() == other.lower())
    assert facet("code", one).isascii()
    assert facet("code", one).isalnum()


def test_a_file_that_another_process_has_made_again_is_opened(database, runs):
    index = up_to_date(Index(database))
    file_of(index).unlink()
    finish(database, runs[1], [14], now=LATER)
    up_to_date(Index(database)).close()
    assert index.update(60).state == "ready"
    assert found(database, index, runs[1:], "mass 14") == [14]
    index.close()


# --- Trouble ---------------------------------------------------------------------------------------------------


def file_of(index: Index) -> Path:
    assert index._file is not None
    return index._file


@both_databases
def test_an_index_of_another_format_is_filled_again(database, runs, monkeypatch):
    up_to_date(Index(database)).close()
    monkeypatch.setattr(module, "FORMAT", "another")
    index = Index(database)
    monkeypatch.setattr(current, "PAGE", 5)
    assert index.update(0).done == 5
    assert found(database, up_to_date(index), runs, "lung") == list(range(N))
    index.close()


def test_an_index_of_another_database_is_filled_again(database, runs, tmp_path):
    up_to_date(Index(database)).close()
    (tmp_path / "other").mkdir()
    other = db.connect(f"sqlite:///{tmp_path}/other/queue.db")
    samples.fill(other, tmp_path / "other", 3)
    shutil.copy(tmp_path / "queue.db.search", tmp_path / "other" / "queue.db.search")
    index = up_to_date(Index(other))
    assert n_documents(index) == 3
    other.dispose()


@pytest.mark.parametrize("captions", [(), [0, 1]], ids=["fewer captions", "other captions"])
def test_an_index_of_a_past_that_a_backup_undid_is_filled_again(engine, tmp_path, checks, captions):
    run = samples.fill(engine, tmp_path, 4)
    db.back_up(engine, tmp_path / "backup.db")
    samples.caption(engine, run, samples.texts("a lost one", "another"))
    index = up_to_date(Index(engine))
    engine.dispose()
    shutil.copy(tmp_path / "backup.db", tmp_path / "queue.db")
    if captions:
        samples.caption(engine, run, samples.texts("a different caption", "and one more"), now=9_000)
    up_to_date(index)
    assert found(engine, index, [run], "lost") == []
    assert found(engine, index, [run], "different") == list(captions[:1])
    index.close()


@pytest.mark.parametrize("damage", ["emptied", "overwritten", "cut", "removed", "replaced by text"])
def test_a_damaged_or_missing_file_is_made_again(database, runs, damage):
    index = up_to_date(Index(database))
    file = file_of(index)
    data = file.read_bytes()
    if damage == "removed":
        file.unlink()
    elif damage == "replaced by text":
        file.write_text("This is not a database." * 100)
    elif damage == "emptied":
        file.write_bytes(b"")
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.write_bytes(data[:4096] + b"\xaa" * (len(data) - 4096))
    finish(database, runs[1], [14], now=LATER)
    if damage != "removed":
        index._database.dispose()  # another process reads the file, not what this one remembers of it
    for _ in range(5):
        index.update(60)
        with suppress(SearchUnavailable):
            assert found(database, index, runs[1:], "mass 14") == [14]
            break
    else:
        raise AssertionError(index.status)
    assert found(database, index, runs, "lung") == list(range(N))
    index.close()


def test_a_full_disk_ends_search_until_there_is_space(database, runs, monkeypatch):
    index = Index(database)
    limits = [5, 10_000]

    @event.listens_for(index._database, "connect")
    def limit(connection, _record):
        connection.execute(f"PRAGMA max_page_count = {limits[0]}")

    status = index.update(60)
    assert status.state == "off"
    assert "full" in status.why
    assert "Free some space" in status.why
    assert found(database, index, runs) == list(range(N))
    with pytest.raises(SearchUnavailable):
        found(database, index, runs, "lung")
    del limits[0]
    index._database.dispose()
    assert found(database, up_to_date(index), runs, "lung") == list(range(N))
    index.close()


def test_a_file_that_cannot_be_opened_ends_search_with_a_sentence(database, runs):
    index = Index(database)
    file_of(index).mkdir()
    assert index.update(60).state == "off"
    page = gallery.page(database, index, runs, Query("train"), limit=100)
    assert len(page.pictures) == N
    assert "search is off, all else works. Check that the folder can be written" in page.why
    with pytest.raises(SearchUnavailable, match="search is off"):
        found(database, index, runs, "lung")
    file_of(index).rmdir()
    assert found(database, up_to_date(index), runs, "lung") == list(range(N))
    index.close()


@pytest.mark.slow
def test_a_role_that_may_make_no_schema_gets_no_search_and_a_sentence(request, tmp_path):
    server = request.getfixturevalue("postgres")
    url = server.create(template="empty_queue")
    owner = db.connect(url)
    with owner.connect() as conn:
        for statement in (
            "CREATE ROLE looker LOGIN",
            "GRANT SELECT ON ALL TABLES IN SCHEMA public TO looker",
        ):
            conn.exec_driver_sql(statement)
    samples.fill(owner, tmp_path, 3)
    looker = db.connect(owner.url.set(username="looker").render_as_string(hide_password=False))
    index = Index(looker)
    status = index.update(60)
    assert status.state == "off"
    assert "GRANT CREATE ON DATABASE" in status.why
    looker.dispose()
    owner.dispose()
    server.drop(url)
