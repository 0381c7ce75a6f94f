"""Every family of models: a small real one of the hub's architecture and file formats, through the stock classes."""

import json
import logging
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import engine_steps
import pytest
import torch
from engine_steps import answers, captions, error_of, message, mixed_pictures, stock_answers, text, texts
from families import FAMILIES, SIDE, as_published_in_2024, idefics3
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, Qwen2Config, Qwen2ForCausalLM

from rococap.demo import MODEL
from rococap.engines import Options, Request, families
from rococap.engines.continuous import ContinuousDecoder
from rococap.engines.decoding import collate
from rococap.engines.hf import TransformersEngine
from rococap.errors import ModelError
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


def test_every_family_says_in_batches_what_generate_says_of_one_picture_at_a_time(family, folder, engine):
    images = mixed_pictures()[:8]
    said = texts(captions(engine, images, 5))
    assert said == stock_answers(folder, engine, [Request([image]) for image in images])
    assert said == texts(captions(engine, images, 1))
    assert len(set(said)) == len(images), "the picture must decide what is said"


def test_every_family_takes_several_pictures_and_turns_as_its_stock_classes_do(folder, engine):
    a, b, c, d, e, f = mixed_pictures()[:6]
    image, compare, count = {"type": "image"}, text("Compare these:"), text("How many are there?")
    system, answer = message("system", text("Be brief.")), message("assistant", text("They differ."))
    requests = [
        Request([a, b], [message("user", compare, image, image)]),
        Request([c]),
        Request([d, e, f], [system, message("user", image, compare, image, image)]),
        Request([b, a], [message("user", image, compare, image), answer, message("user", count)]),
        Request([a, f], [message("user", image), answer, message("user", image, count)]),
    ]
    said = texts(answers(engine, requests, 5))
    assert said == stock_answers(folder, engine, requests)
    assert len(set(said)) == len(said), "the pictures must decide what is said"


def test_every_family_but_those_with_another_cache_is_decoded_continuously(family, engine):
    assert isinstance(engine.decoder, ContinuousDecoder) == (family in CONTINUOUS)


def test_a_collated_batch_of_every_family_is_what_its_processor_makes_of_the_pictures_together(engine):
    images = mixed_pictures()[:4]
    ours = collate(
        [engine.prepare(n, Request([image])).inputs.tensors for n, image in enumerate(images)], engine.loaded.pad
    )
    theirs = engine.processor(
        text=[engine.prompt] * 4, images=[[image] for image in images], return_tensors="pt", padding=True
    )
    assert {name: torch.equal(ours[name], theirs[name]) for name in theirs} == dict.fromkeys(ours, True)


def loaded(folder: Path, batch_size: int = 5, **recipe: object) -> TransformersEngine:
    options = Options(device="cpu", batch_size=batch_size)
    return engine_steps.loaded(folder, options, **{"max_new_tokens": 24} | recipe)


def visual_tokens(engine: TransformersEngine, size: tuple[int, int]) -> int:
    """How many of them a picture of that size becomes."""
    return engine.prepare(1, Request([Image.new("RGB", size)])).n_tokens - len(
        engine.processor.tokenizer(engine.prompt)["input_ids"]
    )


@pytest.fixture(scope="module")
def tokens_of(folder):
    """Visual tokens of a large picture and a small one, with these bounds."""

    @cache
    def tokens(min_pixels: int, max_pixels: int) -> tuple[int, int]:
        engine = loaded(folder, min_pixels=min_pixels, max_pixels=max_pixels)
        blank = (Image.new("RGB", size) for size in ((900, 700), (56, 56)))
        ids = [engine.prepare(1, Request([picture])).inputs.tensors["input_ids"] for picture in blank]
        n = [int((tokens == image_token(engine)).sum()) for tokens in ids]
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
        "max_pixels: this model resizes every picture to 56 x 56. Enqueue a run with --max-pixels 3136 or more."
    )


# --- as the hub has them ---------------------------------------------------------------------------------------


def test_a_folder_as_qwen2_vl_was_published_captions_greedily_within_the_recipes_bounds(tmp_path):
    engine = loaded(as_published_in_2024(tmp_path / "hub"), max_new_tokens=64, max_pixels=12_544)
    mine = loaded(MODEL, max_new_tokens=64, max_pixels=12_544)
    images = [*mixed_pictures(), Image.new("RGB", (900, 700))]
    assert texts(captions(engine, images)) == texts(captions(mine, images))
    assert engine.prepare(1, Request([images[-1]])).inputs.tensors["image_grid_thw"].tolist() == [[1, 6, 8]]
    assert isinstance(engine.decoder, ContinuousDecoder)


def test_a_folder_as_published_without_one_of_its_shards_is_refused(tmp_path):
    folder = as_published_in_2024(tmp_path / "hub")
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert error_of(Recipe(model=str(folder))).startswith(f"The folder {folder} contains no model that can be loaded: ")


def test_code_that_comes_with_a_model_is_not_run_unless_the_recipe_says_so(tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForImageTextToText": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": code}))
    (folder / "own.py").write_text(
        "from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration\n"
        "class OwnConfig(Qwen2VLConfig):\n    model_type = 'own'\n"
        "class OwnModel(Qwen2VLForConditionalGeneration):\n    config_class = OwnConfig\n"
    )
    assert error_of(Recipe(model=str(folder))) == (
        f"{folder} comes with its own code, which is not run unless you trust it: review it, then enqueue a run with "
        "--trust-remote-code."
    )
    stock = AutoModelForImageTextToText.from_pretrained(MODEL)
    save_file({name: tensor.clone() for name, tensor in stock.state_dict().items()}, folder / "model.safetensors")
    for load_in in ("4bit", None):
        engine = loaded(folder, trust_remote_code=True, load_in=load_in)
        assert type(engine.loaded.model).__name__ == "OwnModel"


def test_a_model_that_transformers_has_no_class_for_is_refused_with_its_sister(tmp_path):
    folder = tmp_path / "InternVL2-2B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    assert error_of(Recipe(model=str(folder))) == (
        f"transformers has no class for {folder} (internvl_chat). Enqueue a run with "
        "--model OpenGVLab/InternVL3-2B-hf, or serve it, for example with vllm serve, and start the worker with "
        "--engine openai."
    )
    with pytest.raises(ModelError, match=r"Enqueue a run with --model OpenGVLab/InternVL3-8B-hf, or serve"):
        families.check_native("OpenGVLab/InternVL3-8B", "internvl_chat")


def test_a_name_that_circulates_and_is_not_on_the_hub_is_refused_with_the_right_one():
    assert error_of(Recipe(model="HuggingFaceM4/SmolVLM2-256M")) == (
        "The hub has no model HuggingFaceM4/SmolVLM2-256M: its name is HuggingFaceTB/SmolVLM2-256M-Video-Instruct."
    )


def test_a_text_only_model_is_refused(tmp_path):
    config = Qwen2Config(vocab_size=568, hidden_size=16, intermediate_size=16, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 2
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    shutil.copy(MODEL / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert error_of(Recipe(model=str(tmp_path))) == (
        f"{tmp_path} has no image processor, so it cannot caption pictures. Name a vision-language model."
    )


def test_a_type_of_model_that_the_table_does_not_have_gets_pictures_within_the_bounds(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        engine = loaded(idefics3(tmp_path), max_pixels=10_000)
    assert "pictures are reduced to --max-pixels beforehand: how to set bounds for idefics3 is unknown" in caplog.text
    (picture,) = engine.prepare(1, Request([Image.new("RGB", (900, 700))])).inputs.request.pictures
    assert picture.size == (113, 88)
