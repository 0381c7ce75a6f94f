"""What a GPU is asked to do, counted on the CPU: few kernels, and hardly ever does the CPU wait for it."""

from collections.abc import Iterator
from pathlib import Path

import engine_steps
import pytest
import torch
from engine_steps import mixed_pictures, row
from launches import counted, write_deep_model
from transformers.cache_utils import DynamicCache

from rococap.engines import Options, Prepared, Request
from rococap.engines.continuous import WIDTH
from rococap.engines.decoding import collate
from rococap.engines.hf import TransformersEngine

MAX_KERNELS = 800
ROWS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_deep_model(tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(request, folder) -> Iterator[TransformersEngine]:
    engine = engine_steps.loaded(folder, Options(device="cpu", batch_size=ROWS), dtype=request.param)
    yield engine
    engine.close()


@pytest.fixture
def pictures(engine) -> list[Prepared]:
    prepared = [engine.prepare(number, Request([image])) for number, image in enumerate(mixed_pictures()[:ROWS])]
    assert len({picture.n_tokens for picture in prepared}) > 4
    return prepared


@pytest.fixture
def decoder(engine, pictures):
    """The decoder with a full batch, one step after its prompts."""
    decoder = engine.decoder
    decoder._prefill([row(picture) for picture in pictures])
    for running in decoder._rows.values():
        running.tokens.append(0)
    step(decoder)
    yield decoder
    decoder._clear()


def step(decoder) -> list[int]:
    slots = decoder._step()
    for running in decoder._rows.values():
        running.tokens.append(0)
    return slots


def test_a_prefill_of_8_pictures_reads_nothing_from_the_device_but_its_tokens(engine, pictures, monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # as the engine sets it on a GPU
    engine.decoder._prefill([row(pictures[0])])
    engine.decoder._remove([0])
    with counted(engine.decoder) as launches:
        slots = engine.decoder._prefill([row(picture) for picture in pictures])
        list(engine.decoder._charge(slots, 0.0))
    engine.decoder._clear()
    assert launches.reads == {"tolist": 1}


def test_prompts_of_one_length_need_no_mask(engine, pictures):
    decoder = engine.decoder
    assert decoder._causal_mask([7, 7, 7]) is None
    assert decoder._causal_mask([1, 3]).tolist() == [
        [[[False, False, False], [False, False, False], [False, False, True]]],
        [[[True, False, False], [True, True, False], [True, True, True]]],
    ]


def test_what_is_computed_on_the_cpu_beforehand_changes_no_bit_of_the_logits(engine, pictures):
    model = engine.loaded.model
    inputs = collate([picture.inputs.tensors for picture in pictures], engine.loaded.pad)
    with torch.inference_mode():
        positions = model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)
        cache = DynamicCache(config=model.config)
        expected = model(
            **inputs, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits[:, -1]
        _, logits, ours = engine.decoder._read(pictures)
    assert torch.equal(ours, positions)
    assert torch.equal(logits, expected)


def test_pixels_are_cast_beforehand_as_the_model_casts_them(engine, pictures):
    image = mixed_pictures()[0]
    processed = engine.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    cast = pictures[0].inputs.tensors["pixel_values"]
    assert cast.dtype == engine.dtype
    assert torch.equal(cast, processed.to(engine.dtype))


def test_a_step_launches_few_kernels_and_reads_nothing_but_its_tokens(decoder):
    with counted(decoder) as launches:
        slots = step(decoder)
    assert not launches.reads
    assert 400 < launches.kernels <= MAX_KERNELS, launches.operators.most_common(20)
    with counted(decoder) as launches:
        list(decoder._charge(slots, 0.0))
    assert launches.reads == {"tolist": 1}


def test_two_steps_of_one_shape_are_the_same_operators_on_the_same_storages(decoder):
    """So that a CUDA graph can be captured of one, and replayed for the others."""
    tapes = []
    width = decoder._slots.size[1]
    for _ in range(3):
        with counted(decoder) as launches:
            decoder._decode(ROWS, width)
        tapes.append(launches.tape)
    assert tapes[0] == tapes[1] == tapes[2]
    with counted(decoder) as launches:
        decoder._decode(ROWS, width - WIDTH)
    assert launches.tape != tapes[0]
