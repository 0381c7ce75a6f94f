"""Computes on the CPU, in advance, what a model derives from the shape of a prompt and its picture.

Left to itself, a model derives position ids and the like from tensors on the device, and waits for the device every
time it reads one of them back: with Qwen2-VL-2B 169 times in a prefill of 8 pictures. Knows no model in particular,
only names that transformers' models of the Qwen-VL kind have in common; what it does not recognise stays on the device.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rococap.engines.decoding import Precomputed, pad_left

GRID = "image_grid_thw"
"""Sizes of each picture in patches: time, height, width."""


def precompute(model: Any, inputs: dict[str, Tensor]) -> Precomputed:
    """Returns what the model derives from one prompt and its pictures."""
    of_tower = _tower_inputs(tower(model), inputs[GRID]) if keeps_grid(model) and GRID in inputs else {}
    return Precomputed(model._prepare_position_ids_for_generation(inputs["input_ids"], inputs), of_tower)


def keeps_grid(model: Any) -> bool:
    """Whether grids may stay on the CPU: what the vision tower computes from them can be passed to it instead."""
    return hasattr(functions(tower(model)), "get_vision_position_ids")


def join(rows: Sequence[Precomputed]) -> Precomputed:
    """Makes one left-padded batch."""
    width = max(row.positions.shape[-1] for row in rows)
    return Precomputed(
        torch.cat([pad_left(row.positions, width) for row in rows], dim=-2),
        {name: torch.cat([row.tower[name] for row in rows]) for name in rows[0].tower},
    )


def tower(model: Any) -> Any:
    """Returns the vision tower of a model of the Qwen-VL kind, else None."""
    return getattr(model.base_model, "visual", None)


def functions(vision: Any) -> Any:
    """Returns the module in which the tower's class is written, which has the functions that it uses."""
    return sys.modules[type(vision).__module__]


def _tower_inputs(vision: Any, grid: Tensor) -> dict[str, Tensor]:
    """The model passes arguments that begin with `image_` on to the vision tower."""
    own, merge = functions(vision), vision.spatial_merge_size
    inputs = {"image_position_ids": own.get_vision_position_ids(grid, merge)}
    if hasattr(own, "get_vision_interpolation_indices_and_weights"):
        inputs["image_interp_indices"], inputs["image_interp_weights"] = (
            own.get_vision_interpolation_indices_and_weights(
                grid,
                num_grid_per_side=vision.num_grid_per_side,
                mode=vision.interpolation_mode,
                align_corners=vision.interpolation_align_corners,
                spatial_merge_size=merge,
            )
        )
    return inputs
