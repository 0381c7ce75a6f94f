"""Checks a model's files before anything is loaded: whether they are a model, and which tokens stand for pictures.

Does not import torch, so that an unusable model can be refused when a run is registered. Downloads nothing.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rococap.data import HUB_ID, cached
from rococap.errors import ModelError

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
MODEL_FILES = frozenset({".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".txt"})
OBJECTS = (
    CONFIG,
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    *(name for name in WEIGHTS if name.endswith(".json")),
)
"""A model's files that must contain a JSON object; other files in its folder are not checked."""
PLACEHOLDERS = ("image_token", "video_token", "audio_token", "boi_token", "boa_token")
"""Attributes whose tokens processors replace with the tokens of a picture, a video or a sound; Gemma's `boi` precedes
those of a picture, and `boa` those of a sound.
"""

_ID = re.compile(r"(image|video|audio|boi|boa)_token_(id|index)")
_IN_A_CACHE = re.compile(r"(?:^|/)(?:models--(?P<hub>[^/]+)|(?P<modelscope>[^/]+--[^/]+)/snapshots/)")
_QUANTISED = re.compile(r"(-unsloth)?-bnb-[48]bit$")


def find(model: str, revision: str, file: str) -> Path | None:
    """Returns the path of a model's file, in its folder or in the hub's cache; None if it is in neither."""
    if Path(model).is_dir():
        path = Path(model) / file
        return path if path.is_file() else None
    cached_file = cached(model, file, revision, "model") if HUB_ID.fullmatch(model) else None
    return Path(cached_file) if cached_file else None


def read(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises ModelError, naming the file, if it contains none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}). Copy or download it again.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged: it contains no JSON object. Copy or download it again.")
    return content


def check(model: str, revision: str, prompt: str) -> None:
    """Raises ModelError for a folder that contains no model, and for a prompt that contains a picture's token.

    For a model on the hub, only cached files are checked.
    """
    folder = Path(model)
    if folder.is_dir():
        if is_adapter(folder):
            raise no_model_but_adapter(model, folder / ADAPTER_CONFIG)
        if not (folder / CONFIG).is_file():
            raise _no_config(folder)
        read(folder / CONFIG)
    refuse_placeholders(prompt, placeholders(model, revision), model)


def is_adapter(folder: Path) -> bool:
    """Whether a folder contains an adapter without a model. Its config.json may be a copy made by a training tool."""
    has_model = (folder / CONFIG).is_file() and any((folder / name).is_file() for name in WEIGHTS)
    return (folder / ADAPTER_CONFIG).is_file() and not has_model


def no_model_but_adapter(model: str, config: Path) -> ModelError:
    """Returns the error for an adapter that was named as a model, given its adapter_config.json."""
    base = str(read(config).get("base_model_name_or_path") or "")
    quoted = shlex.quote(hub_name(base))
    named = f"the model that it was trained on: --model {quoted}" if base else "its model with --model:"
    return ModelError(f"{model} is an adapter, not a model. Name {named} --adapter {shlex.quote(model)}")


def _no_config(folder: Path) -> ModelError:
    below = sorted(path.parent for pattern in ("*/", "snapshots/*/") for path in folder.glob(pattern + CONFIG))
    advice = (
        f"Name the one below it: --model {shlex.quote(str(below[-1]))}"
        if below
        else "Name another folder, or a hub id, with --model."
    )
    return ModelError(f"The folder {folder} contains no model: it has no {CONFIG}. {advice}")


# --- Names -----------------------------------------------------------------------------------------------------


def hub_name(model: str) -> str:
    """Returns the name on the hub if `model` is a path into the hub's or ModelScope's cache, or else `model` itself."""
    found = _IN_A_CACHE.search(model.replace("\\", "/"))
    return (found["hub"] or found["modelscope"]).replace("--", "/", 1) if found else model


def folder_digest(folder: Path) -> str:
    """SHA-256, in hex, over the names and contents of the files in a model folder that affect captions."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in MODEL_FILES):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256")
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + content.digest())
    return digest.hexdigest()


def last_part(model: str) -> str:
    """The last part of a model's name, on the hub, in its cache, or in a folder on Windows or Linux."""
    return hub_name(model).replace("\\", "/").rstrip("/").rpartition("/")[2]


def common_name(model: str) -> str:
    """Returns a form that is the same for every spelling of a model's name.

    ModelScope writes a dot as three underscores. Versions quantised with bitsandbytes have the same shapes, and count
    as the same model.
    """
    return _QUANTISED.sub("", last_part(model).replace("___", ".").lower())


# --- Placeholders ----------------------------------------------------------------------------------------------


def placeholders(model: str, revision: str) -> set[str]:
    """Returns the tokens that stand for pictures, as far as the local and cached files show them."""

    def content(file: str) -> dict[str, Any]:
        path = find(model, revision, file)
        return read(path) if path else {}

    config, tokenizer_config = content(CONFIG), content("tokenizer_config.json")
    extra = tokenizer_config.get("extra_special_tokens")
    configs = (content("processor_config.json"), tokenizer_config, extra if isinstance(extra, dict) else {})
    named = {text_of(settings.get(name)) for settings in configs for name in PLACEHOLDERS}
    ids = {value for name, value in config.items() if _ID.fullmatch(name) and isinstance(value, int)}
    tokens = _added(tokenizer_config, content("added_tokens.json"))
    if not ids <= tokens.keys():
        tokens |= {token["id"]: token["content"] for token in _listed(content("tokenizer.json"))}
    return named | {tokens[id] for id in ids & tokens.keys()}


def _added(tokenizer_config: dict[str, Any], added: dict[str, Any]) -> dict[int, str]:
    decoder = tokenizer_config.get("added_tokens_decoder") or {}
    return {int(id): text_of(token) for id, token in decoder.items()} | {id: token for token, id in added.items()}


def _listed(tokenizer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (token for token in tokenizer.get("added_tokens") or [] if {"id", "content"} <= token.keys())


def text_of(token: Any) -> str:
    """The text of a token, which is a string or an object that contains one; "" if it is neither."""
    text = token.get("content") if isinstance(token, dict) else getattr(token, "content", token)
    return text if isinstance(text, str) else ""


def refuse_placeholders(prompt: str, tokens: set[str], model: str) -> None:
    """Raises ModelError for a prompt that contains one of these tokens: the model would expect one picture more."""
    if found := sorted(token for token in tokens if token.strip() and token in prompt):
        raise ModelError(
            f"prompt contains {found[0]}, which {model} would take for one more picture. Leave it out: the chat "
            "template inserts the picture by itself."
        )
