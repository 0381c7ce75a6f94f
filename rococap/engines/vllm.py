"""The vLLM engine: vLLM's kernels and scheduler, with our prompt, our pixel bounds and our accounting of time.

Each picture is a request of its own, so one that vLLM rejects fails alone. Unless VLLM_ENABLE_V1_MULTIPROCESSING says
otherwise, the model runs in this process, so that it dies with its worker and leaves no memory allocated.

NaN in the logits is the failure `non_finite`; infinite logits are not reported by vLLM, and remain unnoticed here.
Knows no queue.
"""

import copy
import importlib.util
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from PIL.Image import Image
from transformers import GenerationConfig

from rococap.data import images
from rococap.engines import (
    Completion,
    EngineInfo,
    Failure,
    Options,
    Prepared,
    Request,
    Source,
    Streaming,
    adapters,
    families,
    files,
    gather,
)
from rococap.engines.checkpoint import (
    cannot_load,
    choose_dtype,
    end_tokens,
    is_here_or_unreachable,
    load_processor,
    quieten,
    type_of,
)
from rococap.engines.decoding import Loaded, Row, dtype_name, free_memory, share
from rococap.engines.template import chat_prompt, messages_prompt
from rococap.errors import ModelError, PictureError
from rococap.recipe import Recipe

MAX_AT_ONCE = 256
"""vLLM's default is up to 1,024 requests: twice as many prepared pictures would not fit into memory."""
REFILL = 4
"""The first batch starts with 1 in REFILL of the rows; the others join as they come."""
CPU_CACHE_BYTES = 4 << 30
"""Memory for keys and values on a CPU, unless VLLM_CPU_KVCACHE_SPACE is set: vLLM would take 90 % of the machine's."""
VISION_THETA = 10_000
"""The base of the rotary positions in vLLM's vision tower of Qwen2-VL."""
ENVIRONMENT = {
    "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
    "VLLM_CONFIGURE_LOGGING": "0",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
"""Defaults for variables that are not set. vLLM reads its environment when it is imported."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """A request as processed by vLLM, and its SamplingParams."""

    processed: Any
    sampling: Any
    flags: str = ""


class VLLMEngine:
    """An Engine that runs the model with vLLM."""

    def __init__(self, recipe: Recipe, options: Options) -> None:
        _refuse(recipe, options)
        self.recipe = recipe
        self.options = options
        self._preparing = threading.Lock()

    def load(self) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ModelError("The engine vllm is not installed. Install it: pip install 'rococap[vllm]'")
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        quieten()
        logging.getLogger("vllm").setLevel(logging.ERROR)
        recipe = self.recipe
        device = _device(self.options.device)
        here = is_here_or_unreachable(recipe.model, recipe.revision)
        source = {"revision": recipe.revision, "local_files_only": here}
        trusting = source | {"trust_remote_code": recipe.trust_remote_code}
        model_type = type_of(recipe.model, trusting)
        self._processor = processor = load_processor(recipe.model, trusting)
        bounds = families.pixel_bounds(model_type, processor.image_processor, recipe)
        self._reduces = bounds is None
        self._prompt = chat_prompt(processor, recipe.prompt, recipe.model)
        adapters.warn_of_unused(recipe.model, source, None)
        folder = _folder(recipe.model, source)
        _refuse_adapter_beside(folder, recipe.model)
        self._llm = _load(folder, recipe, self.options, device, bounds or {})
        _configure_rotary_base(self._llm)
        model, tokenizer = self._llm.model_config, processor.tokenizer  # decoding needs only the model's dtype
        ends = end_tokens(_generation_config(folder, model), processor, recipe.model)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
        self.loaded = Loaded(model, tokenizer, device, frozenset(ends), pad, recipe.max_new_tokens)
        self._ends = ends
        self._max_rows = self._llm.vllm_config.scheduler_config.max_num_seqs
        self.limit = self.options.batch_size or min(self._max_rows, MAX_AT_ONCE)
        self._info = _info(recipe, folder, self.loaded)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def batch_size(self) -> int:
        return self.limit

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.limit = min(size, self._max_rows)

    def prepare(self, job_id: int, request: Request) -> Prepared:
        sampling = _sampling(self.recipe, self._ends, request.limit(self.recipe))
        picture = _only(request.pictures)
        if self._reduces:
            picture = images.reduced(picture, self.recipe.max_pixels)
        text = self._prompt
        if request.messages is not None:
            text = messages_prompt(self._processor, request.messages, self.recipe.model)
        prompt = {"prompt": text, "multi_modal_data": {"image": picture}}
        try:
            with self._preparing:  # vLLM's own server never runs a processor in two threads
                (inputs,) = self._llm.renderer.render_cmpl([prompt])
        except _refusals() as error:
            raise PictureError("unprocessable", f"The model's processor rejects this picture: {error}") from error
        return Prepared(job_id, Inputs(inputs, sampling), len(inputs["prompt_token_ids"]))

    def run(self, source: Source) -> Iterator[Completion]:
        listener = source if isinstance(source, Streaming) else None
        rows: dict[str, Row] = {}
        while (taken := self._take(source, len(rows))) or rows:
            yield from self._add(taken, rows)
            if not rows:
                continue
            started = time.perf_counter()
            outputs = [output for output in self._llm.step() if output.request_id in rows]
            n_decoded = sum(bool(rows[output.request_id].tokens) for output in outputs)
            if listener is not None:
                self._tell(listener, outputs, rows)
            yield from self._charge(outputs, rows, started)
            self._abandon(source.step(n_decoded), rows)

    def text_of(self, ids: Sequence[int]) -> str:
        return str(self.loaded.tokenizer.decode(ids, skip_special_tokens=True))

    def close(self) -> None:
        self._llm.engine_core.shutdown()
        self._llm.renderer.shutdown()
        device = self.loaded.device
        del self._llm, self.loaded
        free_memory(device)

    def _take(self, source: Source, n_rows: int) -> list[Prepared]:
        """Takes pictures from the source, waiting only if no rows are running."""
        if not n_rows:
            return gather(source, max(1, self.limit // REFILL))
        return source.take(self.limit - n_rows, 0) if n_rows < self.limit else []

    def _add(self, pictures: list[Prepared], rows: dict[str, Row]) -> Iterator[Completion]:
        now = time.perf_counter()
        for picture in pictures:
            name = str(picture.job_id)
            try:
                self._llm.add_request(name, picture.inputs.processed, picture.inputs.sampling)
            except _refusals() as error:
                yield Completion(
                    picture.job_id, failure=Failure("unprocessable", f"vLLM rejects this picture: {error}")
                )
            else:
                rows[name] = Row(picture, now, [])

    def _tell(self, listener: Streaming, outputs: list[Any], rows: dict[str, Row]) -> None:
        """Tells the tokens of a step, which the rows do not have yet."""
        for output in outputs:
            row = rows[output.request_id]
            ids = [id for id in output.outputs[0].token_ids if id not in self.loaded.ends]
            if ids and not output.metrics.is_corrupted:
                listener.tokens(row.picture.job_id, len(row.tokens), ids)

    def _charge(self, outputs: list[Any], rows: dict[str, Row], started: float) -> Iterator[Completion]:
        """Charges a step to the rows that got a token in it, or to all if it only read parts of prompts.

        Yields the rows that it finished.
        """
        now = time.perf_counter()
        share([rows[output.request_id] for output in outputs] or list(rows.values()), now - started)
        for output in outputs:
            row = rows[output.request_id]
            row.tokens += output.outputs[0].token_ids
            row.prefill_ms = row.prefill_ms or row.share_ms
            row.is_finite = not output.metrics.is_corrupted
            if not row.is_finite and not output.finished:
                self._llm.abort_request([output.request_id])
            if output.finished or not row.is_finite:
                del rows[output.request_id]
                yield self._completion(output.outputs[0].finish_reason, row, now)

    def _completion(self, reason: str | None, row: Row, now: float) -> Completion:
        if reason in ("abort", "error"):  # vLLM's own decision: an internal error may not happen again
            message = f"vLLM stopped captioning this picture ({reason})."
            return Completion(row.picture.job_id, failure=Failure("vllm", message, transient=True))
        return row.completion(self.loaded, now)

    def _abandon(self, job_ids: Set[int], rows: dict[str, Row]) -> None:
        lost = [name for name, row in rows.items() if row.picture.job_id in job_ids]
        if lost:
            self._llm.abort_request(lost)
        for name in lost:
            del rows[name]


def _only(pictures: Sequence[Image]) -> Image:
    if len(pictures) > 1:
        message = f"The engine vllm takes one picture in a request, not {len(pictures)}. Use --engine transformers."
        raise PictureError("unprocessable", message)
    return pictures[0]


def _refusals() -> tuple[type[Exception], ...]:
    """The classes of errors that vLLM raises for a request that it rejects."""
    from vllm.exceptions import VLLMClientError

    return ValueError, VLLMClientError


def _refuse(recipe: Recipe, options: Options) -> None:
    """Raises ModelError for settings that vLLM cannot follow exactly."""
    requested = {
        "adapter": recipe.adapter is not None,
        "load_in": recipe.load_in is not None,
        "decode": options.decode != "auto",
    }
    for field in (field for field, is_requested in requested.items() if is_requested):
        value = getattr(recipe if hasattr(recipe, field) else options, field)
        raise ModelError(f"{field}: the vllm engine does not support {value!r}. Use --engine transformers.")


# --- Loading ---------------------------------------------------------------------------------------------------


def _device(name: str) -> torch.device:
    from vllm.platforms import current_platform

    kind = current_platform.device_type
    if name.partition(":")[0] not in ("auto", kind):
        raise ModelError(f"This build of vLLM runs on {kind}, not on {name!r}. Use --device auto or {kind}.")
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device(kind, int(name.partition(":")[2] or 0))


def _folder(name: str, source: dict[str, Any]) -> Path:
    """The folder of the model's files, downloaded if necessary. Given a name, vLLM would ask the hub for each file."""
    if Path(name).is_dir():
        return Path(name)
    patterns = [f"*{suffix}" for suffix in sorted(files.MODEL_FILES)]
    try:
        return Path(snapshot_download(name, **source, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise cannot_load(name, source["revision"], error) from error


def _refuse_adapter_beside(folder: Path, name: str) -> None:
    """Raises ModelError for an adapter that vLLM would load as weights of the model: without an index, it loads every
    file of weights in the folder.
    """
    found = [file for file in files.ADAPTER_WEIGHTS if (folder / file).is_file()]
    is_pickled = not any((folder / file).is_file() for file in files.WEIGHTS if "safetensors" in file)
    read = [file for file in found if is_pickled or file.endswith(".safetensors")]
    if read and not (folder / "model.safetensors.index.json").is_file():
        raise ModelError(
            f"vLLM would load {read[0]}, which is in the same folder as the weights of {name}, as a part of them. Move "
            "it elsewhere, or use --engine transformers, which ignores it."
        )


def _load(folder: Path, recipe: Recipe, options: Options, device: torch.device, bounds: families.Bounds) -> Any:
    from vllm import EngineArgs, LLMEngine

    is_cpu = device.type == "cpu"
    try:
        return LLMEngine.from_engine_args(
            EngineArgs(
                model=str(folder),
                dtype=dtype_name(choose_dtype(recipe.dtype, device)),
                trust_remote_code=recipe.trust_remote_code,
                generation_config="vllm",  # the checkpoint's own settings would apply wherever a field is unset
                limit_mm_per_prompt={"image": 1, "video": 0},
                mm_processor_kwargs=dict(bounds),
                mm_processor_cache_gb=0,  # no picture comes twice, and no two share a prefix
                enable_prefix_caching=False,
                max_num_seqs=options.batch_size,
                max_model_len=-1,  # the model's own limit, or as much as memory allows
                device_ids=None if is_cpu else [device.index],
                kv_cache_memory_bytes=CPU_CACHE_BYTES if is_cpu else None,
                enforce_eager=is_cpu,
                seed=0,
            )
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AssertionError) as error:
        raise cannot_load(recipe.model, recipe.revision, error) from error


def _configure_rotary_base(llm: Any) -> None:
    """Gives Qwen2-VL's vision tower the base of its rotary positions: vLLM uses 10,000, whatever the config says.

    Otherwise, a model with another base, such as the demo's, would caption something else, without an error.
    """
    vision = getattr(llm.model_config.hf_config, "vision_config", None)
    theta = (getattr(vision, "rope_parameters", None) or {}).get("rope_theta", VISION_THETA)
    if llm.model_config.hf_config.model_type == "qwen2_vl" and theta != VISION_THETA:
        llm.apply_model(partial(_set_rotary_base, theta=theta))


def _set_rotary_base(model: Any, theta: float) -> None:
    rope = copy.deepcopy(model.visual.rotary_pos_emb)  # vLLM shares it with every model of that size in this process
    rope.base = theta
    rope.cos_sin_cache.copy_(rope._compute_cos_sin_cache())
    model.visual.rotary_pos_emb = rope


def _generation_config(folder: Path, model: Any) -> GenerationConfig:
    """The generation config that transformers would use for this model."""
    if (folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(model.hf_config)


def _sampling(recipe: Recipe, ends: list[int], max_tokens: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=0.0,
        repetition_penalty=recipe.repetition_penalty,
        max_tokens=max_tokens,
        stop_token_ids=ends,
        ignore_eos=True,  # vLLM's own end token: ours are in `ends`
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _info(recipe: Recipe, folder: Path, loaded: Loaded) -> EngineInfo:
    is_local = Path(recipe.model).is_dir()
    packages = ("rococap", "torch", "transformers", "pillow")
    return EngineInfo(
        name="vllm",
        versions={package: version(package) for package in packages} | {"vllm": _vllm_version()},
        model=recipe.model,
        revision="" if is_local else folder.name,  # the hub's cache names a snapshot by its commit
        dtype=dtype_name(loaded.model.dtype),
        device=str(loaded.device),
        digest=files.folder_digest(folder) if is_local else folder.name,
    )


def _vllm_version() -> str:
    """The installed version. The distribution built for the CPU has another name."""
    try:
        return version("vllm")
    except PackageNotFoundError:
        return version("vllm-cpu")
