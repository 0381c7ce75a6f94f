"""Applies LoRA and other adapters in PEFT's format to the model that they were trained on. Captions nothing."""

import importlib.util
import logging
import re
import warnings
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open

from rococap.engines import files
from rococap.engines.checkpoint import adapter_beside, is_here_or_unreachable
from rococap.errors import ModelError
from rococap.recipe import Recipe

log = logging.getLogger(__name__)

PREFIX = "base_model.model."
RENAMED = (
    ("model.layers", "model.language_model.layers"),
    ("model.norm", "model.language_model.norm"),
    ("model.embed_tokens", "model.language_model.embed_tokens"),
    ("visual", "model.visual"),
    ("language_model.lm_head", "lm_head"),
    ("language_model.model", "model.language_model"),
    ("vision_tower.vision_model", "model.vision_tower.vision_model"),
    ("vision_tower.vision_model", "model.vision_tower"),
    ("model.vision_tower.vision_model", "model.vision_tower"),
    ("vision_tower", "model.vision_tower"),
    ("multi_modal_projector", "model.multi_modal_projector"),
)
"""(old, new): names of modules in earlier releases of transformers, mostly before 4.52, and possible names now."""


def warn_of_unused(name: str, source: dict[str, Any], chosen: str | None) -> None:
    """Warns of an adapter among the model's files, as merging leaves it: it is not applied unless it is `chosen`."""
    if adapter_beside(name, source) is not None and chosen != name:
        log.warning(
            "%s comes with an adapter, which is not applied. If it was not merged into the weights, "
            "enqueue a run with --adapter %s",
            name,
            name,
        )


def apply(model: Any, recipe: Recipe) -> tuple[Any, str]:
    """Returns the model with the recipe's adapter, and the digest of the adapter's files (SHA-256, in hex).

    The adapter is merged into the weights, so that it costs no speed, except into quantised ones, which would lose
    precision. Raises ModelError if the adapter is not available or belongs to another model.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError("Adapters need PEFT. Install it: pip install 'rococap[peft]'")
    adapter, name = str(recipe.adapter), recipe.model
    folder = _folder(adapter)
    _check_base(folder, recipe)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Adapter weights without a key would keep their untrained values.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted, unexpected = _load(model, folder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files raise anything, as in `checkpoint.reading`
        raise ModelError(f"The adapter {adapter} does not fit {name}: {_reason(error)}") from error
    if unexpected:
        raise ModelError(
            f"The adapter {adapter} does not fit {name}: the model has no place for {len(unexpected)} of its weights "
            f"({unexpected[0]} …). Name the model that it was trained on with --model."
        )
    # PEFT has already inserted its layers into the model.
    is_quantised = recipe.load_in is not None
    return (adapted.get_base_model() if is_quantised else adapted.merge_and_unload()), files.folder_digest(folder)


def _load(model: Any, folder: Path) -> tuple[Any, list[str]]:
    """Returns the model with the adapter in it, and the names of adapter weights that the model has no place for."""
    from peft import PeftConfig, PeftModel

    unexpected: list[str] = []

    class Recording(PeftModel):  # type: ignore[misc]  # PEFT ships no types
        def load_adapter(self, *args: Any, **options: Any) -> Any:
            result = super().load_adapter(*args, **options)
            unexpected.extend(result.unexpected_keys)
            return result

    config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise ValueError(f"{config.peft_type.value} changes the prompt and not the weights. Name a LoRA.")
    config.task_type = None  # otherwise PEFT picks one of its own classes by the task instead of this one
    keys = [key.removeprefix(PREFIX) for key in _keys(folder)]
    renamed = _renamed(keys, {name for name, _ in model.named_modules()})
    if renamed:
        log.info("the adapter's weights have names from an earlier release of transformers: renaming them")
        _rename_targets(config, renamed, keys)
    mapping = {rf"^{re.escape(old)}\.": f"{new}." for old, new in renamed.items()}
    return Recording.from_pretrained(model, folder, config=config, key_mapping=mapping), unexpected


def _keys(folder: Path) -> list[str]:
    safe, pickled = (folder / name for name in files.ADAPTER_WEIGHTS)
    if safe.exists():
        with safe_open(safe, "pt") as weights:
            return list(weights.keys())
    return list(torch.load(pickled, map_location="meta", weights_only=True))


def _renamed(keys: Iterable[str], modules: Set[str]) -> dict[str, str]:
    """Maps the old names of modules in these keys, which the model does not have, to the model's own names."""
    found: dict[str, str] = {}
    for old, new in RENAMED:
        if old not in modules and new in modules and any(key.startswith(f"{old}.") for key in keys):
            found.setdefault(old, new)
    return found


def _rename_targets(config: Any, renamed: Mapping[str, str], keys: Iterable[str]) -> None:
    """Applies the same renames where the adapter's configuration names modules.

    A pattern written for the old names may match other modules under the new ones, so it is replaced by the list of
    modules that the adapter has weights for.
    """
    if isinstance(config.target_modules, str):
        parts = (key.partition(".lora_") for key in keys)
        config.target_modules = {_with_new_name(module, renamed) for module, lora, _ in parts if lora}
    elif config.target_modules:
        config.target_modules = {_with_new_name(module, renamed) for module in config.target_modules}
    for patterns in ("rank_pattern", "alpha_pattern"):
        values = getattr(config, patterns, None) or {}
        setattr(config, patterns, {_with_new_name(module, renamed): value for module, value in values.items()})


def _with_new_name(module: str, renamed: Mapping[str, str]) -> str:
    name = module.removeprefix("^")
    found = (new + name.removeprefix(old) for old, new in renamed.items() if f"{name}.".startswith(f"{old}."))
    return next(found, module)


def _reason(error: Exception) -> str:
    """The first line of an error, or the first about a weight: torch lists those below a line that says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if line.startswith("size mismatch")), lines[0])[:300]


def _folder(adapter: str) -> Path:
    folder = Path(adapter)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(adapter, local_files_only=is_here_or_unreachable(adapter, "main")))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"The adapter {adapter} is not available. Check the name and the network, or download it on a machine "
                f"with access to the hub: hf download {adapter}"
            ) from error
    if not (folder / files.ADAPTER_CONFIG).exists():
        raise ModelError(
            f"{adapter} is not an adapter: it has no {files.ADAPTER_CONFIG}. Name a folder or hub id in PEFT's format."
        )
    if not any((folder / name).exists() for name in files.ADAPTER_WEIGHTS):
        raise ModelError(f"The adapter {adapter} has no {files.ADAPTER_WEIGHTS[0]}. Copy or download it again.")
    return folder


def _check_base(folder: Path, recipe: Recipe) -> None:
    """Raises ModelError if the adapter was trained on another model.

    Compares only the last part of the names, and ignores spelling: the model may have been copied since.
    """
    adapter, name = recipe.adapter, recipe.model
    try:
        base = str(files.read(folder / files.ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    except ModelError as error:
        raise ModelError(
            f"The adapter {adapter} has a damaged {files.ADAPTER_CONFIG}. Copy or download it again."
        ) from error
    if not base or files.common_name(base) == files.common_name(name):
        if base and base.rpartition("/")[2] != name.rpartition("/")[2]:
            log.info("the adapter %s was trained on %s, assumed to be the same model as %s", adapter, base, name)
    elif recipe.adapter_base == "any":
        log.warning("the adapter %s was trained on %s: applied to %s, as the run requires", adapter, base, name)
    else:
        raise ModelError(
            f"The adapter {adapter} was trained on {base}, not on {name}. Name that model with --model or, if both are "
            "the same, enqueue a run with --adapter-base any"
        )
