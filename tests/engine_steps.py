"""Steps of the tests of the transformers engine: real and drawn pictures, and what is said of them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from rococap.demo import MODEL
from rococap.demo.phantoms import HELD_OUT_SEEDS, draw
from rococap.engines import Completion, Options, Prepared, load_engine
from rococap.engines.decoding import Row
from rococap.engines.hf import TransformersEngine
from rococap.errors import ModelError
from rococap.recipe import Recipe

PHANTOMS = [draw(seed) for seed in HELD_OUT_SEEDS["validation"][:12]]


def mixed_pictures() -> list[Image.Image]:
    sizes = [(112, 112), (300, 60), (64, 200), (30, 30), (250, 250), (90, 140)]
    resized = [p.image.convert("RGB").resize(size) for p, size in zip(PHANTOMS, sizes, strict=False)]
    return resized + [phantom.image.convert("RGB") for phantom in PHANTOMS[6:]]


class Pictures:
    """A Source over pictures that are there from the start."""

    def __init__(self, engine: TransformersEngine, images: Sequence[Image.Image]) -> None:
        self.prepared = [engine.prepare(job_id, image) for job_id, image in enumerate(images)]
        self.steps = self.rows = 0
        self.lost: set[int] = set()

    def take(self, most: int, wait: float | None) -> list[Prepared]:
        taken, self.prepared = self.prepared[:most], self.prepared[most:]
        return taken

    def step(self, rows: int) -> set[int]:
        self.steps += 1
        self.rows += rows
        return self.lost


def loaded(model: Path = MODEL, options: Options | None = None, **recipe: object) -> TransformersEngine:
    engine = TransformersEngine(
        Recipe(**{"model": str(model), "dtype": "float32", "max_new_tokens": 64} | recipe),
        options or Options(device="cpu"),
    )
    engine.load()
    return engine


def row(picture: Prepared) -> Row:
    """The picture in progress, before its first token."""
    return Row(picture, 0.0, [])


def captions(engine: TransformersEngine, images: Sequence[Image.Image], batch_size: int = 16) -> list[Completion]:
    engine.decoder.limit = batch_size
    return sorted(engine.run(Pictures(engine, images)), key=lambda completion: completion.job_id)


def texts(completions: Sequence[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def error_of(recipe: Recipe, device: str = "cpu") -> str:
    with pytest.raises(ModelError) as error:
        load_engine(recipe, Options(device=device)).load()
    return str(error.value)


def one_by_one(folder: Path, engine: TransformersEngine, images: list[Image.Image]) -> list[str]:
    """What the stock classes say, without anything of ours but the prompt and the processor's settings."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for image in images:
        inputs = engine.processor(text=[engine.prompt], images=[image], return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        found.append(engine.processor.tokenizer.decode(new, skip_special_tokens=True))
    return found
