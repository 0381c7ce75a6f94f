"""Files that come out, and back in: round trips with real and awkward captions."""

import csv
import errno
import hashlib
import json
import subprocess
from io import StringIO
from itertools import count
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import SHARED
from samples import fill, register, write_shard
from sqlalchemy import Engine
from steps import invoke, select

from rococap import db, queue
from rococap import files as files_module
from rococap.engines import Completion, EngineInfo, Failure
from rococap.errors import RococapError, RunError
from rococap.queue import Run
from rococap.recipe import RULES, Recipe
from rococap.results import checkpoints, export, formats, snapshot
from rococap.results import manifest as manifest_module
from rococap.results import restore as restore_module
from rococap.results.checkpoints import write_checkpoints
from rococap.results.restore import restore
from rococap.results.snapshot import COLUMNS, IncompleteError

pytestmark = pytest.mark.every_database

INFO = EngineInfo("small", {}, "tests/small", "", "float32", "cpu", "digest")
CAPTIONS = SHARED / "captions"

AWKWARD = [
    'He said "no", twice, and left.',
    "two\nlines and a tab\t.",
    "a bare carriage return \r in the middle",
    "\r\nstarts with one",
    " leading and trailing spaces ",
    "=1+1 and -2, +3, @x",
    "curly “quotes”, dashes – and arrows →, 𝛼 and 🦴",
    "line separator \u2028 and next line \x85 and form feed \f",
    "",
    "NA",
    "nan",
    "None",
    "123",
]


NUMBERS = count()


def worker(database: Engine) -> int:
    with db.transaction(database, write=True) as conn:
        return queue.register_worker(conn, f"worker {next(NUMBERS)}", "host", 1, INFO)


def caption(
    database: Engine, run: Run, texts: list[str], *, split: str = "train", now: int = 1_700_000_000_123
) -> None:
    """Captions the next pending jobs with these texts."""
    with db.transaction(database, write=True) as conn:
        worker_id = queue.register_worker(conn, f"{now} {len(texts)} {split} {texts[:1]}", "host", 1, INFO, now=now)
        lease = queue.claim(conn, worker_id, run.id, split, len(texts), ttl_ms=60_000, now=now)
        done = [
            Completion(job.id, text, processing_ms=10.5 + n / 7, new_tokens=3)
            for n, (job, text) in enumerate(zip(lease.jobs, texts, strict=True))
        ]
        queue.complete(conn, lease, done, now=now)


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def captions_of(name: str) -> list[str]:
    with (CAPTIONS / name).open(newline="", encoding="utf-8") as file:
        return [row.get("caption") or row.get("Caption") or "" for row in csv.DictReader(file)]


@pytest.fixture
def run(database: Engine, tmp_path: Path) -> Run:
    return fill(database, tmp_path / "set", 30)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results_medical"


# --- the main file ---------------------------------------------------------------------------------------------


def test_an_export_has_seven_columns_and_a_row_per_captioned_image_in_data_set_order(database, run, out):
    caption(database, run, [f"Caption {n}." for n in range(20)])
    exported = export.export(database, run, "train", out / "medical_captions_train.csv")
    assert (exported.rows, exported.missing) == (20, 10)
    frame = pd.read_csv(exported.path)
    assert tuple(frame.columns) == COLUMNS
    assert list(frame["image_id"]) == [f"train_{n:05}" for n in range(20)]
    assert frame.iloc[3].to_dict() == {
        "image_id": "train_00003",
        "original_caption": "Original caption 3.",
        "generated_caption": "Caption 3.",
        "processing_time_sec": 0.010929,
        "model": "tests/small",
        "timestamp": "2023-11-14T22:13:20.123Z",
        "split": "train",
    }


def test_the_file_is_rfc_4180_with_a_plain_header_and_line_feeds(database, run, out):
    caption(database, run, ['A "quoted", one.'])
    path = export.export(database, run, "train", out / "x.csv").path
    assert path.read_bytes() == (
        b"image_id,original_caption,generated_caption,processing_time_sec,model,timestamp,split\n"
        b'"train_00000","Original caption 0.","A ""quoted"", one.",0.0105,"tests/small",'
        b'"2023-11-14T22:13:20.123Z","train"\n'
    )


@pytest.mark.parametrize("format", formats.FORMATS)
def test_awkward_captions_come_out_as_they_went_in(database, run, out, format):
    caption(database, run, AWKWARD)
    path = export.export(database, run, "train", out / f"x.{format}").path
    frames = list(restore_module._read(path))
    assert list(pd.concat(frames)["generated_caption"]) == AWKWARD
    if format == "csv":
        with path.open(newline="", encoding="utf-8") as file:
            assert [row["generated_caption"] for row in csv.DictReader(file)] == AWKWARD


@pytest.mark.parametrize("name", ["X.CSV", "X.Parquet", "X.JSONL"])
def test_a_file_whose_ending_is_in_capitals_is_restored(database, run, other, tmp_path, out, name):
    caption(database, run, AWKWARD)
    path = export.export(database, run, "train", out / name).path
    plain = export.export(database, run, "train", out / "plain.csv").path.read_bytes()
    new = fill(other, tmp_path / "set", 30)
    assert restore(other, new, path).restored == len(AWKWARD)
    assert export.export(other, new, "train", out / "again.csv").path.read_bytes() == plain


@pytest.mark.skipif(not CAPTIONS.exists(), reason="needs the real captions beside the checkout")
@pytest.mark.parametrize("name", ["roco_v1_2000.csv", "roco_v1_awkward_200.csv", "rocov2_test_sample_39.csv"])
def test_real_captions_come_out_as_they_went_in(database, tmp_path, out, name):
    texts = captions_of(name)
    run = fill(database, tmp_path / "set", len(texts))
    caption(database, run, texts)
    path = export.export(database, run, "train", out / "x.csv").path
    assert list(read(path)["generated_caption"]) == texts


FORMULAS = ["=1+1", "'=1+1", "''@x", "+", "-2", "\t=a", "\r", "\n", "＝A1", "  =1+1", "\u2028@x"]
HARMLESS = ["'", "'s", "'' ", "a=1", " a", "", "'1", "−2", "(-1)"]


def test_texts_that_a_spreadsheet_would_run_get_an_apostrophe_in_the_csv_alone(database, run, out):
    caption(database, run, FORMULAS + HARMLESS)
    path = export.export(database, run, "train", out / "x.csv", excel_safe=True).path
    assert list(read(path)["generated_caption"]) == [f"'{text}" for text in FORMULAS] + HARMLESS
    assert json.loads(path.with_suffix(".json").read_text())["excel_safe"] is True
    [segment] = write_checkpoints(database, run, "train", out, 20)
    assert list(read(segment)["generated_caption"]) == FORMULAS + HARMLESS
    told = " ".join(invoke("export", "--help").stdout.split())
    assert "Checkpoint segments are not changed." in told


def test_a_csv_for_spreadsheets_begins_with_a_byte_order_mark_and_nothing_else_does(database, run, out):
    caption(database, run, ["Fémur gauche, côlon – œdème 🦴"])
    path = export.export(database, run, "train", out / "safe.csv", excel_safe=True).path
    plain = export.export(database, run, "train", out / "plain.csv").path
    assert path.read_bytes() == b"\xef\xbb\xbf" + plain.read_bytes()
    assert json.loads(path.with_suffix(".json").read_text())["excel_safe"] is True
    assert "excel_safe" not in json.loads(plain.with_suffix(".json").read_text())
    [segment] = write_checkpoints(database, run, "train", out, 1)
    for format in ("parquet", "jsonl"):
        export.export(database, run, "train", out / f"x.{format}")
    others = (segment, plain, out / "x.parquet", out / "x.jsonl")
    assert [file.read_bytes()[:3] == b"\xef\xbb\xbf" for file in others] == [False] * 4


def test_a_byte_order_mark_is_no_part_of_the_first_column_without_a_manifest(database, run, other, tmp_path, out):
    caption(database, run, ["é"])
    path = export.export(database, run, "train", out / "x.csv", excel_safe=True).path
    path.with_suffix(".json").unlink()
    assert restore(other, fill(other, tmp_path / "set", 30), path).restored == 1


@pytest.mark.parametrize("name", ["roco_v1_awkward_200.csv", None])
def test_what_is_safe_for_spreadsheets_is_restored_to_the_byte(database, other, tmp_path, out, name):
    if name and not CAPTIONS.exists():
        pytest.skip("needs the real captions beside the checkout")
    texts = captions_of(name) if name else FORMULAS + HARMLESS + AWKWARD
    run = fill(database, tmp_path / "set", len(texts))
    caption(database, run, texts)
    plain = export.export(database, run, "train", out / "plain.csv").path.read_bytes()
    path = export.export(database, run, "train", out / "x.csv", excel_safe=True).path
    new = fill(other, tmp_path / "set", len(texts))
    assert restore(other, new, path).restored == len(texts)
    assert export.export(other, new, "train", out / "again.csv").path.read_bytes() == plain
    assert path.read_bytes() != plain


@given(text=st.text("='+a \t＝\u2028", max_size=6))
def test_the_apostrophe_is_taken_from_what_got_it_and_from_nothing_else(text):
    assert formats.armed(formats.disarmed(text)) == text


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_that_the_database_holds_survives_csv(tmp_path, texts):
    stored = [queue.clean_text(text) for text in texts]
    rows = [(n, None, f"{n}", text, text, 1.0, 0) for n, text in enumerate(stored)]
    run = Run(1, "default", 1, "set", "", Recipe(), None, 5, False)
    formats.write_csv(iter([snapshot.frame_of(rows, run, "train")]), tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="", encoding="utf-8") as file:
        assert [row["generated_caption"] for row in csv.DictReader(file)] == stored
    assert list(read(tmp_path / "x.csv")["original_caption"]) == stored


def test_a_long_export_is_the_same_in_pages_of_any_size(database, run, out, monkeypatch):
    caption(database, run, [f"Caption {n}." for n in range(30)])
    whole = export.export(database, run, "train", out / "whole.csv").path.read_bytes()
    monkeypatch.setattr(snapshot, "PAGE", 7)
    assert export.export(database, run, "train", out / "pages.csv").path.read_bytes() == whole


def test_rows_that_are_finished_after_the_start_are_left_to_the_next_export(database, run, out):
    caption(database, run, ["Early."])

    def go_on(what: str, done: int, total: int) -> None:
        if done == 1:
            caption(database, run, ["Later."], now=clock(database))

    path = export.export(database, run, "train", out / "x.csv", progress=go_on).path
    assert list(read(path)["generated_caption"]) == ["Early."]
    export.export(database, run, "train", path)
    assert list(read(path)["generated_caption"]) == ["Early.", "Later."]


def test_the_manifest_names_what_made_the_captions(database, run, out):
    caption(database, run, ["A."])
    with db.transaction(database, write=True) as conn:
        queue.pin(conn, run, INFO)
        run = queue.get_run(conn, "default")
    path = export.export(database, run, "train", out / "x.csv").path
    manifest = json.loads(path.with_suffix(".json").read_text())
    assert manifest["recipe"]["model"] == "tests/small"
    assert manifest["recipe"]["prompt"] == "Describe this medical image in detail."
    assert manifest["recipe_hash"] == run.recipe.hash
    assert manifest["resolved"] == INFO.resolved() | {"rules": RULES}
    assert (manifest["run"], manifest["split"], manifest["rows"], manifest["missing"]) == ("default", "train", 1, 29)
    assert manifest["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert "Not for clinical use" in manifest["note"]


def test_each_format_has_a_manifest_of_its_own(database, run, out):
    caption(database, run, ["A."])
    for format in formats.FORMATS:
        path = export.export(database, run, "train", out / f"x.{format}").path
        assert json.loads(manifest_module.manifest_path(path).read_text())["file"] == path.name
    assert sorted(file.name for file in out.glob("*.json")) == ["x.json", "x.jsonl.json", "x.parquet.json"]


def test_require_complete_refuses_a_split_with_gaps_and_leaves_the_old_file(database, run, out):
    caption(database, run, ["A."])
    path = export.export(database, run, "train", out / "x.csv").path
    before = path.read_bytes()
    caption(database, run, ["B."])
    with pytest.raises(IncompleteError, match="28 of 30 images of train are not captioned"):
        export.export(database, run, "train", path, require_complete=True)
    assert path.read_bytes() == before


def test_an_export_that_is_broken_off_leaves_the_old_file_whole_and_nothing_else(database, run, out):
    caption(database, run, ["A."])
    path = export.export(database, run, "train", out / "x.csv").path
    before = path.read_bytes()
    caption(database, run, ["B."])

    def break_off(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export.export(database, run, "train", path, progress=break_off)
    assert path.read_bytes() == before
    assert sorted(file.name for file in out.iterdir()) == ["x.csv", "x.json"]


def test_a_full_disk_is_a_clear_error_that_changes_nothing(database, run, out, monkeypatch):
    caption(database, run, ["A."])
    path = export.export(database, run, "train", out / "x.csv").path
    before = path.read_bytes()

    def no_space(frames, path, schema):
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(formats, "write_csv", no_space)
    with pytest.raises(RococapError) as error:
        export.export(database, run, "train", path)
    assert str(error.value) == (
        f"No space left for {path}: nothing was changed there. Free some space, or write elsewhere with --output."
    )
    assert path.read_bytes() == before
    assert sorted(file.name for file in out.iterdir()) == ["x.csv", "x.json"]


def test_a_split_that_the_run_does_not_have_is_refused(database, run, out):
    with pytest.raises(
        RunError,
        match=r"Run 'default' has no pictures of test\. Register them, with the run's own data set and recipe: ",
    ):
        export.export(database, run, "test", out / "x.csv")


# --- checkpoints -----------------------------------------------------------------------------------------------


def numbers(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_segments_hold_so_many_images_each_in_order_of_completion(database, run, out):
    caption(database, run, ["late"] * 10, now=2_000)
    caption(database, run, ["early"] * 10, now=1_000)
    assert numbers(write_checkpoints(database, run, "train", out, 8)) == [
        "checkpoint_train_000001.csv",
        "checkpoint_train_000002.csv",
    ]
    first = read(out / "checkpoint_train_000001.csv")
    assert tuple(first.columns) == COLUMNS
    assert list(first["image_id"]) == [f"train_{n:05}" for n in range(10, 18)]
    assert list(read(out / "checkpoint_train_000002.csv")["generated_caption"]) == ["early"] * 2 + ["late"] * 6


def test_a_segment_never_changes_and_is_written_again_the_same(database, run, out):
    caption(database, run, [f"{n}" for n in range(20)])
    paths = write_checkpoints(database, run, "train", out, 5)
    before = {path: path.read_bytes() for path in paths}
    caption(database, run, ["later"], now=1)  # finished earlier, committed later
    paths[1].unlink()
    assert write_checkpoints(database, run, "train", out, 5) == [paths[1]]
    assert {path: path.read_bytes() for path in paths} == before


def test_the_tail_is_flushed_when_nothing_is_left_and_the_segments_equal_the_export(database, run, out):
    caption(database, run, [f"{n}" for n in range(22)])
    assert len(write_checkpoints(database, run, "train", out, 10)) == 2
    caption(database, run, [f"{n}" for n in range(22, 29)], now=1_700_000_000_999)
    with db.transaction(database, write=True) as conn:
        lease = queue.claim(conn, 1, run.id, "train", 1, ttl_ms=1)
        queue.fail(conn, lease, {30: Failure("empty", "")})
    assert len(write_checkpoints(database, run, "train", out, 10)) == 1
    main = export.export(database, run, "train", out / "medical_captions_train.csv").path
    segments = pd.concat([read(path) for path in sorted(out.glob("checkpoint_*.csv"))])
    assert segments.sort_values("image_id").to_csv(index=False) == read(main).to_csv(index=False)
    assert len(segments) == 29


def test_many_segments_are_assigned_in_several_transactions(database, run, out, monkeypatch):
    monkeypatch.setattr(checkpoints, "SEGMENTS_AT_ONCE", 2)
    caption(database, run, [f"{n}" for n in range(30)])
    assert len(write_checkpoints(database, run, "train", out, 4)) == 8
    assert [len(read(path)) for path in sorted(out.glob("checkpoint_*.csv"))] == [4] * 7 + [2]


def test_following_ends_when_the_split_has_nothing_left(database, run, out, monkeypatch):
    texts = iter([["a"] * 12, ["b"] * 18])

    class Clock:
        """Workers go on while it sleeps."""

        @staticmethod
        def sleep(_: float) -> None:
            caption(database, run, next(texts))

    monkeypatch.setattr(checkpoints, "time", Clock)
    seen: list[list[str]] = []
    checkpoints.follow(database, run, ["train"], out, 10, lambda paths: seen.append(numbers(paths)))
    assert seen == [["checkpoint_train_000001.csv"], ["checkpoint_train_000002.csv", "checkpoint_train_000003.csv"]]


def test_a_folder_with_segments_of_another_run_is_refused(database, run, out, tmp_path):
    caption(database, run, ["x"] * 30)
    write_checkpoints(database, run, "train", out, 10)
    register(database, tmp_path / "set", ["train"], run="other", recipe=Recipe(model="tests/small", prompt="What?"))
    with db.transaction(database) as conn:
        other_run = queue.get_run(conn, "other")
    caption(database, other_run, ["y"] * 30)
    with pytest.raises(RococapError) as error:
        write_checkpoints(database, other_run, "train", out, 10)
    assert str(error.value) == (
        f"{out} holds checkpoints of another run (default). Move them away, or choose another folder with --output."
    )


# --- restore ---------------------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> Engine:
    """A new database: the old one was lost."""
    engine = db.connect(f"sqlite:///{tmp_path / 'new.db'}")
    yield engine
    engine.dispose()


def test_reasoning_is_flagged_whatever_the_engine_and_again_when_it_is_restored(database, other, tmp_path, out):
    run = fill(database, tmp_path / "set", 3)
    caption(database, run, ["<think>A lung?</think>A scan.", "<think>A lung", "A bone."])
    path = export.export(database, run, "train", out / "x.csv").path
    new = fill(other, tmp_path / "set", 3)
    assert restore(other, new, path).restored == 3
    for engine in (database, other):
        with db.transaction(engine) as conn:
            assert queue.counts_of(conn, new)[0].flags == {"reasoning": 1, "unfinished_reasoning": 1}
            flags = db.execute(conn, "SELECT flags FROM captions ORDER BY job_id").scalars().all()
        assert flags == ["reasoning", "unfinished_reasoning", ""]


@pytest.mark.parametrize("format", formats.FORMATS)
def test_a_lost_database_is_restored_from_an_export_to_the_byte(database, other, run, out, tmp_path, format):
    caption(database, run, [*AWKWARD, *[f"{n}" for n in range(30 - len(AWKWARD))]])
    path = export.export(database, run, "train", out / f"x.{format}").path
    reference = export.export(database, run, "train", out / "reference.csv").path
    new = fill(other, tmp_path / "set", 30)
    result = restore(other, new, path)
    assert (result.restored, result.known, result.leased, result.unknown) == (30, 0, 0, 0)
    again = export.export(other, new, "train", out / "again.csv").path
    assert again.read_bytes() == reference.read_bytes()
    assert restore(other, new, path).known == 30


@pytest.mark.parametrize(("merging", "n_known", "n_twice", "kept"), [(False, 1, 0, "one"), (True, 0, 1, "another")])
def test_a_picture_that_is_twice_in_a_file_is_restored_once(
    database, other, run, out, tmp_path, merging, n_known, n_twice, kept
):
    caption(database, run, ["one", "two", "three"])
    path = export.export(database, run, "train", out / "x.csv").path
    path.with_suffix(".json").unlink()
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    twin = frame.head(1).assign(generated_caption="another")  # of two that were made at one time, the first by text
    pd.concat([frame, twin]).to_csv(path, index=False)
    result = restore(other, fill(other, tmp_path / "set", 30), path, merging=merging)
    assert (result.restored, result.known, result.twice, result.replaced) == (3, n_known, n_twice, 0)
    assert select(other, "SELECT text FROM captions ORDER BY job_id")[0][0] == kept


def test_segments_restore_what_they_hold_and_the_rest_stays_pending(database, other, run, out, tmp_path):
    caption(database, run, [f"{n}" for n in range(20)])
    paths = write_checkpoints(database, run, "train", out, 6)
    new = fill(other, tmp_path / "set", 30)
    assert sum(restore(other, new, path).restored for path in paths) == 18
    with db.transaction(other) as conn:
        (counts,) = queue.counts(conn)
        rows = db.execute(conn, "SELECT DISTINCT lease_id, finish_reason, new_tokens FROM captions").fetchall()
    assert (counts.done, counts.pending) == (18, 12)
    assert [tuple(row) for row in rows] == [(None, None, None)]


def test_restored_segments_stay_as_they_are_and_later_ones_follow_them(database, other, run, out, tmp_path):
    caption(database, run, [f"{n}" for n in range(10)], now=1_700_000_000_999)
    caption(database, run, [f"{n}" for n in range(10, 20)], now=1_700_000_000_111)
    before = {path: path.read_bytes() for path in write_checkpoints(database, run, "train", out, 6)}
    new = fill(other, tmp_path / "set", 30)
    for path in before:
        restore(other, new, path)
    caption(other, new, [f"again {n}" for n in range(12)], now=1_700_000_000_999)
    assert numbers(write_checkpoints(other, new, "train", out, 6)) == [
        "checkpoint_train_000004.csv",
        "checkpoint_train_000005.csv",
    ]
    second = list(before)[1]  # begins with pictures of the end, which were captioned first
    second.unlink()
    assert write_checkpoints(other, new, "train", out, 6) == [second]
    assert {path: path.read_bytes() for path in before} == before
    main = export.export(other, new, "train", out / "medical_captions_train.csv").path
    segments = pd.concat([read(path) for path in sorted(out.glob("checkpoint_*.csv"))])
    assert segments.sort_values("image_id").to_csv(index=False) == read(main).to_csv(index=False)


def test_captions_that_are_there_win_and_what_is_being_captioned_is_left_alone(database, other, run, out, tmp_path):
    caption(database, run, ["old"] * 30)
    path = export.export(database, run, "train", out / "x.csv").path
    new = fill(other, tmp_path / "set", 30)
    caption(other, new, ["new"] * 2)
    with db.transaction(other, write=True) as conn:
        queue.claim(conn, 1, new.id, "train", 3, ttl_ms=60_000)
    result = restore(other, new, path)
    assert (result.restored, result.known, result.leased) == (25, 2, 3)
    with db.transaction(other) as conn:
        assert db.execute(conn, "SELECT text FROM captions ORDER BY job_id").scalars().all()[:3] == [
            "new",
            "new",
            "old",
        ]


def test_restoring_says_how_many_images_the_run_does_not_have(database, other, run, out, tmp_path):
    caption(database, run, ["x"] * 30)
    path = export.export(database, run, "train", out / "x.csv").path
    write_shard(tmp_path / "set", "train", range(10))
    register(other, tmp_path / "set", ["train"])
    with db.transaction(other) as conn:
        new = queue.get_run(conn, "default")
    result = restore(other, new, path)
    assert (result.restored, result.unknown) == (10, 20)


def test_captions_of_another_data_sets_pictures_are_left_out(database, other, run, out, tmp_path):
    caption(database, run, ["x"] * 30)
    path = export.export(database, run, "train", out / "x.csv").path
    new = fill(other, tmp_path / "set", 30)
    with db.transaction(other, write=True) as conn:
        db.execute(conn, "UPDATE images SET caption = 'Of another picture.' WHERE id <= 7")
    result = restore(other, new, path)
    assert (result.restored, result.different) == (23, 7)


def test_the_manifest_pins_what_the_lost_database_had_pinned(database, other, run, out, tmp_path):
    caption(database, run, ["x"])
    with db.transaction(database, write=True) as conn:
        queue.pin(conn, run, INFO)
        run = queue.get_run(conn, "default")
    path = export.export(database, run, "train", out / "x.csv").path
    new = fill(other, tmp_path / "set", 30)
    restore(other, new, path)
    with db.transaction(other) as conn:
        assert queue.get_run(conn, "default").resolved == INFO.resolved() | {"rules": RULES}


def test_a_file_of_another_recipe_or_model_is_refused(database, other, run, out, tmp_path):
    caption(database, run, ["x"])
    path = export.export(database, run, "train", out / "x.csv").path
    new = fill(other, tmp_path / "set", 30, recipe=Recipe(model="tests/other"))
    with pytest.raises(
        RunError, match=r"another recipe than that of run 'default' \(model: 'tests/small', not 'tests/other'\)"
    ):
        restore(other, new, path)
    path.with_suffix(".json").unlink()
    with pytest.raises(RunError, match="holds captions by tests/small, but run 'default' uses tests/other"):
        restore(other, new, path)
    with db.transaction(other) as conn:
        assert queue.counts(conn)[0].done == 0


def test_a_file_that_was_altered_since_or_is_no_export_is_refused(database, run, out):
    caption(database, run, ["x"])
    path = export.export(database, run, "train", out / "x.csv").path
    path.write_text(path.read_text().replace("x", "y"))
    with pytest.raises(RococapError, match="was altered after it was exported"):
        restore(database, run, path)
    (out / "no.csv").write_text("a,b\n1,2\n")
    with pytest.raises(RococapError, match="lacks the columns image_id, original_caption"):
        restore(database, run, out / "no.csv")
    (out / "no.txt").write_text("a,b\n1,2\n")
    with pytest.raises(RococapError, match=r"is not a \.csv, \.jsonl or \.parquet file"):
        restore(database, run, out / "no.txt")
    (out / "empty.csv").write_text("")
    with pytest.raises(RococapError, match="cannot be read"):
        restore(database, run, out / "empty.csv")


def test_a_caption_with_every_control_character_stays_one_row(database, run, out):
    text = "".join(chr(code) for code in range(1, 33)) + "\x7f"
    caption(database, run, [text])
    path = export.export(database, run, "train", out / "x.csv").path
    rows = list(csv.reader(StringIO(path.read_text(encoding="utf-8"), newline="")))
    assert len(rows) == 2
    assert read(path)["generated_caption"][0] == text


# --- a database that replaces a lost one -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with space", "it's", "$HOME", "a&b", "what?"])
def test_the_command_that_restores_segments_names_them_in_any_folder(database, other, run, tmp_path, name):
    caption(database, run, ["x"] * 20)
    segments = write_checkpoints(database, run, "train", tmp_path / name, 10)
    new = fill(other, tmp_path / "set", 30)
    with pytest.raises(RococapError) as error:
        write_checkpoints(other, new, "train", tmp_path / name, 10)
    files = str(error.value).partition("restore them first: rococap restore ")[2].partition("; otherwise move")[0]
    listed = subprocess.run(["sh", "-c", f"ls {files}"], capture_output=True, text=True)
    assert listed.stdout.splitlines() == [str(segment) for segment in segments]


def test_segments_that_a_new_database_does_not_know_are_refused_until_they_are_restored(
    database, other, run, out, tmp_path
):
    caption(database, run, ["late"] * 10, now=1_700_000_000_999)
    caption(database, run, ["early"] * 10, now=1_700_000_000_111)
    segments = write_checkpoints(database, run, "train", out, 10)
    path = export.export(database, run, "train", out / "medical_captions_train.csv").path
    new = fill(other, tmp_path / "set", 30)
    assert restore(other, new, path).restored == 20
    with pytest.raises(RococapError) as error:
        write_checkpoints(other, new, "train", out, 10)
    assert str(error.value) == (
        f"{out} holds checkpoints of train that are not in this database. If this database replaces a lost one, "
        f"restore them first: rococap restore {out}/checkpoint_train_*.csv; otherwise move them away."
    )
    assert [restore(other, new, segment).known for segment in segments] == [10, 10]
    caption(other, new, ["new"] * 10)
    assert numbers(write_checkpoints(other, new, "train", out, 10)) == ["checkpoint_train_000003.csv"]
    together = pd.concat([read(segment) for segment in sorted(out.glob("checkpoint_*.csv"))])
    main = export.export(other, new, "train", path).path
    assert together.sort_values("image_id").to_csv(index=False) == read(main).to_csv(index=False)


def test_captions_of_another_model_state_are_not_restored(database, other, run, out, tmp_path):
    caption(database, run, ["x"])
    with db.transaction(database, write=True) as conn:
        queue.pin(conn, run, INFO)
        run = queue.get_run(conn, "default")
    path = export.export(database, run, "train", out / "x.csv").path
    new = fill(other, tmp_path / "set", 30)
    with db.transaction(other, write=True) as conn:
        queue.pin(conn, new, EngineInfo("small", {}, "tests/small", "", "float16", "cpu", "other"))
    with pytest.raises(RunError, match="was made with another state of the model than run 'default'"):
        restore(other, new, path)


HOUR = 3_600_000


def clock(database: Engine) -> int:
    with db.transaction(database) as conn:
        return db.now(conn)


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("ahead", [2 * HOUR, 365 * 24 * HOUR])
def test_what_was_captioned_while_the_clock_ran_ahead_is_exported(database, run, out, monkeypatch, format, ahead):
    monkeypatch.setattr(snapshot, "PAGE", 7)
    caption(database, run, [f"Caption {n}." for n in range(10)], now=clock(database) + ahead)
    caption(database, run, [f"Caption {n}." for n in range(10, 30)])
    exported = export.export(database, run, "train", out / f"x.{format}", require_complete=True)
    assert (exported.rows, exported.missing) == (30, 0)
    texts = pd.concat(restore_module._read(exported.path))["generated_caption"]
    assert list(texts) == [f"Caption {n}." for n in range(30)]


def test_a_run_of_which_nothing_is_captioned_is_exported_without_rows(database, run, out):
    exported = export.export(database, run, "train", out / "x.csv")
    assert (exported.rows, exported.missing) == (0, 30)


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("timestamp", "", "has a timestamp that is not ISO 8601"),
        ("timestamp", "yesterday", "has a timestamp that is not ISO 8601"),
        ("processing_time_sec", "x", "has a processing_time_sec that is not a number"),
        ("processing_time_sec", "inf", "has a processing_time_sec that is not a number"),
    ],
)
def test_a_file_with_a_cell_that_makes_no_sense_is_refused_whole(
    database, other, run, out, tmp_path, monkeypatch, column, cell, message
):
    monkeypatch.setattr(snapshot, "PAGE", 2)
    caption(database, run, ["x"] * 6)
    path = export.export(database, run, "train", out / "x.csv").path
    path.with_suffix(".json").unlink()
    frame = read(path)
    frame.loc[5, column] = cell
    frame.to_csv(path, index=False)
    new = fill(other, tmp_path / "set", 30)
    with pytest.raises(RococapError, match=message):
        restore(other, new, path)
    with db.transaction(other) as conn:
        assert queue.counts(conn)[0].done == 0


def test_a_caption_that_is_no_text_is_refused(database, run, out):
    caption(database, run, ["x"])
    path = export.export(database, run, "train", out / "x.jsonl").path
    manifest_module.manifest_path(path).unlink()
    for value in ("null", "7", "[1]"):
        path.write_text(path.read_text().replace('"generated_caption":"x"', f'"generated_caption":{value}'))
        with pytest.raises(RococapError, match="has a value that is not text in the column generated_caption"):
            restore(database, run, path)
        path.write_text(path.read_text().replace(f'"generated_caption":{value}', '"generated_caption":"x"'))


def test_a_processing_time_that_is_missing_stays_missing(database, other, run, out, tmp_path):
    caption(database, run, ["x"])
    path = export.export(database, run, "train", out / "x.csv").path
    path.with_suffix(".json").unlink()
    frame = read(path)
    frame["processing_time_sec"] = ""
    frame.to_csv(path, index=False)
    new = fill(other, tmp_path / "set", 30)
    restore(other, new, path)
    again = export.export(other, new, "train", out / "again.csv").path
    assert list(read(again)["processing_time_sec"]) == [""]


def test_a_file_without_its_manifest_is_restored_with_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    database = db.connect(f"sqlite:///{tmp_path / 'queue.db'}")
    run = fill(database, tmp_path / "set", 2)
    caption(database, run, ["=1+1", "b"])
    path = tmp_path / "out" / "captions.csv"
    export.export(database, run, "train", path, excel_safe=True)
    other = db.connect(f"sqlite:///{tmp_path / 'other.db'}")
    fill(other, tmp_path / "set", 2)
    path.with_suffix(".json").unlink()
    result = invoke("--db", f"sqlite:///{tmp_path / 'other.db'}", "restore", str(path))
    assert result.exit_code == 0, result.output
    assert "the manifest (.json) is missing" in result.stderr


def test_a_manifest_of_segments_is_none_of_the_export_beside_them(database, tmp_path):
    run = fill(database, tmp_path / "set", 2)
    caption(database, run, ["a", "b"])
    path = tmp_path / "out" / "medical_captions_train.csv"
    export.export(database, run, "train", path)
    (segment,) = write_checkpoints(database, run, "train", path.parent, every=25)
    assert [restore(database, run, one).has_manifest for one in (path, segment)] == [True, True]
    path.with_suffix(".json").unlink()
    assert [restore(database, run, one).has_manifest for one in (path, segment)] == [False, True]


def test_a_device_or_folder_is_never_replaced(tmp_path):
    for place in (tmp_path, Path("/dev/full")):
        with (
            pytest.raises(RococapError, match="a folder or a device, not a file to replace"),
            files_module.replacing(place),
        ):
            pytest.fail("it was opened")
    assert Path("/dev/full").is_char_device()
