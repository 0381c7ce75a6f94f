"""What a worker makes sure of before its first claim, with the real demonstration model and with engines that err."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from PIL import Image
from samples import fill, picture, write_shard
from small_engine import INFO, SmallEngine
from sqlalchemy import Engine

from rococap import db, queue, selfcheck, trial
from rococap.datasets import locate
from rococap.demo import MODEL
from rococap.demo.phantoms import draw, write_dataset
from rococap.engines import Completion, Failure, Options, Source
from rococap.engines.hf import TransformersEngine
from rococap.enqueue import enqueue
from rococap.errors import ModelError
from rococap.recipe import Recipe
from rococap.selfcheck import SelfCheck
from rococap.trial import Memory
from rococap.worker import Outcome, Settings, work

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
    return work(database, Settings(**settings), load=lambda *_: engine or SmallEngine())


def refusal(database: Engine, engine: SmallEngine, **settings) -> str:
    with pytest.raises(ModelError) as caught:
        run_worker(database, engine, **settings)
    with db.transaction(database) as conn:
        assert db.execute(conn, "SELECT count(*) FROM leases").scalar_one() == 0
    told = str(caught.value).removeprefix("The self-check failed, and nothing was claimed: ")
    return told.removesuffix(" To go on all the same: --no-self-check")


def workers(database: Engine) -> list[queue.WorkerSeen]:
    with db.transaction(database) as conn:
        return queue.list_workers(conn, lost_after_ms=60_000, everyone=True)


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
    assert refusal(database, OneForAll()) == reason, "the next worker looks again"
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
        "a picture is captioned '28 by 28, grey 0' alone and '31 by 31, grey 3' in a batch. Start it with "
        "--batch-size 1."
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


def test_a_recipe_that_samples_is_not_compared(database, tmp_path):
    fill(database, tmp_path / "set", 8, recipe=Recipe(model="tests/small", do_sample=True, temperature=0.7))
    swapped = SwappedInBatches()
    swapped.info = replace(INFO, dtype="float32")
    assert run_worker(database, swapped).done == 8


SCRIPT = """
import sys; sys.path.insert(0, sys.argv[2])
from rococap import db
from rococap.worker import Settings, work
from small_engine import SmallEngine
work(db.connect(sys.argv[1]), Settings(), load=lambda *_: SmallEngine(kills_on=(2,)))
"""


def test_a_picture_that_kills_the_worker_in_its_self_check_does_so_once(database, url, tmp_path):
    fill(database, tmp_path / "set", 12)
    command = [sys.executable, "-c", SCRIPT, url, os.path.dirname(__file__)]
    died = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert died.returncode == -9
    assert workers(database)[0].self_check["reason"] == "under way"
    with db.transaction(database) as conn:
        assert db.execute(conn, "SELECT count(*) FROM leases").scalar_one() == 0
    assert run_worker(database).done == 12
    assert workers(database)[1].self_check is None


def test_a_worker_asked_to_stop_in_its_self_check_claims_nothing(database, tmp_path):
    fill(database, tmp_path / "set", 12)
    script = SCRIPT.replace("kills_on=(2,)", "steps=1000, step_sec=0.05")
    command = [sys.executable, "-c", script, str(database.url), os.path.dirname(__file__)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not workers(database):
            pass
        process.terminate()
        assert process.wait(timeout=30) == 0
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
        places = trial.places(conn, queue.get_run(conn, "default"), "train", selfcheck.MOST)
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
    def pad_right(tensor, prompt_shape, width, fill):
        gap = (0, width - tensor.shape[1])
        return torch.nn.functional.pad(tensor, gap, value=fill) if tensor.shape == prompt_shape else tensor

    monkeypatch.setattr("rococap.engines.decoding._pad_left", pad_right)
    checked = check(phantoms, database, demo)
    assert not checked.passed
    assert checked.reason.startswith("a picture is captioned '")
    assert checked.reason.endswith("Start it with --batch-size 1, or with --decode static.")


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


def test_weights_that_overflow_are_noticed(phantoms, database, demo):
    with torch.no_grad():
        demo.loaded.model.get_input_embeddings().weight[5] = float("nan")
    assert check(phantoms, database, demo).reason == (
        "The model's output is not finite in float32: its weights are damaged."
    )
