"""The transformers engine: captions with any vision-language model that transformers' Auto classes load.

Knows no queue. How rows are decoded is up to `continuous` and `static`.
"""

import importlib.util
import logging
import threading
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image, Resampling
from PIL.Image import new as new_picture
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig, GenerationConfig
from transformers.integrations import sdpa_attention

from rococap.data import images
from rococap.engines import Completion, EngineInfo, Options, Prepared, Request, Source, adapters, continuous, families
from rococap.engines.checkpoint import (
    choose_dtype,
    end_tokens,
    folder_digest,
    is_here_or_unreachable,
    load_processor,
    quieten,
    reading,
    type_of,
)
from rococap.engines.continuous import ContinuousDecoder
from rococap.engines.decoding import Inputs, Loaded, Precomputed, dtype_name, free_memory
from rococap.engines.kernels import reduce_kernels
from rococap.engines.packing import pack
from rococap.engines.precompute import precompute
from rococap.engines.sizing import USUAL_SIDE, choose_limit, longest
from rococap.engines.static import StaticDecoder
from rococap.engines.template import ADVICE, chat_prompt, messages_prompt
from rococap.errors import ModelError, PictureError
from rococap.recipe import LoadIn, Recipe

log = logging.getLogger(__name__)

Size = tuple[int, ...]
Prompt = tuple[dict[str, Tensor], Precomputed | None]
"""The processor's tensors, and what the decoder computed from them, if it does so."""

STATIC_BATCH = 16
"""Pictures in a static batch, unless the user chose a number."""
MAX_PROMPTS = 2_000
"""How many tokenized prompts are kept, one for each shape that pictures take."""
SMALL_TABLE = 32
"""Tensors of fewer elements than this describe a picture's shape, such as its grid."""
NO_ADAPTER = {"subfolder": "no-adapter", "local_files_only": True}
"""Makes transformers find no adapter beside the weights, which it would apply silently. See `adapters.apply`."""
WEIGHTS_SHARE = 0.8
"""The share of a GPU's free memory that the weights may take."""
SHRINK = 0.7
"""The factor for the sides of a picture that exceeds the memory: it halves the area."""


class TransformersEngine:
    """An Engine that runs the model in this process, with transformers."""

    def __init__(self, recipe: Recipe, options: Options) -> None:
        self.recipe = recipe
        self.options = options
        self.device = _device(options.device)
        self.dtype = choose_dtype(recipe.dtype, self.device)
        self._prompts: dict[Hashable, Prompt] = {}
        self._keeps_prompts = True
        self._precomputes = False
        self._may_prepare = threading.Event()
        self._may_prepare.set()
        self._reduces = False

    def load(self) -> None:
        quieten()
        disable_cudnn_attention()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # graphs are captured, and memory is pinned, for the current one
            torch.set_num_threads(1)  # each of the threads that prepare pictures would start one per core
        name, revision = self.recipe.model, self.recipe.revision
        families.check_name(name)
        source: dict[str, Any] = {"revision": revision, "local_files_only": is_here_or_unreachable(name, revision)}
        source["trust_remote_code"] = self.recipe.trust_remote_code
        self._load_processor(name, source)
        model = self._load_model(name, source)
        adapter = ""
        if self.recipe.adapter is not None:
            model, adapter = adapters.apply(model, self.recipe)
        model = model.eval()
        reduce_kernels(model, self.device)
        if self.device.type == "cpu" and self.recipe.load_in is None:
            pack(model)
        tokenizer = self.processor.tokenizer
        ends = end_tokens(model.generation_config, self.processor, name)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
        # Replaced, not updated: the checkpoint's own settings would apply wherever a field is unset.
        model.generation_config = _generation_config(self.recipe, ends, pad)
        self.loaded = Loaded(model, tokenizer, self.device, frozenset(ends), pad, self.recipe.max_new_tokens)
        _warn_of_copies(model)
        self.decoder = self._choose_decoder()
        if isinstance(self.decoder, ContinuousDecoder):
            self._set_up(self.decoder)
        self._info = _info(self.recipe, model, self.device, self.dtype, adapter)

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

    def close(self) -> None:
        del self.loaded, self.decoder, self.processor
        free_memory(self.device)

    def _load_model(self, name: str, source: dict[str, Any]) -> Any:
        """Loads the model onto its device, or over all GPUs if requested and if it does not fit on one."""
        settings: dict[str, Any] = {"dtype": self.dtype}
        if self.recipe.load_in is not None:
            settings |= {
                "quantization_config": _quantisation(self.recipe.load_in, self.dtype, name, source),
                "device_map": {"": self.device},
            }
        if self.options.device_map is not None and not self._fits(name, source):
            settings["device_map"] = self.options.device_map
        model = _load_model(name, source, settings)
        return model if "device_map" in settings else model.to(self.device)

    def _fits(self, name: str, source: dict[str, Any]) -> bool:
        """Whether the weights leave enough memory on one GPU for keys, values and prefilling."""
        if self.device.type != "cuda":
            raise ModelError("--device-map auto spreads a model over GPUs, but there are none. Leave it out.")
        n_bytes, free = _weight_bytes(name, source, self.dtype, self.recipe.load_in), _free_bytes(self.device)
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


def _quantisation(load_in: LoadIn, dtype: torch.dtype, name: str, source: dict[str, Any]) -> BitsAndBytesConfig:
    """LLM.int8 (Dettmers et al. 2022), or 4-bit NormalFloat (Dettmers et al. 2023) with arithmetic in `dtype`.

    Quantises the language model's layers only: its head and the vision tower are small, and no later layer makes up for
    what they lose.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("--load-in needs bitsandbytes. Install it: pip install 'rococap[bitsandbytes]'")
    model = _without_weights(name, source)
    layers = _language_layers(model)
    others = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer not in layers]
    kept = {"llm_int8_skip_modules": others}  # in spite of its name, for 4 bits too
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, **kept)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, **kept)


def _without_weights(name: str, source: dict[str, Any]) -> Any:
    """Returns the model that a configuration describes, with tensors that have shapes and no content."""
    with reading(name, source["revision"]), torch.device("meta"):
        config = AutoConfig.from_pretrained(name, **source)
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=source["trust_remote_code"])


def _language_layers(model: Any) -> set[nn.Linear]:
    """Returns the linear layers inside the numbered layers of the language model."""
    numbered = (module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList))
    return {layer for layers in numbered for layer in layers.modules() if isinstance(layer, nn.Linear)}


def _weight_bytes(name: str, source: dict[str, Any], dtype: torch.dtype, load_in: LoadIn | None) -> int:
    model = _without_weights(name, source)
    bits = {"8bit": 8, "4bit": 4, None: 8 * dtype.itemsize}[load_in]
    n_quantised = sum(layer.weight.numel() for layer in _language_layers(model))
    n_others = sum(parameter.numel() for parameter in model.parameters()) - n_quantised
    return int(n_others * dtype.itemsize + n_quantised * bits // 8)


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _load_model(name: str, source: dict[str, Any], settings: dict[str, Any]) -> Any:
    with reading(name, source["revision"]):
        model, loading = AutoModelForImageTextToText.from_pretrained(
            name,
            **source,
            **settings,
            attn_implementation="sdpa",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, where both shapes are known
            adapter_kwargs=NO_ADAPTER,
        )
    _check_weights(name, model, loading)
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            _multiply(module)
    return model


def _check_weights(name: str, model: nn.Module, loading: dict[str, Any]) -> None:
    """Raises ModelError for weights that transformers, with just a warning, would leave random or ignore."""
    if others := sorted(loading["mismatched_keys"]) or _quantised_otherwise(model):
        weight, stored, wanted = others[0]
        raise ModelError(
            f"{name}: the weight {weight} has the shape {_shape_of(stored)} in the file, but {_shape_of(wanted)} in "
            "config.json, so these belong to two models. Copy the config.json that was saved with the weights, or "
            "download both again."
        )
    if lacking := sorted(loading["missing_keys"]):
        raise ModelError(f"{name} lacks {len(lacking)} weights ({lacking[0]} …). Download it again, or name another.")
    if unknown := sorted(loading["unexpected_keys"]):
        if layers := [weight for weight in unknown if _is_beyond(model, weight)]:
            raise ModelError(
                f"{name}: config.json has no layer for {len(layers)} weights ({layers[0]} …), so these belong to two "
                "models. Copy the config.json that was saved with the weights, or download both again."
            )
        log.warning("%s: %d weights are not part of the model and are ignored (%s …)", name, len(unknown), unknown[0])


def _quantised_otherwise(model: nn.Module) -> list[tuple[str, Size, Size]]:
    """(name, stored shape, expected shape) of weights that differ: bitsandbytes accepts any shape from the file."""
    found: list[tuple[str, Size, Size]] = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            whole = getattr(layer.weight, "quant_state", None) or layer.weight
            stored, wanted = tuple(whole.shape), (layer.out_features, layer.in_features)
            if stored != wanted:
                found.append((f"{name}.weight", stored, wanted))
    return found


def _shape_of(size: Size) -> str:
    return " x ".join(map(str, size))


def _is_beyond(model: nn.Module, weight: str) -> bool:
    """Whether a weight belongs to a layer after the model's last layer of that kind."""
    modules = dict(model.named_modules())
    parts = weight.split(".")
    numbered = [(modules.get(".".join(parts[:i])), int(part)) for i, part in enumerate(parts) if part.isdecimal()]
    return any(isinstance(layers, nn.ModuleList) and number >= len(layers) for layers, number in numbered)


def _multiply(conv: nn.Conv3d) -> None:
    """Computes a convolution whose input is a single patch as what it is, a matrix product.

    As a convolution in bfloat16, it takes seconds with cuDNN on some GPUs and, on a CPU, a tenth of the time to read a
    picture.
    """

    def forward(patches: Tensor) -> Tensor:
        if patches.shape[2:] != conv.kernel_size or conv.padding != (0, 0, 0) or conv.groups != 1:
            return nn.Conv3d.forward(conv, patches)
        return linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)[..., None, None, None]

    conv.forward = forward  # type: ignore[assignment, method-assign]


def _warn_of_copies(model: nn.Module) -> None:
    """Warns of a transformers that copies keys and values at each step, for every query head that shares them."""
    n = max(getattr(module, "num_key_value_groups", 1) for module in model.modules())
    if n > 1 and not hasattr(sdpa_attention, "pack_gqa"):
        log.warning(
            "transformers %s copies the keys and values of this model %d-fold at every decode step, which slows "
            "captioning down. Upgrade it: pip install -U 'transformers>=5.23,<6'",
            *(version("transformers"), n),
        )


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
    folder = Path(recipe.model)
    commit = getattr(model.config, "_commit_hash", None) or ""
    packages = ["rococap", "torch", "transformers", "accelerate", "pillow"]
    packages += ["peft"] * (recipe.adapter is not None) + ["bitsandbytes"] * (recipe.load_in is not None)
    return EngineInfo(
        name="transformers",
        versions={package: version(package) for package in packages} | {"cudnn_attention": _cudnn_attention()},
        model=recipe.model,
        revision="" if folder.is_dir() else commit,
        dtype=dtype_name(dtype),
        device=str(device),
        digest=folder_digest(folder) if folder.is_dir() else commit,
        adapter=adapter,
    )
