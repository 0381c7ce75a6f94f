"""Loads the weights of a model, quantised or not, and refuses those that do not belong to it.

Knows no engine: what runs the model is up to `hf`.
"""

import importlib.util
import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from rococap.engines.checkpoint import reading
from rococap.errors import ModelError
from rococap.recipe import LoadIn

log = logging.getLogger(__name__)

Size = tuple[int, ...]

NO_ADAPTER = {"subfolder": "no-adapter", "local_files_only": True}
"""Makes transformers find no adapter beside the weights, which it would apply silently. See `adapters.apply`."""


def quantisation(load_in: LoadIn, dtype: torch.dtype, name: str, source: dict[str, Any]) -> BitsAndBytesConfig:
    """LLM.int8 (Dettmers et al. 2022), or 4-bit NormalFloat (Dettmers et al. 2023) with arithmetic in `dtype`.

    Quantises the language model's layers only: its head and the vision tower are small, and no later layer makes up for
    what they lose.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("--load-in needs bitsandbytes. Install it: pip install 'rococap[bitsandbytes]'")
    model = _without_weights(name, source)
    layers = language_layers(model)
    others = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer not in layers]
    kept = {"llm_int8_skip_modules": others}  # in spite of its name, for 4 bits too
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, **kept)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **kept)


def _without_weights(name: str, source: dict[str, Any]) -> Any:
    """Returns the model that a configuration describes, with tensors that have shapes and no content."""
    with reading(name, source["revision"]), torch.device("meta"):
        config = AutoConfig.from_pretrained(name, **source)
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=source["trust_remote_code"])


def language_layers(model: Any) -> set[nn.Linear]:
    """Returns the linear layers inside the numbered layers of the language model."""
    numbered = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    return {layer for layers in numbered for layer in layers.modules() if isinstance(layer, nn.Linear)}


def n_bytes(name: str, source: dict[str, Any], dtype: torch.dtype, load_in: LoadIn | None) -> int:
    """Returns the size of the weights in memory, without loading them."""
    model = _without_weights(name, source)
    bits = {"8bit": 8, "4bit": 4, None: 8 * dtype.itemsize}[load_in]
    n_quantised = sum(layer.weight.numel() for layer in language_layers(model))
    n_others = sum(parameter.numel() for parameter in model.parameters()) - n_quantised
    return int(n_others * dtype.itemsize + n_quantised * bits // 8)


def load(name: str, source: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Returns the model, read from `source` with the `settings` of from_pretrained.

    Raises ModelError if a weight is missing, damaged or of another shape than the configuration says.
    """
    with reading(name, source["revision"]):
        model, loading = AutoModelForImageTextToText.from_pretrained(
            name,
            **source,
            **settings,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, where both shapes are known
            adapter_kwargs=NO_ADAPTER,
        )
    _check(name, model, loading)
    return model


def _check(name: str, model: nn.Module, loading: dict[str, Any]) -> None:
    """Raises ModelError for weights that transformers, with just a warning, would leave random or ignore."""
    if others := sorted(loading["mismatched_keys"]) or _quantised_otherwise(model):
        weight, stored, wanted = others[0]
        raise ModelError(
            f"{name}: the weight {weight} has the shape {_shape_of(stored)} in the file, but {_shape_of(wanted)} in "
            "config.json, so these belong to two models. Copy the config.json that was saved with the weights, or "
            "download both again."
        )
    if lacking := sorted(loading["missing_keys"]):
        raise ModelError(f"{name} lacks {len(lacking)} weights ({lacking[0]} …). Download it again, or name another.")
    if unknown := sorted(loading["unexpected_keys"]):
        if layers := [weight for weight in unknown if _is_beyond(model, weight)]:
            raise ModelError(
                f"{name}: config.json has no layer for {len(layers)} weights ({layers[0]} …), so these belong to two "
                "models. Copy the config.json that was saved with the weights, or download both again."
            )
        log.warning("%s: %d weights are not part of the model and are ignored (%s …)", name, len(unknown), unknown[0])


def _quantised_otherwise(model: nn.Module) -> list[tuple[str, Size, Size]]:
    """(name, stored shape, expected shape) of weights that differ: bitsandbytes accepts any shape from the file."""
    found: list[tuple[str, Size, Size]] = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            whole = getattr(layer.weight, "quant_state", None) or layer.weight
            stored, wanted = tuple(whole.shape), (layer.out_features, layer.in_features)
            if stored != wanted:
                found.append((f"{name}.weight", stored, wanted))
    return found


def _shape_of(size: Size) -> str:
    return " x ".join(map(str, size))


def _is_beyond(model: nn.Module, weight: str) -> bool:
    """Whether a weight belongs to a layer after the model's last layer of that kind."""
    modules = dict(model.named_modules())
    parts = weight.split(".")
    numbered = [(modules.get(".".join(parts[:i])), int(part)) for i, part in enumerate(parts) if part.isdecimal()]
    return any(isinstance(layers, nn.ModuleList) and number >= len(layers) for layers, number in numbered)
