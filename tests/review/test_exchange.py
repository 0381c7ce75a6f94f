"""Reviews and edits go into a file and come back, in any order and any number of times, the same."""

import json
from pathlib import Path

import pytest
from samples import caption, fill, texts
from sqlalchemy import Engine
from steps import invoke, refused, said, select, writing

from rococap import db, review
from rococap.errors import RococapError
from rococap.queue import Run
from rococap.review import Replacement

MACHINE = ["CT of the left lung.", "MRI of the brain.", "Left kidney on CT."]
TABLES = ("reviews", "edits")


@pytest.fixture
def run(database: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("ROCOCAP_DB", database.url.render_as_string(hide_password=False))
    run = fill(database, tmp_path / "set", 4)
    caption(database, run, texts(*MACHINE))
    return run


@pytest.fixture
def other(tmp_path: Path, run: Run) -> Engine:
    """Another database with the same captions, whose jobs have other ids."""
    engine = db.connect(f"sqlite:///{tmp_path}/other.db")
    fill(engine, tmp_path / "set", 4, run="before")
    caption(engine, fill(engine, tmp_path / "set", 4), texts(*MACHINE))
    yield engine
    engine.dispose()


def work(database: Engine, run: Run) -> None:
    """Two verdicts, an edit that is undone, and an act of two edits."""
    (first,), (second,), _ = select(database, "SELECT job_id FROM captions ORDER BY 1")
    with writing(database) as conn:
        review.add_review(
            conn, run, first, "ann", "major", errors=["side"], note="It is\nthe right one: “R”.", now=1_000
        )
        review.add_review(conn, run, second, "Bōb", "correct", now=2_001)
        made = review.edit(conn, run, second, "ann", "CT of the brain.", seen=None, now=3_000)
        review.undo(conn, run, made.id, "bob", now=3_000)
    with db.transaction(database) as conn:
        seen = review.seen_now(conn, run, "train")
    assert review.replace_all(database, run, "train", Replacement("CT", "Computed tomography"), seen, "ann").n == 2


def content(database: Engine) -> list[list[tuple]]:
    """The rows of both tables without the ids of this database."""
    place = "r.name, j.split, i.image_id, x.uuid, x.reader, x.at"
    source = (
        "x JOIN jobs j ON j.id = x.job_id JOIN images i ON i.id = j.image_id JOIN runs r ON r.id = j.run_id "
        "ORDER BY x.uuid"
    )
    undone = "(SELECT u.uuid FROM edits u WHERE u.id = x.undoes)"
    return [
        select(database, f"SELECT {place}, x.verdict, x.errors, x.note FROM reviews {source}"),
        select(database, f"SELECT {place}, x.text, x.previous, {undone}, x.act FROM edits {source}"),
    ]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.every_database
def test_what_people_did_comes_back_the_same_and_once(database, run, other, tmp_path):
    work(database, run)
    path = tmp_path / "reviews.jsonl"
    assert review.export_reviews(database, path) == 6
    assert review.import_reviews(other, path) == review.Imported(2, 4, 0)
    assert content(other) == content(database)
    again = tmp_path / "again.jsonl"
    review.export_reviews(other, again)
    assert again.read_bytes() == path.read_bytes()
    for engine in (other, database):
        assert review.import_reviews(engine, path) == review.Imported(0, 0, 6)
    assert content(other) == content(database)


@pytest.mark.every_database
def test_two_halves_come_together_in_any_order(database, run, other, tmp_path):
    path, half = tmp_path / "reviews.jsonl", tmp_path / "half.jsonl"
    work(database, run)
    review.export_reviews(database, path)
    rows = path.read_text().splitlines(keepends=True)
    with writing(other) as conn:
        job = db.execute(conn, "SELECT min(job_id) FROM captions").scalar_one()
        review.edit(conn, run_of(other), job, "cy", "An edit of 1970.", seen=None, now=500)
        review.edit(conn, run_of(other), job + 1, "cy", "An edit of 2096.", seen=None, now=4_000_000_000_000)
    half.write_text("".join(rows[::-1][:3]) + "\n")
    with pytest.raises(RococapError, match=r"1 rows of .*half\.jsonl undo an edit that is missing \(line 3: \w{32}\)"):
        review.import_reviews(other, half)
    half.write_text("".join(rows[:4]))
    assert review.import_reviews(other, half).known == 0
    assert review.import_reviews(other, path) == review.Imported(0, 2, 4)
    with db.transaction(other) as conn:
        found = [review.caption_of(conn, run_of(other), "train", f"train_{n:05}").text for n in (0, 1)]
    assert found == ["Computed tomography of the left lung.", "An edit of 2096."], "the latest by time stands"


def run_of(database: Engine) -> Run:
    from rococap import queue

    with db.transaction(database) as conn:
        return queue.get_run(conn, "default")


def test_a_row_can_be_read_without_the_database(database, run, tmp_path):
    work(database, run)
    path = tmp_path / "reviews.jsonl"
    review.export_reviews(database, path)
    first, second, edited, undone, *_ = lines(path)
    assert [first.pop("uuid"), edited.pop("uuid")] != []
    place = {"run": "default", "split": "train"}
    assert first == {
        **{"kind": "review", **place, "image_id": "train_00000", "caption": MACHINE[0]},
        **{"reader": "ann", "at": "1970-01-01T00:00:01.000Z"},
        **{"verdict": "major", "errors": ["side"], "note": "It is\nthe right one: “R”."},
    }
    assert (second["reader"], second["at"]) == ("Bōb", "1970-01-01T00:00:02.001Z")
    assert edited == {
        **{"kind": "edit", **place, "image_id": "train_00001", "caption": MACHINE[1]},
        **{"reader": "ann", "at": "1970-01-01T00:00:03.000Z", "text": "CT of the brain.", "previous": MACHINE[1]},
        **{"undoes": None, "act": None},
    }
    assert (undone["text"], undone["at"]) == (MACHINE[1], "1970-01-01T00:00:03.001Z")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": "train_09999"}, "1 rows of {} are of pictures that their run has not captioned (line 2: default "
         "train train_09999): nothing was imported."),
        ({"run": "gone"}, "There is no run 'gone'."),
        ({"caption": "Another."}, "1 rows of {} are about other captions than the run has (line 2: default train"),
        ({"verdict": "good"}, "1 rows of {} are damaged (line 2: 'good' is not a verdict"),
        ({"at": "yesterday"}, "1 rows of {} are damaged (line 2: Invalid isoformat string: 'yesterday'"),
        ({"at": "2026-01-01T00:00:00"}, "1 rows of {} are damaged (line 2: at has no time zone"),
        ({"at": None}, "1 rows of {} are damaged (line 2: at is not text)"),
        ({"kind": "vote"}, "1 rows of {} are damaged (line 2: kind is 'vote', not review or edit)"),
        ({"uuid": "'; --"}, "1 rows of {} are damaged (line 2: uuid is not 32 hexadecimal digits"),
        ({"reader": None}, "1 rows of {} are damaged (line 2: reader is not text)"),
        ({"errors": 5}, "1 rows of {} are damaged (line 2: "),
    ],
)  # fmt: skip
def test_a_file_with_a_wrong_row_is_refused_whole(database, run, other, tmp_path, change, message):
    work(database, run)
    path = tmp_path / "reviews.jsonl"
    review.export_reviews(database, path)
    rows = lines(path)
    rows[1] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RococapError) as caught:
        review.import_reviews(other, path)
    assert str(caught.value).startswith(message.format(path))
    assert content(other) == [[], []]


def test_files_that_are_something_else_are_refused(database, run, tmp_path):
    path = tmp_path / "x.jsonl"
    for given in ("{}\n[]\nnot JSON\n", '{"kind": "review"}\n' * 12):
        path.write_text(given)
        with pytest.raises(RococapError, match=r"^\d+ rows of .* are damaged \(line 1: 'kind' is|^12 rows") as caught:
            review.import_reviews(database, path)
        assert str(caught.value).endswith(": nothing was imported. Use the original file.")
    assert "; … and 2 more)" in str(caught.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RococapError, match=r"is not UTF-8 .*: name a file that reviews were exported to\.$"):
        review.import_reviews(database, path)


# --- The command -----------------------------------------------------------------------------------------------


def test_the_command_counts_exports_and_imports(database, run, tmp_path):
    path = tmp_path / "reviews.jsonl"
    assert said("reviews") == "Nobody has reviewed or edited a caption here yet.\n"
    work(database, run)
    assert said("reviews", "--export", str(path)) == f"{path}: 6 verdicts and edits\n"
    assert said("reviews", "--import", str(path)) == f"{path}: 0 verdicts and 0 edits added, 6 known already\n"
    header, first, *_ = said("reviews", "--run", "default").splitlines()
    assert header.split() == ["run", "split", "reader", "correct", "minor", "major", "unusable", "edits"]
    assert first.split() == ["default", "train", "Bōb", "1", "0", "0", "0", "0"]
    assert json.loads(said("reviews", "--json"))[1] == {
        **{"run": "default", "split": "train", "reader": "ann"},
        **{"verdicts": {"correct": 0, "minor": 0, "major": 1, "unusable": 0}, "edits": 3},
    }


def test_what_the_command_cannot_do_at_once_is_refused(database, run, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("")
    file = str(path)
    assert refused("reviews", "--export", file, "--import", file, code=2).startswith(
        "--export and --import are two steps"
    )
    assert refused("reviews", "--import", file, "--run", "default", code=2).startswith("A file names its runs")
    assert refused("reviews", "--export", file, "--json", code=2).startswith("--json prints the counts")
    assert "There is no run 'x'" in refused("reviews", "--export", file, "--run", "x")
    assert invoke("runs", "--delete", "default", "--yes").exit_code == 0, "nobody reviewed it yet"


def test_a_run_with_reviews_is_not_deleted_by_the_command(database, run):
    work(database, run)
    assert "has reviews and edits, which are kept for good" in refused("runs", "--delete", "default", "--yes")
