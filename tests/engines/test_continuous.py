"""Continuous decoding says token for token what the model's own `generate` says of each picture alone."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields

import pytest
import torch
from engine_steps import captions, mixed_pictures, row, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rococap.demo import MODEL
from rococap.demo.phantoms import HELD_OUT_SEEDS, draw
from rococap.engines import Completion, Options, Prepared, Request, continuous
from rococap.engines.decoding import Loaded, Row
from rococap.engines.hf import TransformersEngine
from rococap.engines.sizing import choose_limit
from rococap.errors import ModelError
from rococap.recipe import Recipe

RECIPE = Recipe(model=str(MODEL), max_new_tokens=40, dtype="float32")
SIZES = [(112, 112), (300, 60), (64, 200), (30, 30), (250, 250), (90, 140), (28, 140), (450, 200)]
PROMPTS = [RECIPE.prompt, "What is shown?"]
MOST = 40


@dataclass(frozen=True, slots=True)
class Recording(Loaded):
    """Ends captions at told lengths, whatever the model says, and keeps their tokens."""

    lengths: dict[int, int]
    said: dict[int, list[int]]

    def is_over(self, row: Row) -> bool:
        self.said[row.picture.job_id] = list(row.tokens)
        return len(row.tokens) == self.lengths[row.picture.job_id]


class Arriving:
    """A Source whose pictures come in portions, one portion a step; named jobs are abandoned after so many steps."""

    def __init__(self, portions: Sequence[Sequence[Prepared]], abandoned: dict[int, int] | None = None) -> None:
        self.portions = [list(portion) for portion in portions]
        self.ready: list[Prepared] = []
        self.abandoned = abandoned or {}
        self.steps = 0
        self.most_taken = 0

    def take(self, most: int, wait: float | None) -> list[Prepared]:
        while wait is None and not self.ready and self.portions:
            self.arrive()
        taken, self.ready = self.ready[:most], self.ready[most:]
        return taken

    def arrive(self) -> None:
        if self.portions:
            self.ready += self.portions.pop(0)

    def step(self, rows: int) -> set[int]:
        self.steps += 1
        self.most_taken = max(self.most_taken, rows)
        self.arrive()
        return {job_id for job_id, at in self.abandoned.items() if self.steps >= at}


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    engine = TransformersEngine(RECIPE, Options(device="cpu", batch_size=8, decode="continuous"))
    engine.load()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def prepared(engine) -> list[Prepared]:
    """Every size with every prompt."""
    pictures = [draw(seed).image.convert("RGB") for seed in HELD_OUT_SEEDS["validation"][: 2 * len(SIZES)]]
    asked, made = engine.prompt, []
    for prompt in PROMPTS:
        engine.prompt = asked.replace(RECIPE.prompt, prompt)
        engine._prompts.clear()
        assert (engine.prompt == asked) == (prompt == RECIPE.prompt)
        for size in SIZES:
            made.append(engine.prepare(len(made), Request([pictures[len(made)].resize(size)])))
    engine.prompt = asked
    engine._prompts.clear()
    assert len({picture.n_tokens for picture in made}) > 8
    return made


@pytest.fixture(scope="module")
def alone(engine, prepared) -> list[list[int]]:
    """What `generate` says of each picture alone, going on after every end."""
    said = []
    for picture in prepared:
        inputs = engine.loaded.batch([picture])
        with torch.inference_mode():
            output = engine.loaded.model.generate(**inputs, max_new_tokens=MOST, eos_token_id=None)
        said.append(output[0, picture.n_tokens :].tolist())
    assert len({tuple(tokens) for tokens in said}) == len(said)
    return said


def decode(
    engine: TransformersEngine, source: Arriving, batch_size: int, lengths: dict[int, int]
) -> tuple[dict[int, list[int]], list[Completion]]:
    loaded = engine.loaded
    known = {field.name: getattr(loaded, field.name) for field in fields(loaded)}
    recording = Recording(**known, lengths=lengths, said={})
    decoder = continuous.ContinuousDecoder(recording, batch_size, lambda picture: None)
    completions = list(decoder.run(source))
    return recording.said, completions


def assert_same(engine: TransformersEngine, prepared: list[Prepared], alone: list[list[int]], data: st.DataObject):
    jobs = data.draw(st.permutations(range(len(prepared))))[: data.draw(st.integers(1, len(prepared)))]
    lengths = {job: data.draw(st.integers(1, MOST)) for job in jobs}
    cuts = sorted(data.draw(st.sets(st.integers(1, len(jobs)), max_size=5)) | {len(jobs)})
    portions = [[prepared[job] for job in jobs[start:end]] for start, end in zip([0, *cuts], cuts, strict=False)]
    batch_size = data.draw(st.integers(1, 9))
    source = Arriving(portions)
    said, completions = decode(engine, source, batch_size, lengths)
    assert said == {job: alone[job][: lengths[job]] for job in jobs}
    assert sorted(c.job_id for c in completions) == sorted(jobs)
    assert all(c.new_tokens <= lengths[c.job_id] for c in completions)
    assert source.most_taken <= batch_size


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_mix_of_sizes_prompts_lengths_and_arrivals_says_the_same(engine, prepared, alone, data):
    assert_same(engine, prepared, alone, data)


@pytest.mark.torture
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_very_many_mixes_of_sizes_prompts_lengths_and_arrivals_say_the_same(engine, prepared, alone, data):
    assert_same(engine, prepared, alone, data)


def test_a_row_that_is_abandoned_disturbs_no_other(engine, prepared, alone):
    lengths = dict.fromkeys(range(8), MOST) | {1: 10, 6: 20}
    source = Arriving([prepared[:8]], abandoned={0: 5, 3: 12, 5: 12, 7: 1})
    said, completions = decode(engine, source, 8, lengths)
    assert sorted(c.job_id for c in completions) == [1, 2, 4, 6]
    assert all(said[job] == alone[job][: lengths[job]] for job in (1, 2, 4, 6))


def test_a_caption_leaves_as_it_ends_and_the_next_picture_takes_its_place(engine, prepared):
    lengths = {0: 40, 1: 3, 2: 3, 3: 3}
    source = Arriving([prepared[:4]])
    _, completions = decode(engine, source, 2, lengths)
    assert [c.job_id for c in completions] == [1, 2, 3, 0]
    assert source.steps <= 40 + 3


def test_the_time_of_all_captions_is_the_time_of_the_steps(engine, prepared):
    lengths = {job: 5 + 3 * (job % 8) for job in range(len(prepared))}
    _, completions = decode(engine, Arriving([prepared]), 6, lengths)
    assert all(0 < c.prefill_ms <= c.processing_ms <= c.latency_ms + 1e-6 for c in completions)
    assert {c.batch_size for c in completions} == {6}


# --- slots -----------------------------------------------------------------------------------------------------


def test_a_row_keeps_its_slot_and_a_free_one_is_taken_from_the_front(engine, prepared):
    decoder = continuous.ContinuousDecoder(engine.loaded, 4, lambda picture: None)
    assert decoder._prefill([row(picture) for picture in prepared[:4]]) == [0, 1, 2, 3]
    kept = decoder._rows[3]
    decoder._remove([0, 2])
    assert decoder._slots.lengths.tolist() == [0, prepared[1].n_tokens, 0, prepared[3].n_tokens]
    assert decoder._slots.active.tolist() == [0, 1, 0, 1]
    assert decoder._prefill([row(prepared[4])]) == [0]
    assert decoder._rows[3] is kept


def test_a_step_writes_into_a_free_slot_at_its_first_place_and_nowhere_else(engine, prepared):
    decoder = continuous.ContinuousDecoder(engine.loaded, 10, lambda picture: None)
    decoder._prefill([row(picture) for picture in prepared[:10]])
    decoder._remove([1])
    keys = [layer.keys for layer in decoder._slots.layers]
    before = [buffer.clone() for buffer in keys]
    for running in decoder._rows.values():
        running.tokens.append(0)
    decoder._step()
    for old, new in zip(before, keys, strict=True):
        changed = (old != new).any(dim=1).any(dim=-1)
        written = {(slot, place) for slot, place in changed.nonzero().tolist()}
        assert written == {(1, 0)} | {(slot, prepared[slot].n_tokens) for slot in (0, *range(2, 10))}
    assert decoder._slots.lengths[1] == 0


@pytest.mark.parametrize("finished", [[0, 1, 2, 3, 4, 5], [1, 3, 5], [5], [0]])
def test_rows_with_free_slots_before_them_say_the_same(engine, prepared, alone, finished):
    lengths = {job: 3 if job in finished else MOST for job in range(7)}
    said, _ = decode(engine, Arriving([prepared[:7]]), 7, lengths)
    assert said == {job: alone[job][: lengths[job]] for job in range(7)}


def test_out_of_memory_while_reading_halves_what_is_read_together_and_keeps_the_rows(engine, caplog):
    def refuse(module: object, args: object, inputs: dict[str, torch.Tensor]) -> None:
        if len(inputs["grid_thw"]) > 2:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    expected = texts(captions(engine, mixed_pictures(), 8))
    hook = engine.loaded.model.model.visual.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        with caplog.at_level(logging.WARNING):
            completions = captions(engine, mixed_pictures(), 8)
    finally:
        hook.remove()
        engine.decoder._group_limit = continuous.GROUP_TOKENS
    assert texts(completions) == expected
    assert engine.batch_size == 8
    assert caplog.messages == [
        "out of memory reading 6 pictures at a time: continuing with 3",
        "out of memory reading 3 pictures at a time: continuing with 1",
    ]


def test_on_a_gpu_no_picture_is_begun_while_prompts_are_read(engine, prepared, monkeypatch):
    decoder = engine.decoder
    preparing: list[Future[Prepared]] = []
    began_meanwhile = []

    def prepare_beside(module: object, args: object, inputs: object) -> None:
        preparing.append(pool.submit(engine.prepare, 1, Request([mixed_pictures()[0]])))
        began_meanwhile.append(bool(wait(preparing, timeout=1 if on_gpu else 60).done))

    hook = engine.loaded.model.register_forward_pre_hook(prepare_beside, with_kwargs=True)
    with ThreadPoolExecutor(1) as pool:
        for on_gpu in (True, False):
            monkeypatch.setattr(decoder, "_yields_to_launches", on_gpu)
            decoder._prefill([row(prepared[0])])
            assert preparing.pop().result(timeout=60).n_tokens > 0
            decoder._clear()
    hook.remove()
    assert began_meanwhile == [False, True]


# --- which models, how many rows -------------------------------------------------------------------------------


def test_a_model_whose_cache_is_another_is_decoded_in_static_batches_and_the_log_says_so(engine, caplog, monkeypatch):
    monkeypatch.setattr(engine.loaded.model.config.text_config, "layer_types", ["sliding_attention"] * 3)
    monkeypatch.setattr(engine.loaded.model.config.text_config, "sliding_window", 16, raising=False)
    monkeypatch.setattr(engine, "options", Options(device="cpu", batch_size=8, decode="auto"))
    with caplog.at_level(logging.INFO):
        assert type(engine._choose_decoder()).__name__ == "StaticDecoder"
    assert "decoding in static batches: its cache is of an unsupported kind" in caplog.text
    monkeypatch.setattr(engine, "options", Options(device="cpu", batch_size=8, decode="continuous"))
    with pytest.raises(ModelError, match=r"cannot be decoded continuously: its cache .* Use --decode static"):
        engine._choose_decoder()


def test_a_recipe_with_a_repetition_penalty_is_decoded_in_static_batches():
    engine = TransformersEngine(
        Recipe(model=str(MODEL), max_new_tokens=4, dtype="float32", repetition_penalty=1.2), Options(device="cpu")
    )
    engine.load()
    assert type(engine.decoder).__name__ == "StaticDecoder"
    assert engine.batch_size == 16
    engine.close()


def steps_of(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> list[int]:
    """Makes a step of n rows take so long; returns the numbers of rows that were measured."""
    measured = []

    def probe(picture: Prepared, n: int, n_read: int) -> tuple[float, int]:
        measured.append(n)
        if n not in seconds:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return seconds[n], 1000

    monkeypatch.setattr(engine.decoder, "probe", probe)
    return measured


@pytest.mark.parametrize(
    ("seconds", "chosen", "measured"),
    [
        ({4: 1.0, 8: 1.0, 16: 1.0, 32: 1.0, 64: 1.0}, 64, [4, 8, 16, 32, 64]),
        ({4: 1.0, 8: 1.0, 16: 1.9, 32: 3.9}, 8, [4, 8, 16, 32]),
        ({4: 1.0, 8: 1.0, 16: 1.0}, 16, [4, 8, 16, 32]),
        ({}, 1, [4]),
    ],
    ids=["more is faster", "slow steps end it", "memory ends it", "not even four fit"],
)
def test_the_batch_size_is_the_smallest_that_is_about_as_fast_as_any(engine, monkeypatch, seconds, chosen, measured):
    seen = steps_of(engine, monkeypatch, seconds)
    assert choose_limit(engine.decoder, engine.prepare, RECIPE.max_pixels) == chosen
    assert seen == measured


def test_measuring_leaves_the_decoder_as_it_was(engine, prepared, alone):
    limit = choose_limit(engine.decoder, engine.prepare, RECIPE.max_pixels)
    assert limit in (1, 4, 8, 16, 32, 64)
    assert engine.batch_size == 8
    texts = [completion.text for completion in engine.run(Arriving([prepared[:1]]))]
    expected = engine.loaded.tokenizer.decode(alone[0][: len(alone[0])], skip_special_tokens=True)
    assert expected.startswith(texts[0])


def test_a_picture_of_noise_is_not_larger_than_the_recipe_allows(engine):
    picture = engine.prepare(0, Request([Image.effect_noise((512, 512), 64).convert("RGB")]))
    assert picture.n_tokens < 512 * 512 / 784 + 40
