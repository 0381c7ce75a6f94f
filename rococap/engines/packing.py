"""Speeds up large linear layers on a CPU, in float32: their weights are laid out for oneDNN in advance.

PyTorch lays them out again in every call: batches of 4 to 32 rows then take 1.3 to 2.6 times as long (docs/log.md).
For small layers the overhead of the call outweighs this. Knows no model in particular.
"""

import logging

import psutil
import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

LARGE = 400_000
"""The number of weights from which packing a layer pays off."""
ROWS = 16
"""The batch size for which the layout is chosen."""
MEMORY_SHARE = 0.5
"""The share of free memory that packed weights may take, in addition to the original ones."""


def pack(model: nn.Module) -> None:
    """Makes large linear layers use packed weights, if oneDNN is available and there is memory for them."""
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module.weight.numel() >= LARGE and module.weight.dtype == torch.float32
    ]
    n_bytes = sum(layer.weight.nbytes for layer in layers)
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not (layers and has_onednn) or n_bytes > MEMORY_SHARE * _available():
        return
    for layer in layers:
        _pack(layer)
    log.debug("%d linear layers packed, %.0f MB", len(layers), n_bytes / 1e6)


def _available() -> int:
    """The available memory in bytes."""
    return int(psutil.virtual_memory().available)


@torch.inference_mode()
def _pack(layer: nn.Linear) -> None:
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)

    def forward(rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, layer.bias, "none", [], "")
        return product

    layer.forward = forward  # type: ignore[assignment, method-assign]
