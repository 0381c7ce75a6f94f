"""A model's files, on disk or on the hub: type, processor, prompt and digest, for every engine that reads them."""

import hashlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoProcessor, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging

from rococap.engines import families, files
from rococap.engines.template import turn_end
from rococap.errors import ModelError

log = logging.getLogger(__name__)

MODEL_FILES = frozenset({".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".txt"})


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the GPU has it, float16 on older ones, float32 on the CPU; or what the recipe says."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def quieten() -> None:
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def cannot_load(name: str, revision: str, error: Exception) -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(":.") + "."
    if not isinstance(error, OSError | ValueError):  # raised by code that took a file for whole, and says little
        reason = f"{type(error).__name__}: {reason}"
    if Path(name).is_dir():
        return ModelError(
            f"The folder {name} holds no model that can be loaded: {reason} Copy or download it again, or name another."
        )
    if name.startswith((".", "/", "~")):
        return ModelError(f"There is no model folder {name}. Name an existing folder or a hub id with --model.")
    return ModelError(
        f"The model {name} (revision {revision}) cannot be had: {reason} "
        "Check the name and the network, or download it where there is one: hf download " + name
    )


def is_here_or_unreachable(name: str, revision: str) -> bool:
    """Whether to load without asking the hub: asked once here, where transformers asks for every file, and waits."""
    if Path(name).is_dir():
        return True
    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return False  # loading says it best
    except Exception as error:  # its errors have no base in common
        log.warning("the hub cannot be reached (%s): loading what is cached of %s", error, name)
        return True
    return False


@contextmanager
def reading(name: str, revision: str) -> Iterator[None]:
    """Turns what damaged files of a model raise into a ModelError.

    That is any exception: libraries take the files for whole, and the one of tokenizers has no class of its own.
    """
    try:
        yield
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise cannot_load(name, revision, error) from error


def type_of(name: str, source: dict[str, Any]) -> str:
    """What kind of model it is. Raises ModelError for one that cannot be loaded, or is none."""
    if Path(name).is_dir():
        for path in (Path(name) / file for file in files.OBJECTS):
            if path.is_file():
                files.read(path)
    _refuse_adapter(name, source)
    with reading(name, source["revision"]):
        config, _ = PreTrainedConfig.get_config_dict(name, **source)  # reads it and runs nothing
    model_type = str(config.get("model_type", ""))
    if not source["trust_remote_code"]:
        families.check_native(name, model_type)
        if "auto_map" in config and model_type not in CONFIG_MAPPING:
            raise ModelError(
                f"{name} brings code of its own, which is not run unless you trust it: look at it, then enqueue a run "
                "with --trust-remote-code."
            )
    return model_type


def _refuse_adapter(name: str, source: dict[str, Any]) -> None:
    """transformers would load the model that the adapter was trained on, whichever that is, and put it on."""
    config = adapter_beside(name, source)
    if config is not None and not (
        _is_there(name, files.CONFIG, source) and any(_is_there(name, file, source) for file in files.WEIGHTS)
    ):
        raise files.no_model_but_adapter(name, config)


def adapter_beside(name: str, source: dict[str, Any]) -> Path | None:
    """The adapter_config.json among a model's files, in a folder or on the hub."""
    where = {key: source[key] for key in ("revision", "local_files_only")}
    with reading(name, source["revision"]):
        found = find_adapter_config_file(name, **where)
    return Path(found) if found else None


def _is_there(name: str, file: str, source: dict[str, Any]) -> bool:
    if files.find(name, source["revision"], file) is not None:
        return True
    with reading(name, source["revision"]):
        return not source["local_files_only"] and HfApi().file_exists(name, file, revision=source["revision"])


def load_processor(name: str, source: dict[str, Any]) -> Any:
    with reading(name, source["revision"]):
        processor = AutoProcessor.from_pretrained(name, **source)
    # For a processor class that it does not know, AutoProcessor returns a bare tokenizer without a word.
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ModelError(f"{name} has no image processor, so it cannot caption pictures. Name a vision-language model.")
    _check_vocabulary(processor.tokenizer, name, source)
    processor.tokenizer.padding_side = "left"
    return processor


def _check_vocabulary(tokenizer: Any, name: str, source: dict[str, Any]) -> None:
    """Without its vocabulary's file a tokenizer is loaded all the same, and reads prompts as nothing."""
    config, _ = PreTrainedConfig.get_config_dict(name, **source)
    picture = config.get("image_token_id", config.get("image_token_index"))
    if isinstance(picture, int) and picture >= len(tokenizer):
        raise ModelError(
            f"The tokenizer of {name} has {len(tokenizer)} tokens, and config.json says that number {picture} stands "
            "for a picture: its tokenizer.json is missing, or another model's. Copy or download it again."
        )


def end_tokens(config: GenerationConfig, processor: Any, name: str) -> list[int]:
    """What ends a caption: whatever the generation config, the tokenizer or the chat template ends an answer with.

    They disagree in many published folders, and a model ends with what it was trained on. Raises ModelError if
    there is none.
    """
    tokenizer = processor.tokenizer
    named = config.eos_token_id
    told = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id, turn_end(processor, name)]
    ids = (tokenizer.convert_tokens_to_ids(end) if isinstance(end, str) else end for end in told)
    if ends := list(dict.fromkeys(id for id in ids if id is not None)):
        return ends
    raise ModelError(f"{name} names no token that ends a caption. Copy the eos_token_id of its base model to it.")


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and contents of the files that decide a model folder's captions, in hex."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in MODEL_FILES):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256")
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + content.digest())
    return digest.hexdigest()
