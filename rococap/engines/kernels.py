"""Makes a model launch fewer kernels for the same result, apart from rounding in half precision.

Decoding is limited by the number of kernels, and reading pictures by passes over memory. Knows no model in particular:
what it does not recognise, such as layers with an adapter or with quantised weights, stays as it is.
"""

import inspect
import logging
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers.integrations import sdpa_attention

from rococap.engines.precompute import functions, tower

log = logging.getLogger(__name__)

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of projections that multiply the same input."""
ROTATE = "apply_rotary_pos_emb_vision"
"""The function that rotates the vision tower's queries and keys, in models of the Qwen-VL kind."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def reduce_kernels(model: nn.Module, device: torch.device) -> None:
    """Replaces parts of the model in place, before its first use and after its adapter was applied."""
    for module in list(model.modules()):
        if isinstance(module, nn.Conv3d):
            _multiply(module)
        if hasattr(module, "_hf_hook"):  # accelerate's, which moves data for a layer on another device
            continue
        if type(module).__name__.endswith("RMSNorm"):
            _fuse_norm(module)
        for names in TOGETHER:
            _merge(module, names)
    if device.type == "cuda":
        compile_vision(model)


def warn_of_copies(model: nn.Module) -> None:
    """Warns of a transformers that copies keys and values at each step, for every query head that shares them."""
    n = max(getattr(module, "num_key_value_groups", 1) for module in model.modules())
    if n > 1 and not hasattr(sdpa_attention, "pack_gqa"):
        log.warning(
            "transformers %s copies the keys and values of this model %d-fold at every decode step, which slows "
            "captioning down. Upgrade it: pip install -U 'transformers>=5.23,<6'",
            *(version("transformers"), n),
        )


# --- Norms -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _fuse_norm(norm: Any) -> None:
    """Computes a root-mean-square norm as one kernel instead of six, if it is plain: Gemma's, for example, is not."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    takes_one = len(inspect.signature(norm.forward).parameters) == 1  # others have a gate, for example
    if weight is None or eps is None or weight.dtype not in TOLERANCE or not takes_one:
        return

    def forward(hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, weight.shape, norm.weight, eps)

    sample = torch.linspace(-1, 1, weight.numel(), dtype=weight.dtype, device=weight.device)[None]
    tolerance = TOLERANCE[weight.dtype]
    if torch.allclose(norm(sample), forward(sample), rtol=tolerance, atol=tolerance):
        norm.forward = forward


# --- Projections -----------------------------------------------------------------------------------------------


def _merge(module: nn.Module, names: Sequence[str]) -> None:
    """Computes projections of the same input as one product."""
    layers = [getattr(module, name, None) for name in names]
    plain = [layer for layer in layers if type(layer) is nn.Linear]
    kinds = {(layer.bias is None, layer.in_features, layer.weight.dtype, layer.weight.device) for layer in plain}
    if len(plain) < len(names) or len(kinds) > 1:
        return
    product = _Product(plain)
    for index, name in enumerate(names):
        setattr(module, name, _Part(product, index))


class _Product(nn.Module):
    """Several linear layers as one. The parts of the latest product are kept until the last one was taken."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        first = layers[0]
        self.sizes = [layer.out_features for layer in layers]
        self.linear = nn.Linear(first.in_features, sum(self.sizes), first.bias is not None, device="meta")
        self.linear.weight = _joined([layer.weight for layer in layers])
        if first.bias is not None:
            self.linear.bias = _joined([layer.bias for layer in layers])
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, index: int, rows: Tensor) -> Tensor:
        if rows is not self._input:
            self._input, self._parts = rows, self.linear(rows).split(self.sizes, dim=-1)
        part = self._parts[index]
        if index == len(self.sizes) - 1:
            self._input, self._parts = None, ()
        return part


class _Part(nn.Module):
    """Stands for one of the layers of a product."""

    def __init__(self, product: _Product, index: int) -> None:
        super().__init__()
        self.product = product
        self.index = index

    def forward(self, rows: Tensor) -> Tensor:
        return self.product.part(self.index, rows)


def _joined(parameters: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.cat([parameter.detach() for parameter in parameters]), requires_grad=False)


# --- Patches -----------------------------------------------------------------------------------------------------


def _multiply(conv: nn.Conv3d) -> None:
    """Computes a convolution whose input is a single patch as what it is, a matrix product.

    As a convolution in bfloat16, it takes seconds with cuDNN on some GPUs and, on a CPU, a tenth of the time to read a
    picture.
    """

    def forward(patches: Tensor) -> Tensor:
        if patches.shape[2:] != conv.kernel_size or conv.padding != (0, 0, 0) or conv.groups != 1:
            return nn.Conv3d.forward(conv, patches)
        return linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)[..., None, None, None]

    conv.forward = forward  # type: ignore[assignment, method-assign]


# --- The vision tower on a GPU ---------------------------------------------------------------------------------


@torch.inference_mode()  # the same mode as that of pictures: another would make the first picture compile again
def compile_vision(model: Any) -> bool:
    """Fuses the vision tower's rotation and activation, which otherwise pass over memory 25 times and three times.

    Returns whether that was possible. It needs a C compiler: without one they stay as they are, and the log says so.
    """
    vision = tower(model)
    rotate: Any = getattr(functions(vision), ROTATE, None)
    activations = [] if vision is None else [m for m in vision.modules() if type(m).__name__ == "QuickGELUActivation"]
    try:
        # Called once with a sample, so that they are compiled, or fail, now rather than at the first picture.
        if rotate is not None:
            rotate = torch.compile(rotate, dynamic=True)
            rotate(*_sample(vision))
        if activations:
            activate = torch.compile(_quick_gelu, dynamic=True)
            activate(_sample(vision)[0].flatten(1).contiguous())
    except Exception as error:  # torch.compile raises anything
        reason = str(error).strip().partition("\n")[0]
        log.warning("the vision tower is not compiled, so that reading pictures is slower: %s", reason)
        return False
    if rotate is not None:
        setattr(functions(vision), ROTATE, rotate)
    for activation in activations:
        activation.forward = activate
    return rotate is not None or bool(activations)


def _quick_gelu(rows: Tensor) -> Tensor:
    """Hendrycks and Gimpel 2016, the approximation by a sigmoid; as in transformers."""
    return rows * torch.sigmoid(1.702 * rows)


def _sample(vision: Any) -> tuple[Tensor, ...]:
    """Queries, keys, cosines and sines of 64 patches, laid out as the tower's attention lays them out.

    Anything else that they have in common would be compiled in, and pictures would compile again.
    """
    attention = next(module for module in vision.modules() if hasattr(module, "qkv"))
    weight, heads = attention.qkv.weight, attention.num_heads
    size = weight.shape[1] // heads
    rows = torch.ones(64, 3, heads, size, dtype=vision.dtype, device=weight.device)
    query, key, _ = rows.permute(1, 0, 2, 3).unbind(0)
    return query, key, torch.ones(64, size, device=weight.device), torch.ones(64, size, device=weight.device)
