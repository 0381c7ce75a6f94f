"""What the parts of `gpu.py` share: the model, made up on the device, pictures for it, and the time that is left."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen2_vl import modeling_qwen2_vl

import rococap
from rococap.demo import MODEL
from rococap.demo.phantoms import HELD_OUT_SEEDS, draw
from rococap.engines import Options, Prepared, Request, hf, weights
from rococap.engines.continuous import NOT_FINITE, ContinuousDecoder
from rococap.engines.decoding import Row, free_memory
from rococap.engines.graphs import Graphs
from rococap.engines.hf import TransformersEngine
from rococap.engines.kernels import ROTATE
from rococap.engines.precompute import tower
from rococap.engines.sizing import longest
from rococap.recipe import Recipe

Figures = dict[str, Any]
"""One line of the output, but for the part that it belongs to."""

TEXT = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "num_heads": 16,
    "mlp_ratio": 4,
    "hidden_size": 1536,
    "hidden_act": "quick_gelu",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "initializer_range": 0.02,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 1e4},
}
"""Qwen2-VL-2B. Its special tokens are the demo model's, whose tokenizer it gets."""
ROW_SHARE = 0.5
"""The share of the free memory that keys and values may take."""
PLAIN_ROTATION = getattr(modeling_qwen2_vl, ROTATE)
"""As transformers has it: loading an engine on a GPU replaces it for every model in the process."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. `sides` are those of square pictures in pixels, the most usual first; `rows` are how many
    captions are decoded at a time, in single steps and, as `many_rows`, to the end. A `turn` is a number of captions
    after which lengths repeat, so that whole turns have the same mean.
    """

    sides: tuple[int, ...] = (740, 512, 1000)
    rows: tuple[int, ...] = (1, 16, 64, 128, 256)
    many_rows: tuple[int, ...] = (16, 32, 64, 128, 256)
    groups: tuple[int, ...] = (1, 4, 16)
    static: tuple[int, ...] = (16, 32, 64)
    preparers: tuple[int, ...] = (1, 2, 4, 8)
    mean_length: int = 60
    max_length: int = 256
    turn: int = 64
    alone: int = 8
    repeats: int = 10
    demo_pictures: int = 64
    worker_rows: int = 64
    worker_turns: int = 5
    copy_bytes: int = 2**30
    product: int = 8192


TINY = Scale(
    sides=(112, 56, 168),
    rows=(1, 2, 4),
    many_rows=(2, 4),
    groups=(1, 2),
    static=(2, 4),
    preparers=(1, 2),
    mean_length=8,
    max_length=16,
    turn=8,
    alone=2,
    repeats=2,
    demo_pictures=8,
    worker_rows=4,
    worker_turns=2,
    copy_bytes=2**22,
    product=256,
)


@dataclass
class Bench:
    """The machine, what is loaded on it, and when to stop. `ends_at` is on the clock `time.monotonic`."""

    device: torch.device
    tiny: bool
    ends_at: float
    folder: Path
    report: Callable[[Figures], None]
    _allocated: int = 0
    _images: list[Image.Image] = field(default_factory=list)
    _prepared: dict[int, list[Prepared]] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def scale(self) -> Scale:
        return TINY if self.tiny else Scale()

    # --- time ---

    def left(self) -> float:
        """Seconds until the end."""
        return self.ends_at - time.monotonic()

    def too_late_for(self, seconds: float) -> str | None:
        """Why something that usually takes so long on a GPU must not start any more; None if it may."""
        needed = seconds / 10 if self.tiny else seconds
        left = max(0.0, self.left())
        return f"it takes {needed:.0f} s, and {left:.0f} s are left" if left < needed else None

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def times(self, work: Callable[[], object], n: int) -> list[float]:
        """Milliseconds of each of n calls, with all that they leave to the device."""
        took = []
        for _ in range(n):
            self.synchronise()
            started = time.perf_counter()
            work()
            self.synchronise()
            took.append(1000 * (time.perf_counter() - started))
        return took

    def timed(self, work: Callable[[], object], n: int | None = None) -> Figures:
        """The first call, the second, and the median of n more."""
        first, second, *others = self.times(work, 2 + (n or self.scale.repeats))
        return {"first_ms": first, "second_ms": second, "ms": median(others)}

    # --- memory ---

    def forget_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._allocated = torch.cuda.memory_allocated(self.device)

    def peak(self) -> Figures:
        """Memory since `forget_peak`: the most in tensors, how much of that was new, and what PyTorch held for them."""
        if not self.on_gpu:
            return {}
        allocated = torch.cuda.max_memory_allocated(self.device)
        return {
            "peak_gb": allocated / 1e9,
            "new_gb": (allocated - self._allocated) / 1e9,
            "reserved_gb": torch.cuda.max_memory_reserved(self.device) / 1e9,
        }

    def tidy(self) -> None:
        """Leaves no rows behind, whatever a part broke off."""
        if "_loaded" in self.__dict__:
            self.decoder._clear()
            self.decoder._waiting.clear()
        free_memory(self.device)

    # --- the model ---

    @cached_property
    def model(self) -> Path:
        """A folder with all of the model but its weights."""
        return write_model(self.folder / "model", tiny=self.tiny)

    @cached_property
    def recipe(self) -> Recipe:
        return Recipe(model=str(self.model), dtype="bfloat16", max_new_tokens=self.scale.max_length)

    @cached_property
    def _loaded(self) -> tuple[TransformersEngine, list[int]]:
        started = time.perf_counter()
        self.forget_peak()
        engine = TransformersEngine(self.recipe, Options(device=str(self.device), batch_size=1, graphs=False))
        with random_weights(self.device):
            engine.load()
        self.synchronise()
        seconds = time.perf_counter() - started
        assert isinstance(engine.decoder, ContinuousDecoder), "this transformers only allows static batches: upgrade it"
        finite = _is_finite(engine)
        rows = self._fitting(engine)
        engine.batch_size = max(rows)
        self.report(
            {
                "case": "loading",
                "seconds": seconds,
                "million_parameters": sum(p.numel() for p in engine.loaded.model.parameters()) / 1e6,
                "finite": finite,
                "rows": rows,
                "vision_compiled": getattr(modeling_qwen2_vl, ROTATE) is not PLAIN_ROTATION,
                **self.peak(),
            }
        )
        assert finite, "the made-up weights give logits that are not finite"
        return engine, rows

    @property
    def engine(self) -> TransformersEngine:
        """The engine; it has no graphs until `use_graphs`."""
        return self._loaded[0]

    @property
    def rows(self) -> list[int]:
        """How many captions are decoded at a time: as many of the scale's as fit."""
        return self._loaded[1]

    @property
    def decoder(self) -> ContinuousDecoder:
        decoder = self.engine.decoder
        assert isinstance(decoder, ContinuousDecoder)
        return decoder

    def _fitting(self, engine: TransformersEngine) -> list[int]:
        """The numbers of rows for which there is memory; at least the smallest."""
        if not self.on_gpu:
            return list(self.scale.rows)
        tokens = longest(engine.prepare, self.recipe.max_pixels).n_tokens + self.scale.max_length
        room = ROW_SHARE * torch.cuda.mem_get_info(self.device)[0]
        n_bytes = tokens * key_value_bytes(engine.loaded.model.config)
        return [rows for rows in self.scale.rows if rows * n_bytes < room] or [min(self.scale.rows)]

    def use_graphs(self) -> None:
        """Captures graphs for all rows, as a worker does when it starts; does nothing on a CPU."""
        if self.on_gpu and not self.decoder._graphs:
            self.decoder.limit = max(self.rows)
            self.decoder.use_graphs(longest(self.engine.prepare, self.recipe.max_pixels))

    @contextmanager
    def no_graphs(self) -> Iterator[None]:
        """Puts the graphs aside, unless the buffers that they work on are replaced meanwhile."""
        decoder = self.decoder
        graphs, uses_graphs, buffer = decoder._graphs, decoder._uses_graphs, decoder._slots.layers[0].keys
        decoder._graphs, decoder._uses_graphs = Graphs(decoder._decode, self.device), False
        try:
            yield
        finally:
            decoder._graphs, decoder._uses_graphs = graphs, uses_graphs
            if decoder._slots.layers[0].keys is not buffer:
                graphs.clear()

    # --- pictures ---

    def images(self, side: int, n: int) -> list[Image.Image]:
        """Phantoms enlarged to this side."""
        seeds = HELD_OUT_SEEDS["test"]
        self._images += [draw(seeds[number]).image.convert("RGB") for number in range(len(self._images), n)]
        return [image.resize((side, side), Image.Resampling.BICUBIC) for image in self._images[:n]]

    def prepared(self, side: int, n: int) -> list[Prepared]:
        """n prepared pictures, with job ids from 1; after a turn the same ones come again."""
        known = self._prepared.setdefault(side, [])
        want = min(n, self.scale.turn)
        if len(known) < want:
            known += [self.engine.prepare(0, Request([image])) for image in self.images(side, want)[len(known) :]]
        return [replace(known[number % want], job_id=number + 1) for number in range(n)]

    def forget_pictures(self) -> None:
        self._prepared.clear()


# --- The model -------------------------------------------------------------------------------------------------


def write_model(folder: Path, *, tiny: bool) -> Path:
    """Writes all files of the model but its weights, and returns `folder`."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((MODEL / "config.json").read_text())
    config["dtype"] = "bfloat16"
    if not tiny:
        config["text_config"] |= TEXT
        config["vision_config"] |= VISION
        del config["text_config"]["layer_types"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


class _Random:
    """Stands in for AutoModelForImageTextToText: makes up the weights, on the device, instead of reading them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def from_pretrained(self, name: str, *, dtype: torch.dtype, output_loading_info: bool = False, **_: Any) -> Any:
        torch.manual_seed(0)
        with self._device:
            config = AutoConfig.from_pretrained(name, local_files_only=True)
            model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
        loading: dict[str, list[Any]] = {"mismatched_keys": [], "missing_keys": [], "unexpected_keys": []}
        return (model, loading) if output_loading_info else model


@contextmanager
def random_weights(device: torch.device, *modules: Any) -> Iterator[None]:
    """Makes the engine, or the modules that are named, make up the weights of the models that they load."""
    with ExitStack() as stack:
        for module in modules or [weights]:
            stack.enter_context(patch.object(module, "AutoModelForImageTextToText", _Random(device)))
        yield


@contextmanager
def plain_rotation() -> Iterator[None]:
    """For models that are not to profit from what an engine did to this process, and then as it was."""
    with patch.object(modeling_qwen2_vl, ROTATE, PLAIN_ROTATION):
        yield


def _is_finite(engine: TransformersEngine) -> bool:
    """Whether the logits of a small picture are, when it is read and at the next step."""
    decoder = engine.decoder
    assert isinstance(decoder, ContinuousDecoder)
    picture = engine.prepare(1, Request([Image.effect_noise((112, 112), 64).convert("RGB")]))
    decoder._prefill([Row(picture, 0.0, [])])
    tokens: list[int] = decoder._slots.said[:1].tolist()
    decoder._rows[0].tokens += tokens
    decoder._step()
    tokens += decoder._slots.said[:1].tolist()
    decoder._clear()
    return NOT_FINITE not in tokens


# --- What the model costs, by its configuration ----------------------------------------------------------------


def key_value_bytes(config: Any) -> int:
    """Bytes of the keys and values of one token, in half precision."""
    text = config.text_config
    size = text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * text.num_key_value_heads * size * 2)


def step_bytes(model: Any, rows: int, tokens: int) -> int:
    """Bytes that a step has to read: the language model with its head, and keys and values."""
    others = sum(parameter.nbytes for parameter in tower(model).parameters())
    weights = sum(parameter.nbytes for parameter in model.parameters()) - others
    return int(weights + rows * tokens * key_value_bytes(model.config))


def prefill_tflop(config: Any, patches: int, tokens: int) -> tuple[float, float]:
    """10¹² operations to read one picture: in the vision tower, and in the language model."""
    vision, text = config.vision_config, config.text_config
    width, merged = vision.embed_dim, vision.spatial_merge_size**2
    layers = vision.depth * width * width * (4 + 2 * vision.mlp_ratio)
    merger = merged * width * (merged * width + text.hidden_size)
    of_vision = 2 * layers * patches + 2 * merger * patches / merged + 4 * patches**2 * width * vision.depth
    shared = text.num_key_value_heads / text.num_attention_heads
    matrices = text.hidden_size**2 * (2 + 2 * shared) + 3 * text.hidden_size * text.intermediate_size
    of_text = text.num_hidden_layers * (2 * matrices * tokens + 2 * tokens**2 * text.hidden_size)
    return of_vision / 1e12, of_text / 1e12


def without_distribution() -> AbstractContextManager[object]:
    """Lets the engine name its version where rococap is only on the path, and not installed."""
    installed = hf.version  # type: ignore[attr-defined]
    return patch.object(hf, "version", lambda name: rococap.__version__ if name == "rococap" else installed(name))
