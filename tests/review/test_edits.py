"""Verdicts and edits: every act is a row, nobody overwrites another, and what the machine wrote stays."""

from pathlib import Path

import pytest
from samples import caption, fill, texts
from sqlalchemy import Engine
from steps import at_once, column, select, writing

from rococap import db, queue, review
from rococap.errors import RococapError, RunError
from rococap.queue import Run
from rococap.queue.records import MAX_TEXT
from rococap.review import Conflict, Replacement

MACHINE = ["CT of the left lung.", "MRI of the brain.", "Left kidney on CT.", "X-ray of the chest."]


@pytest.fixture
def run(database: Engine, tmp_path: Path) -> Run:
    run = fill(database, tmp_path / "set", 6)
    caption(database, run, texts(*MACHINE))
    return run


def jobs(database: Engine) -> list[int]:
    return column(database, "SELECT job_id FROM captions ORDER BY job_id")


def current(database: Engine, run: Run) -> list[str]:
    with db.transaction(database) as conn:
        found = [review.caption_of(conn, run, "train", f"train_{n:05}") for n in range(len(MACHINE))]
    assert [one.machine for one in found] == MACHINE
    return [one.text for one in found]


def edit(
    database: Engine, run: Run, job: int, text: str, *, seen: int | None = None, reader: str = "ann"
) -> review.Edit:
    with writing(database) as conn:
        return review.edit(conn, run, job, reader, text, seen=seen)


def undo(database: Engine, run: Run, edit_id: int, reader: str = "ann") -> review.Edit:
    with writing(database) as conn:
        return review.undo(conn, run, edit_id, reader)


def replace(database: Engine, run: Run, replacement: Replacement, between=lambda: None) -> review.Replaced:
    with db.transaction(database) as conn:
        seen = review.seen_now(conn, run, "train")
    between()
    return review.replace_all(database, run, "train", replacement, seen, "ann")


# --- Verdicts --------------------------------------------------------------------------------------------------


@pytest.mark.every_database
def test_a_verdict_is_a_row_and_the_latest_of_a_reader_counts(database, run):
    first, second, *_ = jobs(database)
    with writing(database) as conn:
        made = review.add_review(
            conn, run, first, " ann ", "major", errors=("measurement", "side"), note="right\0 lung", now=5
        )
        review.add_review(conn, run, first, "ann", "minor", errors=["side"], now=6)
        review.add_review(conn, run, first, "bob", "correct", now=7)
        review.add_review(conn, run, second, "ann", "correct", now=8)
    assert (made.reader, made.errors, made.note, made.at) == ("ann", ("side", "measurement"), "right� lung", 5)
    with db.transaction(database) as conn:
        assert review.history(conn, first)[0] == made
        assert [one.verdict for one in review.history(conn, first)] == ["major", "minor", "correct"]
        found = [(one.reader, dict(one.verdicts)) for one in review.counts(conn, run)]
    assert found == [
        ("ann", {"correct": 1, "minor": 1, "major": 0, "unusable": 0}),
        ("bob", {"correct": 1, "minor": 0, "major": 0, "unusable": 0}),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"verdict": "good"}, "'good' is not a verdict: use one of correct, minor, major, unusable."),
        ({"errors": ["spelling"]}, "'spelling' is not a kind of error: use modality, body_part, side, invented, "),
        ({"verdict": "correct", "errors": ["side"]}, "A correct caption has no errors"),
        ({"reader": " "}, "' ' is not the name of a reader: give 1 to 100 characters, in one line."),
        ({"reader": "a\nb"}, "is not the name of a reader"),
        ({"note": "x" * 10_001}, "This note has 10,001 characters; at most 10,000 can be stored. Shorten it."),
        ({"job_id": 5}, "Run 'default' has no caption number 5 yet: nothing was changed."),
    ],
)
def test_a_verdict_that_makes_no_sense_is_refused(database, run, given, message):
    row = {"job_id": jobs(database)[0], "reader": "ann", "verdict": "minor"} | given
    with pytest.raises(RococapError) as caught, writing(database) as conn:
        review.add_review(conn, run, **row)
    assert message in str(caught.value)
    assert select(database, "SELECT * FROM reviews") == []


# --- Edits -----------------------------------------------------------------------------------------------------


@pytest.mark.every_database
def test_an_edit_keeps_what_was_before_and_undo_is_another_edit(database, run):
    job = jobs(database)[0]
    one = edit(database, run, job, "CT of the right lung.")
    assert (one.reader, one.text, one.previous) == ("ann", "CT of the right lung.", MACHINE[0])
    two = edit(database, run, job, "CT of both lungs.", seen=one.id, reader="bob")
    assert two.previous == one.text
    assert two.at > one.at
    three = undo(database, run, two.id)
    assert (three.text, three.previous, three.undoes) == (one.text, two.text, two.id)
    assert current(database, run)[0] == one.text
    assert undo(database, run, three.id).text == two.text, "undone itself"
    with db.transaction(database) as conn:
        assert [made.text for made in review.history(conn, job)] == [one.text, two.text, one.text, two.text]
    assert column(database, "SELECT text FROM captions ORDER BY job_id") == MACHINE


@pytest.mark.every_database
def test_of_two_people_who_edit_one_caption_the_second_is_given_the_first_ones_edit(database, run):
    job = jobs(database)[0]
    readers = iter(["ann", "bob"])

    def one() -> review.Edit | Conflict:
        name = next(readers)
        try:
            return edit(database, run, job, f"The text of {name}.", reader=name)
        except Conflict as conflict:
            return conflict

    made, refused = sorted(at_once(2, one), key=lambda found: isinstance(found, Conflict))
    assert isinstance(refused, Conflict)
    assert refused.edit == made
    assert str(refused).startswith(f"{made.reader} edited this caption in the meantime, so nothing was changed.")
    assert len(select(database, "SELECT id FROM edits")) == 1
    with pytest.raises(Conflict), writing(database) as conn:
        review.edit(conn, run, job, "cy", "Of neither.", seen=made.id + 1)
    assert edit(database, run, job, "Seen and decided.", seen=made.id, reader="cy").previous == made.text
    with pytest.raises(Conflict) as caught:
        undo(database, run, made.id)
    assert caught.value.edit.reader == "cy"


def test_the_latest_edit_stands_although_the_clock_went_back(database, run):
    job = jobs(database)[0]
    with writing(database) as conn:
        one = review.edit(conn, run, job, "ann", "Of the future.", seen=None, now=9_000)
        two = review.edit(conn, run, job, "ann", "Of today.", seen=one.id, now=5)
    assert two.at == 9_001
    assert current(database, run)[0] == "Of today."


def test_an_edit_that_makes_no_sense_is_refused(database, run, tmp_path):
    job = jobs(database)[0]
    with pytest.raises(RococapError, match=r"^The caption is as it was: nothing was stored\."):
        edit(database, run, job, MACHINE[0])
    with pytest.raises(RococapError, match=r"^This caption has 65,537 characters; at most 65,536 can be stored\."):
        edit(database, run, job, "x" * (MAX_TEXT + 1))
    with pytest.raises(RunError, match=r"^Run 'default' has no caption number 6 yet"):
        edit(database, run, 6, "Not captioned yet.")
    with pytest.raises(RococapError, match=r"^Run 'default' has no edit number 1: nothing was changed\.$"):
        undo(database, run, 1)
    other = fill(database, tmp_path / "set", 6, run="other")
    made = edit(database, run, job, "A NUL\0 and half a \ud83d.")
    assert made.text == "A NUL� and half a �."
    with pytest.raises(RunError, match=r"^Run 'other' has no caption"):
        edit(database, other, job, "Of another run.", seen=made.id)
    with pytest.raises(RococapError, match=r"^Run 'other' has no edit"):
        undo(database, other, made.id)
    assert len(select(database, "SELECT id FROM edits")) == 1


# --- Many at once ----------------------------------------------------------------------------------------------


@pytest.mark.every_database
def test_a_replacement_is_shown_made_as_one_act_and_undone_as_one(database, run):
    first, second, third, _ = jobs(database)
    earlier = edit(database, run, second, "MRI of the left brain.")
    swap = Replacement("left", "right", match_case=False, whole_words=True)
    with db.transaction(database) as conn:
        seen = review.seen_now(conn, run, "train")
    shown = list(review.changes(database, run, "train", swap, seen))
    assert [(one.image_id, one.before, one.after, one.seen) for one in shown] == [
        ("train_00000", MACHINE[0], "CT of the right lung.", None),
        ("train_00001", "MRI of the left brain.", "MRI of the right brain.", earlier.id),
        ("train_00002", "Left kidney on CT.", "right kidney on CT.", None),
    ]
    assert list(review.changes(database, run, "train", swap, seen, after=shown[0].key)) == shown[1:]
    made = review.replace_all(database, run, "train", swap, seen, "ann")
    assert (made.n, made.skipped) == (3, 0)
    after = ["CT of the right lung.", "MRI of the right brain.", "right kidney on CT.", MACHINE[3]]
    assert current(database, run) == after
    assert select(database, "SELECT DISTINCT act FROM edits WHERE act IS NOT NULL") == [(made.act,)]
    later = edit(database, run, third, "Kidney on CT.", seen=column(database, "SELECT max(id) FROM edits")[0])
    with writing(database) as conn:
        back = review.undo_act(conn, run, made.act, "bob")
    assert (back.n, back.skipped) == (2, 1), "what was edited since stays"
    assert current(database, run) == [MACHINE[0], earlier.text, later.text, MACHINE[3]]
    with db.transaction(database) as conn:
        assert [(one.act, one.reader, one.n, one.is_undone) for one in review.list_acts(conn, run)] == [
            (back.act, "bob", 2, False),
            (made.act, "ann", 3, True),
        ]
    with writing(database) as conn:
        review.undo_act(conn, run, back.act, "bob")
    assert current(database, run) == [*after[:2], later.text, MACHINE[3]]
    assert first


def test_a_replacement_leaves_alone_what_its_preview_did_not_show(database, run):
    first = jobs(database)[0]

    def meanwhile() -> None:
        edit(database, run, first, "Left, as bob says.", reader="bob")
        caption(database, run, texts("A late caption of the left hand."), now=2_000)

    made = replace(database, run, Replacement("eft", "EFT"), meanwhile)
    assert (made.n, made.skipped) == (1, 1)
    assert current(database, run) == ["Left, as bob says.", MACHINE[1], "LEFT kidney on CT.", MACHINE[3]]


def test_a_replacement_takes_its_texts_literally(database, run):
    assert replace(database, run, Replacement(".", r"\1 (?)")).n == 4
    assert current(database, run)[0] == r"CT of the left lung\1 (?)"
    nothing = replace(database, run, Replacement("no such words", ""))
    assert (nothing.act, nothing.n) == (None, 0)
    with pytest.raises(RococapError, match=r"^There is nothing to look for"):
        replace(database, run, Replacement("", "x"))
    with (
        pytest.raises(RococapError, match=r"^Run 'default' has no act 'none': nothing was changed\.$"),
        writing(database) as conn,
    ):
        review.undo_act(conn, run, "none", "ann")


def test_a_replacement_that_would_make_a_caption_too_long_does_nothing(database, run):
    with pytest.raises(RococapError, match=r"^The caption of train_00000 would have more than 65,536 characters"):
        replace(database, run, Replacement("lung", "x" * MAX_TEXT))
    assert select(database, "SELECT id FROM edits") == []


# --- Kept for good ---------------------------------------------------------------------------------------------


@pytest.mark.every_database
@pytest.mark.parametrize("what", ["edits", "reviews", "reader studies"])
def test_a_run_that_people_worked_on_is_not_deleted(database, run, what):
    job = jobs(database)[0]
    with writing(database) as conn:
        if what == "edits":
            review.edit(conn, run, job, "ann", "A CT.", seen=None)
        elif what == "reviews":
            review.add_review(conn, run, job, "ann", "correct")
        else:
            db.execute(conn, "INSERT INTO studies VALUES (1, 's', 'train', 1, 1, 0, '{}', 5)")
            db.execute(conn, "INSERT INTO study_items VALUES (1, 1, 1, 1, 1, 1, 'CT', ?)", (job,))
    with pytest.raises(RunError) as caught, writing(database) as conn:
        queue.delete_run(conn, run)
    assert str(caught.value).startswith(f"Run 'default' has {what}, which are kept for good, so it was not deleted.")
    with db.transaction(database) as conn:
        assert queue.get_run(conn, "default") == run


def test_nothing_of_a_deleted_run_is_reviewed_or_edited(database, run):
    job = jobs(database)[0]
    with writing(database) as conn:
        queue.delete_run(conn, run)
    for act in (
        lambda conn: review.edit(conn, run, job, "ann", "A CT.", seen=None),
        lambda conn: review.add_review(conn, run, job, "ann", "correct"),
    ):
        with pytest.raises(RunError, match=r"^Run 'default' has been deleted\."), writing(database) as conn:
            act(conn)


def test_no_statement_changes_or_removes_what_people_did():
    """The tables of people's work only ever grow. If a study was opened in two databases that are merged, the time at
    which it was first opened stays.
    """
    source = "\n".join(path.read_text() for path in sorted(Path(review.__file__).parents[1].rglob("*.py")))
    source = source.replace("DELETE FROM unblindings WHERE study_id = ? AND (at > ?", "", 1)
    for table in ("reviews", "edits", "studies", "study_items", "study_readers", "ratings", "unblindings"):
        assert f"INSERT INTO {table} (" in source
        for verb in (f"UPDATE {table}", f"DELETE FROM {table}", f"REPLACE INTO {table}"):
            assert verb not in source
