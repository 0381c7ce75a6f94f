"""Makes what the model learns from: the prompt and the picture exactly as captioning prepares them, and the caption.

The loss covers the tokens of the caption and the token that ends it, and nothing else.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from rococap.engines.checkpoint import end_tokens
from rococap.engines.decoding import collate
from rococap.engines.template import turn_end
from rococap.training.examples import Example

IGNORED = -100
"""The label of a token that is not learned."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[^\Wa-z])")


@dataclass(frozen=True, slots=True)
class Learned:
    """The examples that have a caption to learn, with the tokens of each, and how many captions were shortened at the
    end of a sentence, or refused: because no sentence of theirs is short enough, or because they contain a special
    token.
    """

    examples: list[Example]
    tokens: list[list[int]]
    shortened: int
    refused: int


class Captions:
    """Turns captions into the tokens to learn: at most `limit`, and then the token that ends a caption."""

    def __init__(self, tokenizer: Any, end: int, limit: int) -> None:
        self.tokenizer = tokenizer
        self.end = end
        self.limit = limit
        self._special = _special_tokens(tokenizer)

    def learned(self, examples: Sequence[Example]) -> Learned:
        kept: list[Example] = []
        tokens: list[list[int]] = []
        n_shortened = 0
        for example in examples:
            text = self._short_enough(example.caption)
            if text is None:
                continue
            n_shortened += text != example.caption
            kept.append(example)
            tokens.append([*self._ids(text), self.end])
        return Learned(kept, tokens, n_shortened, len(examples) - len(kept))

    def _short_enough(self, caption: str) -> str | None:
        """The caption, or as many of its first sentences as fit; None if not even one does."""
        ids = self._ids(caption)
        if self._special.intersection(ids):
            return None
        if len(ids) <= self.limit:
            return caption
        ends = [match.start() for match in _SENTENCE_END.finditer(caption)]
        return next((caption[:at] for at in reversed(ends) if len(self._ids(caption[:at])) <= self.limit), None)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def end_of_caption(model: Any, processor: Any, name: str) -> int:
    """The token that ends a caption: the one after an answer in the chat template, or the first that generation knows.

    Raises ModelError if there is none.
    """
    known = end_tokens(model.generation_config, processor, name)
    end = turn_end(processor, name)
    return known[0] if end is None else end


def _special_tokens(tokenizer: Any) -> frozenset[int]:
    added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    return frozenset(added | set(tokenizer.all_special_ids))


# --- Batches ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One picture with its prompt and caption, as the model takes it, and the number of tokens to learn."""

    image_id: str
    tensors: dict[str, Tensor]
    n_learned: int


def row(image_id: str, prompt: Mapping[str, Tensor], tokens: Sequence[int]) -> Row:
    """Returns the row of a prepared picture, whose tensors are those of `engine.prepare`, and the tokens to learn."""
    shape = prompt["input_ids"].shape
    caption = torch.tensor([tokens])
    tails = {"input_ids": caption, "attention_mask": torch.ones_like(caption)}
    text = torch.zeros_like(caption)  # what marks a picture's tokens marks none of these
    tensors = {
        name: torch.cat([tensor, tails.get(name, text).to(tensor.dtype)], dim=1) if tensor.shape == shape else tensor
        for name, tensor in prompt.items()
    }
    tensors["labels"] = torch.cat([torch.full(shape, IGNORED), caption], dim=1)
    return Row(image_id, tensors, len(tokens))


@dataclass(frozen=True, slots=True)
class Collator:
    """Joins rows into a batch for `Trainer`, padded on the left as in captioning.

    All captions then end at the same place, so that the model computes logits for the longest caption's tokens only:
    with 150,000 words in a vocabulary, those of prompt and picture would take more memory than the rest of the model.
    """

    pad: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        joined = collate([row.tensors for row in rows], self.pad)
        # First, because Trainer takes the size of a batch from its first tensor, and pixels may have rows of their own.
        batch: dict[str, Any] = {"input_ids": joined["input_ids"]} | joined
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, IGNORED)
        kept = 1 + max(row.n_learned for row in rows)  # and one before, which predicts the first
        return batch | {"logits_to_keep": kept, "use_cache": False, "image_ids": [row.image_id for row in rows]}


def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int) -> Tensor:
    """The cross entropy of the tokens to learn, divided by their number in the whole effective batch."""
    predicted = outputs.logits[:, :-1].float()
    wanted = labels[:, -predicted.shape[1] :].to(predicted.device)
    total = cross_entropy(predicted.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / num_items_in_batch
