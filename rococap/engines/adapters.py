"""LoRA and other adapters in PEFT's format, put on the model that they were trained on."""

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
from rococap.engines.checkpoint import adapter_beside, folder_digest, is_here_or_unreachable
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
"""What modules were called by earlier releases of transformers, most of them before 4.52, and may be called now."""


def tell_of_one_beside(name: str, source: dict[str, Any], chosen: str | None) -> None:
    """Of a model among whose files an adapter lies, as after merging: it is not put on, unless the recipe names it."""
    if adapter_beside(name, source) is not None and chosen != name:
        log.warning(
            "an adapter lies beside the weights of %s: it is not put on them. If they were not merged with it: "
            "enqueue a run with --adapter %s",
            name,
            name,
        )


def put_on(model: Any, recipe: Recipe) -> tuple[Any, str]:
    """The model with the recipe's adapter, and the digest of the adapter's files.

    It is merged into the weights, so that it costs no speed; quantised ones would lose by that, and keep it beside.
    Raises ModelError if it cannot be had, or is another model's.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError("Adapters need PEFT. Install it: pip install 'rococap[peft]'")
    adapter, name = str(recipe.adapter), recipe.model
    folder = _folder(adapter)
    _check_base(folder, recipe)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # They would be left as they were before training.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted, strange = _load(model, folder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # as in `checkpoint.reading`
        raise ModelError(f"The adapter {adapter} does not fit {name}: {_reason(error)}") from error
    if strange:
        raise ModelError(
            f"The adapter {adapter} does not fit {name}: the model has no place for {len(strange)} of its weights "
            f"({strange[0]} …). Name the model that it was trained on with --model."
        )
    # PEFT has put its layers into the model itself.
    is_quantised = recipe.load_in is not None
    return (adapted.get_base_model() if is_quantised else adapted.merge_and_unload()), folder_digest(folder)


def _load(model: Any, folder: Path) -> tuple[Any, list[str]]:
    """The model with the adapter in it, and the adapter's weights that the model has no place for."""
    from peft import PeftConfig, PeftModel

    strange: list[str] = []

    class Telling(PeftModel):  # type: ignore[misc]  # PEFT ships no types
        def load_adapter(self, *args: Any, **options: Any) -> Any:
            result = super().load_adapter(*args, **options)
            strange.extend(result.unexpected_keys)
            return result

    config = PeftConfig.from_pretrained(folder)
    if config.is_prompt_learning:
        raise ValueError(f"{config.peft_type.value} changes the prompt and not the weights. Name a LoRA.")
    config.task_type = None  # else PEFT takes a class of its own instead of this one, for what generation is called
    keys = [key.removeprefix(PREFIX) for key in _keys(folder)]
    renamed = _renamed(keys, {name for name, _ in model.named_modules()})
    if renamed:
        log.info("the adapter's weights have the names of an earlier transformers, and get those of today")
        _rename_targets(config, renamed, keys)
    mapping = {rf"^{re.escape(old)}\.": f"{new}." for old, new in renamed.items()}
    return Telling.from_pretrained(model, folder, config=config, key_mapping=mapping), strange


def _keys(folder: Path) -> list[str]:
    safe, pickled = (folder / name for name in files.ADAPTER_WEIGHTS)
    if safe.exists():
        with safe_open(safe, "pt") as weights:
            return list(weights.keys())
    return list(torch.load(pickled, map_location="meta", weights_only=True))


def _renamed(keys: Iterable[str], modules: Set[str]) -> dict[str, str]:
    """Which modules these keys know by a name that the model does not have: the old name -> the model's."""
    found: dict[str, str] = {}
    for old, new in RENAMED:
        if old not in modules and new in modules and any(key.startswith(f"{old}.") for key in keys):
            found.setdefault(old, new)
    return found


def _rename_targets(config: Any, renamed: Mapping[str, str], keys: Iterable[str]) -> None:
    """The same renames where an adapter's configuration names modules.

    A pattern over the old names may hit other modules by the new ones: those that there are weights for take its place.
    """
    if isinstance(config.target_modules, str):
        parts = (key.partition(".lora_") for key in keys)
        config.target_modules = {_with_new_name(module, renamed) for module, lora, _ in parts if lora}
    elif config.target_modules:
        config.target_modules = {_with_new_name(module, renamed) for module in config.target_modules}
    for patterns in ("rank_pattern", "alpha_pattern"):
        told = getattr(config, patterns, None) or {}
        setattr(config, patterns, {_with_new_name(module, renamed): value for module, value in told.items()})


def _with_new_name(module: str, renamed: Mapping[str, str]) -> str:
    name = module.removeprefix("^")
    found = (new + name.removeprefix(old) for old, new in renamed.items() if f"{name}.".startswith(f"{old}."))
    return next(found, module)


def _reason(error: Exception) -> str:
    """The first line, or the first about a weight: torch lists them below a line that says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if line.startswith("size mismatch")), lines[0])[:300]


def _folder(adapter: str) -> Path:
    folder = Path(adapter)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(adapter, local_files_only=is_here_or_unreachable(adapter, "main")))
        except (OSError, ValueError) as error:
            raise ModelError(
                f"The adapter {adapter} cannot be had. Check the name and the network, or download it where there is "
                f"one: hf download {adapter}"
            ) from error
    if not (folder / files.ADAPTER_CONFIG).exists():
        raise ModelError(
            f"{adapter} is no adapter: it has no {files.ADAPTER_CONFIG}. Name a folder or hub id in PEFT's format."
        )
    if not any((folder / name).exists() for name in files.ADAPTER_WEIGHTS):
        raise ModelError(f"The adapter {adapter} has no {files.ADAPTER_WEIGHTS[0]}. Copy or download it again.")
    return folder


def _check_base(folder: Path, recipe: Recipe) -> None:
    """By the last part of the name, however it is spelled: a model may have been copied since."""
    adapter, name = recipe.adapter, recipe.model
    try:
        base = str(files.read(folder / files.ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    except ModelError as error:
        raise ModelError(
            f"The adapter {adapter} has a damaged {files.ADAPTER_CONFIG}. Copy or download it again."
        ) from error
    if not base or files.common_name(base) == files.common_name(name):
        if base and base.rpartition("/")[2] != name.rpartition("/")[2]:
            log.info("the adapter %s was trained on %s, taken for another spelling of %s", adapter, base, name)
    elif recipe.adapter_base == "any":
        log.warning("the adapter %s was trained on %s: put on %s, as the run says", adapter, base, name)
    else:
        raise ModelError(
            f"The adapter {adapter} was trained on {base}, not on {name}. Name that with --model. If both are one "
            "model: enqueue a run with --adapter-base any"
        )
