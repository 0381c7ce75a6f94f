"""The transformers engine: captions with any vision-language model that transformers' Auto classes load.

Knows no queue. How rows are decoded is up to `continuous` and `static`.
"""

import logging
import os
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from PIL.Image import Image, Resampling
from PIL.Image import new as new_picture
from torch import Tensor
from transformers import GenerationConfig

from rococap.data import images
from rococap.engines import (
    Completion,
    EngineInfo,
    Options,
    Prepared,
    Request,
    Source,
    adapters,
    continuous,
    families,
    weights,
)
from rococap.engines.checkpoint import (
    choose_dtype,
    end_tokens,
    identity,
    is_here_or_unreachable,
    load_processor,
    quieten,
    type_of,
)
from rococap.engines.continuous import ContinuousDecoder
from rococap.engines.decoding import Inputs, Loaded, Precomputed, dtype_name, free_memory
from rococap.engines.kernels import reduce_kernels, warn_of_copies
from rococap.engines.packing import pack
from rococap.engines.precompute import precompute
from rococap.engines.sizing import USUAL_SIDE, choose_limit, longest
from rococap.engines.static import StaticDecoder
from rococap.engines.template import ADVICE, chat_prompt, messages_prompt
from rococap.errors import ModelError, PictureError
from rococap.recipe import Recipe

log = logging.getLogger(__name__)

Prompt = tuple[dict[str, Tensor], Precomputed | None]
"""The processor's tensors, and what the decoder computed from them, if it does so."""

STATIC_BATCH = 16
"""Pictures in a static batch, unless the user chose a number."""
MAX_PROMPTS = 2_000
"""How many tokenized prompts are kept, one for each shape that pictures take."""
SMALL_TABLE = 32
"""Tensors of fewer elements than this describe a picture's shape, such as its grid."""
WEIGHTS_SHARE = 0.8
"""The share of a GPU's free memory that the weights may take."""
SHRINK = 0.7
"""The factor for the sides of a picture that exceeds the memory: it halves the area."""


class TransformersEngine:
    """An Engine that runs the model in this process, with transformers."""

    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.recipe = recipe
        self.options = options
        self.device = find_device(options.device)
        self.dtype = choose_dtype(recipe.dtype, self.device)
        self._prompts: dict[Hashable, Prompt] = {}
        self._keeps_prompts = True
        self._precomputes = False
        self._may_prepare = threading.Event()
        self._may_prepare.set()
        self._reduces = False

    def load(self) -> None:
        model, adapter = self.load_plain()
        model = model.eval()
        reduce_kernels(model, self.device)
        if self.device.type == "cpu" and self.recipe.load_in is None:
            pack(model)
        name = self.recipe.model
        tokenizer = self.processor.tokenizer
        ends = end_tokens(model.generation_config, self.processor, name)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
        # Replaced, not updated: the checkpoint's own settings would apply wherever a field is unset.
        model.generation_config = _generation_config(self.recipe, ends, pad)
        self.loaded = Loaded(model, tokenizer, self.device, frozenset(ends), pad, self.recipe.max_new_tokens)
        warn_of_copies(model)
        self.decoder = self._choose_decoder()
        if isinstance(self.decoder, ContinuousDecoder):
            self._set_up(self.decoder)
        self._info = _info(self.recipe, model, self.device, self.dtype, adapter)

    def load_plain(self) -> tuple[Any, str]:
        """Loads the processor, and returns the model as transformers makes it and its adapter's digest, "" if none.

        What else `load` does to a model serves captioning alone. Fine-tuning trains this one, and `prepare` works.
        """
        quieten()
        disable_cudnn_attention()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # graphs are captured, and memory is pinned, for the current one
            torch.set_num_threads(1)  # each of the threads that prepare pictures would start one per core
            # A check that there is a place in the prompt for every part of the picture, as the processor makes it: it
            # reads from the device, and waits for the vision tower.
            os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"
        name, revision = self.recipe.model, self.recipe.revision
        families.check_name(name)
        source: dict[str, Any] = {"revision": revision, "local_files_only": is_here_or_unreachable(name, revision)}
        source["trust_remote_code"] = self.recipe.trust_remote_code
        self._load_processor(name, source)
        model = self._load_model(name, source)
        return (model, "") if self.recipe.adapter is None else adapters.apply(model, self.recipe)

    def _load_processor(self, name: str, source: dict[str, Any]) -> None:
        """Loads and tests the processor before the weights, which take minutes: its faults affect every picture."""
        model_type = type_of(name, source)
        adapters.warn_of_unused(name, source, self.recipe.adapter)
        self.processor = load_processor(name, source)
        # Set after loading, because a checkpoint's preprocessor_config.json overrides what from_pretrained is given.
        bounds = families.pixel_bounds(model_type, self.processor.image_processor, self.recipe)
        for setting, value in (bounds or {}).items():
            setattr(self.processor.image_processor, setting, value)
        if bounds is None:
            self._reduces = True
            log.info("pictures are reduced to --max-pixels beforehand: how to set bounds for %s is unknown", model_type)
        self.prompt = chat_prompt(self.processor, self.recipe.prompt, name)
        try:
            self.prepare(0, Request([new_picture("RGB", (USUAL_SIDE, USUAL_SIDE))]))
        except PictureError as error:
            raise ModelError(
                f"The processor of {name} rejects pictures with the prompt that its chat template makes: "
                f"{error.__cause__} {ADVICE}"
            ) from error

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def batch_size(self) -> int:
        return self.decoder.limit

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.decoder.limit = size

    def prepare(self, job_id: int, request: Request) -> Prepared:
        limit = request.limit(self.recipe)
        self._may_prepare.wait()
        if self._reduces:
            reduced = [images.reduced(picture, self.recipe.max_pixels) for picture in request.pictures]
            request = replace(request, pictures=reduced)
        try:
            tensors, precomputed = self._process(request)
        except ValueError as error:
            n = len(request.pictures)
            what = "this picture" if n == 1 else f"these {n} pictures"
            raise PictureError("unprocessable", f"The model's processor rejects {what}: {error}") from error
        staged = {name: self._staged(tensor) for name, tensor in tensors.items()}
        return Prepared(job_id, Inputs(staged, request, limit, precomputed), tensors["input_ids"].shape[1])

    def _staged(self, tensor: Tensor) -> Tensor:
        """Casts pixels to the model's type, as the model itself would, and pins them so that copying need not wait."""
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.to(self.dtype)
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _process(self, request: Request) -> Prompt:
        """Returns the processor's output, with the recipe's prompt from a cache, and what the decoder computes from it.

        Half of the processor's time goes into the prompt, in which only the number of image tokens varies, with the
        shape of the processed picture. Prompts are not cached if they depend on more than the image processor returns.
        """
        pictures = list(request.pictures)
        if request.messages is not None:
            return self._process_whole(messages_prompt(self.processor, request.messages, self.recipe.model), pictures)
        if not self._keeps_prompts:
            return self._process_whole(self.prompt, pictures)
        image = dict(self.processor.image_processor(images=pictures, return_tensors="pt"))
        shape = _shape(image)
        prompt = self._prompts.get(shape)  # looked up only once, since another thread may clear the cache
        if prompt is None:
            whole, precomputed = self._process_whole(self.prompt, pictures)
            if shape is None or not all(name in whole and torch.equal(whole[name], image[name]) for name in image):
                self._keeps_prompts = False
                return whole, precomputed
            if len(self._prompts) == MAX_PROMPTS:
                self._prompts.clear()
            text = {name: tensor for name, tensor in whole.items() if name not in image}
            prompt = self._prompts[shape] = text, precomputed
        return prompt[0] | image, prompt[1]

    def _process_whole(self, prompt: str, pictures: list[Image]) -> Prompt:
        tensors = dict(self.processor(text=[prompt], images=pictures, return_tensors="pt"))
        return tensors, precompute(self.loaded.model, tensors) if self._precomputes else None

    def run(self, source: Source) -> Iterator[Completion]:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # this may be another thread than the one that loaded the model
        return self.decoder.run(source)

    def text_of(self, ids: Sequence[int]) -> str:
        return str(self.loaded.tokenizer.decode(ids, skip_special_tokens=True))

    def close(self) -> None:
        del self.loaded, self.decoder, self.processor
        free_memory(self.device)

    def _load_model(self, name: str, source: dict[str, Any]) -> Any:
        """Loads the model onto its device, or over all GPUs if requested and if it does not fit on one."""
        settings: dict[str, Any] = {"dtype": self.dtype}
        if self.recipe.load_in is not None:
            settings |= {
                "quantization_config": weights.quantisation(self.recipe.load_in, self.dtype, name, source),
                "device_map": {"": self.device},
            }
        if self.options.device_map is not None and not self._fits(name, source):
            settings["device_map"] = self.options.device_map
        model = weights.load(name, source, settings)
        return model if "device_map" in settings else model.to(self.device)

    def _fits(self, name: str, source: dict[str, Any]) -> bool:
        """Whether the weights leave enough memory on one GPU for keys, values and prefilling."""
        if self.device.type != "cuda":
            raise ModelError("--device-map auto spreads a model over GPUs, but there are none. Leave it out.")
        n_bytes, free = weights.n_bytes(name, source, self.dtype, self.recipe.load_in), _free_bytes(self.device)
        if n_bytes <= WEIGHTS_SHARE * free:
            log.info("%s fits on %s, so it is not spread over all GPUs", name, self.device)
            return True
        return False

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
        return ContinuousDecoder(self.loaded, self.options.batch_size or 1, self._shrink)

    def _set_up(self, decoder: ContinuousDecoder) -> None:
        """Chooses how many rows to run at once, unless the user did, and captures CUDA graphs for them."""
        self._precomputes = True
        self._may_prepare = decoder.may_prepare
        self._prompts.clear()
        if self.options.batch_size is None:
            decoder.limit = choose_limit(decoder, self.prepare, self.recipe.max_pixels)
        if self.device.type == "cuda" and self.options.graphs:
            decoder.use_graphs(longest(self.prepare, self.recipe.max_pixels))

    def _why_static(self) -> str | None:
        """Why continuous decoding is not possible; None if it is."""
        if self.recipe.repetition_penalty != 1.0:
            return "the recipe uses a repetition penalty"
        if len(set(getattr(self.loaded.model, "hf_device_map", {}).values())) > 1:
            return "the model is spread over several devices"
        return None if continuous.is_known(self.loaded.model) else "its cache is of an unsupported kind"

    def _shrink(self, picture: Prepared) -> Prepared | None:
        """Prepares a request with smaller pictures, with a flag; None if fewer pixels make no fewer tokens."""
        request: Request = picture.inputs.request
        while any(min(image.size) > 1 for image in request.pictures):
            request = replace(request, pictures=[_smaller(image) for image in request.pictures])
            smaller = self.prepare(picture.job_id, request)
            if smaller.n_tokens < picture.n_tokens:
                message = "out of memory with one picture of %d prompt tokens: reduced to %d by using fewer pixels"
                log.warning(message, picture.n_tokens, smaller.n_tokens)
                return replace(smaller, inputs=replace(smaller.inputs, flags="fewer_pixels"))
        return None


def _smaller(picture: Image) -> Image:
    return picture.resize([max(1, round(side * SHRINK)) for side in picture.size], Resampling.LANCZOS)


def _shape(image: Mapping[str, object]) -> Hashable:
    """The shape of a processed picture: the sizes of its tensors, and the content of small ones such as a grid.

    None if the image processor returned anything but tensors.
    """
    if not all(isinstance(tensor, Tensor) for tensor in image.values()):
        return None
    return tuple(
        (name, tensor.shape, tuple(tensor.flatten().tolist()) if tensor.numel() < SMALL_TABLE else ())
        for name, tensor in image.items()
        if isinstance(tensor, Tensor)
    )


# --- Loading ---------------------------------------------------------------------------------------------------


def find_device(name: str) -> torch.device:
    """The device of this name. auto is the first GPU, or the CPU if there is none.

    Raises ModelError if it does not exist.
    """
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


def disable_cudnn_attention() -> None:
    """Makes attention use other kernels than cuDNN's, PyTorch's default on Hopper and on some Blackwell GPUs.

    cuDNN builds a plan for every new shape, which takes 23 to 440 ms (sgl-project/sglang#4650,
    huggingface/transformers#48163), and it was reported to corrupt the text of models with few key-value heads
    (pytorch/pytorch#193893). Call this before the first attention.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    log.info("cuDNN attention is off")


def _cudnn_attention() -> str:
    return "on" if torch.backends.cuda.cudnn_sdp_enabled() else "off"  # type: ignore[no-untyped-call]


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


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


def _info(recipe: Recipe, model: Any, device: torch.device, dtype: torch.dtype, adapter: str) -> EngineInfo:
    commit, digest = identity(model, recipe.model)
    packages = ["rococap", "torch", "transformers", "accelerate", "pillow"]
    packages += ["peft"] * (recipe.adapter is not None) + ["bitsandbytes"] * (recipe.load_in is not None)
    return EngineInfo(
        name="transformers",
        versions={package: version(package) for package in packages} | {"cudnn_attention": _cudnn_attention()},
        model=recipe.model,
        revision=commit,
        dtype=dtype_name(dtype),
        device=str(device),
        digest=digest,
        adapter=adapter,
    )
