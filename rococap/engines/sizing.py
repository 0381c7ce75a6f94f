"""Measures how many rows the continuous decoder should run at once on this machine: `--batch-size auto`.

Stores nothing: it measures again at every start.
"""

import logging
import math
from collections.abc import Callable

import psutil
import torch
from PIL import Image

from rococap.engines import Prepared, Request
from rococap.engines.continuous import GROUP_TOKENS, ContinuousDecoder
from rococap.engines.decoding import free_memory, is_out_of_memory

log = logging.getLogger(__name__)

SMALLEST = 4
MAX_ROWS = {"cpu": 64, "cuda": 256}
"""The most rows by type of device: more gain little, and keep more pictures from other workers."""
GAIN = 1.1
"""More rows must raise the rate by this factor to be worth their memory."""
SLOW_SEC = 2.0
"""If a step takes this long, more rows are not measured: starting would take minutes."""
MEMORY_SHARE = 0.5
"""The share of free memory for keys and values. The rest is for prefilling."""
SHAPES = ((1, 1), (5, 4), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1), (4, 5), (3, 4), (2, 3), (9, 16), (1, 2), (1, 3))
"""Width and height of pictures as they occur, in proportion."""
USUAL_SIDE = 512
"""The side of a typical picture in pixels."""


def choose_limit(decoder: ContinuousDecoder, prepare: Callable[[int, Request], Prepared], max_pixels: int) -> int:
    """Returns as many rows as there is memory for, or fewer if these yield about as many tokens per second.

    On a GPU it prefills the largest picture that the recipe allows, as many times as are ever prefilled together, so
    that the chosen number fits into memory. On a CPU, where that would take minutes and memory is rarely short, it uses
    a typical picture.
    """
    on_gpu = decoder.loaded.device.type == "cuda"
    side = math.isqrt(max_pixels) if on_gpu else min(USUAL_SIDE, math.isqrt(max_pixels))
    picture = prepare(0, Request([Image.effect_noise((side, side), 64).convert("RGB")]))
    n_read = max(1, GROUP_TOKENS // picture.n_tokens) if on_gpu else 1
    room = MEMORY_SHARE * _available(decoder.loaded.device)
    rates: dict[int, float] = {}
    n, seconds = SMALLEST, 0.0
    while n <= MAX_ROWS["cuda" if on_gpu else "cpu"] and seconds < SLOW_SEC:
        try:
            seconds, row_bytes = decoder.probe(picture, n, min(n, n_read))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
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


def longest(prepare: Callable[[int, Request], Prepared], max_pixels: int) -> Prepared:
    """Returns a picture with as many prompt tokens as the recipe allows: rounding makes that depend on its shape."""
    sides = (
        (math.isqrt(max_pixels * width // height), math.isqrt(max_pixels * height // width)) for width, height in SHAPES
    )
    return max((prepare(0, Request([Image.new("RGB", size)])) for size in sides), key=lambda picture: picture.n_tokens)


def _available(device: torch.device) -> int:
    """The available memory of the device in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
