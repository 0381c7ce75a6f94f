"""LoRA and other adapters in PEFT's format, put on the model that they were trained on."""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from rococap.engines.checkpoint import folder_digest, is_here_or_unreachable
from rococap.errors import ModelError

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def put_on(model: Any, adapter: str, name: str, *, is_quantised: bool) -> tuple[Any, str]:
    """The model with an adapter, and the digest of the adapter's files.

    It is merged into the weights, so that it costs no speed; quantised ones would lose by that, and keep it beside.
    Raises ModelError if it cannot be had, or is another model's.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError("Adapters need PEFT. Install it: pip install 'rococap[peft]'")
    from peft import PeftModel

    folder = _folder(adapter)
    _check_base(folder, adapter, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # They would be left as they were before training.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, Warning) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ModelError(f"The adapter {adapter} does not fit {name}: {reason}") from error
    # PEFT has put its layers into the model itself.
    return (adapted.get_base_model() if is_quantised else adapted.merge_and_unload()), folder_digest(folder)


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
    if not (folder / CONFIG).exists():
        raise ModelError(f"{adapter} is no adapter: it has no {CONFIG}. Name a folder or hub id in PEFT's format.")
    if not any((folder / name).exists() for name in WEIGHTS):
        raise ModelError(f"The adapter {adapter} has no {WEIGHTS[0]}. Copy or download it again.")
    return folder


def _check_base(folder: Path, adapter: str, name: str) -> None:
    """By the last part of the name: a model may have been copied since."""
    try:
        base = str(json.loads((folder / CONFIG).read_text())["base_model_name_or_path"] or "")
    except KeyError:
        return
    except (ValueError, TypeError) as error:
        raise ModelError(f"The adapter {adapter} has a damaged {CONFIG}. Copy or download it again.") from error
    if base and Path(base).name != Path(name).name:
        raise ModelError(f"The adapter {adapter} was trained on {base}, not on {name}. Name that with --model.")
