"""Steps of the tests of fine-tuning: small runs of the demonstration model on drawn pictures."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from samples import fill
from sqlalchemy import Engine

from rococap import db, queue
from rococap.demo import MODEL
from rococap.engines import Options
from rococap.engines.hf import TransformersEngine
from rococap.recipe import Recipe
from rococap.scores.concepts import modality
from rococap.training.examples import Selection
from rococap.training.log import Progress
from rococap.training.settings import Settings
from rococap.training.train import Job, Outcome, finetune

RECIPE = Recipe(model=str(MODEL), max_new_tokens=64, dtype="float32")
QUICK = {"max_steps": 6, "batch_size": 2, "save_every": 2, "lr": 1e-3, "rank": 4, "alpha": 8, "dropout": 0.1}
"""Settings of a training of a few seconds."""


def settings(**changes: Any) -> Settings:
    return Settings(**QUICK | changes)


def ready(database: Engine, root: Path, n: int = 8) -> queue.Run:
    """A run of the demonstration model with `n` pictures, none of them captioned."""
    return fill(database, root, n, recipe=RECIPE)


def job(database: Engine, output: Path, *, selection: Selection | None = None, **changes: Any) -> Job:
    with db.transaction(database) as conn:
        run = queue.find_run(conn, None)
    return Job(database, run, run.recipe, selection or Selection("train"), settings(**changes), output)


def train(
    database: Engine, output: Path, report: Callable[[Progress], None] = lambda progress: None, **changes: Any
) -> Outcome:
    return finetune(job(database, output, **changes), modality, report)


def train_at(url: str, output: str, changes: dict[str, Any]) -> Outcome:
    """Trains in a process of its own, which opens the database by its URL."""
    return train(db.connect(url), Path(output), **changes)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def are_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether the weights are equal bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def plain(model: Path = MODEL, **recipe: Any) -> tuple[TransformersEngine, Any]:
    """An engine and its model, as they are trained."""
    engine = TransformersEngine(Recipe(**{"model": str(model), "dtype": "float32"} | recipe), Options(device="cpu"))
    return engine, engine.load_plain()[0]
