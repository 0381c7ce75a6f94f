"""The demo of fine-tuning: teaches the demonstration model kinds of phantom that it has never seen, and shows what it
gained and what it lost.

It uses the functions behind `rococap enqueue`, `worker`, `finetune` and `report`. Half of the training pictures are of
the old kinds, against forgetting. No picture that the model is evaluated on is trained on.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from sqlalchemy import Engine as Database

from rococap import db, queue
from rococap.data import datasets
from rococap.demo import check_folder, check_same, recipe, run_workers
from rococap.demo.phantoms import write_dataset
from rococap.demo.unseen import NEW, OLD, mixed
from rococap.errors import RococapError
from rococap.progress import Progress
from rococap.queue.enqueue import enqueue, enqueue_from
from rococap.scores.evaluate import Scored, evaluate
from rococap.training.settings import Method, Settings

BASE = "default"
SPLITS = ("train", "test")
FOLDER = "finetune"
IMAGES = 4000
SETTINGS: Mapping[Method, Mapping[str, Any]] = {
    "full": {"lr": 2e-3, "warmup": 0.1},
    "lora": {"lr": 5e-3, "warmup": 0.1, "rank": 32, "alpha": 64, "dropout": 0.0},
}
NOTE = (
    "Drawings made by a program, captioned by a small demonstration model before and after fine-tuning. Pictures whose "
    f"ids begin with {NEW} are of kinds that it had never seen before; those with {OLD} are of the kinds that it knew."
)


@dataclass(frozen=True, slots=True)
class Exact:
    """How many of the held-out pictures of one kind have a caption that equals the original, before and after."""

    pictures: int
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Tuned:
    """What fine-tuning changed. `run` is the run of the tuned model, `output` the folder of its weights."""

    run: str
    steps: int
    trained_on: int
    new: Exact
    old: Exact
    output: Path
    report: Path


def settings(method: Method, steps: int, seed: int) -> Settings:
    """The vision tower is trained too, because the new kinds look like nothing that it has seen."""
    return Settings(
        method=method, target="language+vision", max_steps=steps, batch_size=32, seed=seed, **SETTINGS[method]
    )


def run(
    folder: Path, n_images: int, n_workers: int, method: Method, steps: int, seed: int, progress: Progress
) -> Tuned:
    """Draws `n_images` phantoms into `folder`, a quarter of them held out; captions these, fine-tunes on the others,
    captions the former again with the tuned model, and writes a report. Run again after an interruption, it continues;
    with another method, number of steps or seed, it adds a run.

    Raises RococapError as the demo does, and if it is interrupted while it trains.
    """
    counts = _counts(n_images)
    folder.mkdir(parents=True, exist_ok=True)
    url = str(folder.resolve() / "rococap.db")
    check_folder(folder, Path(url))
    database = db.connect(url)  # created before the phantoms, so that an interrupted demo is recognised by it
    if not (check_same(database, folder, counts) and (folder / "dataset").is_dir()):
        write_dataset(folder / "dataset", counts, drawn=mixed, progress=progress)
        _check_apart(folder / "dataset")
    enqueue(database, datasets.locate(str(folder / "dataset"), SPLITS), SPLITS, run=BASE, recipe=recipe())
    run_workers(database, folder, BASE, ["test"], n_workers, progress)
    name = f"{method}-{steps}-{seed}"
    output = folder.resolve() / name  # runs keep whole paths
    trained_on = _train(database, output, settings(method, steps, seed), progress)
    with db.transaction(database) as conn:
        base = queue.get_run(conn, BASE)
    tuned = replace(base.recipe, adapter=str(output)) if method == "lora" else replace(base.recipe, model=str(output))
    enqueue_from(database, base, ["test"], run=name, recipe=tuned)
    run_workers(database, folder, name, ["test"], n_workers, progress)
    return _compare(database, folder, name, steps, trained_on, progress)


def _counts(n_images: int) -> Mapping[str, int]:
    held_out = max(2, n_images // 4)
    return {"train": max(2, n_images - held_out), "test": held_out}


def _check_apart(dataset: Path) -> None:
    """Raises RococapError if a picture of one split is in another as well."""
    pictures = {split: _contents(dataset, split) for split in SPLITS}
    if both := pictures["train"] & pictures["test"]:
        raise RococapError(f"{len(both)} pictures of {dataset} are both trained on and held out: delete that folder.")


def _contents(dataset: Path, split: str) -> set[bytes]:
    shards = dataset.glob(f"data/{split}-*.parquet")
    return {row["bytes"] for shard in shards for row in pq.read_table(shard, columns=["image"])["image"].to_pylist()}


def _train(database: Database, output: Path, settings: Settings, progress: Progress) -> int:
    """Returns the number of pictures that were learned from."""
    from rococap.scores.concepts import modality
    from rococap.training.examples import Selection
    from rococap.training.log import Progress as Step
    from rococap.training.train import Job, finetune

    def report(step: Step) -> None:
        progress("fine-tuning", step.step, step.steps)

    progress("loading the model to train", 0, 1)
    with db.transaction(database) as conn:
        base = queue.get_run(conn, BASE)
    outcome = finetune(Job(database, base, base.recipe, Selection("train"), settings, output), modality, report)
    if not outcome.is_finished:
        raise RococapError(
            f"Training stopped after step {outcome.steps} of {outcome.total}, which is saved. To continue, run the "
            "same command again."
        )
    return outcome.examples


def _compare(database: Database, folder: Path, name: str, steps: int, trained_on: int, progress: Progress) -> Tuned:
    from rococap.scores.report import report

    progress("writing the report", 0, 1)
    evaluated = evaluate(database, [BASE, name], ["test"])
    reported = report(database, [BASE, name], "test", folder / f"{name}.html", note=NOTE)
    progress("writing the report", 1, 1)
    before, after = evaluated.scored
    new, old = (Exact(_count(before, kinds), _equal(before, kinds), _equal(after, kinds)) for kinds in (NEW, OLD))
    return Tuned(name, steps, trained_on, new, old, folder / name, reported.path)


def _count(scored: Scored, kinds: str) -> int:
    return sum(pair.image_id.startswith(kinds) for pair in scored.pairs)


def _equal(scored: Scored, kinds: str) -> int:
    return sum(pair.text == pair.reference for pair in scored.pairs if pair.image_id.startswith(kinds))
