"""The transformers engine: any vision-language model that the stock Auto classes load, in static batches.

Batches are left-padded and the processor's whole output goes to `generate`: right padding, or leaving out
mm_token_type_ids, gives fluent captions of the wrong picture and no error.
"""

import gc
import hashlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from PIL.Image import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import logging as transformers_logging

from rococap.engines import Completion, EngineInfo, Failure, Options, Prepared, Source, gather
from rococap.errors import ModelError, PictureError
from rococap.recipe import Recipe

log = logging.getLogger(__name__)

MODEL_FILES = frozenset({".bin", ".jinja", ".json", ".model", ".py", ".safetensors", ".txt"})


class TransformersEngine:
    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.recipe = recipe
        self.batch_size = options.batch_size
        self.device = _device(options.device)
        self.dtype = choose_dtype(recipe.dtype, self.device)

    def load(self) -> None:
        _quieten()
        name, revision = self.recipe.model, self.recipe.revision
        source = {"revision": revision, "local_files_only": _is_here_or_unreachable(name, revision)}
        self.processor = _load_processor(name, source)
        # After loading: the bounds in a checkpoint's preprocessor_config.json override those given to from_pretrained.
        self.processor.image_processor.size = {
            "shortest_edge": self.recipe.min_pixels,
            "longest_edge": self.recipe.max_pixels,
        }
        self.prompt = _prompt(self.processor, self.recipe.prompt, name)
        self.model = _load_model(name, source, self.dtype).to(self.device).eval()
        tokenizer = self.processor.tokenizer
        self.ends = _end_tokens(self.model.generation_config, tokenizer)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.ends[0]
        # The model's own is replaced, not amended: whatever a checkpoint sets applies where a field is unset.
        self.model.generation_config = _generation_config(self.recipe, self.ends, self.pad)
        self._info = _info(self.recipe, self.model, self.device, self.dtype)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def prepare(self, job_id: int, picture: Image) -> Prepared:
        try:
            inputs = self.processor(text=[self.prompt], images=[picture], return_tensors="pt")
        except ValueError as error:
            raise PictureError("unprocessable", f"The model's processor refuses this picture: {error}") from error
        return Prepared(job_id, dict(inputs), inputs["input_ids"].shape[1])

    def run(self, source: Source) -> Iterator[Completion]:
        while batch := gather(source, self.batch_size):
            yield from self._caption(batch, source)

    def close(self) -> None:
        del self.model, self.processor
        self._free_memory()

    def _caption(self, batch: list[Prepared], source: Source) -> Iterator[Completion]:
        taken = time.perf_counter()
        try:
            completions = self._generate(batch, source)
        except torch.OutOfMemoryError:
            yield from self._caption_smaller(batch, source)
        else:
            latency = (time.perf_counter() - taken) * 1000
            yield from (replace(completion, latency_ms=latency) for completion in completions)

    def _caption_smaller(self, batch: list[Prepared], source: Source) -> Iterator[Completion]:
        self._free_memory()
        if len(batch) == 1:
            message = f"Out of memory with this picture alone ({batch[0].n_tokens} prompt tokens)."
            yield Completion(batch[0].job_id, failure=Failure("out_of_memory", message))
            return
        half = len(batch) // 2
        if half < self.batch_size:
            self.batch_size = half
            log.warning("out of memory with a batch of %d: going on with %d", len(batch), half)
        for part in (batch[:half], batch[half:]):
            yield from self._caption(part, source)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Prepared], source: Source) -> list[Completion]:
        meter = _Meter(source, [picture.job_id for picture in batch], self.ends)
        finite = _Finite()
        inputs = collate([picture.inputs for picture in batch], self.pad)
        output = self.model.generate(
            **{name: self._to_device(tensor) for name, tensor in inputs.items()},
            stopping_criteria=StoppingCriteriaList([meter]),
            logits_processor=LogitsProcessorList([finite]),
        )
        tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
        bad = finite.bad()
        return [
            self._completion(picture, tokens[row], bad[row], meter, row, len(batch))
            for row, picture in enumerate(batch)
            if row not in meter.abandoned
        ]

    def _completion(
        self, picture: Prepared, tokens: list[int], bad: bool, meter: "_Meter", row: int, batch_size: int
    ) -> Completion:
        if bad:
            message = (
                f"The model's output is not finite in {dtype_name(self.dtype)}: enqueue a run with another --dtype."
            )
            return Completion(picture.job_id, failure=Failure("non_finite", message))
        end = next((at for at, token in enumerate(tokens) if token in self.ends), None)
        return Completion(
            picture.job_id,
            # Stored as the model said it: only its special tokens are left out.
            text=self.processor.tokenizer.decode(tokens[:end], skip_special_tokens=True),
            finish_reason="length" if end is None else "stop",
            prompt_tokens=picture.n_tokens,
            new_tokens=len(tokens) if end is None else end + 1,
            processing_ms=meter.share_ms[row],
            prefill_ms=meter.prefill_ms[row],
            batch_size=batch_size,
        )

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _free_memory(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


# --- One batch -------------------------------------------------------------------------------------------------


def collate(rows: Sequence[dict[str, Tensor]], pad_token: int) -> dict[str, Tensor]:
    """One batch from pictures prepared alone: what has the length of the prompt is padded on the left."""
    width = max(row["input_ids"].shape[1] for row in rows)

    def column(name: str) -> Tensor:
        fill = pad_token if name == "input_ids" else 0
        return torch.cat([_pad_left(row[name], row["input_ids"].shape, width, fill) for row in rows])

    return {name: column(name) for name in rows[0]}


def _pad_left(tensor: Tensor, prompt_shape: torch.Size, width: int, fill: int) -> Tensor:
    return pad(tensor, (width - tensor.shape[1], 0), value=fill) if tensor.shape == prompt_shape else tensor


class _Meter(StoppingCriteria):  # type: ignore[misc]  # transformers ships no types
    """Called by `generate` after every step: shares its time over the rows active in it, and ends abandoned rows."""

    def __init__(self, source: Source, job_ids: Sequence[int], ends: Sequence[int]) -> None:
        self.source = source
        self.job_ids = job_ids
        self.ends = frozenset(ends)
        self.abandoned: set[int] = set()
        self.active = set(range(len(job_ids)))
        self.share_ms = [0.0] * len(job_ids)
        self.prefill_ms = [0.0] * len(job_ids)
        self.first = True
        self.since = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        newest = input_ids[:, -1].tolist()  # waits for the step to finish on the device
        self._share(time.perf_counter())
        lost = self.source.step()
        self.abandoned |= {row for row in self.active if self.job_ids[row] in lost}
        self.active -= self.abandoned | {row for row in self.active if newest[row] in self.ends}
        done = [row in self.abandoned for row in range(len(self.job_ids))]
        return torch.tensor(done, device=input_ids.device)

    def _share(self, now: float) -> None:
        step_ms = (now - self.since) * 1000
        self.since = now
        for row in self.active:
            self.share_ms[row] += step_ms / len(self.active)
        if self.first:
            self.prefill_ms = list(self.share_ms)
            self.first = False


class _Finite(LogitsProcessor):  # type: ignore[misc]  # transformers ships no types
    """Remembers the rows whose logits overflowed: half precision prints them as a row of exclamation marks."""

    def __init__(self) -> None:
        self._bad: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bad = ~torch.isfinite(scores).all(dim=-1)
        self._bad = bad if self._bad is None else self._bad | bad
        return scores

    def bad(self) -> list[bool]:
        assert self._bad is not None, "generate has not run"
        return [bool(bad) for bad in self._bad.tolist()]


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


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
        return AutoModelForImageTextToText.from_pretrained(name, **source, dtype=dtype, attn_implementation="sdpa")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _missing(name, source["revision"], error) from error


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
