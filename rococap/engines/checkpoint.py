"""Reads a model's files, on disk or on the hub: its type, processor, end tokens and digest. Loads no weights.

Serves every engine that runs the model itself. Knows no picture and no queue.
"""

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


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of this name; for "auto", bfloat16 or, on older GPUs, float16, and float32 on the CPU."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def quieten() -> None:
    """Silences warnings of the libraries, and their progress bars unless a person is watching."""
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def cannot_load(name: str, revision: str, error: Exception) -> ModelError:
    """Returns the ModelError for a model that a library failed to load, with the first sentence of its reason."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(":.") + "."
    if not isinstance(error, OSError | ValueError):  # raised by code that assumes an intact file; alone, it says little
        reason = f"{type(error).__name__}: {reason}"
    if Path(name).is_dir():
        return ModelError(
            f"The folder {name} contains no model that can be loaded: {reason} Copy or download it again, or name "
            "another."
        )
    if name.startswith((".", "/", "~")):
        return ModelError(f"There is no model folder {name}. Name an existing folder or a hub id with --model.")
    return ModelError(
        f"The model {name} (revision {revision}) is not available: {reason} "
        "Check the name and the network, or download it on a machine with access to the hub: hf download " + name
    )


def is_here_or_unreachable(name: str, revision: str) -> bool:
    """Whether to load without asking the hub, because the model is a folder or the hub cannot be reached.

    This asks the hub once; transformers would ask, and wait, for every file.
    """
    if Path(name).is_dir():
        return True
    try:
        HfApi().model_info(name, revision=revision, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return False  # loading gives the best explanation
    except Exception as error:  # the hub's errors share no base class
        log.warning("the hub cannot be reached (%s): loading %s from the cache", error, name)
        return True
    return False


@contextmanager
def reading(name: str, revision: str) -> Iterator[None]:
    """Turns the errors that damaged files of a model cause into a ModelError.

    They may be of any class: libraries assume intact files, and tokenizers raises a plain Exception.
    """
    try:
        yield
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise cannot_load(name, revision, error) from error


def type_of(name: str, source: dict[str, Any]) -> str:
    """Returns the `model_type` in a model's configuration. Raises ModelError if it cannot be loaded or is no model.

    `source` holds `revision`, `local_files_only` and `trust_remote_code`, as transformers takes them.
    """
    if Path(name).is_dir():
        for path in (Path(name) / file for file in files.OBJECTS):
            if path.is_file():
                files.read(path)
    _refuse_adapter(name, source)
    with reading(name, source["revision"]):
        config, _ = PreTrainedConfig.get_config_dict(name, **source)  # reads the file without running any code
    model_type = str(config.get("model_type", ""))
    if not source["trust_remote_code"]:
        families.check_native(name, model_type)
        if "auto_map" in config and model_type not in CONFIG_MAPPING:
            raise ModelError(
                f"{name} comes with its own code, which is not run unless you trust it: review it, then enqueue a run "
                "with --trust-remote-code."
            )
    return model_type


def _refuse_adapter(name: str, source: dict[str, Any]) -> None:
    """Raises ModelError for an adapter without a model: transformers would load whatever model it was trained on."""
    config = adapter_beside(name, source)
    if config is not None and not (
        _is_there(name, files.CONFIG, source) and any(_is_there(name, file, source) for file in files.WEIGHTS)
    ):
        raise files.no_model_but_adapter(name, config)


def adapter_beside(name: str, source: dict[str, Any]) -> Path | None:
    """Returns the adapter_config.json among a model's files, in a folder or on the hub; None if there is none."""
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
    """Returns a model's processor, set to pad on the left. Raises ModelError if it cannot process pictures."""
    with reading(name, source["revision"]):
        processor = AutoProcessor.from_pretrained(name, **source)
    # For a processor class that it does not know, AutoProcessor silently returns a bare tokenizer.
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ModelError(f"{name} has no image processor, so it cannot caption pictures. Name a vision-language model.")
    _check_vocabulary(processor.tokenizer, name, source)
    processor.tokenizer.padding_side = "left"
    return processor


def _check_vocabulary(tokenizer: Any, name: str, source: dict[str, Any]) -> None:
    """Raises ModelError for a tokenizer without a vocabulary, which still loads, and encodes prompts as nothing."""
    config, _ = PreTrainedConfig.get_config_dict(name, **source)
    picture = config.get("image_token_id", config.get("image_token_index"))
    if isinstance(picture, int) and picture >= len(tokenizer):
        raise ModelError(
            f"The tokenizer of {name} has {len(tokenizer)} tokens, and config.json says that number {picture} stands "
            "for a picture: its tokenizer.json is missing, or another model's. Copy or download it again."
        )


def end_tokens(config: GenerationConfig, processor: Any, name: str) -> list[int]:
    """Returns the tokens that end a caption: those of the generation config, the tokenizer and the chat template.

    In many published models these disagree, and a model uses the one that it was trained on. Raises ModelError if there
    is none.
    """
    tokenizer = processor.tokenizer
    named = config.eos_token_id
    candidates = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id, turn_end(processor, name)]
    ids = (tokenizer.convert_tokens_to_ids(end) if isinstance(end, str) else end for end in candidates)
    if ends := list(dict.fromkeys(id for id in ids if id is not None)):
        return ends
    raise ModelError(f"{name} names no token that ends a caption. Copy the eos_token_id from its base model.")


def identity(model: Any, name: str) -> tuple[str, str]:
    """Returns the commit of a loaded model on the hub, "" for a folder, and what identifies its exact weights."""
    if (folder := Path(name)).is_dir():
        return "", files.folder_digest(folder)
    commit = getattr(model.config, "_commit_hash", None) or ""
    return commit, commit
