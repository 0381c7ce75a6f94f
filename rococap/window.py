"""Grey values and colours of any depth -> 8 bits a channel, so that what a scanner measured can be seen.

**The rule.** Black and white are the 0.5 and 99.5 percentiles of the picture's own values, as nnU-Net clips intensities
(Isensee et al., Nature Methods 18, 2021: "clipped to the 0.5 and 99.5 percentiles"). Before that, what is no measured
value is left out: a lowest or a highest value that is frequent (more of the pixels have it than a percentile cuts off)
and far from all others (by more than a quarter of their own range). That is what DICOM calls pixel padding (PS3.3,
C.7.5.1.1.2), which belongs to no window, and what annotators burn in at 65535. Such pixels become black or white.
A picture of fewer than 32 values is a drawing or a mask, and all of them count. What is not finite is black.
"""

import math

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.generic]
Shades = NDArray[np.uint8]

PERCENTILES = (0.5, 99.5)
FREQUENT = 0.005
FAR = 0.25
FEWEST_VALUES = 32
SAMPLED = 100_000
"""Pixels that are looked at to count a picture's values."""

DEEPEST_DETECTOR = 1 << 14
"""Radiology stores 10 to 14 bits a sample: a channel of 16 bits that goes beyond uses its whole range."""
NEARLY_BLACK = 1 << 12
"""Of 65536: where nearly all of a picture is below, it cannot be seen without a window."""


def windowed(values: Values, is_measured: NDArray[np.bool_] | None = None) -> Shades:
    """Grey values of any shape and type -> as many shades, by the rule above.

    `is_measured` is False for pixels that say nothing, such as transparent ones: they do not decide the window.
    """
    wide = _wide(values)
    is_finite = np.isfinite(wide)
    black, white, _ = _levels(wide[is_finite if is_measured is None else is_finite & is_measured])
    return scaled(np.where(is_finite, wide, black), black, white)


def colours(values: Values, is_measured: NDArray[np.bool_]) -> Shades:
    """Red, green and blue, shape (height, width, 3), with one window for all three channels.

    What uses the whole range of its type stays as it is: integers beyond 14 of their 16 bits (in 32 and 64 bits: as
    many below the top), and floating point numbers from 0 to 1. `is_measured` has the shape (height, width).
    """
    wide = _wide(values)
    is_finite = np.isfinite(wide)
    black, white, highest = _levels(wide[is_finite & is_measured[..., None]])
    if values.dtype.kind == "f":
        if wide.size and wide[is_finite].min(initial=0.0) >= 0 and wide[is_finite].max(initial=0.0) <= 1:
            black, white = 0.0, 1.0
    elif values.dtype.kind == "u":
        depth = 2.0 ** (8 * values.dtype.itemsize - 16)
        if highest >= DEEPEST_DETECTOR * depth and white >= NEARLY_BLACK * depth:
            upper: Shades = np.right_shift(values, 8 * values.dtype.itemsize - 8).astype(np.uint8)
            return upper
    return scaled(np.where(is_finite, wide, black), black, white)


def _wide(values: Values) -> NDArray[np.floating]:
    """As numbers that hold every value: those of 32 bits are not exact in floating point of 32."""
    wide: NDArray[np.floating] = values.astype(np.float64 if values.dtype.itemsize > 2 else np.float32)
    return wide


def scaled(values: NDArray[np.floating], black: float, white: float) -> Shades:
    """Linearly, from 0 at `black` to 255 at `white`."""
    shades = (values - black) * (255 / (white - black))
    rounded: Shades = np.rint(shades.clip(0, 255)).astype(np.uint8)
    return rounded


def _levels(values: NDArray[np.floating]) -> tuple[float, float, float]:
    """Black, white and the highest measured value. Black and white always differ: a constant picture is black."""
    if not values.size:
        return 0.0, math.inf, 0.0
    measured = _measured(values)
    lowest, highest = float(measured.min()), float(measured.max())
    black, white = (float(level) for level in np.percentile(measured, PERCENTILES))
    if black == white:
        # Nearly all of it has one value: what differs is the picture, so the full range counts.
        black, white = lowest, highest
    return black, (white if white > black else math.inf), highest


def _measured(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Without padding and labels, of which there may be several values at either end."""
    while True:
        rest = _without(values, values.min())
        rest = _without(rest, rest.max())
        if rest.size == values.size:
            return values
        values = rest


def _without(values: NDArray[np.floating], extreme: np.floating) -> NDArray[np.floating]:
    """Without the lowest or the highest value, if that is frequent and far from the others."""
    is_other = values != extreme
    n_others = np.count_nonzero(is_other)
    if values.size - n_others <= FREQUENT * values.size or not n_others:
        return values
    rest = values[is_other]
    low, high = np.percentile(rest, PERCENTILES)
    is_far = np.abs(rest - extreme).min() > FAR * (high - low)
    is_picture = np.unique(rest[:: rest.size // SAMPLED + 1]).size >= FEWEST_VALUES
    return rest if is_far and is_picture else values
