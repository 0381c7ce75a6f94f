import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor

import rococap.demo
from rococap.demo import train
from rococap.demo.canvas import Phantom
from rococap.demo.phantoms import HELD_OUT_SEEDS, draw

FOLDER = Path(rococap.demo.__file__).parent / "model"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return train.load(FOLDER)


@pytest.fixture(scope="module")
def sample() -> list[Phantom]:
    return [draw(seed) for seed in HELD_OUT_SEEDS["validation"][-64:]]


@pytest.fixture(scope="module")
def scores(loaded: tuple[Any, Any], sample: list[Phantom]) -> train.Scores:
    generated = train.captions(*loaded, [phantom.image for phantom in sample])
    return train.score(generated, [phantom.caption for phantom in sample])


def test_the_stock_auto_classes_load_the_model_without_a_network() -> None:
    processor = AutoProcessor.from_pretrained(FOLDER, local_files_only=True)
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, local_files_only=True)
    assert type(processor).__name__ == "Qwen2VLProcessor"
    assert type(processor.image_processor).__name__ == "Qwen2VLImageProcessor"
    assert type(processor.tokenizer).__name__ == "Qwen2Tokenizer"
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert model.dtype is torch.float16


def test_the_processor_keeps_the_pixel_areas_of_the_training() -> None:
    processor = AutoProcessor.from_pretrained(FOLDER, local_files_only=True)
    size = processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (3136, 1003520)


def test_the_weights_are_float16_and_at_most_4_mb() -> None:
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size <= 4_000_000
    with safe_open(weights, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118 - no iterator


def test_captions_of_held_out_phantoms_are_exact(scores: train.Scores) -> None:
    assert scores.held_out == 64
    assert scores.exact_match >= 0.97
    assert scores.modality_accuracy >= 0.98


def test_the_caption_of_the_previous_picture_is_not_exact(scores: train.Scores) -> None:
    """The control: exact captions come from the picture, not from a caption that fits all."""
    assert scores.control_previous_picture < 0.05


def test_a_black_picture_changes_the_caption(loaded: tuple[Any, Any], sample: list[Phantom]) -> None:
    blank = [phantom.image.point(lambda _: 0) for phantom in sample[:8]]
    generated = train.captions(*loaded, blank)
    assert all(got != phantom.caption for got, phantom in zip(generated, sample, strict=False))


def test_a_batch_of_quite_different_shapes_is_captioned_like_one_at_a_time(
    loaded: tuple[Any, Any], sample: list[Phantom]
) -> None:
    by_ratio = sorted(sample, key=lambda phantom: phantom.image.width / phantom.image.height)
    pair = [by_ratio[0].image, by_ratio[-1].image]
    assert pair[1].width / pair[1].height > 2 * pair[0].width / pair[0].height
    assert train.captions(*loaded, pair, batch_size=2) == train.captions(*loaded, pair, batch_size=1)


def test_the_prompt_is_written_as_qwen2_vl_expects_it(loaded: tuple[Any, Any]) -> None:
    assert train.prompt_text(loaded[0]) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        "Describe this medical image in detail.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_tokenizer_gives_back_any_text(loaded: tuple[Any, Any]) -> None:
    text = "Größe 3 µm → “CT”, naïve 肺 \n\t end"
    tokenizer = loaded[0].tokenizer
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_record_of_the_training_meets_the_bar() -> None:
    record = json.loads((FOLDER / "training.json").read_text())
    assert record["held_out"] >= 320
    assert record["exact_match"] >= 0.97
    assert record["modality_accuracy"] >= 0.99
    assert record["control_previous_picture"] < 0.05
    assert record["prompt"] == train.PROMPT


def test_the_model_card_says_what_the_model_is_not_for() -> None:
    card = (FOLDER / "README.md").read_text()
    assert "not for clinical use" in card.lower()
    assert "license: apache-2.0" in card


def test_scores_count_exact_captions_modalities_and_the_previous_caption() -> None:
    original = ["Axial CT a.", "Axial CT b.", "Normal frontal chest X-ray.", "Axial T1-weighted MRI."]
    generated = ["Axial CT a.", "Axial CT a.", "Ultrasound of the liver.", "Axial T1-weighted MRI."]
    assert train.score(generated, original) == train.Scores(4, 0.5, 0.75, 0.25)


def test_only_tokens_where_captions_branch_weigh_in_full() -> None:
    weights = train.BranchWeights([[1, 2, 3], [1, 2, 4], [1, 5, 6]])
    low = train.FORCED_TOKEN_WEIGHT
    assert weights([1, 2, 3]) == [low, 1.0, 1.0]
    assert weights([1, 5, 6]) == [low, 1.0, low]
