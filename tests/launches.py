"""Counts what a GPU would be asked to do: kernels, about one for each operator that makes or changes data, and reads.

A read makes the CPU wait for the device. Nothing runs on a GPU here: what would be there is marked, and so is
everything that is computed from it.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, Qwen2VLForConditionalGeneration

from rococap.demo import MODEL
from rococap.engines import decoding
from rococap.engines.continuous import ContinuousDecoder

NO_KERNELS = {"empty", "empty_like", "new_empty", "empty_strided", "_local_scalar_dense", "is_nonzero", "item"}
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


class Launches(TorchDispatchMode):
    """Counts operators, kernels and reads, and notes every operator with the storages that it gets from outside."""

    def __init__(self, decoder: ContinuousDecoder) -> None:
        super().__init__()
        model = decoder.loaded.model
        self.on_device = {_place(tensor) for tensor in [*model.parameters(), *model.buffers(), *_buffers(decoder)]}
        self.operators: Counter[str] = Counter()
        self.kernels = 0
        self.reads: Counter[str] = Counter()
        self.tape: list[tuple[object, ...]] = []
        self._made: set[int] = set()
        self._kept: list[Tensor] = []  # freed memory would come again under another name
        self._in_one_kernel = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator._schema.name.split("::")[1]
        given = _tensors((args, kwargs))
        result = operator(*args, **(kwargs or {}))
        made = _tensors(result)
        if any(_place(tensor) in self.on_device for tensor in given):
            self.on_device |= {_place(tensor) for tensor in made}
            if name in READS or _depends_on_content(name, args):
                self.reads[name] += 1
        self._note(name, given, made, args)
        return result

    def _note(self, name: str, given: list[Tensor], made: list[Tensor], args: Any) -> None:
        shapes = [(tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in given]
        outside = [_place(tensor) for tensor in given if _place(tensor) not in self._made]
        numbers = [repr(leaf) for leaf in tree_leaves(args) if not isinstance(leaf, Tensor)]
        self.tape.append((name, tuple(shapes), tuple(outside), tuple(numbers)))
        self._made |= {_place(tensor) for tensor in made} - set(outside)
        self._kept += made
        if not self._in_one_kernel:
            self.operators[name] += 1
            self.kernels += name not in NO_KERNELS and (name.endswith("_") or not _is_view(given, made))

    @contextmanager
    def one_kernel(self) -> Iterator[None]:
        """For a function that is one kernel on a GPU, and several operators on a CPU."""
        self.kernels += 1
        self._in_one_kernel = True
        yield
        self._in_one_kernel = False


class _Functions(TorchFunctionMode):
    """Reads that reach no operator on a CPU, and functions that CUDA has a single kernel for."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in ("tolist", "numpy", "item") and _place(args[0]) in self.launches.on_device:
            self.launches.reads[name] += name != "item"  # which is _local_scalar_dense as well
        if function in (torch.rms_norm, torch.nn.functional.rms_norm):
            with self.launches.one_kernel():
                return function(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@contextmanager
def counted(decoder: ContinuousDecoder) -> Iterator[Launches]:
    """Counts what happens inside. What is uploaded there is on the device."""
    launches, upload = Launches(decoder), decoding.upload

    def to_device(tensor: Tensor, device: torch.device) -> Tensor:
        copy = upload(tensor, device).clone()
        launches.on_device.add(_place(copy))
        launches._kept.append(copy)
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "upload", to_device)
        with _Functions(launches), launches:
            yield launches


def _buffers(decoder: ContinuousDecoder) -> list[Tensor]:
    slots = decoder._slots
    own = [tensor for tensor in vars(slots).values() if isinstance(tensor, Tensor)]
    return own + [buffer for layer in slots.layers for buffer in (layer.keys, layer.values) if buffer is not None]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _is_view(given: list[Tensor], made: list[Tensor]) -> bool:
    return {_place(tensor) for tensor in made} <= {_place(tensor) for tensor in given}


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _depends_on_content(name: str, args: Any) -> bool:
    """Whether the shape of the result does: the CPU has to wait for it."""
    if name == "repeat_interleave":
        return True
    indices = args[1] if name in ("index", "index_put", "index_put_") else ()
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def write_deep_model(folder: Path) -> Path:
    """Writes a narrow Qwen2-VL with as many layers as the one of 2 billion parameters, and random weights."""
    config = AutoConfig.from_pretrained(MODEL)
    text = config.text_config.to_dict() | {
        "num_hidden_layers": 28,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    del text["layer_types"]
    vision = config.vision_config.to_dict() | {"depth": 32, "hidden_size": 192}
    rest = {k: v for k, v in config.to_dict().items() if k not in ("text_config", "vision_config", "dtype")}
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(type(config)(**rest, text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    for path in MODEL.iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    return folder
