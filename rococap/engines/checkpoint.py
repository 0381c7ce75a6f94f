"""A model's files, on disk or on the hub: type, processor, prompt and digest, for every engine that reads them."""

import hashlib
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoProcessor, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from rococap.engines import families
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
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".") + "."
    if Path(name).is_dir():
        return ModelError(f"The folder {name} holds no model that can be loaded: {reason}")
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


def type_of(name: str, source: dict[str, Any]) -> str:
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **source)  # reads it and runs nothing
    except (OSError, ValueError) as error:
        raise cannot_load(name, source["revision"], error) from error
    model_type = str(config.get("model_type", ""))
    if not source["trust_remote_code"]:
        families.check_native(name, model_type)
        if "auto_map" in config and model_type not in CONFIG_MAPPING:
            raise ModelError(
                f"{name} brings code of its own, which is not run unless you trust it: look at it, then enqueue a run "
                "with --trust-remote-code."
            )
    return model_type


def load_processor(name: str, source: dict[str, Any]) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(name, **source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise cannot_load(name, source["revision"], error) from error
    # For a processor class that it does not know, AutoProcessor returns a bare tokenizer without a word.
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ModelError(f"{name} has no image processor, so it cannot caption pictures. Name a vision-language model.")
    processor.tokenizer.padding_side = "left"
    return processor


def chat_prompt(processor: Any, prompt: str, name: str) -> str:
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise ModelError(f"{name} has no chat template, so it does not follow prompts. Name an instruct model.")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    return str(processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def end_tokens(config: GenerationConfig, tokenizer: Any) -> list[int]:
    ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    return list(ends) if isinstance(ends, list) else [ends]


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and contents of the files that decide a model folder's captions, in hex."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in MODEL_FILES):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256")
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + content.digest())
    return digest.hexdigest()
