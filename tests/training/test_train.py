"""Training the demonstration model for a few steps: what is done, what goes wrong, and what comes out."""

import json
import math
import resource
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from samples import picture, register, write_shard
from small_engine import SmallEngine
from steps import captions, run_worker
from training_steps import RECIPE, adapter, are_equal, job, ready, settings, train

from rococap.errors import DatasetError, ModelError, RococapError, RunError
from rococap.results.manifest import TRAINING
from rococap.scores.concepts import modality
from rococap.training import train as training
from rococap.training.checkpoints import Checkpoints
from rococap.training.examples import Selection, select
from rococap.training.trainer import Trainer


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [entry["loss"] for entry in logged(folder)]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "tuned"


# --- What is done ----------------------------------------------------------------------------------------------


def test_the_loss_falls_and_every_step_is_logged_and_drawn(engine, tmp_path, output):
    ready(engine, tmp_path)
    seen = []
    outcome = train(engine, output, seen.append, max_steps=12, dropout=0.0, lr=3e-3)
    assert (outcome.is_finished, outcome.steps, outcome.total, outcome.examples) == (True, 12, 12, 8)
    assert losses(output)[-1] < 0.8 * losses(output)[0]
    assert [entry["step"] for entry in logged(output)] == [progress.step for progress in seen] == list(range(1, 13))
    assert set(logged(output)[0]) == {"step", "loss", "lr", "seconds"}
    assert (output / "loss.png").stat().st_size > 5_000


def test_accumulation_does_not_change_the_loss(engine, tmp_path):
    """With captions of many lengths, over which the mean of batches would differ from that of tokens."""
    texts = {n: "Original caption" + " of a picture" * (n * n % 7) + f" {n}." for n in range(8)}
    write_shard(tmp_path, "train", range(8), captions=texts)
    register(engine, tmp_path, ["train"], recipe=RECIPE)
    found = {}
    for size, accumulate in ((8, 1), (2, 4), (1, 8)):
        folder = tmp_path / f"{size}"
        train(engine, folder, batch_size=size, accumulate=accumulate, max_steps=3, dropout=0.0)
        found[size] = losses(folder), adapter(folder)
    for size in (2, 1):
        assert found[size][0] == pytest.approx(found[8][0], rel=1e-5)
        for name, weight in found[size][1].items():
            torch.testing.assert_close(weight, found[8][1][name], rtol=1e-2, atol=2e-5)


def test_checkpointing_changes_no_loss(engine, tmp_path, output):
    ready(engine, tmp_path)
    common = {"max_steps": 3, "dropout": 0.0, "target": "language+vision"}
    train(engine, output, checkpointing=True, **common)
    train(engine, tmp_path / "plain", checkpointing=False, **common)
    assert losses(output) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_a_lora_is_trained_beside_weights_of_four_bits(engine, tmp_path, output):
    ready(engine, tmp_path)
    asked = job(engine, output, max_steps=2)
    training.finetune(replace(asked, recipe=replace(asked.recipe, load_in="4bit")), modality, lambda progress: None)
    learned = {name: weight for name, weight in adapter(output).items() if "lora_B" in name}
    assert len(learned) == 21
    assert all(weight.any() for weight in learned.values())


def test_batches_are_halved_if_memory_runs_out_and_make_the_same_step(engine, tmp_path, output, monkeypatch):
    ready(engine, tmp_path)
    plainly = tmp_path / "plain"
    train(engine, plainly, batch_size=None, max_steps=2, dropout=0.0)
    step = Trainer.training_step

    def within_memory(trainer, model, inputs, *rest):
        if len(inputs["image_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(trainer, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", within_memory)
    train(engine, output, batch_size=None, max_steps=2, dropout=0.0)
    assert losses(output) == pytest.approx(losses(plainly), rel=1e-5)
    with pytest.raises(ModelError, match=r"Out of memory at the first step.* --batch-size 1 --accumulate N"):
        train(engine, tmp_path / "fixed", batch_size=4, max_steps=2)


def test_with_early_stopping_the_best_of_the_evaluations_is_the_result(engine, tmp_path, output):
    write_shard(tmp_path, "train", range(6))
    write_shard(
        tmp_path, "validation", range(4), captions=dict.fromkeys(range(4), "Something else entirely, in Latin.")
    )
    register(engine, tmp_path, ["train", "validation"], recipe=RECIPE)
    outcome = train(
        engine, output, max_steps=40, lr=1e-2, eval_split="validation", eval_every=2, early_stopping=2, keep=1
    )
    evaluated = {entry["step"]: entry["eval_loss"] for entry in logged(output) if "eval_loss" in entry}
    best = min(evaluated, key=evaluated.get)
    assert outcome.is_finished
    assert outcome.steps < 40
    assert json.loads((output / TRAINING).read_text())["steps"] == best


# --- Which pictures --------------------------------------------------------------------------------------------


def test_pictures_are_chosen_by_modality_concept_and_limit(engine, tmp_path):
    cuis = {0: ["C0040405"], 1: ["C0041618"], 2: ["C0040405", "C0000726"], 3: ["C0040405"]}
    write_shard(tmp_path, "train", range(4), cuis=cuis, captions={3: " "})
    register(engine, tmp_path, ["train"], recipe=RECIPE)
    run = job(engine, tmp_path).run

    def chosen(**filters):
        found = select(engine, run, Selection("train", **filters), modality)
        return [int(example.place.image_id[-1]) for example in found]

    ct = modality(["C0040405"])
    assert chosen() == [0, 1, 2]
    assert chosen(modalities=(ct,)) == [0, 2]
    assert chosen(concepts=("C0000726", "C0041618")) == [1, 2]
    assert chosen(modalities=(ct,), limit=1) == [0]
    with pytest.raises(RococapError, match=rf"left by --modality and --concept.*{ct} \(2\)"):
        chosen(modalities=("mri",))


def test_another_runs_captions_can_be_learned_instead(engine, tmp_path):
    ready(engine, tmp_path)
    run_worker(engine, SmallEngine(), limit=3)
    run = job(engine, tmp_path).run
    found = select(engine, run, Selection("train", targets="default"), modality)
    assert {example.place.image_id: example.caption for example in found} == captions(engine)


def test_pictures_that_cannot_be_read_are_skipped_counted_and_listed(engine, tmp_path, output):
    broken = {1: b"no picture", 2: b"", 5: picture(5)[:60]}
    write_shard(tmp_path, "train", range(8), pictures=broken)
    register(engine, tmp_path, ["train"], recipe=RECIPE)
    outcome = train(engine, output, batch_size=1)
    listed = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
    codes = {entry["image_id"]: entry["code"] for entry in listed}
    assert codes.items() <= {"train_00001": "not_an_image", "train_00002": "empty", "train_00005": "truncated"}.items()
    assert len(codes) >= 2
    assert sum(outcome.skipped.values()) == len(listed)
    assert json.loads((output / TRAINING).read_text())["skipped"] == outcome.skipped
    assert all(math.isfinite(loss) for loss in losses(output))


def test_if_no_picture_can_be_read_it_says_why(engine, tmp_path, output):
    ready(engine, tmp_path, 3)
    write_shard(tmp_path, "train", range(3), pictures=dict.fromkeys(range(3), b"no picture"))
    with pytest.raises(DatasetError, match=r"None of the 3 pictures can be read: not_an_image \(3\)"):
        train(engine, output)


# --- What goes wrong -------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_and_names_the_step_and_its_pictures(engine, tmp_path, output, monkeypatch):
    ready(engine, tmp_path)
    step = Trainer.training_step

    def overflowing(trainer, model, inputs, *rest):
        if trainer.state.global_step == 2:
            inputs["pixel_values"] = inputs["pixel_values"] * math.nan
        return step(trainer, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", overflowing)
    with pytest.raises(ModelError, match=r"loss of step 3 is not finite; its pictures are train_0000\d, train_0000\d"):
        train(engine, output)
    assert len(losses(output)) == 2
    assert Checkpoints(output, 2).steps() == [2]


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(engine, tmp_path, output, monkeypatch):
    ready(engine, tmp_path)
    step = Trainer.training_step

    def overflowing(trainer, model, *rest):
        loss = step(trainer, model, *rest)
        if trainer.state.global_step == 2:
            next(weight for weight in model.parameters() if weight.requires_grad).grad.fill_(math.inf)
        return loss

    monkeypatch.setattr(Trainer, "training_step", overflowing)
    with pytest.raises(ModelError, match=r"gradient of step 3 is not finite; its pictures are train_\d+, train_\d+\."):
        train(engine, output)
    assert Checkpoints(output, 2).steps() == [2]


def test_without_captions_there_is_nothing_to_learn(engine, tmp_path, output):
    write_shard(tmp_path, "train", range(3), captions=dict.fromkeys(range(3), ""))
    register(engine, tmp_path, ["train"], recipe=RECIPE)
    with pytest.raises(DatasetError, match=r"nothing to learn.*--columns caption=NAME"):
        train(engine, output)


def test_a_split_that_is_not_enqueued_is_named(engine, tmp_path, output):
    ready(engine, tmp_path)
    with pytest.raises(RunError, match=r"has no pictures of test\. Register them"):
        training.finetune(job(engine, output, selection=Selection("test")), modality, print)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in": "4bit", "method": "full"}, "Quantised weights cannot be trained"),
        ({"adapter": "some/adapter"}, "captions with the adapter some/adapter"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(engine, tmp_path, output, changes, message):
    ready(engine, tmp_path)
    method = {"method": changes.pop("method", "lora")}
    asked = job(engine, output, **method)
    with pytest.raises(ModelError, match=message):
        training.finetune(replace(asked, recipe=replace(asked.recipe, **changes)), modality, print)
    assert not output.exists()


def test_settings_that_exclude_one_another_are_refused():
    for changes, message in (
        ({"batch_size": None, "accumulate": 2}, "--accumulate goes with a number"),
        ({"early_stopping": 1}, "--eval-split"),
        ({"method": "full", "target": "q_proj"}, "names of modules only with --method lora"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(**changes)


# --- The output folder -----------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_else_is_refused(engine, tmp_path, output):
    ready(engine, tmp_path)
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    with pytest.raises(RococapError, match="exists and holds no training"):
        train(engine, output)
    assert [path.name for path in output.iterdir()] == ["thesis.txt"]


def test_another_recipe_in_the_same_folder_is_refused_field_by_field(engine, tmp_path, output):
    ready(engine, tmp_path)
    train(engine, output, max_steps=2)
    with pytest.raises(RococapError, match=r"holds another training \(rank: 4, not 8; lr: 0.001, not 0.01\)"):
        train(engine, output, max_steps=2, rank=8, lr=1e-2)
    write_shard(tmp_path, "train", range(9))
    register(engine, tmp_path, ["train"], recipe=RECIPE)
    with pytest.raises(RococapError, match=r"pictures: 8, not 9; pictures_digest: "):
        train(engine, output, max_steps=2)


def test_a_folder_in_which_nothing_was_learned_yet_takes_other_options(engine, tmp_path, output, monkeypatch):
    ready(engine, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(training, "TransformersEngine", None)
        with pytest.raises(TypeError):
            train(engine, output, max_steps=2, rank=8)
    assert train(engine, output, max_steps=1).is_finished


def test_other_weights_under_the_same_name_are_refused(engine, tmp_path, output, monkeypatch):
    ready(engine, tmp_path)
    train(engine, output, lambda progress: progress.step == 1 and signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(training, "identity", lambda model, name: ("", "another"))
    with pytest.raises(RococapError, match=r"other weights under the same name \(base_digest: \w{64}, now another\)"):
        train(engine, output)


def test_a_finished_training_is_not_done_again(engine, tmp_path, output, monkeypatch):
    ready(engine, tmp_path)
    train(engine, output, max_steps=2)
    before = adapter(output)
    left = Checkpoints(output, 2).path(2)
    left.mkdir(parents=True)  # as after a kill right after the result was written
    monkeypatch.setattr(training, "TransformersEngine", None)  # it is not even loaded
    outcome = train(engine, output, max_steps=2)
    assert (outcome.is_finished, outcome.steps) == (True, 2)
    assert are_equal(adapter(output), before)
    assert not left.exists()


def test_only_the_newest_checkpoints_are_kept(engine, tmp_path, output, monkeypatch):
    ready(engine, tmp_path)
    kept = []
    prune = Checkpoints.prune
    monkeypatch.setattr(Checkpoints, "prune", lambda self, *rest: (prune(self, *rest), kept.append(self.steps())))
    train(engine, output, max_steps=4, save_every=1, keep=2)
    assert kept == [[1], [1, 2], [2, 3], [3, 4]]
    assert not (output / "checkpoints").exists()


@contextmanager
def largest_file(n_bytes):
    """No file of this process can grow beyond so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_good_checkpoint(engine, tmp_path, output, monkeypatch):
    ready(engine, tmp_path)
    undisturbed = tmp_path / "undisturbed"
    train(engine, undisturbed)
    save = Trainer._save_checkpoint

    def on_a_full_disk(trainer, *rest):
        if trainer.state.global_step == 4:
            with largest_file(2_000):
                return save(trainer, *rest)
        return save(trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", on_a_full_disk)
        with pytest.raises(RococapError, match=r"checkpoint of step 4 cannot be written .* the one of step 2 is whole"):
            train(engine, output)
    assert Checkpoints(output, 2).steps() == [2]
    assert not Checkpoints(output, 2).staging.exists()
    train(engine, output)
    assert are_equal(adapter(output), adapter(undisturbed))


def test_a_signal_saves_and_stops_and_the_same_command_continues(engine, tmp_path, output):
    ready(engine, tmp_path)
    undisturbed = tmp_path / "undisturbed"
    train(engine, undisturbed)

    def interrupt(progress):
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    before, threads = signal.getsignal(signal.SIGINT), set(threading.enumerate())
    outcome = train(engine, output, interrupt)
    assert (outcome.is_finished, outcome.steps, outcome.total) == (False, 3, 6)
    assert Checkpoints(output, 2).latest() == 3, "which is none of the steps that are saved anyway"
    assert not (output / TRAINING).exists()
    assert signal.getsignal(signal.SIGINT) is before
    outcome = train(engine, output)
    assert (outcome.is_finished, outcome.steps) == (True, 6)
    assert [entry["step"] for entry in logged(output)] == list(range(1, 7))
    assert are_equal(adapter(output), adapter(undisturbed))
    assert set(threading.enumerate()) <= threads, "of an earlier test, some may have ended"
