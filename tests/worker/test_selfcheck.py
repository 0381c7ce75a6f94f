"""What a worker makes sure of before its first claim, with the real demonstration model and with engines that err."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from places import TESTS
from samples import fill, picture, register, write_shard
from small_engine import INFO, SmallEngine
from sqlalchemy import Engine
from steps import until

from rococap import db, queue
from rococap.data.datasets import locate
from rococap.demo import MODEL
from rococap.demo.phantoms import draw, write_dataset
from rococap.engines import Completion, Failure, Options, Source
from rococap.engines.hf import TransformersEngine
from rococap.errors import ModelError
from rococap.queue.enqueue import enqueue
from rococap.recipe import Recipe
from rococap.worker import dry_run, selfcheck
from rococap.worker.dry_run import Memory, from_memory
from rococap.worker.process import work
from rococap.worker.selfcheck import SelfCheck
from rococap.worker.settings import Settings
from rococap.worker.store import Outcome

DEMO = Recipe(model=str(MODEL), max_new_tokens=48, dtype="float32")


class OneForAll(SmallEngine):
    def run(self, source: Source) -> Iterator[Completion]:
        yield from (replace(one, text="A chest X-ray.") for one in super().run(source))


class Overflowing(SmallEngine):
    def run(self, source: Source) -> Iterator[Completion]:
        for one in super().run(source):
            yield Completion(one.job_id, failure=Failure("non_finite", "The model's output is not finite in float16."))


class SwappedInBatches(SmallEngine):
    """Says of a picture what it saw in its neighbour, in the check; else it would wait for pictures for ever."""

    def run(self, source: Source) -> Iterator[Completion]:
        if not isinstance(source, Memory):
            yield from super().run(source)
            return
        batch = list(super().run(source))
        yield from (replace(one, text=other.text) for one, other in zip(batch, batch[::-1], strict=True))


def run_worker(database: Engine, engine: SmallEngine | None = None, **settings) -> Outcome:
    return work(database, Settings.of(**settings), load=lambda *_: engine or SmallEngine())


def refusal(database: Engine, engine: SmallEngine, **settings) -> str:
    with pytest.raises(ModelError) as caught:
        run_worker(database, engine, **settings)
    with db.transaction(database) as conn:
        assert db.execute(conn, "SELECT count(*) FROM leases").scalar_one() == 0
    told = str(caught.value).removeprefix("The self-check failed, and nothing was claimed: ")
    return told.removesuffix(" To continue anyway: --no-self-check")


def workers(database: Engine) -> list[queue.WorkerSeen]:
    with db.transaction(database) as conn:
        return queue.list_workers(conn, everyone=True)


@pytest.mark.every_database
def test_a_worker_that_passes_says_so_and_those_after_it_look_no_more(database, tmp_path):
    fill(database, tmp_path / "set", 20)
    engine = SmallEngine()
    assert run_worker(database, engine, limit=5).done == 5
    assert run_worker(database, limit=5).done == 5
    newer = SmallEngine()
    newer.info = replace(INFO, versions={"rococap": "1"})
    assert run_worker(database, newer, limit=5).done == 5
    assert run_worker(database, limit=2, batch_size=1).done == 2
    passed = {"run": "default", "way": "decode auto, batch size auto", "passed": True, "pictures": 4}
    passed |= {"equal_in_batch": 2, "compared": 2, "reason": ""}
    other_way = passed | {"way": "decode auto, batch size 1"}
    assert [worker.self_check for worker in workers(database)] == [passed, None, passed, other_way]


def test_a_worker_whose_self_check_takes_longer_than_its_lease_time_is_not_lost(database, tmp_path):
    fill(database, tmp_path / "set", 20)
    states = []

    class Slow(SmallEngine):
        def run(self, source):
            if not states:
                time.sleep(3)
                until(lambda: workers(database)[0].state == "running", "a heartbeat")
                states.append("running")
            yield from super().run(source)

    assert run_worker(database, Slow(), lease_ttl=2.0, limit=1).done == 1
    assert states == ["running"]


@pytest.mark.every_database
def test_one_string_for_all_pictures_stops_the_worker_before_its_first_claim(database, tmp_path):
    fill(database, tmp_path / "set", 20)
    reason = (
        "12 pictures were all captioned 'A chest X-ray.': the model does not look at them. Check that --model names a "
        "vision-language model with its own processor and chat template."
    )
    assert refusal(database, OneForAll()) == reason
    (worker,) = workers(database)
    assert (worker.state, worker.self_check["passed"], worker.self_check["reason"]) == ("stopped", False, reason)
    with db.transaction(database) as conn:
        assert queue.get_run(conn, "default").resolved is None, "an engine that errs pins nothing"
    assert refusal(database, OneForAll()) == reason, "the next worker will repeat it"
    assert run_worker(database, OneForAll(), self_check=False).done == 20


def test_pictures_that_look_alike_are_asked_for_others_before_the_model_is_blamed(database, tmp_path):
    write_shard(tmp_path / "set", "train", range(20), pictures={n: picture(0) for n in range(4)})
    enqueue(
        database, locate(str(tmp_path / "set"), ["train"]), ["train"], run="default", recipe=Recipe(model="tests/small")
    )
    engine = SmallEngine()
    engine.info = replace(INFO, dtype="float32")
    assert run_worker(database, engine).done == 20


def test_logits_that_are_not_finite_stop_the_worker(database, tmp_path):
    fill(database, tmp_path / "set", 20)
    assert refusal(database, Overflowing()) == "The model's output is not finite in float16."


def test_captions_that_are_others_in_a_batch_stop_the_worker(database, tmp_path):
    fill(database, tmp_path / "set", 20)
    swapped = SwappedInBatches()
    swapped.info = replace(INFO, dtype="float32")
    assert refusal(database, swapped) == (
        "a picture is captioned '28 by 28, grey 0' alone and '31 by 31, grey 3' in a batch. Start the "
        "worker with --batch-size 1."
    )


def test_where_rounding_may_change_words_a_batch_need_only_be_alike(database, tmp_path):
    fill(database, tmp_path / "set", 20)
    assert run_worker(database, SwappedInBatches()).done == 20
    assert workers(database)[0].self_check["equal_in_batch"] == 0


def test_too_few_pictures_prove_nothing_and_stop_nobody(database, tmp_path):
    fill(database, tmp_path / "set", 1)
    assert run_worker(database, OneForAll()).done == 1
    assert workers(database)[0].self_check["reason"] == "too few pictures to compare."


def test_unreadable_pictures_are_no_fault_of_the_engine(database, tmp_path):
    write_shard(tmp_path / "set", "train", range(6), pictures=dict.fromkeys(range(5), b"no picture"))
    located = locate(str(tmp_path / "set"), ["train"])
    enqueue(database, located, ["train"], run="default", recipe=Recipe(model="tests/small"))
    outcome = run_worker(database)
    assert (outcome.done, outcome.failed) == (1, 5)


# --- pictures that are refused, few, or of one scene -------------------------------------------------------------


class Refusing(SmallEngine):
    """Takes pictures and captions none of them."""

    failure = Failure("unprocessable", "The small engine is blind.")

    def run(self, source: Source) -> Iterator[Completion]:
        for one in super().run(source):
            yield Completion(one.job_id, failure=self.failure)


class Busy(Refusing):
    """In the check; else it would be asked again for ever."""

    failure = Failure("busy", "Come back later.", transient=True)

    def run(self, source: Source) -> Iterator[Completion]:
        yield from super().run(source) if isinstance(source, Memory) else SmallEngine.run(self, source)


def scene(number: int) -> bytes:
    """Another file for each number, of which the small engine says the same."""
    image = Image.new("L", (40, 40), 7)
    image.putpixel((39, 39), number)
    return _png(image)


def fill_with(database: Engine, root: Path, n: int, pictures: dict[int, bytes]) -> None:
    write_shard(root, "train", range(n), pictures=pictures)
    register(database, root, ["train"])


@pytest.mark.parametrize("n", [1, 3, 20])
def test_a_model_that_refuses_every_picture_as_it_is_prepared_stops_the_worker(database, tmp_path, n):
    fill(database, tmp_path / "set", n)
    assert refusal(database, SmallEngine(unprepared=tuple(range(256)))) == (
        f"none of {min(n, 12)} pictures was captioned. The first: The small engine cannot take this picture."
    )


@pytest.mark.every_database
@pytest.mark.parametrize("n", [1, 3, 20])
def test_a_model_that_refuses_every_picture_as_it_runs_stops_the_worker(database, tmp_path, n):
    fill(database, tmp_path / "set", n)
    reason = f"none of {min(n, 12)} pictures was captioned. The first: The small engine is blind."
    assert refusal(database, Refusing()) == reason
    assert refusal(database, Refusing()) == reason, "the next worker will repeat it"
    told = workers(database)[0].self_check
    assert (told["passed"], told["reason"]) == (False, reason)
    assert "inconclusive" not in told


def test_the_first_pictures_may_be_refused_if_others_of_the_run_are_captioned(database, tmp_path):
    fill(database, tmp_path / "set", 100)
    outcome = run_worker(database, SmallEngine(unprepared=tuple(range(20))))
    assert (outcome.done, outcome.failed) == (80, 20)
    told = workers(database)[0].self_check
    assert (told["passed"], told["pictures"], told["compared"]) == (True, 6, 2)  # of the eight others, two are refused


def test_a_data_set_of_which_no_picture_can_be_read_stops_the_worker(database, tmp_path):
    fill(database, tmp_path / "set", 20)
    write_shard(tmp_path / "set", "train", range(20), pictures=dict.fromkeys(range(20), b"no picture"))
    reason = refusal(database, SmallEngine())
    assert reason.startswith("none of 12 pictures was captioned. The first: This is not a picture")


def test_a_few_pictures_that_cannot_be_read_fail_as_the_worker_comes_to_them(database, tmp_path):
    fill(database, tmp_path / "set", 3)
    write_shard(tmp_path / "set", "train", range(3), pictures=dict.fromkeys(range(3), b"no picture"))
    assert run_worker(database).failed == 3
    told = workers(database)[0].self_check
    assert (told["passed"], told["inconclusive"]) == (False, True)
    assert told["reason"].startswith("too few pictures to compare. This is not a picture")


def test_what_may_pass_is_no_refusal(database, tmp_path):
    fill(database, tmp_path / "set", 20)
    assert run_worker(database, Busy()).done == 20
    told = workers(database)[0].self_check
    assert (told["passed"], told["inconclusive"], told["reason"]) == (False, True, "too few pictures to compare.")


@pytest.mark.parametrize("n", [2, 3])
def test_one_caption_for_less_than_four_pictures_proves_nothing_and_is_no_pass(database, tmp_path, caplog, n):
    fill(database, tmp_path / "set", n)
    assert run_worker(database, OneForAll(), limit=1).done == 1
    reason = f"too few pictures to compare: {n} were captioned, all 'A chest X-ray.'."
    assert f"the self-check is inconclusive, and the next worker will repeat it: {reason}" in caplog.text
    assert run_worker(database, OneForAll()).done == n - 1
    for told in (worker.self_check for worker in workers(database)):
        assert (told["passed"], told["inconclusive"], told["reason"]) == (False, True, reason)


def test_one_caption_for_four_pictures_stops_the_worker(database, tmp_path):
    fill(database, tmp_path / "set", 4)
    assert refusal(database, OneForAll()).startswith("4 pictures were all captioned 'A chest X-ray.': the model does")


def test_copies_of_one_picture_prove_nothing(database, tmp_path):
    fill_with(database, tmp_path / "set", 20, dict.fromkeys(range(20), picture(1)))
    assert run_worker(database).done == 20
    assert workers(database)[0].self_check["inconclusive"]


@pytest.mark.parametrize("n", [14, 100, 400])
def test_pictures_of_one_scene_are_asked_for_others_from_all_over_the_run(database, tmp_path, n):
    fill_with(database, tmp_path / "set", n, {number: scene(number) for number in range(n - 2)})
    assert run_worker(database, limit=1).done == 1
    told = workers(database)[0].self_check
    assert (told["passed"], told["pictures"]) == (True, 12)


def test_other_pictures_come_from_every_split_from_its_beginning_to_its_end(database, tmp_path):
    write_shard(tmp_path / "set", "train", range(100))
    write_shard(tmp_path / "set", "test", range(100, 200))
    register(database, tmp_path / "set", ["train", "test"])
    with db.transaction(database) as conn:
        run = queue.get_run(conn, "default")
        chosen = [place.image_id for place in selfcheck.pictures(conn, run, ["train", "validation", "test"])]
        alone = [place.image_id for place in selfcheck.pictures(conn, run, ["test"])]
        assert selfcheck.pictures(conn, run, ["validation"]) == []
    assert chosen == [f"train_{n:05}" for n in (0, 1, 2, 3, 4, 35, 67, 99)] + [
        f"test_{n:05}" for n in (100, 133, 166, 199)
    ]
    assert alone == [f"test_{n:05}" for n in (100, 101, 102, 103, 104, 117, 131, 144, 158, 171, 185, 199)]


@pytest.mark.parametrize("n", [1, 4, 5, 9, 12])
def test_a_small_run_is_looked_at_as_a_whole_and_nothing_twice(database, tmp_path, n):
    fill(database, tmp_path / "set", n)
    with db.transaction(database) as conn:
        chosen = selfcheck.pictures(conn, queue.get_run(conn, "default"), ["train"])
    assert sorted(place.image_id for place in chosen) == [f"train_{number:05}" for number in range(n)]


def test_what_earlier_releases_stored_is_understood():
    told = '{"run": "a", "way": "b", "passed": false, "pictures": 1, "equal_in_batch": 0, "compared": 0, "reason": "c"}'
    check = SelfCheck.from_json(told)
    assert (check.passed, check.inconclusive, check.reason) == (False, False, "c")
    assert check.to_json() == told
    for later in (replace(check, inconclusive=True), selfcheck.under_way("a", "b")):
        assert SelfCheck.from_json(later.to_json()) == later


SCRIPT = """
import sys; sys.path.insert(0, sys.argv[2])
from rococap import db
from rococap.worker.process import work
from rococap.worker.settings import Settings
from small_engine import SmallEngine
work(db.connect(sys.argv[1]), Settings(), load=lambda *_: SmallEngine(kills_on=(2,)))
"""


def test_a_picture_that_kills_the_worker_in_its_self_check_does_so_once(database, url, tmp_path):
    fill(database, tmp_path / "set", 12)
    command = [sys.executable, "-c", SCRIPT, url, str(TESTS)]
    died = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert died.returncode == -9
    assert workers(database)[0].self_check["reason"] == "under way"
    with db.transaction(database) as conn:
        assert db.execute(conn, "SELECT count(*) FROM leases").scalar_one() == 0
    assert run_worker(database).done == 12
    assert workers(database)[1].self_check is None


def set_pid(database: Engine, pid: int) -> None:
    """Says of the only worker, which died in its self-check, that this was its id."""
    with db.transaction(database, write=True) as conn:
        db.execute(conn, "UPDATE workers SET pid = ?", (pid,))


@pytest.mark.every_database
def test_a_self_check_that_killed_a_process_is_not_done_again_by_another_of_its_id(database, url, tmp_path):
    fill(database, tmp_path / "set", 12)
    command = [sys.executable, "-c", SCRIPT, url, str(TESTS)]
    subprocess.run(command, capture_output=True, timeout=60)
    set_pid(database, os.getpid())  # as in a container, where it is 1 each time
    assert run_worker(database, limit=4).done == 4
    assert workers(database)[1].self_check is None


def test_a_self_check_that_killed_a_process_is_not_taken_for_that_of_a_later_one(database, url, tmp_path):
    fill(database, tmp_path / "set", 12)
    command = [sys.executable, "-c", SCRIPT, url, str(TESTS)]
    subprocess.run(command, capture_output=True, timeout=60)
    with subprocess.Popen(["sleep", "60"]) as later:
        set_pid(database, later.pid)
        assert run_worker(database, limit=4).done == 4
        later.kill()
    assert workers(database)[1].self_check is None


def test_a_self_check_of_a_process_that_still_runs_is_done_again_by_the_next(database, tmp_path):
    fill(database, tmp_path / "set", 12)
    script = SCRIPT.replace("kills_on=(2,)", "steps=1000, step_sec=0.05")
    command = [sys.executable, "-c", script, str(database.url), str(TESTS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        until(lambda: workers(database), "it has begun")
        assert run_worker(database, limit=4).done == 4
        process.kill()
    assert workers(database)[1].self_check["passed"]


@pytest.mark.parametrize("pid", [pytest.param(os.getpid(), id="own"), 1 << 22])
def test_what_earlier_releases_stored_of_a_check_under_way_counts_by_its_process_id(pid):
    earlier = replace(selfcheck.under_way("a", "b"), process_started=None)
    assert "process_started" not in earlier.to_json()
    assert selfcheck.was_survived(earlier, pid) == (pid == os.getpid())


UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]


def may_unshare() -> bool:
    return bool(shutil.which("unshare")) and not subprocess.run([*UNSHARE, "true"], capture_output=True).returncode


@pytest.mark.skipif(not may_unshare(), reason="needs the right to make PID namespaces")
def test_a_container_that_a_picture_kills_in_its_self_check_gets_past_it_when_it_is_started_again(
    database, url, tmp_path
):
    fill(database, tmp_path / "set", 12)
    # A shell is process 1 there, which no signal from within could kill, and the worker is 2 each time.
    command = [
        *UNSHARE,
        "sh",
        "-c",
        '"$@"; exit $?',
        "sh",
        sys.executable,
        "-c",
        SCRIPT,
        url,
        str(TESTS),
    ]
    for _ in range(2):
        assert subprocess.run(command, capture_output=True, timeout=60).returncode == 128 + signal.SIGKILL
    with db.transaction(database) as conn:
        rows = db.execute(conn, "SELECT pid, self_check FROM workers ORDER BY id").fetchall()
    assert rows[0][0] == rows[1][0]
    assert (json.loads(rows[0][1])["reason"], rows[1][1]) == ("under way", None)


def test_a_worker_asked_to_stop_in_its_self_check_claims_nothing(database, tmp_path):
    fill(database, tmp_path / "set", 12)
    script = SCRIPT.replace("kills_on=(2,)", "steps=1000, step_sec=0.05")
    command = [sys.executable, "-c", script, str(database.url), str(TESTS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: workers(database), "it has begun")
        process.terminate()
        assert process.wait(timeout=60) == 0
    (worker,) = workers(database)
    assert (worker.state, worker.self_check) == ("stopped", None)
    with db.transaction(database) as conn:
        assert db.execute(conn, "SELECT count(*) FROM leases").scalar_one() == 0


# --- with a real model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantoms")
    write_dataset(root, {"train": 12})
    return root


def check(phantoms, database, engine, **recipe) -> SelfCheck:
    enqueue(database, locate(str(phantoms), ["train"]), ["train"], run="default", recipe=DEMO)
    with db.transaction(database) as conn:
        places = dry_run.places(conn, queue.get_run(conn, "default"), "train", selfcheck.MAX_PICTURES)
    return selfcheck.check(engine, replace(DEMO, **recipe), "default", "as usual", phantoms, places)


@pytest.fixture
def demo():
    engine = TransformersEngine(DEMO, Options(device="cpu", batch_size=8))
    engine.load()
    yield engine
    engine.close()


def test_the_demonstration_model_passes(phantoms, database, demo):
    assert check(phantoms, database, demo) == SelfCheck("default", "as usual", True, 4, 2, 2)


def test_padding_on_the_wrong_side_is_noticed(phantoms, database, demo, monkeypatch):
    def pad_right(tensor, width, fill=0):
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]), value=fill)

    monkeypatch.setattr("rococap.engines.decoding.pad_left", pad_right)  # of the prompts
    monkeypatch.setattr("rococap.engines.precompute.pad_left", pad_right)  # of their positions
    checked = check(phantoms, database, demo)
    assert not checked.passed
    assert checked.reason.startswith("a picture is captioned '")
    assert checked.reason.endswith("Start the worker with --batch-size 1, or with --decode static.")


def test_a_model_without_its_vision_is_noticed(tmp_path, database, demo):
    square = {n: _png(draw(n).image.resize((112, 112))) for n in range(12)}
    write_shard(tmp_path / "set", "train", range(12), pictures=square)
    assert check(tmp_path / "set", database, demo).passed
    with torch.no_grad():
        demo.loaded.model.model.visual.merger.mlp[2].weight.zero_()
    checked = check(tmp_path / "set", database, demo)
    assert (checked.passed, checked.pictures) == (False, 12)
    assert checked.reason.startswith("12 pictures were all captioned '")


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_pictures_of_one_scene_do_not_prove_that_the_model_is_blind(tmp_path, database, demo):
    """Every one is another file with other pixels, and all get one caption."""
    scene = np.asarray(draw(1).image.convert("L"))
    shades = {n: _png(Image.fromarray(np.maximum(scene, n).astype(np.uint8))) for n in range(12)}
    write_shard(tmp_path / "set", "train", range(12), pictures=shades)
    register(database, tmp_path / "set", ["train"], recipe=DEMO)
    with db.transaction(database) as conn:
        places = selfcheck.pictures(conn, queue.get_run(conn, "default"), ["train"])
    said = dry_run.prepare(demo, tmp_path / "set", places, 1)
    assert len({one.text for one in from_memory(demo, said.prepared)[1]}) == 1
    checked = selfcheck.check(demo, DEMO, "default", "as usual", tmp_path / "set", places)
    assert (checked.passed, checked.pictures, checked.compared) == (True, 12, 2)


def test_weights_that_overflow_are_noticed(phantoms, database, demo):
    with torch.no_grad():
        demo.loaded.model.get_input_embeddings().weight[5] = float("nan")
    assert check(phantoms, database, demo).reason == (
        "The model's output is not finite in float32: its weights are damaged."
    )
