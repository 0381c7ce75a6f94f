"""What the ways of decoding share: a loaded model, pictures prepared for it, and a batch of them.

Batches are left-padded and the processor's whole output goes to the model: right padding, or leaving out
mm_token_type_ids, gives fluent captions of the wrong picture and no error.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad

from rococap.engines import Completion, Failure, Prepared


@dataclass(frozen=True, slots=True)
class Inputs:
    """The processor's tensors for one picture, and the picture, should it have to be made smaller."""

    tensors: dict[str, Tensor]
    picture: Image
    flags: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model on its device, and what ends a caption: one of `ends`, or `max_new_tokens`."""

    model: Any
    tokenizer: Any
    device: torch.device
    ends: frozenset[int]
    pad: int
    max_new_tokens: int

    def is_over(self, row: "Row") -> bool:
        return not row.is_finite or row.tokens[-1] in self.ends or len(row.tokens) == self.max_new_tokens

    def batch(self, pictures: Sequence[Prepared]) -> dict[str, Tensor]:
        """One left-padded batch on the device."""
        inputs = collate([picture.inputs.tensors for picture in pictures], self.pad)
        return {name: self._to_device(tensor) for name, tensor in inputs.items()}

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


@dataclass(slots=True)
class Row:
    """A picture under way: what was said of it so far, and what it took. Times in seconds and milliseconds."""

    picture: Prepared
    taken_at: float
    tokens: list[int]
    is_finite: bool = True
    share_ms: float = 0.0
    prefill_ms: float = 0.0
    batch_size: int = 1

    def completion(self, loaded: Loaded, now: float) -> Completion:
        if not self.is_finite:
            dtype = dtype_name(loaded.model.dtype)
            mend = "its weights are damaged" if dtype == "float32" else "enqueue a run with another --dtype"
            message = f"The model's output is not finite in {dtype}: {mend}."
            return Completion(self.picture.job_id, failure=Failure("non_finite", message))
        end = next((at for at, token in enumerate(self.tokens) if token in loaded.ends), None)
        return Completion(
            self.picture.job_id,
            # Stored as the model said it: only its special tokens are left out.
            text=loaded.tokenizer.decode(self.tokens[:end], skip_special_tokens=True),
            flags=self.picture.inputs.flags,
            finish_reason="length" if end is None else "stop",
            prompt_tokens=self.picture.n_tokens,
            new_tokens=len(self.tokens) if end is None else end + 1,
            processing_ms=self.share_ms,
            prefill_ms=self.prefill_ms,
            latency_ms=(now - self.taken_at) * 1000,
            batch_size=self.batch_size,
        )


def share(rows: Sequence[Row], seconds: float) -> None:
    """A step's time, over the rows active in it."""
    for row in rows:
        row.share_ms += seconds * 1000 / len(rows)
        row.batch_size = max(row.batch_size, len(rows))


def out_of_memory(picture: Prepared) -> Completion:
    message = f"Out of memory with this picture alone ({picture.n_tokens} prompt tokens)."
    return Completion(picture.job_id, failure=Failure("out_of_memory", message))


def collate(rows: Sequence[dict[str, Tensor]], pad_token: int) -> dict[str, Tensor]:
    """One batch from pictures prepared alone: what has the length of the prompt is padded on the left.

    Pictures that were cut into fewer tiles than others get tiles of zeros, which the models that cut them leave out.
    """
    width = max(row["input_ids"].shape[1] for row in rows)

    def column(name: str) -> Tensor:
        fill = pad_token if name == "input_ids" else 0
        return _joined([_pad_left(row[name], row["input_ids"].shape, width, fill) for row in rows])

    return {name: column(name) for name in rows[0]}


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    return torch.cat([_filled_up(tensor, shape) for tensor in tensors])


def _filled_up(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """With zeros behind, in every dimension but the first."""
    gaps = [want - have for want, have in zip(shape, tensor.shape[1:], strict=True)]
    return pad(tensor, [n for gap in reversed(gaps) for n in (0, gap)]) if any(gaps) else tensor


def _pad_left(tensor: Tensor, prompt_shape: torch.Size, width: int, fill: int) -> Tensor:
    return pad(tensor, (width - tensor.shape[1], 0), value=fill) if tensor.shape == prompt_shape else tensor


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
