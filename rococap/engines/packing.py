"""Large linear layers on a CPU, in float32, by oneDNN with their weights laid out for it beforehand.

PyTorch lays them out again at every call: for batches of 4 to 32 rows that takes 1.3 to 2.6 times as long
(docs/log.md). Small layers lose by the call's overhead, and a single row gains nothing.
"""

import logging

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

log = logging.getLogger(__name__)

LARGE = 400_000
"""Weights, from which on it pays."""
ROWS = 16
"""For which the layout is chosen."""
MEMORY_SHARE = 0.5
"""Of what is free: the weights are there twice then."""


def pack(model: nn.Module) -> None:
    """Lets large linear layers multiply packed weights, where oneDNN is there and there is memory for them."""
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
    """Bytes."""
    return int(psutil.virtual_memory().available)


@torch.inference_mode()
def _pack(layer: nn.Linear) -> None:
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)

    def forward(rows: Tensor) -> Tensor:
        if rows.numel() == layer.in_features:
            return linear(rows, layer.weight, layer.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, layer.bias, "none", [], "")
        return product

    layer.forward = forward  # type: ignore[assignment, method-assign]
