"""Steps of the tests of the transformers engine: real and drawn pictures, and what is said of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from rococap.demo import MODEL
from rococap.demo.phantoms import HELD_OUT_SEEDS, draw
from rococap.engines import Completion, Message, Options, Prepared, Request, load_engine
from rococap.engines.decoding import Row
from rococap.engines.hf import TransformersEngine
from rococap.errors import ModelError
from rococap.recipe import Recipe

PHANTOMS = [draw(seed) for seed in HELD_OUT_SEEDS["validation"][:12]]


def mixed_pictures() -> list[Image.Image]:
    sizes = [(112, 112), (300, 60), (64, 200), (30, 30), (250, 250), (90, 140)]
    resized = [p.image.convert("RGB").resize(size) for p, size in zip(PHANTOMS, sizes, strict=False)]
    return resized + [phantom.image.convert("RGB") for phantom in PHANTOMS[6:]]


class Requests:
    """A Source over requests that are there from the start."""

    def __init__(self, engine: TransformersEngine, requests: Sequence[Request]) -> None:
        self.prepared = [engine.prepare(job_id, request) for job_id, request in enumerate(requests)]
        self.steps = self.rows = 0
        self.lost: set[int] = set()

    def take(self, most: int, wait: float | None) -> list[Prepared]:
        taken, self.prepared = self.prepared[:most], self.prepared[most:]
        return taken

    def step(self, rows: int) -> set[int]:
        self.steps += 1
        self.rows += rows
        return self.lost


class Pictures(Requests):
    """The same over pictures to caption."""

    def __init__(self, engine: TransformersEngine, images: Sequence[Image.Image]) -> None:
        super().__init__(engine, [Request([image]) for image in images])


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
    return answers(engine, [Request([image]) for image in images], batch_size)


def answers(engine: TransformersEngine, requests: Sequence[Request], batch_size: int = 16) -> list[Completion]:
    engine.decoder.limit = batch_size
    return sorted(engine.run(Requests(engine, requests)), key=lambda completion: completion.job_id)


def texts(completions: Sequence[Completion]) -> list[str]:
    return [completion.text for completion in completions]


def error_of(recipe: Recipe, device: str = "cpu") -> str:
    with pytest.raises(ModelError) as error:
        load_engine(recipe, Options(device=device)).load()
    return str(error.value)


@contextmanager
def memory_for(engine: TransformersEngine, rows: int = 1000, tokens: int = 100_000) -> Iterator[None]:
    """The real model on a device with room for so many rows at once, and prompts of so many tokens."""

    def refuse(module: object, args: object, inputs: dict[str, torch.Tensor]) -> None:
        n, width = inputs["input_ids"].shape
        if n > rows or width > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = engine.loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def stock_answers(folder: Path, engine: TransformersEngine, requests: Sequence[Request]) -> list[str]:
    """What the stock classes say, without anything of ours but the recipe's prompt and the processor's settings."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for request in requests:
        prompt = engine.prompt
        if request.messages is not None:
            prompt = engine.processor.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
        inputs = engine.processor(text=[prompt], images=[list(request.pictures)], return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        found.append(engine.processor.tokenizer.decode(new, skip_special_tokens=True))
    return found


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def message(role: str, *parts: dict[str, Any]) -> Message:
    return {"role": role, "content": list(parts)}
