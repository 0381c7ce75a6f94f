"""What `rococap bench` measures, says and leaves alone."""

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import steps
from PIL import Image
from samples import fill, register, write_shard
from small_engine import SmallEngine

from rococap import __version__, db, queue
from rococap.data import datasets
from rococap.demo import recipe
from rococap.demo.phantoms import write_dataset
from rococap.engines import Completion, Failure, Options, Source
from rococap.errors import RococapError
from rococap.queue.enqueue import enqueue
from rococap.worker import benchmark
from rococap.worker.benchmark import Costs, Rate, estimate, recommend, sizes_up_to

N = 12
TABLES = ("datasets", "shards", "images", "runs", "jobs", "tallies", "leases", "workers", "captions", "failures")


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a queue, and a run of twelve phantoms of validation."""
    folder = tmp_path_factory.mktemp("bench")
    write_dataset(folder / "set", {"validation": N})
    database = db.connect(f"sqlite:///{folder / 'rococap.db'}")
    located = datasets.locate(str(folder / "set"), ["validation"])
    enqueue(database, located, ["validation"], run="default", recipe=recipe())
    database.dispose()
    return folder


@pytest.fixture
def here(registered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(registered / "rococap.db", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


BENCH = ("bench", "--device", "cpu")
invoke, said = partial(steps.invoke, *BENCH), partial(steps.said, *BENCH)


def refused(*args: str, code: int = 1) -> str:
    result = invoke(*args)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    return result.stderr.strip().splitlines()[-1].removeprefix("Error: ")


def dump(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


# --- with the demo's model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(registered: Path) -> dict[str, Any]:
    """`rococap bench --json` in the registered folder, with what the folder was before."""
    before = os.getcwd()
    os.chdir(registered)
    digest, rows = hashlib.sha256(Path("rococap.db").read_bytes()).hexdigest(), dump(Path("rococap.db"))
    try:
        printed = json.loads(said("--json"))
    finally:
        os.chdir(before)
    return printed | {"digest": digest, "rows": rows}


def test_every_figure_is_there_and_they_agree(measured):
    assert measured["rococap"] == measured["versions"]["rococap"] == __version__
    assert (measured["engine"], measured["device"], measured["dtype"]) == ("transformers", "cpu", "float32")
    assert (measured["model"], measured["recipe_hash"]) == (recipe().model, recipe().hash)
    assert (measured["run"], measured["split"], measured["cpu_count"]) == ("default", "validation", os.cpu_count())
    assert (measured["pictures"], measured["failures"]) == (N, 0)
    assert min(measured["load_ms"], measured["prepare_ms"]) > 0
    assert all(rate["pictures_per_sec"] > 0 for rate in measured["batch_sizes"])
    # Phantoms' captions have between 5 and 64 tokens.
    assert all(5 <= rate["tokens_per_sec"] / rate["pictures_per_sec"] <= 64 for rate in measured["batch_sizes"])
    assert measured["worker_pictures_per_sec"] > 0
    assert measured["efficiency"] > 0
    hours = pytest.approx(N / measured["worker_pictures_per_sec"] / 3600)
    assert measured["estimate"] == {"split_hours": hours, "unfinished_hours": hours}
    assert measured["recommendation"].endswith(".")


def test_the_batch_sizes_are_powers_of_two_up_to_the_automatic_one_or_the_pictures(measured):
    sizes = [rate["batch_size"] for rate in measured["batch_sizes"]]
    assert sizes == sizes_up_to(N, measured["automatic_batch_size"])
    assert max(sizes) <= N


def test_the_efficiency_is_of_the_automatic_batch_size(measured):
    for rate in measured["batch_sizes"]:
        if rate["batch_size"] == measured["automatic_batch_size"]:
            assert measured["efficiency"] == pytest.approx(
                measured["worker_pictures_per_sec"] / rate["pictures_per_sec"]
            )


def test_the_queue_is_unchanged_byte_for_byte(measured, registered):
    assert hashlib.sha256((registered / "rococap.db").read_bytes()).hexdigest() == measured["digest"]
    assert dump(registered / "rococap.db") == measured["rows"]
    assert not (registered / "rococap.db.spool").exists()


def test_the_file_holds_what_was_printed(measured, registered):
    folder = registered / "results_medical" / "bench"
    written = json.loads((folder / "bench.json").read_text())
    assert written == {key: value for key, value in measured.items() if key not in ("digest", "rows")}
    assert {path.name for path in folder.iterdir()} <= {"bench.json", "bench.png"}


def test_the_plot_is_a_picture(measured, registered):
    with Image.open(registered / "results_medical" / "bench" / "bench.png") as plot:
        assert plot.format == "PNG"
        assert min(plot.size) > 300


def test_the_table_fits_80_columns_and_names_the_files(here):
    text = said("--pictures", "4", "--batch-size", "2,16,1", "--output", "out")
    assert max(map(len, text.splitlines())) <= 80
    table = text.split("\n\n")[1].splitlines()
    assert table[0].split() == ["batch", "size", "pictures/s", "new", "tokens/s"]
    assert [line.split()[0] for line in table[1:]] == ["1", "2"]
    assert "about " in text.split("\n\n")[0]
    assert f"Written: {Path('out/bench.json')}" in text
    assert len(json.loads(Path("out/bench.json").read_text())["batch_sizes"]) == 2


# --- with a small engine ---------------------------------------------------------------------------------------


class Narrow(SmallEngine):
    """Has memory for four pictures at a time."""

    def run(self, source: Source) -> Iterator[Completion]:
        self.batch_size = min(4, self.batch_size)
        return super().run(source)


class Mute(SmallEngine):
    def run(self, source: Source) -> Iterator[Completion]:
        while batch := source.take(4, None):
            yield from (Completion(one.job_id, failure=Failure("broken", "It says nothing.")) for one in batch)


def measure(database, engine: SmallEngine, **options: Any) -> benchmark.Measured:
    return benchmark.measure(database, Options(), load=lambda *_: engine, **options)


def test_a_picture_that_cannot_be_read_or_prepared_is_left_out_and_counted(database, tmp_path):
    fill(database, tmp_path / "set", 10)
    result = measure(database, SmallEngine(unprepared=(3,)))
    assert (result.pictures, result.failures) == (9, 1)
    assert [rate.batch_size for rate in result.batch_sizes] == [1, 2, 4]


def test_bytes_that_are_no_picture_are_counted(database, tmp_path):
    write_shard(tmp_path / "set", "train", range(10), pictures={5: b"no picture", 6: b""})
    register(database, tmp_path / "set", ["train"])
    result = measure(database, SmallEngine())
    assert (result.pictures, result.failures) == (8, 2)


def test_nothing_can_be_measured_if_no_picture_can_be_read(database, tmp_path):
    fill(database, tmp_path / "set", 3)
    with pytest.raises(RococapError, match=r"^None of the 3 pictures can be measured. The first: The small engine"):
        measure(database, SmallEngine(unprepared=(0, 1, 2)))


def test_the_pictures_are_those_that_the_run_has(database, tmp_path):
    write_shard(tmp_path / "set", "train", range(30))
    register(database, tmp_path / "set", ["train"], offset=20, limit=5)
    said: list[str] = []

    class Hearing(SmallEngine):
        def run(self, source: Source) -> Iterator[Completion]:
            for completion in super().run(source):
                said.append(completion.text)
                yield completion

    result = measure(database, Hearing(), sizes=[4])
    assert result.pictures == result.split_pictures == 5
    assert {text.rpartition(" ")[2] for text in said} == {str(n) for n in range(20, 25)}


def test_the_estimate_is_for_the_whole_split_and_for_what_is_unfinished(database, tmp_path):
    run = fill(database, tmp_path / "set", 20)
    with db.transaction(database, write=True) as conn:
        queue.cancel(conn, run, image_ids=[f"train_{n:05}" for n in range(5)])
    result = measure(database, SmallEngine(), max_pictures=8)
    assert (result.split_pictures, result.unfinished_pictures, result.pictures) == (20, 15, 8)
    assert result.estimate == estimate(20, 15, result.worker_pictures_per_sec)


def test_a_batch_size_that_ran_out_of_memory_is_left_out(database, tmp_path):
    fill(database, tmp_path / "set", 10)
    engine = Narrow()
    assert [rate.batch_size for rate in measure(database, engine, sizes=[2, 4, 8]).batch_sizes] == [2, 4]
    assert engine.batch_size == 4
    with pytest.raises(RococapError, match=r"^Out of memory with 8 pictures at a time. Give a smaller --batch-size.$"):
        measure(database, engine, sizes=[8])


def test_a_model_that_captions_nothing_is_an_error_that_says_why(database, tmp_path):
    fill(database, tmp_path / "set", 3)
    with pytest.raises(RococapError, match=r"captioned none of the pictures. The first: It says nothing."):
        measure(database, Mute())


def test_what_waits_in_the_spool_stays_there(database, tmp_path, monkeypatch):
    monkeypatch.setenv("ROCOCAP_SPOOL", str(tmp_path / "spool"))
    fill(database, tmp_path / "set", 3)
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "someone.jsonl").write_text('{"not": "ours"}\n')
    measure(database, SmallEngine())
    assert [path.name for path in (tmp_path / "spool").iterdir()] == ["someone.jsonl"]
    assert (tmp_path / "spool" / "someone.jsonl").read_text() == '{"not": "ours"}\n'


@pytest.mark.every_database
def test_rows_of_the_queue_are_unchanged_on_every_database(database, tmp_path):
    def rows() -> list[Any]:
        with db.transaction(database) as conn:
            return [
                sorted(map(str, db.execute(conn, f"SELECT * FROM {table}").fetchall()))
                for table in (
                    "runs",
                    "jobs",
                    "tallies",
                    "leases",
                    "workers",
                    "captions",
                    "failures",
                    "images",
                    "shards",
                )
            ]

    fill(database, tmp_path / "set", 10)
    before = rows()
    measure(database, SmallEngine())
    assert rows() == before


# --- what cannot be measured -----------------------------------------------------------------------------------


def test_without_a_run_it_says_how_to_register_one(tmp_path, empty_queue, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_queue, tmp_path / "rococap.db")
    assert refused() == "Nothing is registered here yet. Register pictures first: rococap enqueue --split train"


def test_a_run_that_does_not_exist_is_refused_with_those_that_do(here):
    assert refused("--run", "other") == "There is no run 'other'. Runs: default."


def test_several_runs_are_chosen_from_with_this_command(database, tmp_path):
    fill(database, tmp_path / "set", 3, run="a")
    fill(database, tmp_path / "set", 3, run="b")
    with pytest.raises(RococapError, match="Choose one: rococap bench --run NAME"):
        measure(database, SmallEngine())


def test_a_split_that_the_run_lacks_is_refused(here):
    assert refused("--split", "test").startswith("Run 'default' has no pictures of test. Register them")


def test_batch_sizes_that_no_picture_fills_are_refused(here):
    assert refused("--pictures", "3", "--batch-size", "8,4") == (
        "3 pictures do not fill a batch of 4. Give a smaller --batch-size, or more --pictures."
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--pictures", "0"), "0 is not in the range"),
        (("--batch-size", "four"), "'four' is not a list of numbers. Write it like 1,4,16."),
        (("--batch-size", "1,,4"), "'1,,4' is not a list of numbers. Write it like 1,4,16."),
        (("--batch-size", "0,4"), "0 is not in the range"),
    ],
)
def test_numbers_that_make_no_sense_are_wrong_usage(here, options, told):
    assert told in refused(*options, code=2)


# --- what follows from the figures -----------------------------------------------------------------------------


def rates(**pictures_per_sec: float) -> list[Rate]:
    return [Rate(int(size[1:]), rate, 30 * rate) for size, rate in pictures_per_sec.items()]


def test_hours_are_pictures_by_rate():
    assert estimate(7200, 3600, 0.5) == benchmark.Estimate(4.0, 2.0)


@pytest.mark.parametrize(
    ("most", "automatic", "sizes"),
    [(64, 16, [1, 2, 4, 8, 16]), (64, 12, [1, 2, 4, 8, 12]), (10, 64, [1, 2, 4, 8]), (1, 1, [1]), (5, 1, [1])],
)
def test_sizes_are_powers_of_two_and_the_automatic_one(most, automatic, sizes):
    assert sizes_up_to(most, automatic) == sizes


@pytest.mark.parametrize(
    ("measured", "automatic", "told"),
    [
        (rates(_1=1.0, _2=1.8, _4=3.0), 4, "Leave --batch-size at auto, which is 4 here."),
        (rates(_1=1.0, _2=2.95, _4=3.0), 4, "Leave --batch-size at auto, which is 4 here."),
        (rates(_1=1.0, _2=3.0, _4=3.1), 2, "Leave --batch-size at auto, which is 2 here."),
        (rates(_1=1.0, _2=2.9, _4=3.0, _8=2.0), 8, "Use --batch-size 2, the smallest within 5 % of the fastest."),
        (
            rates(_1=1.0, _2=2.0),
            8,
            "Of the batch sizes measured, use --batch-size 2; auto is 8, which was not among them.",
        ),
    ],
)
def test_it_recommends_the_smallest_batch_size_that_is_about_the_fastest(measured, automatic, told):
    assert recommend(measured, automatic, 0.95, Costs(1.0, 1.0, 10.0), 64) == told


@pytest.mark.parametrize(
    ("costs", "told"),
    [
        (Costs(1.0, 3.0, 10.0), "preparing limits it, at 3.0 ms a picture; the model takes 10.0 ms."),
        (Costs(4.0, 3.0, 10.0), "reading limits it, at 4.0 ms a picture; the model takes 10.0 ms."),
        (Costs(4.0, 30.0, 3.0, 8), "preparing limits it, at 30.0 ms a picture on each of 8 threads; the model takes"),
        (Costs(0.1, 0.2, 10.0), "neither reading nor preparing explains it: check what else is busy on this machine."),
    ],
)
def test_a_worker_that_falls_behind_its_model_is_told_why(costs, told):
    text = recommend(rates(_1=1.0), 1, 0.72, costs, 4)
    assert text.startswith(
        "Leave --batch-size at auto, which is 1 here. The whole worker reaches 72 % of the model's speed"
    )
    assert told in text


def test_of_few_pictures_it_does_not_say_what_limits_a_worker():
    assert recommend(rates(_16=1.0), 16, 0.5, Costs(9.0, 9.0, 10.0), 63) == (
        "Leave --batch-size at auto, which is 16 here. The whole worker reaches 50 % of the model's speed, "
        "but with so few pictures the start dominates: measure with --pictures 64."
    )


def test_a_worker_that_keeps_up_is_told_nothing():
    assert recommend(rates(_1=1.0), 1, 0.9, Costs(5.0, 5.0, 10.0), 64) == "Leave --batch-size at auto, which is 1 here."
