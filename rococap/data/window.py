"""Grey values and colours of any depth -> 8 bits a channel, so that what a scanner measured can be seen.

**The rule.** Black and white are the 0.5 and 99.5 percentiles of the picture's own values, as nnU-Net clips intensities
(Isensee et al., Nature Methods 18, 2021: "clipped to the 0.5 and 99.5 percentiles"). Before that, what is no measured
value is left out: a lowest or a highest value that is frequent (0.5 % of the pixels have it) and far from nearly all
others (by more than a quarter of their range; 5 % of them may lie between, as at the edges of letters), or that some
have (0.05 %) and that is a whole range away. That is what DICOM calls pixel padding (PS3.3, C.7.5.1.1.2), which belongs
to no window, and what annotators burn in at 65535. Such pixels become black or white. A picture of fewer than 32 values
is a drawing or a mask, and all of them count. What is not finite is black.
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
FEWEST_VALUES = 32
MOST_ENDS = 4
"""How many values of padding and labels there may be at either end."""
SAMPLED = 100_000
"""Pixels that are looked at to count a picture's values."""
MOST = 1 << 22
"""Values that decide a window: of a larger picture, some all over it."""

DEEPEST_DETECTOR = 1 << 14
"""Radiology stores 10 to 14 bits a sample: a channel of 16 bits that goes beyond uses its whole range."""


def windowed(values: Values, is_measured: NDArray[np.bool_] | None = None) -> Shades:
    """Grey values of any shape and type -> as many shades, by the rule above.

    `is_measured` is False for pixels that say nothing, such as transparent ones: they do not decide the window.
    """
    if values.dtype.kind == "f":
        values = values.astype(np.float64) / 2  # so that no difference is beyond what the type holds
    return _shades(values, *_window(values, is_measured))


def colours(values: Values, is_measured: NDArray[np.bool_]) -> Shades:
    """Red, green and blue, shape (height, width, 3), with one window for all three channels.

    What uses the whole range of its type stays as it is: unsigned integers whose white is beyond 14 of their 16 bits
    (of 32 and 64 bits: as far below the top), and floating point numbers from 0 to 1. `is_measured` has the shape
    (height, width).
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
    """Linearly, from 0 at `black` to 255 at `white`."""
    shades = (values - black) * (255 / (white - black))
    rounded: Shades = np.rint(shades.clip(0, 255)).astype(np.uint8)
    return rounded


def _shades(values: Values, black: float, white: float) -> Shades:
    if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:
        # Through a table of all values that there may be: a picture of 60 megapixels takes gigabytes otherwise.
        bits = values.dtype.newbyteorder("=").str.replace("i", "u")
        every = np.arange(1 << (8 * values.dtype.itemsize)).astype(bits).view(values.dtype.newbyteorder("="))
        table = scaled(every.astype(np.float64), black, white)
        looked_up: Shades = table[values.astype(values.dtype.newbyteorder("=")).view(bits)]
        return looked_up
    wide = values.astype(np.float64)
    return scaled(np.where(np.isfinite(wide), wide, black), black, white)


def _window(values: Values, is_measured: NDArray[np.bool_] | None) -> tuple[float, float]:
    """Black and white. Where all that was measured is one value, as of strokes, the rest decides with it."""
    black, white = _levels(_deciding(values, is_measured))
    return (black, white) if math.isfinite(white) else _levels(_deciding(values, None))


def _deciding(values: Values, is_measured: NDArray[np.bool_] | None) -> NDArray[np.floating]:
    """The finite measured values that decide a window."""
    step = values.size // MOST + 1
    some = values.reshape(-1)[::step].astype(np.float64)
    is_deciding = np.isfinite(some)
    if is_measured is not None:
        is_deciding &= is_measured.reshape(-1)[::step]
    decided: NDArray[np.floating] = some[is_deciding]
    return decided


def _levels(values: NDArray[np.floating]) -> tuple[float, float]:
    """Black and white, which always differ: a constant picture is black."""
    if not values.size:
        return 0.0, math.inf
    measured = _measured(values)
    black, white = (float(level) for level in np.percentile(measured, PERCENTILES))
    if black == white:
        # Nearly all of it has one value: what differs is the picture, so the full range counts.
        black, white = float(measured.min()), float(measured.max())
    return black, (white if white > black else math.inf)


def _measured(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Without padding and labels, of which there may be several values at either end."""
    for _ in range(MOST_ENDS):
        rest = _without(values, values.min())
        rest = _without(rest, rest.max())
        if rest.size == values.size:
            break
        values = rest
    return values


def _without(values: NDArray[np.floating], extreme: np.floating) -> NDArray[np.floating]:
    """Without the lowest or the highest value, if that is frequent and far from nearly all others; and then without
    what lies between, a whole range away from them.
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
    is_picture = np.unique(rest[:: rest.size // SAMPLED + 1]).size >= FEWEST_VALUES
    return rest[distances >= nearest - spread] if is_far and is_picture else values
