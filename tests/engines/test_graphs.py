"""Steps replayed from CUDA graphs: without a GPU, a graph that runs its step again stands in for a captured one."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import engine_steps
import pytest
import torch
from engine_steps import captions, mixed_pictures, row, texts

from rococap.engines import Request
from rococap.engines.continuous import WIDTH, ContinuousDecoder
from rococap.engines.graphs import Graphs, rows_up_to, widths_up_to
from rococap.engines.hf import TransformersEngine
from rococap.engines.sizing import longest


class Recorded:
    """Stands in for torch.cuda.CUDAGraph: what was called while it was captured is what a replay calls."""

    capturing: "Recorded | None" = None

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@contextmanager
def capture(graph: Recorded, pool: object, capture_error_mode: str) -> Iterator[None]:
    assert pool == "the pool"
    assert capture_error_mode == "thread_local"
    Recorded.capturing = graph
    yield
    Recorded.capturing = None


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    engine = engine_steps.loaded()
    yield engine
    engine.close()


def forget_graphs(decoder: ContinuousDecoder) -> None:
    """Leaves the decoder to the next test as it was."""
    decoder._uses_graphs, decoder._longest = False, 0
    decoder._clear()


def recording(step: Callable[[int, int], None]) -> tuple[Graphs, list[tuple[int, int]]]:
    """Graphs of a step, and the list of the shapes with which it was called."""
    shapes: list[tuple[int, int]] = []

    def run(n: int, width: int) -> None:
        if Recorded.capturing is not None:
            Recorded.capturing.calls.append(lambda: run(n, width))
        else:
            shapes.append((n, width))
            step(n, width)

    return Graphs(run, torch.device("cpu")), shapes


def test_rows_are_captured_up_to_the_limit_and_widths_in_four_steps():
    assert rows_up_to(1) == [1]
    assert rows_up_to(20) == [1, 2, 4, 8, 16, 20]
    assert rows_up_to(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert widths_up_to(1600, 32) == [416, 800, 1216, 1600]
    assert widths_up_to(64, 32) == [32, 64]


def test_every_step_is_run_once_before_it_is_captured_and_the_smallest_that_holds_it_is_replayed():
    graphs, shapes = recording(lambda n, width: None)
    assert not graphs
    assert graphs.capture(4, 128, 32)
    assert graphs
    assert shapes == sorted(((n, width) for n in (1, 2, 4) for width in (32, 64, 96, 128)), reverse=True)
    shapes.clear()
    assert graphs.replay(3, 33)
    assert graphs.replay(1, 32)
    assert graphs.replay(4, 128)
    assert shapes == [(4, 64), (1, 32), (4, 128)]
    assert not graphs.replay(5, 32)
    assert not graphs.replay(1, 129)


def test_without_graphs_the_log_says_why_and_steps_run_as_before(engine, caplog):
    def refuse(n: int, width: int) -> None:
        if n == 2:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand so on")

    graphs, _ = recording(refuse)
    with caplog.at_level(logging.WARNING):
        assert not graphs.capture(4, 128, 32)
    assert caplog.messages == [
        "CUDA graphs are off, so that decoding is slower: CUDA error: operation not permitted when stream is capturing"
    ]
    assert not graphs
    assert not graphs.replay(1, 32)


def test_captions_from_graphs_are_those_of_steps_without(engine, monkeypatch):
    expected = texts(captions(engine, mixed_pictures(), 5))
    decoder = engine.decoder
    graphs, shapes = recording(decoder._decode)
    monkeypatch.setattr(decoder, "_graphs", graphs)
    decoder.limit = 5
    decoder.use_graphs(longest(engine.prepare, engine.recipe.max_pixels))
    captured = len(shapes)
    tokens = decoder._slots.size[1]
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(decoder, "_decode", lambda *shape: steps.append(shape))
    assert texts(captions(engine, mixed_pictures(), 5)) == expected
    assert not steps, "a step was run that no graph held"
    assert captured == 4 * len(widths_up_to(tokens, WIDTH))
    assert len(set(shapes[captured:])) > 1
    forget_graphs(decoder)


def test_a_batch_for_which_there_is_no_memory_gets_graphs_once_it_is_smaller(engine, monkeypatch, caplog):
    expected = texts(captions(engine, mixed_pictures(), 4))
    decoder = engine.decoder
    graphs, shapes = recording(decoder._decode)
    monkeypatch.setattr(decoder, "_graphs", graphs)
    reserve = decoder._slots.reserve

    def refuse(like: object, positions: object, rows: int, tokens: int) -> bool:
        if rows > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return reserve(like, positions, rows, tokens)

    decoder._clear()
    monkeypatch.setattr(decoder._slots, "reserve", refuse)
    decoder.limit = 8
    decoder.use_graphs(longest(engine.prepare, engine.recipe.max_pixels))
    assert not graphs
    assert texts(captions(engine, mixed_pictures(), 8)) == expected
    assert decoder.limit <= 4
    assert graphs
    assert max(n for n, _ in shapes) <= 4
    forget_graphs(decoder)


def test_graphs_are_captured_anew_when_the_buffers_are_and_not_while_rows_run(engine, monkeypatch, caplog):
    decoder = engine.decoder
    graphs, shapes = recording(decoder._decode)
    monkeypatch.setattr(decoder, "_graphs", graphs)
    small, *_, large = sorted(
        (engine.prepare(n, Request([image])) for n, image in enumerate(mixed_pictures())),
        key=lambda picture: picture.n_tokens,
    )
    decoder.limit = 2
    decoder.use_graphs(small)
    tokens = decoder._slots.size[1]
    decoder._prefill([row(small)])
    decoder._prefill([row(large)])
    assert decoder._slots.size[1] > tokens
    assert not graphs, "these would write into buffers that are gone"
    decoder._remove([0, 1])
    decoder._prefill([row(large)])
    assert graphs
    assert max(width for _, width in shapes) == decoder._slots.size[1]
    forget_graphs(decoder)


@pytest.mark.parametrize("max_pixels", [50_000, 200_704])
def test_the_longest_picture_has_as_many_tokens_as_the_bounds_allow(max_pixels):
    engine = engine_steps.loaded(max_pixels=max_pixels)
    ids = longest(engine.prepare, max_pixels).inputs.tensors["input_ids"]
    assert (ids == engine.loaded.model.config.image_token_id).sum() == max_pixels // (28 * 28)
