"""Maps grey values and colours of any depth to 8 bits per channel, so that what a scanner measured is visible.

**The rule.** Black and white are the 0.5 and 99.5 percentiles of the picture's own values, as nnU-Net clips intensities
(Isensee et al., Nature Methods 18, 2021: "clipped to the 0.5 and 99.5 percentiles"). Values that were not measured are
left out first. These are a lowest or highest value that is frequent (more than 0.5 % of the pixels) and far from nearly
all others (by more than a quarter of their range; 5 % of them may lie in between, as at the edges of letters), and one
that is less frequent (more than 0.05 %) but a whole range away. Such values are what DICOM calls pixel padding (PS3.3,
C.7.5.1.1.2), which belongs to no window, and annotations burned in at 65535. These pixels become black or white. A
picture with fewer than 32 distinct values is a drawing or a mask, and all of its values count. Values that are not
finite become black.

Knows no file format.
"""

import math

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.generic]
Shades = NDArray[np.uint8]

PERCENTILES = (0.5, 99.5)
FREQUENT, RARE = 0.005, 0.0005
FAR = {FREQUENT: 0.25, RARE: 1.0}
BETWEEN = 0.05
MIN_VALUES = 32
MAX_ENDS = 4
"""How many different values of padding and annotations are left out at either end."""
N_SAMPLED = 100_000
"""About how many pixels are sampled to count a picture's distinct values."""
MAX_DECIDING = 1 << 22
"""At most how many values decide a window: larger pictures are sampled evenly."""

DEEPEST_DETECTOR = 1 << 14
"""Radiology stores 10 to 14 bits per sample: a 16-bit channel with higher values uses its whole range."""


def windowed(values: Values, is_measured: NDArray[np.bool_] | None = None) -> Shades:
    """Maps grey values of any shape and type to 8-bit shades of the same shape, by the rule above.

    `is_measured` has the same shape; it is False for pixels without meaning, such as transparent ones, which do not
    affect the window.
    """
    if values.dtype.kind == "f":
        values = values.astype(np.float64) / 2  # so that no difference overflows
    return _shades(values, *_window(values, is_measured))


def colours(values: Values, is_measured: NDArray[np.bool_]) -> Shades:
    """Maps red, green and blue, of shape (height, width, 3), to 8 bits with one window for all three channels.

    Colours that use the whole range of their type are only scaled: unsigned integers whose white exceeds 14 of their 16
    bits (of 32 or 64 bits: the same fraction), and floating-point numbers from 0 to 1. `is_measured`, of shape (height,
    width), is False for pixels without meaning.
    """
    black, white = _window(values, np.broadcast_to(is_measured[..., None], values.shape))
    if values.dtype.kind == "f":
        lowest, highest = (float(end(values, initial=0)) for end in (np.nanmin, np.nanmax))
        if lowest >= 0 and highest <= 1:
            black, white = 0.0, 1.0
    elif values.dtype.kind == "u" and DEEPEST_DETECTOR * 2.0 ** (8 * values.dtype.itemsize - 16) <= white < math.inf:
        upper: Shades = np.right_shift(values, 8 * values.dtype.itemsize - 8).astype(np.uint8)
        return upper
    return _shades(values, black, white)


def scaled(values: NDArray[np.floating], black: float, white: float) -> Shades:
    """Maps values linearly to 8 bits, from 0 at `black` to 255 at `white`, and clips those outside."""
    shades = (values - black) * (255 / (white - black))
    rounded: Shades = np.rint(shades.clip(0, 255)).astype(np.uint8)
    return rounded


def _shades(values: Values, black: float, white: float) -> Shades:
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:
        # A lookup table of all possible values: without it, a picture of 60 megapixels takes gigabytes.
        bits = values.dtype.newbyteorder("=").str.replace("i", "u")
        all_values = np.arange(1 << (8 * values.dtype.itemsize)).astype(bits).view(values.dtype.newbyteorder("="))
        table = scaled(all_values.astype(np.float64), black, white)
        looked_up: Shades = table[values.astype(values.dtype.newbyteorder("=")).view(bits)]
        return looked_up
    wide = values.astype(np.float64)
    return scaled(np.where(np.isfinite(wide), wide, black), black, white)


def _window(values: Values, is_measured: NDArray[np.bool_] | None) -> tuple[float, float]:
    """Returns black and white. If all measured values are equal, as in strokes, the other pixels decide as well."""
    black, white = _levels(_deciding(values, is_measured))
    return (black, white) if math.isfinite(white) else _levels(_deciding(values, None))


def _deciding(values: Values, is_measured: NDArray[np.bool_] | None) -> NDArray[np.floating]:
    """The finite measured values that decide a window."""
    step = values.size // MAX_DECIDING + 1
    some = values.reshape(-1)[::step].astype(np.float64)
    is_deciding = np.isfinite(some)
    if is_measured is not None:
        is_deciding &= is_measured.reshape(-1)[::step]
    decided: NDArray[np.floating] = some[is_deciding]
    return decided


def _levels(values: NDArray[np.floating]) -> tuple[float, float]:
    """Returns black and white, which always differ: white is infinite for a constant picture, which becomes black."""
    if not values.size:
        return 0.0, math.inf
    measured = _measured(values)
    black, white = (float(level) for level in np.percentile(measured, PERCENTILES))
    if black == white:
        # Nearly all pixels have one value, so the few that differ are the content, and the full range counts.
        black, white = float(measured.min()), float(measured.max())
    return black, (white if white > black else math.inf)


def _measured(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Leaves out padding and annotations, which may have several values at either end."""
    for _ in range(MAX_ENDS):
        rest = _without(values, values.min())
        rest = _without(rest, rest.max())
        if rest.size == values.size:
            break
        values = rest
    return values


def _without(values: NDArray[np.floating], extreme: np.floating) -> NDArray[np.floating]:
    """Leaves out the lowest or the highest value if it is frequent and far from nearly all others; then also what lies
    in between, a whole range away from the others.
    """
    is_other = values != extreme
    share = 1 - np.count_nonzero(is_other) / values.size
    if not RARE < share < 1:
        return values
    rest = values[is_other]
    distances = np.abs(rest - extreme)
    nearest, farthest = np.quantile(distances, (BETWEEN, PERCENTILES[1] / 100))
    spread = farthest - nearest
    is_far = nearest > FAR[FREQUENT if share > FREQUENT else RARE] * spread
    is_picture = np.unique(rest[:: rest.size // N_SAMPLED + 1]).size >= MIN_VALUES
    return rest[distances >= nearest - spread] if is_far and is_picture else values
