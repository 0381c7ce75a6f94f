"""How many rows a decoder should run at once, measured on this machine: `--batch-size auto`."""

import logging
import math
from collections.abc import Callable

import psutil
import torch
from PIL import Image

from rococap.engines import Prepared
from rococap.engines.continuous import GROUP_TOKENS, ContinuousDecoder
from rococap.engines.decoding import free_memory

log = logging.getLogger(__name__)

SMALLEST = 4
MOST = {"cpu": 64, "cuda": 256}
"""More rows than that gain little and hold more pictures back from other workers."""
GAIN = 1.1
"""More rows that bring less than this are not worth their memory."""
SLOW_SEC = 2.0
"""A step that takes so long is not measured with more rows: starting would take minutes."""
MEMORY_SHARE = 0.5
"""Of the free memory, for keys and values. The rest is for what reading pictures in takes."""
USUAL_SIDE = 512


def choose_limit(decoder: ContinuousDecoder, prepare: Callable[[int, Image.Image], Prepared], max_pixels: int) -> int:
    """As many rows as there is memory for, unless fewer yield about as many tokens a second.

    On a GPU the largest picture that the recipe allows is read in, as many times as are ever read together, so that
    what is chosen fits. A CPU, where that takes minutes and memory is not what is short, is measured with a usual one.
    """
    on_gpu = decoder.loaded.device.type == "cuda"
    side = math.isqrt(max_pixels) if on_gpu else min(USUAL_SIDE, math.isqrt(max_pixels))
    picture = prepare(0, Image.effect_noise((side, side), 64).convert("RGB"))
    n_read = max(1, GROUP_TOKENS // picture.n_tokens) if on_gpu else 1
    room = MEMORY_SHARE * _available(decoder.loaded.device)
    rates: dict[int, float] = {}
    n, seconds = SMALLEST, 0.0
    while n <= MOST["cuda" if on_gpu else "cpu"] and seconds < SLOW_SEC:
        try:
            seconds, row_bytes = decoder.probe(picture, n, min(n, n_read))
        except torch.OutOfMemoryError:
            break
        rates[n] = n / seconds
        log.debug("%d rows: %.1f ms a step", n, seconds * 1000)
        n *= 2
        if n * row_bytes > room:
            break
    free_memory(decoder.loaded.device)
    chosen = min((n for n, rate in rates.items() if GAIN * rate >= max(rates.values())), default=1)
    log.info("%d pictures at a time: %.0f tokens/s", chosen, rates.get(chosen, 0.0))
    return chosen


def _available(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
