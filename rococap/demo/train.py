"""Trains the demonstration model from scratch on phantoms: a Qwen2-VL of 1.8 million parameters.

    python -m rococap.demo.train --out DIR

This takes minutes on two CPU cores. Two aids are used in training only and are not part of the saved model: a
classifier that locates the lesion in the grid of image cells, and a loss that gives more weight to the tokens at which
captions differ.
"""

import argparse
import json
import logging
import math
import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from rococap.demo.canvas import Finding, Phantom
from rococap.demo.phantoms import HELD_OUT_SEEDS, TRAINING_SEEDS, draw
from rococap.errors import ModelError
from rococap.recipe import DEFAULT_PROMPT, Recipe

PROMPT: Final = DEFAULT_PROMPT
PIXEL_AREAS: Final = {"shortest_edge": Recipe().min_pixels, "longest_edge": Recipe().max_pixels}

BATCH_SIZE: Final = 32
MAX_NEW_TOKENS: Final = 48
VOCABULARY: Final = 700
CORES: Final = 2
FORCED_TOKEN_WEIGHT: Final = 0.25
EMPTY_CELL_WEIGHT: Final = 0.15
CELL_LOSS_WEIGHT: Final = 0.5

SPECIAL_TOKENS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE: Final = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""
CARD: Final = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
language: en
---

# A small Qwen2-VL that captions drawings

It captions the phantoms that `rococap.demo.phantoms` draws: pictures made by a program to look like CT, MRI, chest
X-ray and ultrasound. It has seen nothing else, and says something fluent and wrong about any real picture.
**Not for clinical use.** It is there to show and to test `rococap` with a real Qwen2-VL on any computer.

- A plain `Qwen2VLForConditionalGeneration` of {parameters:,} parameters in float16: text and vision width 128, 3 layers
  each, 4 heads, patches of 14 pixels. `AutoProcessor` and `AutoModelForImageTextToText` load it.
- Trained from nothing, in float32, by `python -m rococap.demo.train`: {steps:,} steps of {batch_size}, seed {seed},
  {training_phantoms:,} phantoms, {minutes:.0f} minutes on two CPU cores. An auxiliary loss that finds the lesion was
  used in training only.
- Prompt: "{prompt}", greedy, padding on the left.

| On {held_out:,} phantoms of seeds never trained on | |
| --- | --- |
| captions equal to the original, letter by letter | {exact_match:.1%} |
| right modality | {modality_accuracy:.1%} |
| control: equal to the caption of the previous picture | {control_previous_picture:.1%} |

`training.json` holds the same figures and the versions. Licence: Apache-2.0, the weights too.
"""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Scores:
    held_out: int
    exact_match: float
    modality_accuracy: float
    control_previous_picture: float


def draw_all(seeds: Sequence[int]) -> list[Phantom]:
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        return pool.map(draw, seeds, chunksize=64)


def build_tokenizer(captions: Sequence[str]) -> Any:
    texts = [*captions, *[f"user\n{PROMPT}\nassistant\n"] * 100]
    vocabulary = VOCABULARY - len(SPECIAL_TOKENS)
    trained = Qwen2Tokenizer().train_new_from_iterator(texts, vocabulary, show_progress=False)
    bpe = json.loads(trained.backend_tokenizer.to_str())["model"]
    tokens = [token for token in bpe["vocab"] if token not in SPECIAL_TOKENS]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate([*tokens, *SPECIAL_TOKENS])},
        merges=[tuple(pair) for pair in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="left",
        model_max_length=4096,
    )


def build_processor(tokenizer: Any) -> Any:
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=dict(PIXEL_AREAS)),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=dict(PIXEL_AREAS)),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any) -> Any:
    token = tokenizer.convert_tokens_to_ids
    # With 32 dimensions per head, the usual theta of 10,000 makes left and right almost indistinguishable.
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 3,
        "embed_dim": 128,
        "hidden_size": 128,
        "num_heads": 4,
        "mlp_ratio": 4,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
    }
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=token("<|im_end|>"), pad_token_id=token("<|endoftext|>")
    )
    return model


def prompt_text(processor: Any) -> str:
    content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
    messages = [{"role": "user", "content": content}]
    return str(processor.apply_chat_template(messages, add_generation_prompt=True))


class BranchWeights:
    """The loss weight of each token of a caption: low where all captions with the same beginning continue alike."""

    def __init__(self, captions: Sequence[Sequence[int]]) -> None:
        self._next: defaultdict[tuple[int, ...], set[int]] = defaultdict(set)
        for tokens in set(map(tuple, captions)):
            for i, token in enumerate(tokens):
                self._next[tokens[:i]].add(token)

    def __call__(self, caption: Sequence[int]) -> list[float]:
        tokens = tuple(caption)
        branches = (len(self._next[tokens[:i]]) > 1 for i in range(len(tokens)))
        return [1.0 if branch else FORCED_TOKEN_WEIGHT for branch in branches]


class Trainer:
    """Trains the model together with its auxiliary cell classifier."""

    def __init__(self, phantoms: Sequence[Phantom], steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.phantoms, self.steps, self.seed = phantoms, steps, seed
        tokenizer = build_tokenizer([phantom.caption for phantom in phantoms])
        self.processor = build_processor(tokenizer)
        self.model = build_model(tokenizer)
        self.prompt = prompt_text(self.processor)
        self.weights = BranchWeights([self.caption_tokens(p.caption) for p in phantoms])
        self.kinds = sorted({p.finding.kind for p in phantoms if p.finding})
        self.cells = nn.Linear(128, len(self.kinds) + 1)
        parameters = [*self.model.parameters(), *self.cells.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.05, betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate)

    def rate(self, step: int, warm_up: int = 60) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, self.steps - warm_up)))

    def caption_tokens(self, caption: str) -> list[int]:
        return [int(token) for token in self.processor.tokenizer(f"{caption}<|im_end|>").input_ids]

    def train(self) -> float:
        started = time.monotonic()
        self.model.train()
        for step, batch in enumerate(self.batches()):
            losses = self.step(batch)
            if step % 50 == 0 or step == self.steps - 1:
                seconds = time.monotonic() - started
                left = seconds / (step + 1) * (self.steps - step - 1)
                logger.info("step %4d  caption %.3f  cell %.3f  %4.0f s left", step, *losses, left)
        return time.monotonic() - started

    def batches(self) -> Iterator[list[Phantom]]:
        rng = np.random.default_rng(self.seed)
        order: list[int] = []
        for _ in range(self.steps):
            if len(order) < BATCH_SIZE:
                order = rng.permutation(len(self.phantoms)).tolist()
            yield [_retouched(self.phantoms[order.pop()], rng) for _ in range(BATCH_SIZE)]

    def step(self, batch: Sequence[Phantom]) -> tuple[float, float]:
        texts = [f"{self.prompt}{phantom.caption}<|im_end|>" for phantom in batch]
        inputs = self.processor(
            text=texts, images=[phantom.image for phantom in batch], padding=True, return_tensors="pt"
        )
        pixels, grids = inputs.pop("pixel_values"), inputs["image_grid_thw"]
        features = self.model.model.get_image_features(pixels, grids)
        logits = self.model(**inputs, mm_encoder_outputs={"image": features}, use_cache=False).logits
        caption_loss = self.caption_loss(logits, inputs["input_ids"], batch)
        cell_loss = self.cell_loss(features.pooler_output, grids, batch)
        self.optimizer.zero_grad()
        torch.autograd.backward(caption_loss + CELL_LOSS_WEIGHT * cell_loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return caption_loss.item(), cell_loss.item()

    def caption_loss(self, logits: Tensor, tokens: Tensor, batch: Sequence[Phantom]) -> Tensor:
        """Weighted cross entropy of the captions. Padding is on the left, so every row ends with its caption."""
        weights = torch.zeros(tokens.shape)
        for row, phantom in zip(weights, batch, strict=True):
            caption = self.weights(self.caption_tokens(phantom.caption))
            row[-len(caption) :] = torch.tensor(caption)
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return (losses * weights[:, 1:]).sum() / weights.sum()

    def cell_loss(self, features: Sequence[Tensor], grids: Tensor, batch: Sequence[Phantom]) -> Tensor:
        targets = torch.cat(
            [
                self.cell_targets(phantom.finding, int(height) // 2, int(width) // 2)
                for phantom, (_, height, width) in zip(batch, grids, strict=True)
            ]
        )
        weights = torch.ones(len(self.kinds) + 1)
        weights[0] = EMPTY_CELL_WEIGHT
        return F.cross_entropy(self.cells(torch.cat(list(features))), targets, weights)

    def cell_targets(self, finding: Finding | None, rows: int, columns: int) -> Tensor:
        targets = torch.zeros(rows * columns, dtype=torch.long)
        if finding:
            row = min(rows - 1, max(0, int(finding.y * rows)))
            column = min(columns - 1, max(0, int(finding.x * columns)))
            targets[row * columns + column] = 1 + self.kinds.index(finding.kind)
        return targets

    def save(self, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.model.to(torch.float16).save_pretrained(out)
        self.processor.save_pretrained(out)
        (out / "model.safetensors").chmod(0o644)


def _retouched(phantom: Phantom, rng: np.random.Generator) -> Phantom:
    """The phantom with random brightness, contrast and noise, so that a second pass sees a different picture."""
    pixels = np.atleast_3d(np.asarray(phantom.image, np.float32))
    pixels = pixels * rng.uniform(0.9, 1.1) + rng.uniform(-8, 8)
    pixels += rng.uniform(0, 5) * rng.standard_normal((*pixels.shape[:2], 1), np.float32)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).squeeze())
    return Phantom(image, phantom.caption, phantom.cui, phantom.finding)


def load(folder: Path) -> tuple[Any, Any]:
    """The processor and the float32 model, loaded with transformers' own classes, as any Qwen2-VL is.

    Raises ModelError if the folder has no Qwen2-VL processor.
    """
    processor = AutoProcessor.from_pretrained(folder)
    # For a processor class that it does not know, AutoProcessor returns a bare tokenizer without a warning.
    if not isinstance(processor, Qwen2VLProcessor):
        raise ModelError(f"{folder} has no Qwen2-VL processor: train the model again.")
    processor.image_processor.size = dict(PIXEL_AREAS)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return processor, model


def captions(processor: Any, model: Any, images: Sequence[Image.Image], batch_size: int = 32) -> list[str]:
    """Captions by greedy decoding, in the order of the images."""
    prompt, texts = prompt_text(processor), []
    for start in range(0, len(images), batch_size):
        batch = list(images[start : start + batch_size])
        inputs = processor(text=[prompt] * len(batch), images=batch, padding=True, return_tensors="pt")
        with torch.inference_mode():
            tokens = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        new_tokens = tokens[:, inputs["input_ids"].shape[1] :]
        texts += processor.batch_decode(new_tokens, skip_special_tokens=True)
    return texts


def modality(caption: str) -> str:
    words = caption.lower().rstrip(".").split()
    return next((word for word in ("ct", "mri", "x-ray", "ultrasound") if word in words), "none")


def score(generated: Sequence[str], original: Sequence[str]) -> Scores:
    def share(hits: Sequence[bool]) -> float:
        return round(sum(hits) / len(hits), 4)

    pairs = list(zip(generated, original, strict=True))
    previous = [original[-1], *original[:-1]]
    return Scores(
        held_out=len(pairs),
        exact_match=share([one == other for one, other in pairs]),
        modality_accuracy=share([modality(one) == modality(other) for one, other in pairs]),
        control_previous_picture=share([a == b for a, b in zip(generated, previous, strict=True)]),
    )


def evaluate(folder: Path, held_out: int) -> Scores:
    phantoms = draw_all(HELD_OUT_SEEDS["test"][-held_out:])
    originals = [phantom.caption for phantom in phantoms]
    generated = captions(*load(folder), [phantom.image for phantom in phantoms])
    for got, wanted in zip(generated, originals, strict=True):
        if got != wanted:
            logger.info("wrong: %s\n       %s", got, wanted)
    return score(generated, originals)


def write_record(out: Path, trainer: Trainer, seconds: float, scores: Scores) -> None:
    record: dict[str, Any] = {
        "seed": trainer.seed,
        "steps": trainer.steps,
        "batch_size": BATCH_SIZE,
        "training_phantoms": len(trainer.phantoms),
        "seconds": round(seconds),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        **asdict(scores),
        "prompt": PROMPT,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    (out / "README.md").write_text(CARD.format(**record, minutes=seconds / 60))
    logger.info("%s", json.dumps(record, indent=2))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m rococap.demo.train", description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of 32 phantoms")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--phantoms", type=int, default=24_000, help="number of different phantoms to train on")
    parser.add_argument("--held-out", type=int, default=640, help="phantoms to evaluate on")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    logger.info("drawing %d phantoms", options.phantoms)
    trainer = Trainer(draw_all(TRAINING_SEEDS[: options.phantoms]), options.steps, options.seed)
    seconds = trainer.train()
    trainer.save(options.out)
    write_record(options.out, trainer, seconds, evaluate(options.out, options.held_out))


if __name__ == "__main__":
    main()
