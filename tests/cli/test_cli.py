"""The command line, end to end and in trouble: exact messages, exit codes, nothing half-written."""

import csv
import json
import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from samples import write_shard
from steps import invoke, refused, said

from rococap import db, prompts, queue
from rococap.cli import worker as worker_command
from rococap.cli.options import cli
from rococap.cli.worker import _again
from rococap.demo import MODEL
from rococap.demo.phantoms import write_dataset
from rococap.engines import Completion, EngineInfo, Failure
from rococap.tables import SCHEMA
from rococap.worker.settings import Settings
from rococap.worker.store import Outcome

INFO = EngineInfo("small", {}, "tests/small", "", "float32", "cpu", "digest")

pytestmark = pytest.mark.usefixtures("here")


def enqueue(*more: str) -> str:
    return said("enqueue", "--split", "train", "--dataset", "set", "--model", str(MODEL), *more)


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


# --- the main job ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_split_goes_from_shards_to_csv(here):
    write_dataset(here / "set", {"train": 12})
    assert enqueue("--max-new-tokens", "64") == "default train: 12 new, 0 known, 0 changed\n"
    assert enqueue("--max-new-tokens", "64") == "default train: 0 new, 12 known, 0 changed\n"
    worked = said("worker", "--batch-size", "8", "--device", "cpu")
    assert worked.startswith("default: 12 captioned in ")
    assert worked.rstrip().endswith("0 failed")
    assert said("export", "--split", "train", "--checkpoint-every", "5") == (
        "results_medical/checkpoint_train_000001.csv to checkpoint_train_000003.csv: 3 new checkpoints\n"
        "results_medical/medical_captions_train.csv: 12 captions\n"
    )
    with Path("results_medical/medical_captions_train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image_id"] for row in rows] == [f"PHANTOM_train_{n:06}" for n in range(1, 13)]
    assert sum(row["original_caption"] == row["generated_caption"] for row in rows) >= 11


def renamed(root: Path, image: str, keep: Sequence[str] = ()) -> None:
    """The set's columns under other names, pictures as a plain binary column; of the others those to keep."""
    (path,) = (root / "data").glob("train-*.parquet")
    table = pq.read_table(path)
    pictures = pa.array([one["bytes"] for one in table.column("image").to_pylist()], pa.binary())
    pq.write_table(pa.table({image: pictures, **{f"my_{key}": table.column(key) for key in keep}}), path)


@pytest.mark.slow
def test_columns_of_other_names_are_read_by_every_command_that_opens_pictures(here):
    write_dataset(here / "set", {"train": 12})
    renamed(here / "set", "scan", ("image_id", "caption", "cui"))
    assert "lacks the column image; it has the columns scan, my_image_id" in refused(
        *("enqueue", "--split", "train", "--dataset", "set", "--model", str(MODEL))
    )
    columns = "image=scan,image_id=my_image_id,caption=my_caption,cui=my_cui"
    assert enqueue("--columns", columns) == "default train: 12 new, 0 known, 0 changed\n"
    assert enqueue() == "default train: 0 new, 12 known, 0 changed\n"
    assert "was registered with image=scan," in refused(
        *("enqueue", "--split", "train", "--dataset", "set", "--model", str(MODEL), "--columns", "image=my_cui")
    )
    assert "--columns takes image" in refused(
        *("enqueue", "--split", "train", "--dataset", "set", "--model", str(MODEL), "--columns", "text=my_caption")
    )
    assert said("worker", "--device", "cpu", "--batch-size", "8").rstrip().endswith("0 failed")  # checks itself too
    assert "as registered, 1 shard" in invoke("doctor").stdout
    assert json.loads(said("runs", "--json"))[0]["columns"] == dict(one.split("=") for one in columns.split(","))
    assert "0 pictures" not in said("report", "--split", "train", "--output", "report.html")
    assert (here / "report.html").read_text().count('src="data:image/jpeg') == 12
    assert "12 captions" in said("export", "--split", "train", "--format", "webdataset")
    said("bench", "--pictures", "2", "--device", "cpu", "--batch-size", "1")


def test_pictures_alone_are_captioned_and_exported_with_an_empty_original(here):
    write_dataset(here / "set", {"train": 12})
    renamed(here / "set", "image")
    assert enqueue() == (
        "default train: 12 new, 0 known, 0 changed\n"
        "  no original captions, so nothing can be scored. If a column holds them, register it in another\n"
        "  queue: --db URL --columns caption=NAME\n"
    )
    assert said("worker", "--device", "cpu", "--batch-size", "8").rstrip().endswith("0 failed")
    said("export", "--split", "train", "--output", "out.csv")
    with (here / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image_id"] for row in rows] == [f"train_{n:06}" for n in range(12)]
    assert {row["original_caption"] for row in rows} == {""}
    assert all(row["generated_caption"] for row in rows)
    assert "There are no originals" in " ".join(said("evaluate", "--split", "train").split())
    said("report", "--split", "train", "--output", "report.html")
    page = (here / "report.html").read_text()
    assert page.count("no original: the data set has no caption for this picture") == 12
    assert "equals the original" not in page


def test_a_configuration_is_chosen_by_its_name(here):
    for config in ("axial", "coronal"):
        write_shard(here / "set" / config, "train", range(3))
    options = ("enqueue", "--split", "train", "--dataset", "set", "--model", str(MODEL))
    assert "has several configurations (axial, coronal): choose one with --config NAME." in refused(*options)
    assert enqueue("--config", "axial") == "default train: 3 new, 0 known, 0 changed\n"
    assert "Run 'default' is on another data set" in refused(*options, "--config", "coronal")
    assert enqueue("--config", "coronal", "--run", "other") == "other train: 3 new, 0 known, 0 changed\n"
    assert json.loads(said("runs", "--json"))[0]["dataset"] == f"{here}/set:axial"
    assert [line for line in invoke("doctor").stdout.splitlines() if "set:coronal: as registered, 1 shard" in line]
    assert "leave --config out" in refused(
        *("enqueue", "--run", "third", "--from", "other", "--config", "axial", "--prompt", "What?"), code=2
    )


def test_captions_are_exported_in_another_format_or_place(here):
    write_shard(here / "set", "train", range(3))
    enqueue()
    assert said("export", "--split", "train", "--format", "jsonl") == (
        "results_medical/medical_captions_train.jsonl: 0 captions; 3 of the split are not done\n"
    )
    assert said("export", "--split", "train", "--output", "a/b.parquet").startswith("a/b.parquet: 0 captions")
    assert said("export", "--split", "train", "--output", "c").startswith("c/medical_captions_train.csv: 0 captions")
    enqueue("--run", "other", "--prompt", "In one word?")
    assert said("export", "--split", "train", "--run", "other").startswith(
        "results_medical/other/medical_captions_train.csv"
    )


@pytest.mark.parametrize("name", ["x.CSV", "x.Parquet", "x.JSONL"])
def test_an_ending_in_capitals_is_that_of_a_file(here, name):
    write_shard(here / "set", "train", range(3))
    enqueue()
    assert said("export", "--split", "train", "--output", name, "--checkpoint-every", "0").startswith(f"{name}: 0 cap")
    assert (here / name).is_file()
    assert (here / ("x.json" if name == "x.CSV" else f"{name}.json")).is_file()


@pytest.mark.parametrize("name", ["x.csv.gz", "x.xlsx", "x.TSV", "x.json", "a/x.txt", "x.7z"])
def test_a_file_of_a_kind_that_is_not_written_here_is_refused_and_becomes_no_folder(here, name):
    write_shard(here / "set", "train", range(3))
    enqueue()
    there = sorted(here.iterdir())
    assert refused("export", "--split", "train", "--output", name, code=2).endswith(
        f"{name} looks like a file, but export only writes files that end in .csv, .parquet, .jsonl; if it is "
        f"meant to be a folder, make it first: mkdir -p {name}"
    )
    assert sorted(here.iterdir()) == there
    (here / name).mkdir(parents=True)
    assert said("export", "--split", "train", "--output", name).startswith(f"{name}/medical_captions_train.csv: ")


@pytest.mark.parametrize("name", ["run.2", "run.v2", "2026-11.30-b", ".hidden"])
def test_a_folder_may_have_a_number_behind_a_dot(here, name):
    write_shard(here / "set", "train", range(3))
    enqueue()
    assert said("export", "--split", "train", "--output", name).startswith(f"{name}/medical_captions_train.csv: ")


@pytest.mark.parametrize("format", ["hf", "webdataset", "kohya", "messages"])
@pytest.mark.parametrize("name", ["x.tar", "x.csv", "x.Parquet"])
def test_a_format_that_is_a_folder_is_not_written_to_the_name_of_a_file(here, format, name):
    assert f"{name} looks like a file, but {format} is written to a folder: name one; if " in refused(
        "export", "--split", "train", "--format", format, "--output", name, code=2
    )
    assert not (here / name).exists()


def test_a_submission_ends_in_csv_in_any_case(here):
    write_shard(here / "set", "train", range(3))
    enqueue()
    options = ("export", "--split", "train", "--format", "imageclef", "--allow-missing", "--output")
    assert said(*options, "S.CSV").startswith("S.CSV: 3 captions")
    assert "x.jsonl does not end as imageclef files do: end it in .csv" in refused(*options, "x.jsonl", code=2)
    assert "x.xlsx looks like a file, but" in refused(*options, "x.xlsx", code=2)


def test_status_tells_where_it_stands(here):
    assert said("status") == "Nothing is registered here yet. Register pictures first: rococap enqueue --split train\n"
    write_shard(here / "set", "train", range(5))
    enqueue()
    header, row = lines(said("status"))[:2]
    assert " ".join(header) == "run split pending leased done total per min time left"
    assert " ".join(row) == "default train 5 0 0 5 0.0 ?"
    assert said("status").endswith("No worker is running. Start one: rococap worker\n")
    said("cancel", "--all")
    assert said("status").endswith("No worker is running, and nothing is left to caption.\n")


def test_status_as_json_has_the_fields_that_others_build_on(here):
    write_shard(here / "set", "train", range(5))
    enqueue()
    with db.transaction(db.connect("rococap.db"), write=True) as conn:
        queue.register_worker(conn, "one", "host", 7, INFO)
    status = json.loads(said("status", "--json"))
    assert status["runs"] == [
        {"run": "default", "split": "train", "pending": 5, "leased": 0, "waiting": 0, "done": 0, "failed": 0}
        | {"cancelled": 0, "total": 5, "per_minute": 0.0, "eta_sec": None, "paused": False, "flags": {}}
        | {"parts": []}
    ]
    (worker,) = status["workers"]
    assert worker.pop("seen_sec_ago") < 60
    assert worker == {"id": 1, "host": "host", "pid": 7, "device": "cpu", "state": "running", "done": 0} | {
        "telemetry": None,
        "self_check": None,
        "versions": INFO.versions,
    }
    assert status["versions"] == {"unknown": 1}


def test_status_counts_flagged_captions(here):
    write_shard(here / "set", "train", range(5))
    enqueue()
    with db.transaction(db.connect("rococap.db"), write=True) as conn:
        lease = queue.claim(conn, queue.register_worker(conn, "one", "host", 7, INFO), 1, "train", 3, ttl_ms=60_000)
        queue.complete(conn, lease, [Completion(job.id, "") for job in lease.jobs[:2]])
        queue.fail(conn, lease, {lease.jobs[2].id: Failure("empty", "No bytes.")})
    assert "default train: 1 failed. Why: rococap failures\ndefault train: flagged captions: 2 empty\n" in said(
        "status"
    )
    assert json.loads(said("status", "--json"))["runs"][0]["flags"] == {"empty": 2}


def fail_two(here: Path) -> None:
    write_shard(here / "set", "train", range(5))
    enqueue()
    with db.transaction(db.connect("rococap.db"), write=True) as conn:
        worker = queue.register_worker(conn, "one", "host", 7, INFO)
        lease = queue.claim(conn, worker, 1, "train", 2, ttl_ms=60_000)
        queue.fail(conn, lease, {1: Failure("truncated", "It ends early."), 2: Failure("empty", "No bytes.")})


def test_failures_are_listed_by_code_and_as_json(here):
    assert said("failures") == "Nothing has failed.\n"
    fail_two(here)
    assert said("failures") == (
        "default: 1 truncated\n  train train_00000: It ends early.\n"
        "default: 1 empty\n  train train_00001: No bytes.\n"
        "To retry them: rococap retry --code CODE, or --image-id ID, or --all\n"
    )
    assert json.loads(said("failures", "--json"))[1] == {
        "run": "default",
        "split": "train",
        "image_id": "train_00001",
        "code": "empty",
        "message": "No bytes.",
        "attempts": 1,
    }
    assert json.loads(said("failures", "--json", "--split", "test")) == []


def test_many_failures_of_one_code_are_cut_short(here):
    write_shard(here / "set", "train", range(15))
    enqueue()
    with db.transaction(db.connect("rococap.db"), write=True) as conn:
        worker = queue.register_worker(conn, "one", "host", 7, INFO)
        lease = queue.claim(conn, worker, 1, "train", 15, ttl_ms=60_000)
        queue.fail(conn, lease, {job.id: Failure("moved", "Gone.") for job in lease.jobs})
    told = said("failures").splitlines()
    assert (told[0], len(told), told[11]) == ("default: 15 moved", 13, "  … and 5 more: --json lists them all")


def test_commands_to_paste_name_the_run(here):
    write_shard(here / "set", "train", range(5))
    enqueue("--run", "other")
    assert said("cancel", "--all") == "other: 5 cancelled. Undo: rococap retry --cancelled --run other\n"
    assert said("worker") == "other: nothing left to do. See: rococap status\n"


ODD_NAMES = ["with space", "what?", "nr#1", "100%", "it's", 'q"q', "$HOME", "a&b", "semi;colon", "Łódź"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_the_command_that_upgrades_a_database_names_it_also_where_a_shell_or_a_url_would_read_something_else(
    here, name
):
    (here / name).mkdir()
    path = Path(shutil.move("rococap.db", f"{name}/q.db"))
    with sqlite3.connect(path) as conn:
        conn.execute("UPDATE alembic_version SET version_num = '0001'")
    conn.close()
    command = shlex.split(refused("--db", str(path), "status").partition("(a backup copy is made): ")[2])
    assert (command[:2], command[3:]) == (["rococap", "--db"], ["migrate"])
    assert db._parse(command[2]).database == str(path)


@pytest.mark.parametrize("model", ["my model", "it's", "a&b;c", "$HOME"])
def test_the_command_that_goes_on_with_a_server_has_its_options_whole(model):
    url = "http://127.0.0.1:8000/v1?key=a&for='me'"
    settings = Settings.of(engine="openai", base_url=url, served_model=model)
    again = _again("worker", "other", settings)
    command = subprocess.run(["sh", "-c", f"printf '%s\\n' {again}"], capture_output=True, text=True)
    engine = ["--engine", "openai", "--base-url", url, "--served-model", model]
    assert command.stdout.splitlines() == ["rococap", "worker", "--run", "other", *engine]


def test_a_model_that_is_neither_a_folder_nor_a_hub_id_is_refused(here):
    write_shard(here / "set", "train", range(5))
    assert refused("enqueue", "--split", "train", "--dataset", "set", "--model", "./nowhere") == (
        "There is no folder ./nowhere: check the path, or name a model of the hub as owner/name."
    )


def test_retry_and_cancel_say_how_many(here):
    fail_two(here)
    assert said("retry", "--code", "empty") == "default: 1 pending again. Caption them: rococap worker\n"
    assert said("retry", "--image-id", "train_00004") == "default: 0 pending again\n"
    assert said("retry", "--all") == "default: 1 pending again. Caption them: rococap worker\n"
    assert said("cancel", "--image-id", "train_00003") == "default: 1 cancelled. Undo: rococap retry --cancelled\n"
    assert said("cancel", "--all") == "default: 4 cancelled. Undo: rococap retry --cancelled\n"
    assert said("retry", "--cancelled") == "default: 5 pending again. Caption them: rococap worker\n"
    assert "Choose what to retry: --code CODE" in refused("retry", code=2)
    assert "--all already selects every failed picture" in refused("retry", "--all", "--cancelled", code=2)
    assert "Choose what to cancel: --split SPLIT" in refused("cancel", code=2)


def test_a_sentence_about_another_kind_of_database_has_no_command_in_it(here):
    write_shard(here / "set", "train", range(5))
    enqueue("--db", "mine.db")
    assert refused("--db", "mine.db", "merge", "mysql://x/y") == (
        "A queue is kept in SQLite or PostgreSQL, not in mysql."
    )


def test_the_database_is_named_before_or_after_the_command_or_by_the_environment(here, monkeypatch):
    write_shard(here / "set", "train", range(5))
    enqueue("--db", "other.db")
    assert "default" in said("--db", "sqlite:///other.db", "status")
    assert "default" in said("status", "--db", "other.db")
    assert "default" not in said("status")
    monkeypatch.setenv("ROCOCAP_DB", "sqlite:///other.db")
    assert "default" in said("status")


@pytest.mark.slow
def test_restore_reads_exports_back(here):
    write_dataset(here / "set", {"train": 6})
    enqueue("--max-new-tokens", "8")
    said("worker", "--device", "cpu")
    said("export", "--split", "train")
    before = Path("results_medical/medical_captions_train.csv").read_bytes()
    Path("rococap.db").unlink()
    enqueue("--max-new-tokens", "8")
    assert said(
        "restore", "results_medical/medical_captions_train.csv", "results_medical/checkpoint_train_000001.csv"
    ) == ("default: 6 restored, 6 already captioned\n")
    said("export", "--split", "train")
    assert Path("results_medical/medical_captions_train.csv").read_bytes() == before


@pytest.mark.slow
def test_a_file_of_pictures_that_the_run_does_not_have_is_no_success(here):
    write_dataset(here / "set", {"train": 6})
    enqueue("--max-new-tokens", "8", "--limit", "3")
    said("worker", "--device", "cpu")
    said("export", "--split", "train")
    Path("rococap.db").unlink()
    enqueue("--max-new-tokens", "8", "--offset", "3")
    result = invoke("restore", "results_medical/medical_captions_train.csv")
    assert result.exit_code == 1
    assert result.stdout == (
        "default: 0 restored, 0 already captioned\n"
        "  3 are of pictures that the run does not have: enqueue all of their split first\n"
    )
    assert result.stderr == (
        "Error: Nothing was restored: run 'default' has none of these pictures. Enqueue their split, or name another "
        "run with --run.\n"
    )
    enqueue("--max-new-tokens", "8")
    assert said("restore", "results_medical/medical_captions_train.csv").startswith("default: 3 restored")
    assert said("restore", "results_medical/medical_captions_train.csv").startswith(
        "default: 0 restored, 3 already captioned"
    )


@pytest.mark.parametrize(
    ("command", "known", "told"),
    [("retry", "train_00000", "default: 1 pending again. "), ("cancel", "train_00003", "default: 1 cancelled. ")],
)
def test_pictures_that_a_run_does_not_have_are_no_success(here, command, known, told):
    fail_two(here)
    assert refused(command, "--image-id", "train_999", "--image-id", "nope") == (
        "Run 'default' has no picture train_999, nope: nothing was changed. Check the IDs: they are "
        "those of the data set."
    )
    assert said(command, "--image-id", known, "--image-id", "nope").startswith(told)


def test_a_code_that_nothing_failed_with_is_no_success(here):
    fail_two(here)
    assert refused("retry", "--code", "truncatd") == (
        "No picture of run 'default' failed with the code truncatd: nothing was changed. To see the codes: "
        "rococap failures"
    )
    assert said("retry", "--code", "truncated", "--code", "truncatd").startswith("default: 1 pending again")
    assert said("retry", "--code", "truncated") == "default: 0 pending again\n"
    assert said("cancel", "--split", "test") == "default: 0 cancelled\n"


@pytest.mark.parametrize("name", ["rococap.db", "typo.db", "sqlite:///typo.db"])
def test_a_command_that_only_looks_makes_no_database(here, name):
    Path("rococap.db").unlink()
    Path("captions.csv").touch()
    commands = [
        *("status", "failures", "leases", "workers", "runs", "export --split train", "compare a"),
        *("bench", "retry --all", "cancel --all", "pause", "resume", "reap", "vacuum", "backup copy.db", "worker"),
        *("restore captions.csv", "enqueue --run new --from old", "evaluate --split train", "report --split train"),
    ]
    for command in commands:
        assert refused("--db", name, *command.split()) == (
            f"There is no database {name.removeprefix('sqlite:///')}. Name yours with --db, or create it by "
            f"registering pictures: rococap --db {name} enqueue --split train"
        ), command
    assert invoke("--db", name, "doctor").exit_code == 1
    assert os.listdir(here) == ["captions.csv"]


def test_limit_and_offset_choose_rows(here):
    write_shard(here / "set", "train", range(9))
    assert enqueue("--limit", "4", "--offset", "2") == "default train: 4 new, 0 known, 0 changed\n"
    assert enqueue("--limit", "4", "--offset", "2") == "default train: 0 new, 4 known, 0 changed\n"


def test_all_means_every_split(here):
    for split in ("train", "validation", "test"):
        write_shard(here / "set", split, range(2))
    assert said("enqueue", "--split", "all", "--dataset", "set").splitlines() == [
        f"default {split}: 2 new, 0 known, 0 changed" for split in ("train", "validation", "test")
    ]


# --- bad input -------------------------------------------------------------------------------------------------


def test_an_unknown_split_is_a_usage_error():
    assert "'trian' is not one of 'train', 'validation', 'test', 'all'" in refused(
        "enqueue", "--split", "trian", code=2
    )


def test_a_missing_split_is_a_usage_error():
    assert "Missing option '--split'" in refused("enqueue", code=2)


def test_flagged_captions_go_to_a_new_run_with_the_old_recipe_but_for_what_is_said(here):
    write_shard(here / "set", "train", range(5))
    enqueue("--max-new-tokens", "48", "--preset", "anatomy")
    with db.transaction(db.connect("rococap.db"), write=True) as conn:
        lease = queue.claim(conn, queue.register_worker(conn, "one", "host", 7, INFO), 1, "train", 3, ttl_ms=60_000)
        queue.complete(conn, lease, [Completion(job.id, "!" * 64 * (job.id != 2)) for job in lease.jobs])
    again = ("enqueue", "--run", "again", "--from", "default", "--flag", "one_token", "--flag", "loop")
    assert said(*again, "--repetition-penalty", "1.1") == "again train: 2 new, 0 known, 0 changed\n"
    with db.transaction(db.connect("rococap.db")) as conn:
        old, new = (queue.get_run(conn, name).recipe for name in ("default", "again"))
    assert old.differences(new) == {"repetition_penalty": (1.0, 1.1)}
    assert refused(*again) == (
        "Run 'default' has the same recipe, which would give the same captions again. Change something: --prompt, "
        "--model, --max-new-tokens, --repetition-penalty …"
    )
    assert said("enqueue", "--run", "other", "--from", "default", "--prompt", "What?") == (
        "other train: 5 new, 0 known, 0 changed\n"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--flag", "loop"], "--flag selects from another run's captions: name that run with --from RUN."),
        (["--from", "default"], "--from needs a name for the new run: --run NAME."),
        (["--from", "a", "--run", "b", "--limit", "5"], "--from takes another run's pictures: leave --limit out."),
        (
            ["--from", "a", "--run", "b", "--dataset", "set"],
            "--from takes another run's pictures: leave --dataset out.",
        ),
    ],
)
def test_what_does_not_go_with_another_runs_pictures_is_a_usage_error(here, args, message):
    assert refused("enqueue", *args, code=2) == message


def test_a_model_whose_name_circulates_wrongly_is_refused_before_anything_is_registered(here):
    write_shard(here / "set", "train", range(5))
    args = ("enqueue", "--split", "train", "--dataset", "set", "--model", "HuggingFaceM4/SmolVLM2-256M")
    assert refused(*args) == (
        "The hub has no model HuggingFaceM4/SmolVLM2-256M: its name is HuggingFaceTB/SmolVLM2-256M-Video-Instruct."
    )


def test_pixel_bounds_that_no_model_could_follow_are_a_usage_error(here):
    assert "min_pixels (9000) must be positive and at most max_pixels (800)" in refused(
        "enqueue", "--split", "train", "--min-pixels", "9000", "--max-pixels", "800", code=2
    )


def test_a_run_name_that_is_no_file_name_is_a_usage_error():
    assert "'../x' is not a file name" in refused("enqueue", "--split", "train", "--run", "../x", code=2)


@pytest.mark.parametrize("name", ["a" * 101, "ł" * 51, "骨" * 34, "骨" * 100])
def test_a_run_name_of_more_than_100_bytes_is_a_usage_error(here, name):
    message = refused("enqueue", "--split", "train", "--run", name, code=2)
    assert f"is {len(name.encode())} bytes long in UTF-8, and the limit is 100: shorten it." in message


def test_the_longest_run_names_have_room_in_every_file_name(here):
    write_shard(here / "set", "train", range(3))
    names = ["a" * 100, "骨" * 33 + "b"]
    for name, prompt in zip(names, ("One?", "Two?"), strict=True):
        enqueue("--run", name, "--prompt", prompt)
        with db.transaction(db.connect("rococap.db"), write=True) as conn:
            worker = queue.register_worker(conn, name, "host", 7, INFO)
            lease = queue.claim(conn, worker, queue.get_run(conn, name).id, "train", 3, ttl_ms=60_000)
            queue.complete(conn, lease, [Completion(job.id, "A bone.") for job in lease.jobs])
        said("export", "--split", "train", "--run", name)
    said("compare", *names)
    said("report", "--split", "train", *(f"--run={name}" for name in names))


def test_a_folder_without_parquet_or_csv_is_refused(here):
    (here / "empty").mkdir()
    assert refused("enqueue", "--split", "train", "--dataset", "empty") == (
        f"{here / 'empty'} has no split 'train': there is neither train-00000-of-000NN.parquet nor train_captions.csv. "
        "It has no split at all: choose another folder."
    )
    assert said("status").startswith("Nothing is registered")


def test_a_shard_that_is_truncated_is_refused_and_nothing_is_registered(here):
    path = write_shard(here / "set", "train", range(5))
    path.write_bytes(path.read_bytes()[:-20])
    message = refused("enqueue", "--split", "train", "--dataset", "set")
    assert "train-00000-of-00001.parquet" in message
    assert said("status").startswith("Nothing is registered")


def test_missing_columns_are_named(here):
    path = write_shard(here / "set", "train", range(5))
    pq.write_table(pq.read_table(path).drop_columns(["image", "cui"]), path)
    message = refused("enqueue", "--split", "train", "--dataset", "set")
    assert (
        "lacks the column image; it has the columns image_id, caption. Say what they are called, for example" in message
    )


def test_two_recipes_under_one_name_are_refused_with_what_differs(here):
    write_shard(here / "set", "train", range(5))
    enqueue()
    result = invoke("enqueue", "--split", "train", "--dataset", "set", "--model", str(MODEL), "--prompt", "What?")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: Run 'default' has another recipe (prompt: 'Describe this medical image in detail.', not 'What?'). "
        "Give this one a name of its own: --run NAME\n"
    )


def test_a_model_folder_without_weights_is_refused_by_the_worker(here):
    write_shard(here / "set", "train", range(5))
    shutil.copytree(MODEL, here / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    said("enqueue", "--split", "train", "--dataset", "set", "--model", "weightless")
    message = refused("worker", "--device", "cpu")
    assert message.startswith(f"The folder {here / 'weightless'} contains no model that can be loaded: ")
    assert lines(said("status"))[1][2] == "5"


def test_an_unknown_hub_model_offline_is_refused_by_the_worker(here):
    write_shard(here / "set", "train", range(5))
    said("enqueue", "--split", "train", "--dataset", "set", "--model", "nobody/nothing")
    message = refused("worker", "--device", "cpu")
    assert message.startswith("The model nobody/nothing (revision main) is not available: ")
    assert message.endswith("hf download nobody/nothing")


def test_a_worker_without_anything_registered_names_enqueue():
    assert refused("worker") == (
        "Nothing is registered here yet. Register pictures first: rococap enqueue --split train"
    )


def test_a_run_that_does_not_exist_is_named_with_those_that_do(here):
    write_shard(here / "set", "train", range(5))
    enqueue()
    assert refused("export", "--split", "train", "--run", "nope") == "There is no run 'nope'. Runs: default."


def test_an_incomplete_split_is_refused_where_all_of_it_is_required(here):
    write_shard(here / "set", "train", range(5))
    enqueue()
    assert "5 of 5 images of train are not captioned" in refused("export", "--split", "train", "--require-complete")
    assert not Path("results_medical").exists()


def test_several_splits_do_not_fit_into_one_file(here):
    write_shard(here / "set", "train", range(5))
    enqueue()
    assert "x.csv is a single file: name a folder for several splits" in refused(
        "export", "--split", "all", "--output", "x.csv", code=2
    )
    assert "x.csv does not end as jsonl files do" in refused(
        "export", "--split", "train", "--output", "x.csv", "--format", "jsonl", code=2
    )


def test_a_place_that_cannot_be_written_is_named(here):
    write_shard(here / "set", "train", range(5))
    enqueue()
    (here / "file").write_text("")
    message = refused("export", "--split", "train", "--output", "file/x.csv")
    assert message == "file/x.csv cannot be written (File exists). Write elsewhere with --output."


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root")
def test_a_full_disk_while_exporting_is_one_line_and_leaves_no_half_file(here):
    write_shard(here / "set", "train", range(400))
    enqueue()
    with db.transaction(db.connect("rococap.db"), write=True) as conn:
        db.execute(conn, "UPDATE jobs SET status = 'done', finished_at = 1")
        db.execute(conn, "UPDATE tallies SET status = 'done'")
        db.execute(
            conn, "INSERT INTO captions (job_id, text, generated_at) SELECT id, hex(randomblob(200)), 1 FROM jobs"
        )
    disk = here / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this machine does not let root mount a tmpfs")
    try:
        message = refused("export", "--split", "train", "--output", "disk", "--checkpoint-every", "0")
        assert message == (
            "No space left for disk/medical_captions_train.csv: nothing was changed there. "
            "Free some space, or write elsewhere with --output."
        )
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_database_that_is_not_ours_is_refused(here):
    with sqlite3.connect("theirs.db") as conn:
        conn.execute("CREATE TABLE patients (id)")
    conn.close()
    assert refused("status", "--db", "theirs.db") == (
        "theirs.db contains other tables (patients) and is not a rococap database. Name another with --db."
    )


def test_a_file_that_is_no_database_is_refused(here):
    Path("notes.db").write_text("not a database at all, but long enough to be read as a page of one" * 20)
    assert refused("status", "--db", "notes.db") == (
        "sqlite:///notes.db is not an SQLite database, or is damaged (file is not a database). Name another with --db."
    )


def test_a_newer_and_an_older_database_are_refused_with_what_to_do(here):
    with sqlite3.connect("rococap.db") as conn:
        conn.execute("UPDATE alembic_version SET version_num = '9999'")
    conn.close()
    assert refused("status") == (
        f"sqlite:///rococap.db has schema 9999, from a newer version of rococap than this one ({SCHEMA}). "
        "Upgrade rococap, or name another database with --db."
    )
    with sqlite3.connect("rococap.db") as conn:
        conn.execute("UPDATE alembic_version SET version_num = '0001'")
    conn.close()
    assert refused("status") == (
        f"sqlite:///rococap.db has schema 0001; this version of rococap needs {SCHEMA}. Upgrade it (a backup copy is "
        "made): rococap --db sqlite:///rococap.db migrate"
    )


def test_a_database_on_a_network_file_system_is_refused(here, monkeypatch):
    monkeypatch.setattr(db, "mounts", lambda: f"server:/home {here} nfs4 rw 0 0\n")
    message = refused("status")
    assert "is on a network file system (nfs4)" in message
    assert "or use PostgreSQL: --db postgresql+psycopg://USER@HOST/NAME" in message


def test_migrating_a_current_database_says_so():
    assert said("migrate") == "The schema is up to date.\n"


# --- ctrl-c ----------------------------------------------------------------------------------------------------

COMMANDS = [
    ["enqueue", "--split", "train", "--dataset", "set"],
    ["worker"],
    ["status"],
    ["failures"],
    ["retry", "--all"],
    ["cancel", "--all"],
    ["export", "--split", "train"],
    ["restore", "file.csv"],
    ["migrate"],
    ["pause"],
    ["resume"],
    ["reap"],
    ["leases"],
    ["workers"],
    ["vacuum"],
    ["backup", "copy.db"],
    ["copy-db", "rococap.db", "copy.db"],
    ["merge", "file.csv"],
    ["doctor"],
    ["bench"],
    ["demo"],
    ["prompts"],
    ["runs"],
    ["serve"],
    ["launch", "slurm"],
    ["launch", "ray", "--cpus", "1"],
    ["compare", "default"],
    ["evaluate", "--split", "train"],
    ["probe", "--split", "train"],
    ["finetune", "--split", "train", "--output", "tuned"],
    ["report", "--split", "train"],
    ["reviews"],
    ["study", "new", "one", "--run", "default", "--split", "train", "--pictures", "1", "--readers", "1"],
    ["study", "status"],
    ["study", "results", "one"],
    ["study", "unblind", "one"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_ctrl_c_is_one_line_in_every_command(here, monkeypatch, command):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    Path("file.csv").touch()
    monkeypatch.setattr(db, "connect", interrupt)
    monkeypatch.setattr(db, "migrate", interrupt)
    monkeypatch.setattr(prompts, "presets", interrupt)
    result = invoke(*command)
    assert result.exit_code == 1
    assert result.stderr == "Error: Interrupted. Nothing is half-written: run the same command again to continue.\n"


def test_every_command_is_tried_with_ctrl_c():
    assert {command[0] for command in COMMANDS} == set(cli.commands)


@pytest.mark.slow
def test_watching_ends_with_ctrl_c(here):
    screen, terminal = os.openpty()  # what is not shown on a terminal is written only at the end
    with (
        open(screen, "rb", buffering=0) as shown,
        subprocess.Popen(
            [sys.executable, "-m", "rococap", "status", "--watch"],
            stdout=terminal,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TERM": "xterm"},
            # a test run in the background of a shell passes on that Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process,
    ):
        os.close(terminal)
        try:
            seen = b""
            while b"Nothing is registered here yet" not in seen:
                seen += shown.read(9_999)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, err) == (0, "")


@pytest.mark.slow
def test_ctrl_c_while_the_model_loads_ends_the_worker_with_every_picture_pending(here, monkeypatch):
    from rococap.engines import hf

    class Interrupted(hf.TransformersEngine):
        def load(self) -> None:
            signal.raise_signal(signal.SIGINT)
            super().load()

    monkeypatch.setattr(hf, "TransformersEngine", Interrupted)
    write_shard(here / "set", "train", range(5))
    enqueue()
    assert "Stopped on request" in said("worker", "--device", "cpu")
    assert lines(said("status"))[1][2] == "5"


# --- terminals that are not UTF-8 ---------------------------------------------------------------------------------

TOLD = "Łódź–7, γ-knife, ≥ 5 µm, 🦴"


def printed(encoding: str, *args: str) -> str:
    command = [sys.executable, "-m", "rococap", *args]
    done = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
    assert done.returncode == 0, done.stderr
    return done.stdout.decode(encoding, "replace")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "koi8-r", "shift_jis", "utf-8"])
def test_what_an_encoding_cannot_show_is_escaped(here, encoding):
    fail_two(here)
    with db.transaction(db.connect("rococap.db"), write=True) as conn:
        db.execute(conn, "UPDATE failures SET message = ? WHERE job_id = 1", (TOLD,))
    shown = TOLD.encode(encoding, "backslashreplace").decode(encoding)
    assert f"  train train_00000: {shown}\n" in printed(encoding, "failures").replace("\r", "")
    assert json.loads(printed(encoding, "failures", "--json"))[0]["message"] == TOLD


@pytest.mark.slow
@pytest.mark.parametrize("command", ["status", "runs", "leases", "workers", "prompts", "bench --help", "export --help"])
@pytest.mark.parametrize("encoding", ["koi8-r", "ascii"])
def test_no_command_fails_for_an_encoding(here, encoding, command):
    fail_two(here)
    assert printed(encoding, *command.split())


# --- tracebacks ------------------------------------------------------------------------------------------------


def test_a_traceback_is_shown_where_debug_asks_for_it(here):
    Path("notes.db").write_text("no database" * 100)
    result = invoke("--debug", "--db", "notes.db", "status")
    assert result.exit_code == 1
    assert type(result.exception).__name__ == "DatabaseError"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("many", "'many' is neither auto nor a number."),
        ("0", "0 is not in the range 1<=x<=4096."),
        ("-1", "neither auto"),
    ],
)
def test_a_batch_size_is_auto_or_a_number(tmp_path, value, told):
    result = invoke("--db", f"sqlite:///{tmp_path / 'queue.db'}", "worker", f"--batch-size={value}")
    assert result.exit_code == 2
    assert told in result.output


def test_a_worker_logs_how_fast_all_workers_are_in_the_last_five_minutes(monkeypatch, caplog):
    clock = SimpleNamespace(at=0.0)
    monkeypatch.setattr(worker_command, "time", SimpleNamespace(monotonic=lambda: clock.at))
    with caplog.at_level("INFO"), worker_command.worker_progress() as report:
        for clock.at, left in ((0.0, 9_000), (60.0, 8_400), (300.0, 8_000), (500.0, 7_200), (510.0, 7_300)):
            report(Outcome(done=5), left)
    messages = [record.message for record in caplog.records if record.name == "rococap.worker"]
    assert messages == [
        "5 done here, 8400 left, 600/min, 14 min 00 s to go",
        "5 done here, 8000 left, 200/min, 40 min 00 s to go",
        "5 done here, 7200 left, 240/min, 30 min 00 s to go",
        "5 done here, 7300 left, 200/min, 36 min 30 s to go",
    ]
