"""Methods of captioning the same pictures with the same weights, each written as a typical user would write it."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria, StoppingCriteriaList, pipeline

from rococap import db, queue
from rococap.data.datasets import locate
from rococap.engines import Engine, Options, Prepared
from rococap.engines.decoding import Loaded, Row, collate
from rococap.engines.hf import TransformersEngine
from rococap.queue.enqueue import enqueue
from rococap.recipe import Recipe
from rococap.worker import selfcheck
from rococap.worker.benchmark import Ready
from rococap.worker.process import work
from rococap.worker.settings import Settings

SPREAD = 0.65
"""Standard deviation of the logarithm of forced lengths: with a mean of 33 tokens, one caption in a hundred is longer
than 120, as in ROCOv2.
"""


def uneven_lengths(n: int, mean: int, longest: int) -> list[int]:
    """Caption lengths in tokens with a lognormal distribution, like those of ROCOv2's captions in Qwen2's tokens."""
    rng, median = random.Random(0), mean / 2.718281828 ** (SPREAD**2 / 2)
    return [max(2, min(longest, round(median * rng.lognormvariate(0, SPREAD)))) for _ in range(n)]


# --- ours ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Forced(Loaded):
    """A model whose captions have forced lengths: that of job n, from 1, is the nth of `lengths`."""

    lengths: Sequence[int] = ()

    def is_over(self, row: Row) -> bool:
        return len(row.tokens) == self.lengths[(row.picture.job_id - 1) % len(self.lengths)]


def load(recipe: Recipe, options: Options, lengths: Sequence[int] | None = None) -> TransformersEngine:
    engine = TransformersEngine(recipe, options)
    engine.load()
    if lengths is not None:
        force(engine, lengths)
    return engine


def force(engine: TransformersEngine, lengths: Sequence[int]) -> None:
    """Makes a loaded engine's captions as long as this, from now on."""
    loaded = {field.name: getattr(engine.loaded, field.name) for field in fields(Loaded)}
    engine.loaded = engine.decoder.loaded = Forced(**loaded, lengths=lengths)


def whole_worker(engine: Engine, root: Path, folder: Path, recipe: Recipe) -> tuple[float, float]:
    """The seconds from the loaded model to the last stored caption, and the share of them in which the model worked."""
    database = db.connect(f"sqlite:///{folder / 'queue.db'}")
    enqueue(database, locate(str(root), ["train"]), ["train"], run="default", recipe=recipe)
    outcome = work(database, Settings(self_check=False), load=lambda *_: Ready(engine))
    assert not outcome.failed, outcome
    with db.transaction(database) as conn:
        model_ms = db.execute(conn, "SELECT sum(processing_ms) FROM captions").scalar_one()
    database.dispose()
    return outcome.seconds, model_ms / 1000 / outcome.seconds


def self_check(engine: Engine, root: Path, folder: Path, recipe: Recipe) -> float:
    """The seconds of a worker's self-check on the run that `whole_worker` captioned."""
    database = db.connect(f"sqlite:///{folder / 'queue.db'}")
    with db.transaction(database) as conn:
        places = selfcheck.pictures(conn, queue.get_run(conn, "default"), ["train"])
    database.dispose()
    started = time.perf_counter()
    checked = selfcheck.check(Ready(engine), recipe, "default", "as usual", root, places)
    assert checked.passed, checked.reason
    return time.perf_counter() - started


def resident(engine: Engine, root: Path, folder: Path, recipe: Recipe) -> list[tuple[int, float]]:
    """(captions stored so far, resident memory in MB) after each group of captions that a worker stored."""
    database = db.connect(f"sqlite:///{folder / 'queue.db'}")
    enqueue(database, locate(str(root), ["train"]), ["train"], run="default", recipe=recipe)
    process = psutil.Process()
    sizes: list[tuple[int, float]] = []
    work(
        database,
        Settings(self_check=False),
        report=lambda outcome, _: sizes.append((outcome.done, process.memory_info().rss / 1e6)),
        load=lambda *_: Ready(engine),
    )
    database.dispose()
    return sizes


# --- the others ------------------------------------------------------------------------------------------------


def pictures_of(root: Path) -> Iterator[Image.Image]:
    for path in sorted((root / "data").glob("train-*.parquet")):
        for row in pq.read_table(path, columns=["image"]).to_pylist():
            yield Image.open(BytesIO(row["image"]["bytes"])).convert("RGB")


@dataclass
class Stock:
    """The model and processor as users of transformers load them."""

    model: Any
    processor: Any
    question: str
    prompt: str
    max_new_tokens: int

    def generate(self, inputs: Any, lengths: Sequence[int] | None) -> torch.Tensor:
        """New tokens, shape (rows, longest). With forced lengths, each row ends at its own, and no token ends it
        earlier.
        """
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        width = inputs["input_ids"].shape[1]
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        if lengths is not None:
            settings |= {"max_new_tokens": max(lengths), "eos_token_id": None}
            settings["stopping_criteria"] = StoppingCriteriaList([Lengths(lengths, width, self.model.device)])
        with torch.inference_mode():
            return self.model.generate(**inputs, **settings)[:, width:]


class Lengths(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch at its forced length; `width` is the length of the prompt."""

    def __init__(self, lengths: Sequence[int], width: int, device: torch.device) -> None:
        self.lengths, self.width = torch.tensor(lengths, device=device), width

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return self.lengths <= input_ids.shape[1] - self.width


def stock(recipe: Recipe) -> Stock:
    dtype = getattr(torch, recipe.dtype)
    model = AutoModelForImageTextToText.from_pretrained(recipe.model, dtype=dtype).eval()
    processor = AutoProcessor.from_pretrained(recipe.model)
    processor.image_processor.size = {"shortest_edge": recipe.min_pixels, "longest_edge": recipe.max_pixels}
    processor.tokenizer.padding_side = "left"
    prompt = processor.apply_chat_template([_message(recipe.prompt)], tokenize=False, add_generation_prompt=True)
    return Stock(model, processor, recipe.prompt, prompt, recipe.max_new_tokens)


def _message(question: str, picture: Image.Image | None = None) -> dict[str, Any]:
    image = {"type": "image"} if picture is None else {"type": "image", "image": picture}
    return {"role": "user", "content": [image, {"type": "text", "text": question}]}


def old_script(model: Stock, root: Path, lengths: Sequence[int] | None) -> list[str]:
    """One picture at a time: read, prepare, generate, decode."""
    texts = []
    for number, picture in enumerate(pictures_of(root)):
        inputs = model.processor(text=[model.prompt], images=[picture], return_tensors="pt")
        tokens = model.generate(inputs, None if lengths is None else [lengths[number]])
        texts.append(model.processor.batch_decode(tokens, skip_special_tokens=True)[0])
    return texts


def static_batches(model: Stock, prepared: Sequence[Prepared], size: int, lengths: Sequence[int] | None) -> list[Any]:
    """`generate` on batches in the order of the pictures, which are prepared beforehand."""
    captions: list[Any] = []
    for start in range(0, len(prepared), size):
        batch = prepared[start : start + size]
        inputs = collate([picture.inputs.tensors for picture in batch], model.processor.tokenizer.pad_token_id)
        ends = None if lengths is None else lengths[start : start + size]
        tokens = model.generate(inputs, ends).tolist()
        captions += [row[:end] for row, end in zip(tokens, ends or [None] * len(tokens), strict=True)]
    return captions


def stock_pipeline(model: Stock, size: int, lengths: Sequence[int] | None) -> Callable[[Path], list[str]]:
    """transformers' own pipeline, with batches of this size."""
    pipe = pipeline("image-text-to-text", model=model.model, processor=model.processor)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": model.max_new_tokens}

    def run(root: Path) -> list[str]:
        if lengths is not None:
            ends = BatchLengths(lengths, size)
            more = {"stopping_criteria": StoppingCriteriaList([ends]), "eos_token_id": None}
            settings.update(more, max_new_tokens=max(lengths))
        chats = [[_message(model.question, picture)] for picture in pictures_of(root)]
        outputs = pipe(text=chats, batch_size=size, generate_kwargs=settings, return_full_text=False)
        return [output[0]["generated_text"] for output in outputs]

    return run


class BatchLengths(StoppingCriteria):  # type: ignore[misc]
    """`Lengths` for a pipeline, which does not show where in the list each batch begins. Batches come in order, and a
    width that does not continue the last one marks the next batch.
    """

    def __init__(self, lengths: Sequence[int], size: int) -> None:
        self.lengths, self.size = torch.tensor(lengths), size
        self.start, self.width, self.last_width = -size, 0, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.shape[1] != self.last_width + 1:  # the next batch
            self.start, self.width = self.start + self.size, input_ids.shape[1] - 1
        self.last_width = input_ids.shape[1]
        return self.lengths[self.start : self.start + input_ids.shape[0]] <= self.last_width - self.width
