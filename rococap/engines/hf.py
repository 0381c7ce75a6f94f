"""The transformers engine: any vision-language model that the stock Auto classes load."""

import hashlib
import logging
import sys
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from PIL.Image import Image, Resampling
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging as transformers_logging

from rococap import images
from rococap.engines import Completion, EngineInfo, Options, Prepared, Source, continuous, families
from rococap.engines.continuous import ContinuousDecoder
from rococap.engines.decoding import Inputs, Loaded, dtype_name, free_memory
from rococap.engines.sizing import choose_limit
from rococap.engines.static import StaticDecoder
from rococap.errors import ModelError, PictureError
from rococap.recipe import Recipe

log = logging.getLogger(__name__)

STATIC_BATCH = 16
MOST_TEXTS = 2_000
SMALL_TABLE = 32
SHRINK = 0.7
"""By how much the sides of a picture that is too large are reduced: its area is halved."""

MODEL_FILES = frozenset({".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".txt"})


class TransformersEngine:
    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.recipe = recipe
        self.options = options
        self.device = _device(options.device)
        self.dtype = choose_dtype(recipe.dtype, self.device)
        self._texts: dict[Hashable, dict[str, Tensor]] = {}
        self._keeps_prompts = True
        self._reduces = False

    def load(self) -> None:
        _quieten()
        if self.device.type == "cuda":
            torch.set_num_threads(1)  # several threads prepare pictures, each of which would start one for every core
        name, revision = self.recipe.model, self.recipe.revision
        families.check_name(name)
        source: dict[str, Any] = {"revision": revision, "local_files_only": _is_here_or_unreachable(name, revision)}
        source["trust_remote_code"] = self.recipe.trust_remote_code
        model_type = _model_type(name, source)
        self.processor = _load_processor(name, source)
        # After loading: the bounds in a checkpoint's preprocessor_config.json override those given to from_pretrained.
        bounds = families.pixel_bounds(model_type, self.processor.image_processor, self.recipe)
        for setting, value in (bounds or {}).items():
            setattr(self.processor.image_processor, setting, value)
        if bounds is None:
            self._reduces = True
            log.info("pictures are reduced to --max-pixels beforehand: how %s bounds them is not known", model_type)
        self.prompt = _prompt(self.processor, self.recipe.prompt, name)
        model = _load_model(name, source, self.dtype).to(self.device).eval()
        tokenizer = self.processor.tokenizer
        ends = _end_tokens(model.generation_config, tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
        # The model's own is replaced, not amended: whatever a checkpoint sets applies where a field is unset.
        model.generation_config = _generation_config(self.recipe, ends, pad)
        self.loaded = Loaded(model, tokenizer, self.device, frozenset(ends), pad, self.recipe.max_new_tokens)
        self.decoder = self._choose_decoder()
        self._info = _info(self.recipe, model, self.device, self.dtype)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def batch_size(self) -> int:
        return self.decoder.limit

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.decoder.limit = size

    def prepare(self, job_id: int, picture: Image) -> Prepared:
        if self._reduces:
            picture = images.reduced(picture, self.recipe.max_pixels)
        try:
            tensors = self._process(picture)
        except ValueError as error:
            raise PictureError("unprocessable", f"The model's processor refuses this picture: {error}") from error
        return Prepared(job_id, Inputs(tensors, picture), tensors["input_ids"].shape[1])

    def _process(self, picture: Image) -> dict[str, Tensor]:
        """The processor's output. Half of its time goes into the prompt, of which only the number of image tokens
        changes, and that with the shape of what the picture became: it is kept, unless the prompt of this processor
        needs more than the image processor alone returns.
        """
        if not self._keeps_prompts:
            return self._process_whole(picture)
        image = dict(self.processor.image_processor(images=[picture], return_tensors="pt"))
        shape = _shape(image)
        text = self._texts.get(shape)  # once: another thread may clear them
        if text is None:
            whole = self._process_whole(picture)
            if shape is None or not all(name in whole and torch.equal(whole[name], image[name]) for name in image):
                self._keeps_prompts = False
                return whole
            if len(self._texts) == MOST_TEXTS:
                self._texts.clear()
            text = self._texts[shape] = {name: tensor for name, tensor in whole.items() if name not in image}
        return text | image

    def _process_whole(self, picture: Image) -> dict[str, Tensor]:
        return dict(self.processor(text=[self.prompt], images=[picture], return_tensors="pt"))

    def run(self, source: Source) -> Iterator[Completion]:
        return self.decoder.run(source)

    def close(self) -> None:
        del self.loaded, self.decoder, self.processor
        free_memory(self.device)

    def _choose_decoder(self) -> ContinuousDecoder | StaticDecoder:
        way = self.options.decode
        if way == "auto":
            way = "continuous" if (reason := self._why_static()) is None else "static"
            if reason is not None:
                log.info("decoding in static batches: %s", reason)
        elif way == "continuous" and (reason := self._why_static()) is not None:
            raise ModelError(f"{self.recipe.model} cannot be decoded continuously: {reason}. Use --decode static.")
        if way == "static":
            return StaticDecoder(self.loaded, self.options.batch_size or STATIC_BATCH, self._shrink)
        decoder = ContinuousDecoder(self.loaded, self.options.batch_size or 1, self._shrink)
        if self.options.batch_size is None:
            decoder.limit = choose_limit(decoder, self.prepare, self.recipe.max_pixels)
        return decoder

    def _why_static(self) -> str | None:
        """Why the continuous loop cannot take it; None if it can."""
        recipe = self.recipe
        if recipe.do_sample or recipe.num_beams > 1 or recipe.repetition_penalty != 1.0:
            return "the recipe is not greedy"
        return None if continuous.is_known(self.loaded.model) else "its cache is not one that the loop knows"

    def _shrink(self, picture: Prepared) -> Prepared | None:
        """The picture in fewer visual tokens, flagged; None if the model makes no fewer of it."""
        image = picture.inputs.picture
        while min(image.size) > 1:
            image = image.resize([max(1, round(side * SHRINK)) for side in image.size], Resampling.LANCZOS)
            smaller = self.prepare(picture.job_id, image)
            if smaller.n_tokens < picture.n_tokens:
                message = "out of memory with one picture of %d prompt tokens: fewer pixels make it %d"
                log.warning(message, picture.n_tokens, smaller.n_tokens)
                return replace(smaller, inputs=replace(smaller.inputs, flags="fewer_pixels"))
        return None


def _shape(image: Mapping[str, object]) -> Hashable:
    """What an image processor's output tells of the picture's shape: sizes, and small tables like a grid's.

    None if it holds something else than tensors.
    """
    if not all(isinstance(tensor, Tensor) for tensor in image.values()):
        return None
    return tuple(
        (name, tensor.shape, tuple(tensor.flatten().tolist()) if tensor.numel() < SMALL_TABLE else ())
        for name, tensor in image.items()
        if isinstance(tensor, Tensor)
    )


# --- Loading ---------------------------------------------------------------------------------------------------


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"There is no device {name!r}. Use auto, cpu or cuda:0.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"This machine has {torch.cuda.device_count()} CUDA devices, so not {name!r}. Use --device auto or cpu."
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """bfloat16 where the GPU has it, float16 on older ones, float32 on the CPU; or what the recipe says."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _quieten() -> None:
    transformers_logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def _missing(name: str, revision: str, error: Exception) -> ModelError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".") + "."
    if Path(name).is_dir():
        return ModelError(f"The folder {name} holds no model that can be loaded: {reason}")
    if name.startswith((".", "/", "~")):
        return ModelError(f"There is no model folder {name}. Name an existing folder or a hub id with --model.")
    return ModelError(
        f"The model {name} (revision {revision}) cannot be had: {reason} "
        "Check the name and the network, or download it where there is one: hf download " + name
    )


def _is_here_or_unreachable(name: str, revision: str) -> bool:
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


def _model_type(name: str, source: dict[str, Any]) -> str:
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **source)  # reads it and runs nothing
    except (OSError, ValueError) as error:
        raise _missing(name, source["revision"], error) from error
    model_type = str(config.get("model_type", ""))
    if not source["trust_remote_code"]:
        families.check_native(name, model_type)
        if "auto_map" in config and model_type not in CONFIG_MAPPING:
            raise ModelError(
                f"{name} brings code of its own, which is not run unless you trust it: look at it, then enqueue a run "
                "with --trust-remote-code."
            )
    return model_type


def _load_processor(name: str, source: dict[str, Any]) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(name, **source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _missing(name, source["revision"], error) from error
    # For a processor class that it does not know, AutoProcessor returns a bare tokenizer without a word.
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise ModelError(f"{name} has no image processor, so it cannot caption pictures. Name a vision-language model.")
    processor.tokenizer.padding_side = "left"
    return processor


def _load_model(name: str, source: dict[str, Any], dtype: torch.dtype) -> Any:
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            name, **source, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _missing(name, source["revision"], error) from error
    if lacking := sorted(loading["missing_keys"]):  # transformers would leave them random, and only warn
        raise ModelError(f"{name} lacks {len(lacking)} weights ({lacking[0]} …). Download it again, or name another.")
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            _multiply(module)
    return model


def _multiply(conv: nn.Conv3d) -> None:
    """Makes a convolution whose input is one patch what it is, a matrix product.

    cuDNN takes seconds for it in bfloat16 on some GPUs, and a CPU a tenth of the time of reading a picture.
    """

    def forward(patches: Tensor) -> Tensor:
        if patches.shape[2:] != conv.kernel_size or conv.padding != (0, 0, 0) or conv.groups != 1:
            return nn.Conv3d.forward(conv, patches)
        return linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)[..., None, None, None]

    conv.forward = forward  # type: ignore[assignment, method-assign]


def _prompt(processor: Any, prompt: str, name: str) -> str:
    if not (processor.chat_template or processor.tokenizer.chat_template):
        raise ModelError(f"{name} has no chat template, so it does not follow prompts. Name an instruct model.")
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
    return str(processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True))


def _end_tokens(config: GenerationConfig, tokenizer: Any) -> list[int]:
    ends = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    return list(ends) if isinstance(ends, list) else [ends]


def _generation_config(recipe: Recipe, ends: list[int], pad_token: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=recipe.max_new_tokens,
        do_sample=recipe.do_sample,
        num_beams=recipe.num_beams,
        repetition_penalty=recipe.repetition_penalty,
        temperature=recipe.temperature,
        top_p=recipe.top_p,
        top_k=recipe.top_k,
        eos_token_id=ends,
        pad_token_id=pad_token,
    )


def _info(recipe: Recipe, model: Any, device: torch.device, dtype: torch.dtype) -> EngineInfo:
    folder = Path(recipe.model)
    commit = getattr(model.config, "_commit_hash", None) or ""
    packages = ("rococap", "torch", "transformers", "accelerate", "pillow")
    return EngineInfo(
        name="transformers",
        versions={package: version(package) for package in packages},
        model=recipe.model,
        revision="" if folder.is_dir() else commit,
        dtype=dtype_name(dtype),
        device=str(device),
        digest=folder_digest(folder) if folder.is_dir() else commit,
    )


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and contents of the files that decide a model folder's captions, in hex."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in MODEL_FILES):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256")
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + content.digest())
    return digest.hexdigest()
