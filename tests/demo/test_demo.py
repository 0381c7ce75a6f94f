"""The whole job as a newcomer runs it, and at once by two workers, one of them killed."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from sqlalchemy import Engine
from steps import invoke

from rococap import db, queue
from rococap.data import SPLITS, datasets
from rococap.demo import recipe
from rococap.demo.phantoms import write_dataset
from rococap.queue.enqueue import enqueue
from rococap.results.snapshot import COLUMNS

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def rococap(*args: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rococap", *args], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def start_worker(url: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "rococap", "--db", url, "worker", "--batch-size", "4", "--device", "cpu", *more]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


HOLDER = (
    "SELECT w.pid FROM leases l JOIN workers w ON w.id = l.worker_id WHERE l.state = 'open' ORDER BY l.id DESC LIMIT 1"
)
"""Who has claimed last: if it is killed, something is left for the other."""


def exports(folder: Path) -> pd.DataFrame:
    return pd.concat(pd.read_csv(path) for path in sorted(folder.glob("medical_captions_*.csv")))


@pytest.mark.slow
def test_the_demo_captions_phantoms_and_says_what_they_are(tmp_path):
    told = rococap("demo", "--images", "20", cwd=tmp_path)
    assert "drawings made by a program" in told
    assert "Nothing in rococap is for clinical use" in told
    frame = exports(tmp_path / "demo" / "results_medical")
    assert tuple(frame.columns) == COLUMNS
    assert dict(frame["split"].value_counts()) == {"train": 12, "validation": 4, "test": 4}
    exact = int((frame["original_caption"] == frame["generated_caption"]).sum())
    assert exact >= 19
    assert "20 pictures captioned by 2 workers in " in told
    assert f"{exact} of them identical to the original" in told
    with Image.open(tmp_path / "demo" / "captions.png") as sheet:
        assert min(sheet.size) > 500
    floor = shuffled(tmp_path / "demo")
    again = rococap("demo", "--images", "20", cwd=tmp_path)
    assert "20 pictures were captioned by an earlier demo in this folder, " in again
    assert "Nothing was captioned again; the files below were regenerated from its queue." in again
    assert " captioned by 2 workers" not in again
    assert exports(tmp_path / "demo" / "results_medical").equals(frame)
    assert "Look at  demo/report.html" in again
    assert shuffled(tmp_path / "demo") == floor


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(*args: str) -> str:
    result = invoke("demo", *args)
    assert result.exit_code == 1, result.output
    return result.stderr.strip().removeprefix("Error: ")


@pytest.fixture(scope="module")
def smallest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo of 5 pictures, and what it told."""
    cwd = tmp_path_factory.mktemp("smallest")
    return cwd / "demo", rococap("demo", "--images", "5", "--workers", "1", cwd=cwd)


@pytest.mark.slow
def test_a_demo_of_another_size_overwrites_no_results(smallest):
    folder, _ = smallest
    there = files(folder)
    assert refused("--images", "6", "--dir", str(folder)) == (
        f"{folder} holds the results of a demo of 5 pictures, which one of 6 would overwrite. See them "
        "again with --images 5, or choose another folder: rococap demo --dir FOLDER"
    )
    assert files(folder) == there


@pytest.mark.slow
def test_the_smallest_demo_has_a_report_too(smallest):
    folder, told = smallest
    assert "5 pictures captioned by 1 workers" in told
    shuffled(folder)


@pytest.mark.parametrize("name", ["dataset", "results_medical", "captions.png", "report.html"])
def test_the_demo_leaves_a_folder_alone_that_holds_something_else(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("mine")
    assert refused("--dir", str(tmp_path)) == (
        f"{tmp_path} holds {name} but no queue of a demo, and was left unchanged. Choose another folder: "
        "rococap demo --dir FOLDER"
    )
    assert files(tmp_path) == {f"{name}/mine": b"mine"}


@pytest.mark.parametrize("run", ["default", "mine"])
def test_the_demo_leaves_a_queue_alone_that_is_not_its_own(tmp_path, run):
    write_dataset(tmp_path / "set", {"train": 5})
    database = db.connect(str(tmp_path / "rococap.db"))
    enqueue(database, datasets.locate(str(tmp_path / "set"), ["train"]), ["train"], run=run, recipe=recipe())
    database.dispose()
    there = files(tmp_path)
    assert refused("--dir", str(tmp_path)) == (
        f"{tmp_path} holds a queue that no demo made in this folder, and was left unchanged. Choose another folder: "
        "rococap demo --dir FOLDER"
    )
    assert files(tmp_path).keys() == there.keys()
    assert files(tmp_path / "set") == {name.removeprefix("set/"): data for name, data in there.items() if "set" in name}


@pytest.mark.slow
def test_a_demo_that_was_stopped_tells_what_an_earlier_one_captioned(tmp_path):
    folder = tmp_path / "demo"
    write_dataset(folder / "dataset", {"train": 4, "validation": 1, "test": 1})
    database = db.connect(str(folder / "rococap.db"))
    located = datasets.locate(str(folder / "dataset"), SPLITS)
    enqueue(database, located, SPLITS, run="default", recipe=recipe())
    worker = start_worker(str(folder / "rococap.db"), "--limit", "2", "--batch-size", "2")
    worker.communicate(timeout=300)
    assert worker.returncode == 0
    told = rococap("demo", "--images", "6", "--workers", "1", cwd=tmp_path)
    assert "\n4 pictures captioned by 1 workers in " in told
    assert "s, after 2 by an earlier demo in this folder, " in told


@pytest.mark.slow
def test_the_demo_works_beside_a_users_own_modules(tmp_path):
    (tmp_path / "random.py").write_text("raise SystemExit('imported random.py of the working folder')")
    command = [sys.executable, "-P", "-m", "rococap", "demo", "--images", "6", "--workers", "1"]
    told = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stderr
    assert "6 pictures captioned by 1 workers in " in told.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["what? it's #1 of 100%", "a&b;$HOME"])
def test_the_command_that_the_demo_tells_to_ask_with_works_in_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    told = rococap("demo", "--images", "6", "--workers", "1", "--dir", name, cwd=tmp_path)
    command = shlex.split(told.splitlines()[-1].removeprefix("Run "))
    assert command[0] == "rococap"
    assert rococap(*command[1:], cwd=tmp_path).splitlines()[1].split()[:2] == ["default", "train"]
    assert (tmp_path / name / "rococap.db").is_file()


def shuffled(folder: Path) -> dict[str, str]:
    """The captions of run `shuffled`, which are run `default`'s, each of another picture."""
    database = db.connect(f"sqlite:///{folder / 'rococap.db'}")
    sql = (
        "SELECT i.image_id, c.text FROM captions c JOIN jobs j ON j.id = c.job_id JOIN images i ON i.id = j.image_id "
        "JOIN runs r ON r.id = j.run_id WHERE r.name = ?"
    )
    with db.transaction(database) as conn:
        own, others = (dict(map(tuple, db.execute(conn, sql, (name,)).fetchall())) for name in ("default", "shuffled"))
        assert queue.get_run(conn, "shuffled").recipe.model == "captions of run default, shuffled"
    database.dispose()
    assert own.keys() == others.keys()
    assert sorted(own.values()) == sorted(others.values())
    assert sum(own[name] == others[name] for name in own) < 5  # some pictures are described alike
    page = (folder / "report.html").read_text("utf-8")
    assert all(f">{name}</h3>" in page for name in own if "_test_" in name)
    return others


def test_its_help_names_all_that_it_makes():
    assert "and writes an export and a report." in " ".join(invoke("demo", "--help").output.split())


@pytest.mark.slow
def test_two_workers_caption_50_phantoms_once_each_although_one_is_killed(database: Engine, url: str, tmp_path: Path):
    write_dataset(tmp_path / "set", {"train": 50})
    enqueue(database, datasets.locate(str(tmp_path / "set"), ["train"]), ["train"], run="default", recipe=recipe())
    workers = [start_worker(url, "--lease-ttl", "5") for _ in range(2)]
    while done(database) < 8:
        time.sleep(0.05)
    with db.transaction(database) as conn:
        (pid,) = db.execute(conn, HOLDER).one()
    (killed, survivor) = sorted(workers, key=lambda worker: worker.pid != pid)
    killed.kill()
    assert done(database) < 50
    outputs = [worker.communicate(timeout=600) for worker in workers]
    assert (killed.returncode, survivor.returncode) == (-signal.SIGKILL, 0), outputs

    told = rococap("--db", url, "export", "--split", "train", "--output", "out", "--require-complete", cwd=tmp_path)
    assert "50 captions" in told
    frame = pd.read_csv(tmp_path / "out" / "medical_captions_train.csv")
    assert list(frame["image_id"]) == [f"PHANTOM_train_{n:06}" for n in range(1, 51)]
    assert (frame["original_caption"] == frame["generated_caption"]).mean() >= 0.97
    segments = [pd.read_csv(path) for path in sorted((tmp_path / "out").glob("checkpoint_train_*.csv"))]
    assert [len(segment) for segment in segments] == [25] * 2
    together = pd.concat(segments).sort_values("image_id").reset_index(drop=True)
    pd.testing.assert_frame_equal(together, frame)
    with db.transaction(database) as conn:
        assert db.execute(conn, "SELECT count(*), count(DISTINCT job_id) FROM captions").one() == (50, 50)
        assert db.execute(conn, "SELECT count(*) FROM leases WHERE state = 'expired'").scalar_one() >= 1


def done(database: Engine) -> int:
    with db.transaction(database) as conn:
        return sum(counts.done for counts in queue.counts(conn))
