"""The parts of `gpu.py` that take the engine apart: whether its captions are right, its steps, and how it reads
pictures.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from gpu_profile import kernels
from gpu_setting import Bench, Figures, plain_rotation, prefill_tflop, step_bytes
from torch import nn

from rococap.demo import MODEL
from rococap.demo import recipe as demo_recipe
from rococap.demo.phantoms import HELD_OUT_SEEDS, draw
from rococap.engines import Completion, Options, Prepared, Request, Source, continuous, decoding
from rococap.engines.continuous import ContinuousDecoder
from rococap.engines.decoding import Row
from rococap.engines.graphs import widths_up_to
from rococap.engines.hf import TransformersEngine
from rococap.engines.precompute import tower
from rococap.engines.sizing import choose_limit, longest
from rococap.recipe import Dtype, Recipe

TOP = 15
"""Kernels in a table."""
DEMO_CASES: tuple[tuple[str, Dtype, int, bool], ...] = (
    ("float32, graphs", "float32", 16, True),
    ("float32, no graphs", "float32", 16, False),
    ("float32, graphs, fewer rows", "float32", 5, True),
    ("bfloat16, graphs", "bfloat16", 16, True),
)
"""Name, dtype, rows, and whether graphs are used."""

# --- The demo model's captions ---------------------------------------------------------------------------------


def demo(bench: Bench) -> Iterator[Figures]:
    """The demo model on the device says what it says on the CPU, with graphs and without."""
    phantoms = [draw(seed) for seed in HELD_OUT_SEEDS["test"][: bench.scale.demo_pictures]]
    images = [phantom.image.convert("RGB") for phantom in phantoms]
    expected = _captions(images, Options(device="cpu", batch_size=16))
    right = sum(text == phantom.caption for text, phantom in zip(expected, phantoms, strict=True))
    yield {"case": "cpu", "pictures": len(images), "exact": right}
    for name, dtype, rows, graphs in DEMO_CASES:
        started = time.perf_counter()
        found = _captions(images, Options(device=str(bench.device), batch_size=rows, graphs=graphs), dtype)
        others = [pair for pair in zip(expected, found, strict=True) if pair[0] != pair[1]]
        yield {
            "case": name,
            "equal": len(images) - len(others),
            "of": len(images),
            "seconds": time.perf_counter() - started,
            "others": others[:3],
        }


def _captions(images: Sequence[Any], options: Options, dtype: Dtype = "float32") -> list[str]:
    recipe = demo_recipe()
    engine = TransformersEngine(Recipe(model=str(MODEL), max_new_tokens=recipe.max_new_tokens, dtype=dtype), options)
    with plain_rotation():
        engine.load()
        prepared = [engine.prepare(number, Request([image])) for number, image in enumerate(images)]
        found = {completion.job_id: _said(completion) for completion in engine.run(Given(prepared))}
        engine.close()
    return [found[number] for number in range(len(images))]


def _said(completion: Completion) -> str:
    return completion.text if completion.failure is None else f"({completion.failure.code})"


class Given(Source):
    """Pictures that are prepared already."""

    def __init__(self, prepared: Sequence[Prepared]) -> None:
        self._left = list(prepared)

    def take(self, limit: int, wait: float | None) -> list[Prepared]:
        taken, self._left = self._left[:limit], self._left[limit:]
        return taken

    def step(self, rows: int) -> set[int]:
        return set()


# --- A step ----------------------------------------------------------------------------------------------------


def steps(bench: Bench) -> Iterator[Figures]:
    """A decoding step, with the reading of its tokens, in the middle of captions of the usual length."""
    picture = bench.prepared(bench.scale.sides[0], 1)[0]
    with bench.no_graphs():
        _make_room(bench)
        yield from _steps(bench, picture, "eager")
        yield from _automatic(bench)
    if not bench.on_gpu:
        yield {"case": "graphs", "skipped": "there are none on a CPU"}
        return
    yield from _capture(bench)
    if bench.decoder._graphs:
        yield from _steps(bench, picture, "replayed")


def _steps(bench: Bench, picture: Prepared, mode: str) -> Iterator[Figures]:
    model = bench.engine.loaded.model
    tokens = picture.n_tokens + bench.scale.mean_length
    for rows in bench.rows:
        with _running(bench, picture, rows):
            first, second, *others = (1000 * bench.decoder._timed_step() for _ in range(2 + bench.scale.repeats))
        yield {
            "case": f"{mode}, {rows} at a time",
            "mode": mode,
            "rows": rows,
            "tokens": tokens,
            "read_gb": step_bytes(model, rows, tokens) / 1e9,
            "first_ms": first,
            "second_ms": second,
            "ms": median(others),
        }


def _capture(bench: Bench) -> Iterator[Figures]:
    """What graphs cost at the start of a worker."""
    before, started = torch.cuda.memory_reserved(bench.device), time.perf_counter()
    bench.use_graphs()
    yield {
        "case": "graphs",
        "n": len(bench.decoder._graphs._graphs),
        "seconds": time.perf_counter() - started,
        "buffers_and_graphs_gb": (torch.cuda.memory_reserved(bench.device) - before) / 1e9,
        "widths": widths_up_to(bench.decoder._slots.size[1], continuous.WIDTH),
    }


def _automatic(bench: Bench) -> Iterator[Figures]:
    """How many rows a worker without --batch-size would choose, and how long it takes to find out."""
    engine, decoder = bench.engine, bench.decoder
    limit, started = decoder.limit, time.perf_counter()
    rows = choose_limit(decoder, engine.prepare, engine.recipe.max_pixels)
    decoder.limit = limit
    yield {"case": "automatic batch size", "rows": rows, "seconds": time.perf_counter() - started}


def _usual(rows: Sequence[int]) -> int:
    """The number of rows that is looked at more closely."""
    return max(n for n in rows if n <= 64)


def _make_room(bench: Bench) -> None:
    """Allocates buffers as a worker does: for the longest prompt, and for as many rows as are measured."""
    decoder = bench.decoder
    decoder.limit = max(bench.rows)
    decoder._prefill([Row(longest(bench.engine.prepare, bench.recipe.max_pixels), 0.0, [])])
    decoder._remove([0])


@contextmanager
def _running(bench: Bench, picture: Prepared, rows: int) -> Iterator[None]:
    """Pretends that copies of a picture are in progress, with made-up keys and values. Their lengths stay as they are,
    because their slots count as free.
    """
    decoder, said = bench.decoder, bench.scale.mean_length
    decoder._rows = {slot: Row(picture, 0.0, [0] * said) for slot in range(rows)}
    _fill_lengths(decoder, picture.n_tokens + said - 1)
    yield
    decoder._rows = {}
    _fill_lengths(decoder, 0)


@torch.inference_mode()
def _fill_lengths(decoder: ContinuousDecoder, tokens: int) -> None:
    decoder._slots.lengths.fill_(tokens)


# --- Reading pictures ------------------------------------------------------------------------------------------


def prefill(bench: Bench) -> Iterator[Figures]:
    """Reading so many pictures of one size together, as a whole, and then part by part, waiting after each."""
    most = max(bench.scale.groups)
    bench.decoder.limit = most
    with bench.no_graphs():
        for side in bench.scale.sides:
            pictures = bench.prepared(side, most)
            for n in bench.scale.groups:
                yield _read(bench, pictures[:n], side)
    yield _patches(bench)


def _read(bench: Bench, pictures: Sequence[Prepared], side: int) -> Figures:
    decoder, n = bench.decoder, len(pictures)
    inputs = pictures[0].inputs.tensors

    def work() -> None:
        decoder._remove(decoder._prefill([Row(picture, 0.0, []) for picture in pictures]))

    bench.forget_peak()
    times = bench.timed(work, max(1, bench.scale.repeats // 2))
    peak = bench.peak()
    vision, text = prefill_tflop(bench.engine.loaded.model.config, len(inputs["pixel_values"]), pictures[0].n_tokens)
    return {
        "case": f"{n} of {side} x {side}",
        "pictures": n,
        "side": side,
        "tokens": pictures[0].n_tokens,
        "patches": len(inputs["pixel_values"]),
        **times,
        "split_ms": _split(bench, work),
        "vision_tflop": n * vision,
        "text_tflop": n * text,
        **peak,
    }


def _split(bench: Bench, work: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of each part of a prefill."""
    turns = []
    for _ in range(3):
        clock = Clock(bench)
        with clock.watching(bench.decoder):
            (whole,) = bench.times(work, 1)
        turns.append(clock.ms | {"other": whole - sum(clock.ms.values())})
    return {name: median(turn.get(name, 0.0) for turn in turns) for name in turns[-1]}


class Clock:
    """Times functions, and waits for the device before and after each. What one calls counts as its own."""

    def __init__(self, bench: Bench) -> None:
        self.ms: dict[str, float] = {}
        self._bench = bench
        self._is_inside = False

    @contextmanager
    def watching(self, decoder: ContinuousDecoder) -> Iterator[None]:
        model = decoder.loaded.model
        places = (
            (decoding, "collate", "collate"),
            (continuous, "join", "collate"),
            (decoding, "upload", "upload"),
            (tower(model), "forward", "vision tower"),
            (model.get_decoder(), "forward", "language model"),
            (model.lm_head, "forward", "language model"),
            (decoder._slots, "put", "put"),
            (decoder, "_say", "put"),
        )
        with ExitStack() as stack:
            for owner, attribute, name in places:
                function = self._timed(name, getattr(owner, attribute))
                stack.enter_context(patch.object(owner, attribute, function))
            yield

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            if self._is_inside:
                return function(*arguments, **named)
            self._bench.synchronise()
            started = time.perf_counter()
            self._is_inside = True
            try:
                result = function(*arguments, **named)
                self._bench.synchronise()
            finally:
                self._is_inside = False
            self.ms[name] = self.ms.get(name, 0.0) + 1000 * (time.perf_counter() - started)
            return result

        return run


def _patches(bench: Bench) -> Figures:
    """The vision tower's first layer as a matrix product, as the engine has it, and as the convolution that it was."""
    model = bench.engine.loaded.model
    conv = next(module for module in tower(model).modules() if isinstance(module, nn.Conv3d))
    pixels = bench.prepared(bench.scale.sides[0], 1)[0].inputs.tensors["pixel_values"].to(bench.device)
    patches = pixels.view(-1, conv.in_channels, *conv.kernel_size)
    with torch.inference_mode():
        product = bench.timed(lambda: conv.forward(patches), 3)
        convolution = bench.timed(lambda: nn.Conv3d.forward(conv, patches), 1)
    return {"case": "patches", "product": product, "convolution": convolution}


# --- Tables of kernels -----------------------------------------------------------------------------------------


def profile(bench: Bench) -> Iterator[Figures]:
    """The kernels that take longest, of a step without and with graphs, and of a prefill."""
    decoder, side = bench.decoder, bench.scale.sides[0]
    picture, rows = bench.prepared(side, 1)[0], _usual(bench.rows)
    bench.use_graphs()
    with bench.no_graphs():
        _make_room(bench)
        with _running(bench, picture, rows):
            yield _table(bench, f"step of {rows} rows, eager", decoder._timed_step)
    if decoder._graphs:
        with _running(bench, picture, rows):
            yield _table(bench, f"step of {rows} rows, replayed", decoder._timed_step)
    pictures = bench.prepared(side, bench.scale.groups[1])

    def read() -> None:
        decoder._remove(decoder._prefill([Row(picture, 0.0, []) for picture in pictures]))

    yield _table(bench, f"prefill of {len(pictures)} of {side} x {side}", read)


def _table(bench: Bench, case: str, work: Callable[[], object]) -> Figures:
    bench.times(work, 2)
    (ms,) = bench.times(work, 1)
    found = kernels(bench, work)
    top = [
        {
            "name": name[:120],
            "calls": found.calls[name],
            "ms": spent,
            "share": spent / max(1e-9, sum(found.ms.values())),
        }
        for name, spent in list(found.ms.items())[:TOP]
    ]
    return {
        "case": case,
        "ms": ms,
        "busy_ms": found.busy_ms,
        "kernels": sum(found.calls.values()),
        "attention": found.attention,
        "top": top,
    }
