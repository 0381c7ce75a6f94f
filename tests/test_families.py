"""Every family of models: a small real one of the hub's architecture and file formats, through the stock classes."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SIDE
from PIL import Image
from test_engines import captions, error_of, mixed_pictures, texts
from transformers import AutoModelForImageTextToText

from rococap.engines import Options
from rococap.engines.continuous import ContinuousDecoder
from rococap.engines.decoding import collate
from rococap.engines.hf import TransformersEngine
from rococap.recipe import Recipe

CONTINUOUS = set(FAMILIES) - {"gemma3"}
"""Gemma 3's cache forgets: some of its layers look back over a window only."""


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory) -> Path:
    return FAMILIES[family](tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def engine(folder) -> Iterator[TransformersEngine]:
    engine = loaded(folder)
    yield engine
    engine.close()


def loaded(folder: Path, batch_size: int = 5, **recipe: object) -> TransformersEngine:
    engine = TransformersEngine(
        Recipe(**{"model": str(folder), "dtype": "float32", "max_new_tokens": 24} | recipe),
        Options(device="cpu", batch_size=batch_size),
    )
    engine.load()
    return engine


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


def test_every_family_says_in_batches_what_generate_says_of_one_picture_at_a_time(family, folder, engine):
    images = mixed_pictures()
    said = texts(captions(engine, images, 5))
    assert said == one_by_one(folder, engine, images)
    assert said == texts(captions(engine, images, 1))
    assert len(set(said)) == len(images), "the picture must decide what is said"


def test_every_family_but_those_with_another_cache_is_decoded_continuously(family, engine):
    assert isinstance(engine.decoder, ContinuousDecoder) == (family in CONTINUOUS)


def test_a_collated_batch_of_every_family_is_what_its_processor_makes_of_the_pictures_together(engine):
    images = mixed_pictures()[:4]
    ours = collate([engine.prepare(n, image).inputs.tensors for n, image in enumerate(images)], engine.loaded.pad)
    theirs = engine.processor(
        text=[engine.prompt] * 4, images=[[image] for image in images], return_tensors="pt", padding=True
    )
    assert {name: torch.equal(ours[name], theirs[name]) for name in theirs} == dict.fromkeys(ours, True)


def visual_tokens(engine: TransformersEngine, size: tuple[int, int]) -> int:
    """How many of them a picture of that size becomes."""
    return engine.prepare(1, Image.new("RGB", size)).n_tokens - len(
        engine.processor.tokenizer(engine.prompt)["input_ids"]
    )


@pytest.fixture(scope="module")
def tokens_of(folder):
    """Visual tokens of a large picture and a small one, with these bounds."""

    @cache
    def tokens(min_pixels: int, max_pixels: int) -> tuple[int, int]:
        engine = loaded(folder, min_pixels=min_pixels, max_pixels=max_pixels)
        n = [
            int((engine.prepare(1, Image.new("RGB", size)).inputs.tensors["input_ids"] == image_token(engine)).sum())
            for size in ((900, 700), (56, 56))
        ]
        engine.close()
        return n[0], n[1]

    return tokens


def image_token(engine: TransformersEngine) -> int:
    config = engine.loaded.model.config
    return config.image_token_id


def test_the_recipes_pixel_bounds_hold_for_every_family(family, tokens_of):
    large, small = tokens_of(3_136, 1_003_520)
    most, least = tokens_of(3_136, 12_544)
    if family in ("qwen2_vl", "qwen2_5_vl"):  # a token is 28 x 28 pixels
        assert (large, small) == (32 * 25, 4)
        assert 10 <= most <= 12_544 // 784
        assert tokens_of(100_352, 200_704)[1] >= 100_352 // 784
    elif family == "qwen3_vl":  # 32 x 32
        assert (large, small) == (28 * 22, 4)
        assert 8 <= most <= 12_544 // 1_024
        assert tokens_of(100_352, 200_704)[1] >= 100_352 // 1_024
    elif family == "smolvlm":  # a tile of 4 tokens, and all of it once more
        assert (large, small) == (4 * (4 * 4 + 1), 4 * (4 * 4 + 1))
        assert (most, least) == (4 * (2 * 2 + 1), 4 * (2 * 2 + 1))
        assert tokens_of(1, SIDE * SIDE) == (4, 4)
    elif family == "internvl":
        assert (large, small) == (4 * (4 * 3 + 1), 4)
        assert most == 4 * (4 + 1)
        assert tokens_of(1, SIDE * SIDE) == (4, 4)
    else:
        assert (large, small) == (most, least) == (4, 4)


def test_a_bound_that_gemma_3_cannot_keep_is_refused(tmp_path):
    assert error_of(Recipe(model=str(FAMILIES["gemma3"](tmp_path)), max_pixels=3_135, min_pixels=1)) == (
        "max_pixels: this model brings every picture to 56 x 56. Enqueue a run with --max-pixels 3136 or more."
    )
