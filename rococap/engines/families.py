"""What differs between families of models: how bounds on a picture's pixels are said, and names that lead nowhere.

It imports no torch, so that a wrong name is refused when a run is registered.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from rococap.errors import ModelError
from rococap.recipe import Recipe

Bounds = Mapping[str, Any]
"""Attributes of the image processor."""

NO_SUCH_MODEL = {"HuggingFaceM4/SmolVLM2-256M": "HuggingFaceTB/SmolVLM2-256M-Video-Instruct"}
INTERNVL_SISTER = "OpenGVLab/InternVL3-2B-hf"


def pixel_bounds(model_type: str, image_processor: Any, recipe: Recipe) -> Bounds | None:
    """How the image processor of a model is told the recipe's bounds; None if rococap does not know.

    Raises ModelError, naming the field, for bounds that the model cannot keep.
    """
    find = _FAMILIES.get(model_type)
    return None if find is None else find(image_processor, recipe)


def _areas(image_processor: Any, recipe: Recipe) -> Bounds:
    """Qwen's: areas, in spite of the names."""
    return {"size": {"shortest_edge": recipe.min_pixels, "longest_edge": recipe.max_pixels}}


def _edge_in_tiles(image_processor: Any, recipe: Recipe) -> Bounds:
    """SmolVLM's: the longer side of a picture, to which every picture is brought and which is then cut into tiles."""
    tile = dict(image_processor.max_image_size)["longest_edge"]
    most = dict(image_processor.size)["longest_edge"] // tile
    n = round(math.sqrt(recipe.max_pixels) / tile)
    return {"size": {"longest_edge": tile * max(1, min(n, most))}}


def _number_of_tiles(image_processor: Any, recipe: Recipe) -> Bounds:
    """InternVL's: a picture becomes that many tiles at most, in the grid that is nearest to its shape."""
    size = dict(image_processor.size)
    n = recipe.max_pixels // (size["height"] * size["width"])
    return {"max_patches": max(1, min(n, image_processor.max_patches))}


def _fixed(image_processor: Any, recipe: Recipe) -> Bounds:
    """Gemma's: every picture becomes the same square."""
    size = dict(image_processor.size)
    if recipe.max_pixels < size["height"] * size["width"]:
        raise ModelError(
            f"max_pixels: this model brings every picture to {size['height']} x {size['width']}. "
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
    """Raises ModelError for a name that circulates and that the hub does not have, with the right one."""
    if right := NO_SUCH_MODEL.get(model):
        raise ModelError(f"The hub has no model {model}: it is called {right}.")


def check_native(model: str, model_type: str) -> None:
    """Raises ModelError for a model that transformers has no class for."""
    if model_type != "internvl_chat":
        return
    sister = model + "-hf" if model.startswith("OpenGVLab/InternVL3") else INTERNVL_SISTER
    raise ModelError(
        f"transformers has no class for {model} (internvl_chat). Enqueue a run with --model {sister}, "
        "or serve it, as with vllm serve, and start the worker with --engine openai."
    )
