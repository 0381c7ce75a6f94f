"""What differs between model families: how a picture's size is bounded, and names that do not work.

Does not import torch, so that a wrong name can be refused when a run is registered. Loads nothing.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from rococap.errors import ModelError
from rococap.recipe import Recipe

Bounds = Mapping[str, Any]
"""Attributes to set on the image processor."""

NO_SUCH_MODEL = {"HuggingFaceM4/SmolVLM2-256M": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"}
INTERNVL_CONVERTED = "OpenGVLab/InternVL3-2B-hf"


def pixel_bounds(model_type: str, image_processor: Any, recipe: Recipe) -> Bounds | None:
    """Returns the image processor's attributes for the recipe's bounds; None if the family is unknown.

    Raises ModelError, naming the field, for bounds that the model cannot keep.
    """
    find = _FAMILIES.get(model_type)
    return None if find is None else find(image_processor, recipe)


def _areas(image_processor: Any, recipe: Recipe) -> Bounds:
    """Qwen: the bounds are areas in pixels, in spite of their names."""
    return {"size": {"shortest_edge": recipe.min_pixels, "longest_edge": recipe.max_pixels}}


def _edge_in_tiles(image_processor: Any, recipe: Recipe) -> Bounds:
    """SmolVLM: the length to which the longer side of every picture is resized, before it is cut into tiles."""
    tile = dict(image_processor.max_image_size)["longest_edge"]
    max_tiles = dict(image_processor.size)["longest_edge"] // tile
    n = round(math.sqrt(recipe.max_pixels) / tile)
    return {"size": {"longest_edge": tile * max(1, min(n, max_tiles))}}


def _number_of_tiles(image_processor: Any, recipe: Recipe) -> Bounds:
    """InternVL: the maximum number of tiles, in the grid whose shape is closest to the picture's."""
    size = dict(image_processor.size)
    n = recipe.max_pixels // (size["height"] * size["width"])
    return {"max_patches": max(1, min(n, image_processor.max_patches))}


def _fixed(image_processor: Any, recipe: Recipe) -> Bounds:
    """Gemma: every picture becomes the same square, so there is nothing to set."""
    size = dict(image_processor.size)
    if recipe.max_pixels < size["height"] * size["width"]:
        raise ModelError(
            f"max_pixels: this model resizes every picture to {size['height']} x {size['width']}. "
            f"Enqueue a run with --max-pixels {size['height'] * size['width']} or more."
        )
    return {}


_FAMILIES: dict[str, Callable[[Any, Recipe], Bounds]] = {
    "gemma3": _fixed,
    "internvl": _number_of_tiles,
    "qwen2_5_vl": _areas,
    "qwen2_vl": _areas,
    "qwen3_vl": _areas,
    "smolvlm": _edge_in_tiles,
}


def check_name(model: str) -> None:
    """Raises ModelError, with the correct name, for a name that is often quoted but does not exist on the hub."""
    if correct := NO_SUCH_MODEL.get(model):
        raise ModelError(f"The hub has no model {model}: its name is {correct}.")


def check_native(model: str, model_type: str) -> None:
    """Raises ModelError for a model that transformers has no class for."""
    if model_type != "internvl_chat":
        return
    converted = model + "-hf" if model.startswith("OpenGVLab/InternVL3") else INTERNVL_CONVERTED
    raise ModelError(
        f"transformers has no class for {model} (internvl_chat). Enqueue a run with --model {converted}, "
        "or serve it, for example with vllm serve, and start the worker with --engine openai."
    )
