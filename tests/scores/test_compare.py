"""Runs side by side: the file's rows and columns, and what the captions took and came to."""

import csv
import errno
import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
import steps
from samples import caption, fill, register, texts, write_shard
from sqlalchemy import Engine

from rococap import db, queue
from rococap.errors import RococapError, RunError
from rococap.queue import Run
from rococap.recipe import Recipe
from rococap.results import formats, snapshot
from rococap.scores import compare as comparison
from rococap.scores import disagreement
from rococap.scores.compare import compare

AWKWARD = ['He said "no", twice.', "two\nlines", "a bare \r here", " spaces ", "", "NA", "=1+1", "line \u2028 sep, 🦴"]
COLUMNS = [
    *("image_id", "split", "original_caption", "generated_caption_a", "generated_caption_b", "flags_a", "flags_b"),
    *("new_tokens_a", "new_tokens_b", "processing_time_sec_a", "processing_time_sec_b"),
    *("finish_reason_a", "finish_reason_b"),
]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cells(path: Path, *columns: str) -> list[tuple[str, ...]]:
    return [tuple(row[column] for column in columns) for row in read(path)]


@pytest.fixture
def runs(database: Engine, tmp_path: Path) -> tuple[Run, Run]:
    """Runs a and b, of 20 pictures each."""
    one = fill(database, tmp_path / "set", 20, run="a")
    return one, fill(database, tmp_path / "set", 20, run="b", recipe=Recipe(model="tests/other"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results_medical" / "x.csv"


# --- the file --------------------------------------------------------------------------------------------------


@pytest.mark.every_database
def test_a_row_for_every_picture_that_a_run_has_captioned_in_data_set_order(database, runs, out):
    caption(database, runs[0], texts("a5", "a6"), skip=5)
    caption(database, runs[1], texts("b4", "b5"), skip=4)
    caption(database, runs[1], texts("b0"), now=2_000)
    compared = compare(database, ["a", "b"], out)
    assert (compared.path, compared.rows, compared.shared) == (out, 4, 1)
    assert list(read(out)[0]) == COLUMNS
    assert cells(out, "image_id", "original_caption", "generated_caption_a", "generated_caption_b") == [
        ("train_00000", "Original caption 0.", "", "b0"),
        ("train_00004", "Original caption 4.", "", "b4"),
        ("train_00005", "Original caption 5.", "a5", "b5"),
        ("train_00006", "Original caption 6.", "a6", ""),
    ]


@pytest.mark.every_database
def test_only_pictures_that_every_run_has_captioned_where_that_is_asked(database, runs, out):
    caption(database, runs[0], texts("a0", "a1"))
    caption(database, runs[1], texts("b1", "b2"), skip=1)
    compared = compare(database, ["b", "a"], out, all_done=True)
    assert (compared.rows, compared.shared, [one.captions for one in compared.runs]) == (1, 1, [1, 1])
    assert cells(out, "image_id", "generated_caption_b", "generated_caption_a") == [("train_00001", "b1", "a1")]


def test_a_row_has_what_each_caption_took(database, runs, out):
    caption(database, runs[0], [{"text": "A.", "flags": "loop,empty", "new_tokens": 7, "processing_ms": 1234.5678}])
    caption(database, runs[1], [{"text": "B.", "finish_reason": "length"}])
    compare(database, ["a", "b"], out)
    assert out.read_text().splitlines() == [
        ",".join(COLUMNS),
        '"train_00000","train","Original caption 0.","A.","B.","loop,empty","",7,0,1.234568,0,"stop","length"',
    ]


@pytest.mark.parametrize("format", formats.FORMATS)
def test_texts_come_out_as_they_went_in_and_what_is_missing_is_told_from_what_is_empty(database, runs, out, format):
    caption(database, runs[0], texts(*AWKWARD))
    caption(database, runs[1], texts("b"), skip=len(AWKWARD))
    path = out.with_suffix(f".{format}")
    compare(database, ["a", "b"], path)
    if format == "csv":
        assert [row["generated_caption_a"] for row in read(path)] == [*AWKWARD, ""]
        assert '"Original caption 4.","",,"empty",,0,,0,,"stop",\n' in path.read_text()
        return
    rows = (
        [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
        if format == "jsonl"
        else pq.read_table(path).to_pylist()
    )
    assert list(rows[0]) == COLUMNS
    assert [row["generated_caption_a"] for row in rows] == [*AWKWARD, None]
    assert (rows[8]["new_tokens_a"], rows[8]["flags_a"], rows[8]["processing_time_sec_a"]) == (None, None, None)
    assert (rows[8]["new_tokens_b"], rows[8]["flags_b"], rows[8]["processing_time_sec_b"]) == (0, "", 0.0)


@pytest.mark.every_database
@pytest.mark.parametrize("all_done", [False, True])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_file_is_the_same_in_pages_of_any_size(database, runs, out, monkeypatch, all_done, suffix):
    caption(database, runs[0], texts(*(f"a{n}" for n in range(12))))
    caption(database, runs[1], texts(*(f"b{n}" for n in range(12))), skip=5)
    path = out.with_suffix(suffix)
    whole = compare(database, ["a", "b"], path, all_done=all_done), path.read_bytes()
    monkeypatch.setattr(snapshot, "PAGE", 3)
    monkeypatch.setattr(comparison, "PAGE", 2)
    seen = []
    compared = compare(database, ["a", "b"], path, all_done=all_done, progress=lambda *step: seen.append(step))
    assert (compared, path.read_bytes()) == whole
    assert (compared.rows, compared.shared) == (7 if all_done else 17, 7)
    assert (seen[0], seen[-1]) == (("train: comparing", 2, 24), ("train: comparing", 24, 24))


def test_one_run_three_runs_and_their_order(database, runs, out, tmp_path):
    fill(database, tmp_path / "set", 20, run="c.d-e")
    caption(database, runs[0], texts("a0"))
    assert compare(database, ["a"], out).rows == 1
    assert list(read(out)[0])[3:5] == ["generated_caption_a", "flags_a"]
    compare(database, ["c.d-e", "b", "a"], out)
    assert list(read(out)[0])[3:6] == ["generated_caption_c.d-e", "generated_caption_b", "generated_caption_a"]


@pytest.mark.every_database
def test_every_split_that_the_runs_have_or_those_named(database, out, tmp_path):
    for split in ("test", "validation", "train"):
        write_shard(tmp_path / "set", split, range(3))
    for name, splits in (("a", ["test", "train"]), ("b", ["validation", "train"])):
        register(database, tmp_path / "set", splits, run=name)
        with db.transaction(database) as conn:
            run = queue.get_run(conn, name)
        for split in splits:
            caption(database, run, texts(f"{name} {split}"), split=split)
    compare(database, ["a", "b"], out)
    assert cells(out, "split", "image_id", "generated_caption_a", "generated_caption_b") == [
        ("train", "train_00000", "a train", "b train"),
        ("validation", "validation_00000", "", "b validation"),
        ("test", "test_00000", "a test", ""),
    ]
    compare(database, ["a", "b"], out, splits=["train"])
    assert cells(out, "split") == [("train",)]
    with pytest.raises(RunError, match=r"^Run 'b' has no pictures of test\. Register them"):
        compare(database, ["a", "b"], out, splits=["test"])


@pytest.mark.every_database
@pytest.mark.parametrize("ahead", [7_200_000, 9_000_000_000_000])
def test_captions_that_were_made_while_the_clock_ran_ahead_are_compared(database, runs, out, ahead):
    caption(database, runs[0], texts("of today"))
    with db.transaction(database) as conn:
        future = db.now(conn) + ahead
    caption(database, runs[1], texts("of the future", "of it too"), now=future)
    assert [one.captions for one in compare(database, ["a", "b"], out).runs] == [1, 2]
    assert [one.captions for one in compare(database, ["b"], out).runs] == [2]


@pytest.mark.every_database
def test_captions_that_are_stored_while_it_reads_stall_nobody_and_are_left_out(database, runs, out, monkeypatch):
    monkeypatch.setattr(snapshot, "PAGE", 2)
    monkeypatch.setattr(comparison, "PAGE", 2)
    caption(database, runs[0], texts("a0", "a1", "a2", "a3"))
    with db.transaction(database) as conn:
        later = db.now(conn) + 60_000

    def go_on(what: str, done: int, total: int) -> None:
        if done == 2:
            caption(database, runs[0], texts("later", "later"), now=later)

    assert compare(database, ["a"], out, progress=go_on).rows == 4


# --- what it came to -------------------------------------------------------------------------------------------


def test_a_summary_is_of_the_captions_in_the_file(database, runs, out):
    caption(
        database,
        runs[0],
        [
            {"text": "One two.", "new_tokens": 2, "processing_ms": 100.0, "flags": "loop,replaced"},
            {"text": "Three four five.", "new_tokens": 5, "processing_ms": 300.0, "finish_reason": "length"},
            {"text": "", "new_tokens": 2, "processing_ms": 200.0, "flags": "loop"},
            {"text": "Six seven eight nine.", "new_tokens": 3, "processing_ms": 200.0},
        ],
    )
    one, other = compare(database, ["a", "b"], out).runs
    assert asdict(one) == {
        "run": "a",
        "model": "tests/small",
        "captions": 4,
        "sec_per_picture": pytest.approx(0.2),
        "pictures_per_sec": pytest.approx(5.0),
        "new_tokens": 3.0,
        "characters": 11.25,
        "words": 2.25,
        "flagged": 0.5,
        "flags": {"empty": 1, "loop": 2, "replaced": 1},
        "cut": 0.25,
    }
    unknown = dict.fromkeys(asdict(one)) | {"run": "b", "model": "tests/other", "captions": 0, "flags": {}}
    assert asdict(other) == unknown


def test_captions_whose_speed_is_not_known_count_for_their_text_alone(database, runs, out):
    caption(database, runs[0], [{"text": "abcd", "new_tokens": 4, "processing_ms": 100.0}, {"text": "ab"}])
    with db.transaction(database, write=True) as conn:
        sql = "UPDATE captions SET new_tokens = NULL, processing_ms = NULL, finish_reason = NULL WHERE text = 'ab'"
        db.execute(conn, sql)
    (one,) = compare(database, ["a"], out).runs
    assert (one.new_tokens, one.sec_per_picture, one.cut, one.characters) == (4.0, 0.1, 0.0, 3.0)
    assert cells(out, "new_tokens_a", "processing_time_sec_a", "finish_reason_a")[1] == ("", "", "")


# --- bad input -------------------------------------------------------------------------------------------------


def test_runs_of_different_data_sets_are_refused(database, runs, out, tmp_path):
    fill(database, tmp_path / "other", 5, run="c")
    caption(database, runs[0], texts("a0"))
    with pytest.raises(RunError) as error:
        compare(database, ["a", "c"], out)
    assert str(error.value) == (
        f"Runs 'a' and 'c' are on different data sets ({tmp_path / 'set'}, {tmp_path / 'other'}), so their pictures "
        "differ. Compare runs on the same one: see rococap runs --json"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "x"], "There is no run 'x'. Runs: a, b."),
        (["a", "b", "a"], "Run 'a' is named twice: name each run once."),
        (["b"], "Run 'b' captioned nothing of train yet. Caption pictures: rococap worker --run b"),
        (["a", "b"], "Runs 'a' and 'b' captioned nothing of train yet. Caption pictures: rococap worker --run a"),
    ],
)
def test_what_cannot_be_compared_is_refused_and_nothing_is_written(database, runs, out, names, message):
    with pytest.raises(RunError) as error:
        compare(database, names, out)
    assert str(error.value) == message
    assert not out.parent.exists()


def test_runs_without_a_picture_in_common_are_refused_where_only_such_count(database, runs, out):
    caption(database, runs[0], texts("a0"))
    compare(database, ["a"], out)
    before = out.read_bytes()
    caption(database, runs[1], texts("b1"), skip=1)
    with pytest.raises(RunError) as error:
        compare(database, ["a", "b"], out, all_done=True)
    assert str(error.value) == (
        "Runs 'a' and 'b' have no captioned picture in common yet. Leave out --all-done, or caption more: "
        "rococap worker"
    )
    assert (out.read_bytes(), list(out.parent.iterdir())) == (before, [out])


def test_a_file_that_cannot_be_written_leaves_the_old_one_whole(database, runs, out, monkeypatch):
    caption(database, runs[0], texts("a0"))
    compare(database, ["a"], out)
    before = out.read_bytes()
    caption(database, runs[0], texts("a1"), now=2_000)

    def break_off(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(database, ["a"], out, progress=break_off)

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RococapError, match=f"^No space left for {out}: nothing was changed there"):
        compare(database, ["a"], out, progress=no_space)
    assert (out.read_bytes(), list(out.parent.iterdir())) == (before, [out])


# --- where runs state different facts ---------------------------------------------------------------------------


def say(database: Engine, runs: tuple[Run, Run], *pairs: tuple[str, str]) -> None:
    for run, said in zip(runs, zip(*pairs, strict=True), strict=True):
        caption(database, run, texts(*said))


@pytest.mark.every_database
def test_the_pictures_on_which_runs_contradict_each_other_come_first(database, runs, out):
    say(
        database,
        runs,
        ("A mass in the left lung.", "A mass in the left lung."),
        ("CT of the chest.", "CT of the left chest."),
        ("MRI, mass in the left kidney, no effusion.", "CT: mass in the right kidney, and an effusion."),
        ("Left kidney.", "Right kidney."),
        ("Fracture.", "No fracture."),
        ("Masse im linken Oberlappen mit der Biopsie.", "Left lung."),
    )
    found = compare(database, ["a", "b"], out).disagreements
    assert (found.compared, found.not_read, found.differing, found.opposite) == (5, 1, 4, 3)
    assert [(one.image_id, one.split, one.opposite, one.other) for one in found.worst] == [
        ("train_00002", "train", 3, 0),
        ("train_00003", "train", 1, 0),
        ("train_00004", "train", 1, 0),
        ("train_00001", "train", 0, 1),
    ]
    assert [(one.kind, one.runs, one.says) for one in found.worst[0].differences] == [
        ("side", ("a", "b"), ("left kidney", "right kidney")),
        ("negation", ("a", "b"), ("no effusion", "effusion")),
        ("modality", ("a", "b"), ("MRI", "CT")),
    ]
    assert [one.says for one in found.worst[3].differences] == [(None, "left")]


STORED = (
    "SELECT r.name, i.image_id, s.value FROM scores s JOIN jobs j ON j.id = s.job_id JOIN runs r ON r.id = j.run_id "
    "JOIN images i ON i.id = j.image_id WHERE s.metric = 'disagreement' ORDER BY r.name, i.id"
)


@pytest.mark.every_database
@pytest.mark.parametrize("page", [1, 1000])
def test_each_caption_is_stored_with_how_much_runs_disagree_as_of_the_last_comparison(
    database, runs, out, monkeypatch, page
):
    monkeypatch.setattr(comparison, "PAGE", page)
    unread = ("Masse im linken Oberlappen mit der Biopsie.", "Left lung.")
    say(database, runs, ("Left lung.", "Left lung."), ("Left lung, CT.", "Right lung."), unread)
    caption(database, runs[0], texts("Alone."), now=2_000)
    for _ in range(2):
        compare(database, ["a", "b"], out)
        weights = [("train_00000", 0.0), ("train_00001", 1.001)]
        found = [
            (run, image, json.loads(value)["disagreement"]) for run, image, value in steps.select(database, STORED)
        ]
        assert found == [(run, image, pytest.approx(weight)) for run in "ab" for image, weight in weights]


def test_a_database_that_cannot_be_written_is_compared_all_the_same(database, runs, out, monkeypatch, caplog):
    say(database, runs, ("Left lung.", "Right lung."), ("Left lung.", "Right lung."))
    monkeypatch.setattr(db, "PATIENCE_SEC", 0.1)
    monkeypatch.setattr(comparison, "PAGE", 1)
    with db.transaction(database, write=True):
        assert compare(db.connect(database.url.render_as_string()), ["a", "b"], out).disagreements.opposite == 2
    assert len(read(out)) == 2
    assert steps.select(database, STORED) == []
    assert caplog.text.count("the gallery cannot sort by this comparison") == 1


def test_of_many_pictures_only_the_worst_are_kept_in_data_set_order(database, runs, out, monkeypatch):
    monkeypatch.setattr(disagreement, "_SLACK", 0)
    say(database, runs, *[("Left lung.", f"Right lung, no {what}.") for what in ["mass", "cyst"] * 5])
    found = compare(database, ["a", "b"], out, worst=3).disagreements
    assert (found.differing, [one.image_id for one in found.worst]) == (
        10,
        ["train_00000", "train_00001", "train_00002"],
    )
    assert compare(database, ["a", "b"], out, worst=0).disagreements.worst == []


def test_every_two_of_several_runs_are_compared_and_one_run_with_nothing(database, runs, out, tmp_path):
    third = fill(database, tmp_path / "set", 20, run="c")
    say(database, (*runs, third), ("Left lung.", "Right lung.", "Left lung."))
    (one,) = compare(database, ["a", "b", "c"], out).disagreements.worst
    assert [difference.runs for difference in one.differences] == [("a", "b"), ("b", "c")]
    assert compare(database, ["a"], out).disagreements is None


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def here(database: Engine, runs: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROCOCAP_DB", database.url.render_as_string(hide_password=False))
    caption(database, runs[0], [{"text": "One two.", "new_tokens": 3, "processing_ms": 250.0, "flags": "loop"}])
    caption(database, runs[0], [{"text": "One.", "new_tokens": 2, "processing_ms": 250.0}], now=2_000)
    return tmp_path


def invoke(*args: str):
    return steps.invoke("compare", *args)


def test_the_command_prints_what_the_runs_took_and_where_the_rows_are(here):
    result = invoke("a", "b")
    assert result.stdout == (
        "run  captions  s/pic  pic/s  tokens  chars  words  flag %  cut %\n"
        "a           2   0.25    4.0     2.5    6.0    1.5    50.0    0.0\n"
        "b           0      -      -       -      -      -       -      -\n"
        "\n"
        "results_medical/compare_a_b.csv: 2 pictures, 0 of them captioned by every run\n"
    )
    assert len(read(Path("results_medical/compare_a_b.csv"))) == 2
    assert invoke("a").stdout.endswith("\nresults_medical/compare_a.csv: 2 pictures\n")


def test_the_command_prints_json_and_writes_where_it_is_told(here):
    told = json.loads(invoke("a", "b", "--json", "--output", "c/d.parquet").stdout)
    assert (told["path"], told["rows"], told["shared"]) == ("c/d.parquet", 2, 0)
    assert told["runs"][0]["flags"] == {"loop": 1}
    assert len(pd.read_parquet("c/d.parquet")) == 2


def test_the_command_names_the_pictures_to_look_at(database, runs, here):
    caption(database, runs[1], texts("Left lung.", "CT without effusion."), now=3_000)
    caption(database, runs[0], texts("Right lung.", "MRI: effusion."), skip=0, now=4_000)
    caption(database, runs[1], texts("Left kidney.", "CT without effusion."), now=5_000)
    told = invoke("a", "b").stdout
    assert "runs differ on 4 of 4 pictures, and contradict each other on 2." in " ".join(told.split())
    assert "train_00003 (train)\n  negation: a: effusion, b: no effusion\n  modality: a: MRI, b: CT\n" in told
    assert told.index("train_00003") < told.index("train_00002") < told.index("train_00000")
    assert "train_00000" not in invoke("a", "b", "--worst", "2").stdout
    found = json.loads(invoke("a", "b", "--json", "--worst", "1").stdout)["disagreements"]
    assert (found["differing"], found["opposite"], len(found["worst"])) == (4, 2, 1)
    assert found["worst"][0]["differences"][0] == {
        "kind": "negation",
        "runs": ["a", "b"],
        "says": ["effusion", "no effusion"],
    }


def test_reasoning_is_flagged_and_compared_unless_it_is_to_be_stripped(database, runs, out):
    caption(database, runs[0], texts("<think>A lung?</think>\nA scan.", "<think>A lung", "A bone."))
    compared = compare(database, ["a"], out)
    assert [row["generated_caption_a"] for row in read(out)] == [
        "<think>A lung?</think>\nA scan.",
        "<think>A lung",
        "A bone.",
    ]
    assert compared.runs[0].flags == {"reasoning": 1, "unfinished_reasoning": 1}
    stripped = compare(database, ["a"], out, strip_reasoning=True)
    assert cells(out, "generated_caption_a", "flags_a") == [
        ("A scan.", "reasoning"),
        ("<think>A lung", "unfinished_reasoning"),
        ("A bone.", ""),
    ]
    assert stripped.runs[0].characters < compared.runs[0].characters


def test_the_command_says_that_it_stripped_reasoning(here):
    told = json.loads(invoke("a", "b", "--json", "--strip-reasoning").stdout)
    assert told["strip_reasoning"] is True


def test_a_file_of_another_kind_is_refused_with_those_that_are_known(here):
    for name in ("x.txt", "x"):
        result = invoke("a", "--output", name)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == (
            f"Error: {name} does not end in one of .csv, .parquet, .jsonl: choose another name with --output.\n"
        )


def test_an_ending_in_capitals_is_known(here):
    result = invoke("a", "--output", "x.CSV")
    assert (result.exit_code, (here / "x.CSV").is_file()) == (0, True), result.output


def test_a_command_without_a_run_is_a_usage_error(here):
    assert invoke().exit_code == 2


def test_the_table_fits_into_80_columns_whatever_the_runs_are_called(database, here):
    with db.transaction(database, write=True) as conn:
        db.execute(conn, "UPDATE runs SET name = ? WHERE name = 'a'", ("a-very-long-name-" * 4,))
        db.execute(conn, "UPDATE captions SET processing_ms = 123456.7, new_tokens = 1234567")
    told = invoke("a-very-long-name-" * 4, "--output", "x.csv").stdout.splitlines()
    assert max(map(len, told)) <= 80
    assert told[1].startswith("a-very-long-na… ")
