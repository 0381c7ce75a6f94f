"""The part `versions` of `gpu.py`: what the machine is, what it can do at most, and which attention suits it."""

import os
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from gpu_setting import Bench, Figures
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations import sdpa_attention

from rococap.engines.decoding import free_memory
from rococap.engines.hf import disable_cudnn_attention

PACKAGES = ("torch", "transformers", "triton", "accelerate", "tokenizers", "numpy", "pillow", "sqlalchemy", "alembic")
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def versions(bench: Bench) -> Iterator[Figures]:
    yield {"case": "software"} | _software()
    yield {"case": "machine"} | _machine(bench)
    yield {"case": "ceilings"} | _ceilings(bench)
    yield {"case": "attention, as PyTorch enables it"} | _enabled()
    found = {name: _attention(bench, shapes) for name, shapes in _attentions(bench).items()}
    disable_cudnn_attention()
    yield {"case": "attention, as the engine enables it"} | _enabled()
    for name, (make, usual, _) in _attentions(bench).items():
        yield {"case": f"attention, {name}"} | found[name] | {"chosen_by_engine": _chosen(make(usual))}
    free_memory(bench.device)


def _software() -> Figures:
    found = {package: _version(package) for package in PACKAGES}
    return {
        "python": platform.python_version(),
        **found,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        # Without it, a step copies keys and values for the query heads that share them.
        "packs_shared_heads": hasattr(sdpa_attention, "pack_gqa"),
        "c_compiler": shutil.which("cc") or shutil.which("gcc"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine(bench: Bench) -> Figures:
    figures: Figures = {"device": str(bench.device), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if not bench.on_gpu:
        return figures
    card = torch.cuda.get_device_properties(bench.device)
    free, total = torch.cuda.mem_get_info(bench.device)
    return figures | {
        "card": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "free_gb": free / 1e9,
        "total_gb": total / 1e9,
    }


def _enabled() -> Figures:
    cuda = torch.backends.cuda
    return {
        "flash": cuda.flash_sdp_enabled(),  # type: ignore[no-untyped-call]
        "efficient": cuda.mem_efficient_sdp_enabled(),  # type: ignore[no-untyped-call]
        "cudnn": cuda.cudnn_sdp_enabled(),  # type: ignore[no-untyped-call]
        "math": cuda.math_sdp_enabled(),  # type: ignore[no-untyped-call]
    }


# --- Ceilings --------------------------------------------------------------------------------------------------


def _ceilings(bench: Bench) -> Figures:
    """What no model can exceed: moving data, multiplying, and starting a kernel."""
    scale = bench.scale
    source = torch.empty(scale.copy_bytes, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    host = torch.empty(scale.copy_bytes // 4, dtype=torch.uint8)
    host = host.pin_memory() if bench.on_gpu else host
    left, right = (torch.randn(scale.product, scale.product, device=bench.device).to(torch.bfloat16) for _ in range(2))
    copy = _median(bench, lambda: target.copy_(source))
    upload = _median(bench, lambda: target[: len(host)].copy_(host, non_blocking=True))
    product = _median(bench, lambda: left @ right)
    one = torch.zeros(1, device=bench.device)
    launches = _median(bench, lambda: [one.add_(1) for _ in range(1000)])
    return {
        "copy_gb_per_sec": 2 * len(source) / copy / 1e6,
        "upload_gb_per_sec": len(host) / upload / 1e6,
        "matmul_tflop_per_sec": 2 * scale.product**3 / product / 1e9,
        "launch_us": launches,
    }


def _median(bench: Bench, work: Callable[[], object]) -> float:
    """Milliseconds of a call."""
    bench.times(work, 2)
    return median(bench.times(work, bench.scale.repeats))


# --- Attention -------------------------------------------------------------------------------------------------

Shapes = tuple[Callable[[int], dict[str, Any]], int, int]
"""What makes the arguments of an attention over so many tokens, one number of tokens, and another."""


def _attentions(bench: Bench) -> dict[str, Shapes]:
    """The attentions of Qwen2-VL-2B, in which a picture of 740 x 740 has 2,704 patches and 676 tokens."""
    rows = 4 if bench.tiny else 64
    tokens, patches = (64, 128) if bench.tiny else (768, 2704)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=bench.device, dtype=torch.bfloat16)

    def step(n: int) -> dict[str, Any]:
        keys, values = random(rows, 2, n, 128), random(rows, 2, n, 128)
        return {"query": random(rows, 2, 6, 128), "key": keys, "value": values, "attn_mask": random(rows, 1, 1, n)}

    def vision(n: int) -> dict[str, Any]:
        # A picture's heads lie next to each other, as the tower has them.
        query, key, value = (part[None] for part in random(n, 3, 16, 80).permute(1, 2, 0, 3))
        return {"query": query, "key": key, "value": value}

    def prompt(n: int) -> dict[str, Any]:
        return {name: random(4, 12, n, 128) for name in ("query", "key", "value")} | {"is_causal": True}

    def padded(n: int) -> dict[str, Any]:
        mask = torch.ones(n, n, dtype=torch.bool, device=bench.device).tril().expand(4, 1, n, n)
        return {name: random(4, 12, n, 128) for name in ("query", "key", "value")} | {"attn_mask": mask}

    return {
        f"step of {rows}": (step, tokens, tokens + 32),
        "vision tower": (vision, patches, patches - 104),
        "prompts of one length": (prompt, tokens, tokens - 26),
        "padded prompts": (padded, tokens, tokens - 26),
    }


def _attention(bench: Bench, shapes: Shapes) -> Figures:
    """Milliseconds by backend: of a call, and how much longer the first call of another shape takes. None where the
    backend cannot do it.
    """
    make, usual, other = shapes
    ms: dict[str, float | None] = {}
    new_shape_ms: dict[str, float | None] = {}
    for name, backend in BACKENDS.items():
        try:
            ms[name], new_shape_ms[name] = _with_backend(bench, make(usual), make(other), sdpa_kernel(backend))
        except RuntimeError:
            ms[name] = new_shape_ms[name] = None
    return {"ms": ms, "new_shape_ms": new_shape_ms, "chosen": _chosen(make(usual))}


def _chosen(arguments: dict[str, Any]) -> str:
    """The backend that PyTorch chooses among those that are enabled."""
    number = torch._fused_sdp_choice(**arguments)
    return next((name for name, backend in BACKENDS.items() if backend.value == number), str(number))


def _with_backend(
    bench: Bench, usual: dict[str, Any], other: dict[str, Any], backend: AbstractContextManager[None]
) -> tuple[float, float]:
    with warnings.catch_warnings(), backend:
        warnings.simplefilter("ignore")  # of a backend that cannot do it, why
        ms = _median(bench, lambda: scaled_dot_product_attention(**usual))
        first, second, _ = bench.times(lambda: scaled_dot_product_attention(**other), 3)
    return ms, first - second
