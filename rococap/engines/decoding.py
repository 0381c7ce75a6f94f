"""What continuous and static decoding share: the loaded model, the pictures prepared for it, and batches of them.

Batches are left-padded, and the model gets the processor's entire output: with right padding, or without
mm_token_type_ids, it captions the wrong picture fluently, without an error. Knows no queue and no recipe.
"""

import gc
import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rococap.engines import Completion, Failure, Prepared, Request, Streaming


@dataclass(frozen=True, slots=True)
class Inputs:
    """The processor's tensors for one request, its limit, and the request itself in case its pictures are to shrink.

    `precomputed` is what the decoder computed from the tensors beforehand, if it does so.
    """

    tensors: dict[str, Tensor]
    request: Request
    max_new_tokens: int
    precomputed: "Precomputed | None" = None
    flags: str = ""


@dataclass(frozen=True, slots=True)
class Precomputed:
    """What the model would compute from the shape of a prompt and its picture; on the CPU.

    `positions` are the position ids, of shape [..., 1, tokens]; `tower` is further input of the vision tower, by the
    name of the model's argument, with an entry for each patch.
    """

    positions: Tensor
    tower: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model on its device, and what ends a caption: a token in `ends`, or the limit of its request.

    No request has a limit above `max_new_tokens`.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    ends: frozenset[int]
    pad: int
    max_new_tokens: int

    def is_over(self, row: "Row") -> bool:
        limit: int = row.picture.inputs.max_new_tokens
        return not row.is_finite or row.tokens[-1] in self.ends or len(row.tokens) == limit

    def batch(self, pictures: Sequence[Prepared], on_host: Set[str] = frozenset()) -> dict[str, Tensor]:
        """Makes one left-padded batch on the device, except for the tensors named in `on_host`.

        Pixels are joined on the device: on the CPU, that would keep the thread waiting that launches the kernels.
        """
        rows = [
            {name: self.upload(tensor) if tensor.is_floating_point() else tensor for name, tensor in row.items()}
            for row in (picture.inputs.tensors for picture in pictures)
        ]
        joined = collate(rows, self.pad)
        return {name: tensor if name in on_host else self.upload(tensor) for name, tensor in joined.items()}

    def upload(self, tensor: Tensor) -> Tensor:
        return upload(tensor, self.device)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to the device, unless it is there already, without waiting for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(slots=True)
class Row:
    """A picture in progress: its caption's tokens so far, and the time spent on it.

    `taken_at` is in seconds on the decoder's clock.
    """

    picture: Prepared
    taken_at: float
    tokens: list[int]
    is_finite: bool = True
    share_ms: float = 0.0
    prefill_ms: float = 0.0
    batch_size: int = 1

    def completion(self, loaded: Loaded, now: float) -> Completion:
        """Returns the caption, or the failure `non_finite`. `now` is in seconds on the same clock as `taken_at`."""
        if not self.is_finite:
            dtype = dtype_name(loaded.model.dtype)
            advice = "its weights are damaged" if dtype == "float32" else "enqueue a run with another --dtype"
            message = f"The model's output is not finite in {dtype}: {advice}."
            return Completion(self.picture.job_id, failure=Failure("non_finite", message))
        end = next((index for index, token in enumerate(self.tokens) if token in loaded.ends), None)
        return Completion(
            self.picture.job_id,
            # Stored as the model wrote it, except for special tokens.
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


def tell(source: Streaming, rows: Iterable[Row], ends: Set[int]) -> None:
    """Tells a source the latest token of each row, unless that ends it."""
    for row in rows:
        if row.is_finite and row.tokens[-1] not in ends:
            source.tokens(row.picture.job_id, len(row.tokens) - 1, row.tokens[-1:])


def share(rows: Sequence[Row], seconds: float) -> None:
    """Divides a step's time among the rows active in it."""
    for row in rows:
        row.share_ms += seconds * 1000 / len(rows)
        row.batch_size = max(row.batch_size, len(rows))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device lacked memory: PyTorch, or cuBLAS or cuDNN, whose handles and workspaces need some as well."""
    return isinstance(error, torch.OutOfMemoryError) or bool(_LIBRARY_OUT_OF_MEMORY.search(str(error)))


_LIBRARY_OUT_OF_MEMORY = re.compile(r"CU(BLAS|DNN)_STATUS_\w*ALLOC\w*_FAILED")


def out_of_memory(picture: Prepared) -> Completion:
    """Returns the failure of a picture that does not fit in memory on its own."""
    message = f"Out of memory with this picture alone ({picture.n_tokens} prompt tokens)."
    return Completion(picture.job_id, failure=Failure("out_of_memory", message))


def collate(rows: Sequence[dict[str, Tensor]], pad_token: int) -> dict[str, Tensor]:
    """Makes one batch from pictures prepared singly: tensors of the prompt's shape are padded on the left.

    Pictures cut into fewer tiles than others get tiles of zeros, which models that use tiles ignore.
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
    """Appends zeros in every dimension but the first."""
    gaps = [want - have for want, have in zip(shape, tensor.shape[1:], strict=True)]
    return pad(tensor, [n for gap in reversed(gaps) for n in (0, gap)]) if any(gaps) else tensor


def pad_left(tensor: Tensor, width: int, fill: int = 0) -> Tensor:
    """Pads the last dimension on the left."""
    return pad(tensor, (width - tensor.shape[-1], 0), value=fill)


def _pad_left(tensor: Tensor, prompt_shape: torch.Size, width: int, fill: int) -> Tensor:
    return pad_left(tensor, width, fill) if tensor.shape == prompt_shape else tensor


def free_memory(device: torch.device) -> None:
    """Returns unused memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def dtype_name(dtype: torch.dtype) -> str:
    """The name as in a recipe: `bfloat16`."""
    return str(dtype).removeprefix("torch.")
