"""What phantoms are drawn with: a canvas, shapes of several scenes, and the record of what was drawn.

Positions are in units of 56 pixels from the centre of the picture, x to the right and y down; greys range from 0
(black) to 1 (white).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

# No lesion has a radius between 0.13 and 0.19: whether it is small or large would be a guess.
RADII: Final = {"small": (0.095, 0.13), "large": (0.19, 0.235)}
SIZES: Final = ("small", "large")
_NORMAL_SHARE: Final = 0.12
_RGB_SHARE: Final = 0.15
SIDES: Final = ("right", "left")
APEX: Final = -1.32

Floats = npt.NDArray[np.float32]
Rng = np.random.Generator
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Finding:
    """The kind of a finding and the position of its centre, as fractions of the picture's width and height."""

    kind: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Phantom:
    """A drawing with its caption, its UMLS concepts and its finding, which a normal picture does not have."""

    image: Image.Image
    caption: str
    cui: tuple[str, ...]
    finding: Finding | None = None


class Canvas:
    """A grey picture being drawn, with a random slight rotation, scale and shift, so that no two are aligned alike."""

    def __init__(self, rng: Rng, width: int, height: int, ground: float = 0.0) -> None:
        self.rng = rng
        self.width, self.height = width, height
        self.grey: Floats = np.full((height, width), ground, np.float32)
        self.pixel = 1 / (56 * rng.uniform(0.93, 1.03))
        self.turn = rng.normal(0, 0.035)
        self.shift = rng.uniform(-0.05, 0.05, 2)
        columns = (np.arange(width, dtype=np.float32) - (width - 1) / 2) * self.pixel
        rows = (np.arange(height, dtype=np.float32)[:, None] - (height - 1) / 2) * self.pixel
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        self.x: Floats = (columns * cos + rows * sin - self.shift[0]).astype(np.float32)
        self.y: Floats = (rows * cos - columns * sin - self.shift[1]).astype(np.float32)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """The position of a point in the picture, as fractions of its width and height."""
        x, y = x + self.shift[0], y + self.shift[1]
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        column, row = x * cos - y * sin, x * sin + y * cos
        return float(0.5 + column / self.pixel / self.width), float(0.5 + row / self.pixel / self.height)

    def finding(self, kind: str, x: float, y: float) -> Finding:
        return Finding(kind, *self.place(x, y))

    def paint(self, mask: Floats, grey: float | Floats) -> None:
        self.grey += mask * (grey - self.grey)

    def edge(self, distance: Floats, soft: float = 1.0) -> Floats:
        """A mask: 1 inside (negative distance), 0 outside, and a ramp of `soft` pixels in between."""
        ramp: Floats = np.clip(0.5 - distance / np.float32(self.pixel * max(soft, 1.0)), 0, 1)
        return ramp

    def ellipse(
        self, x: float, y: float, rx: float, ry: float, turn: float = 0, rough: float = 0, soft: float = 1
    ) -> Floats:
        window = self._window(x, y, max(rx, ry) * (1 + 2 * rough), soft)
        return self._whole(window, self.edge(self._distance(window, x, y, rx, ry, turn, rough), soft))

    def ring(self, x: float, y: float, rx: float, ry: float, width: float, turn: float = 0) -> Floats:
        window = self._window(x, y, max(rx, ry) + width, 1)
        distance = np.abs(self._distance(window, x, y, rx, ry, turn, 0))
        return self._whole(window, self.edge(distance - np.float32(width / 2)))

    def stroke(self, x0: float, y0: float, x1: float, y1: float, width: float, soft: float = 1) -> Floats:
        """A straight line with round ends."""
        length = math.hypot(x1 - x0, y1 - y0)
        window = self._window((x0 + x1) / 2, (y0 + y1) / 2, length / 2 + width, soft)
        dx, dy = np.float32((x1 - x0) / length), np.float32((y1 - y0) / length)
        x, y = self.x[window] - np.float32(x0), self.y[window] - np.float32(y0)
        along: Floats = np.clip(x * dx + y * dy, np.float32(0), np.float32(length))
        distance = hypot(x - along * dx, y - along * dy) - np.float32(width / 2)
        return self._whole(window, self.edge(distance, soft))

    def cloud(self, cell: float) -> Floats:
        """Smooth noise with a standard deviation of about 0.7 and features of about `cell` pixels."""
        size = (math.ceil(self.height / cell) + 1, math.ceil(self.width / cell) + 1)
        coarse = Image.fromarray(self.rng.standard_normal(size, np.float32))
        return np.asarray(coarse.resize((self.width, self.height), Image.Resampling.BICUBIC))

    def picture(self, noise: float, grain: float = 1.6) -> Image.Image:
        grey = self.grey * self.rng.uniform(0.88, 1.06) + self.rng.uniform(-0.01, 0.05)
        grey += np.float32(noise) * self.cloud(grain)
        image = Image.fromarray((np.clip(grey, 0, 1) * 255 + 0.5).astype(np.uint8))
        return image.convert("RGB") if self.rng.random() < _RGB_SHARE else image

    def _window(self, x: float, y: float, reach: float, soft: float) -> tuple[slice, slice]:
        """The rows and columns within `reach` of a point. Most shapes are small, so drawing takes half as long."""
        across, down = self.place(x, y)
        column, row, span = across * self.width, down * self.height, reach / self.pixel + soft + 1
        rows = slice(max(0, math.floor(row - span)), max(0, math.ceil(row + span)))
        return rows, slice(max(0, math.floor(column - span)), max(0, math.ceil(column + span)))

    def _whole(self, window: tuple[slice, slice], mask: Floats) -> Floats:
        whole: Floats = np.zeros_like(self.grey)
        whole[window] = mask
        return whole

    def _distance(
        self, window: tuple[slice, slice], x: float, y: float, rx: float, ry: float, turn: float, rough: float
    ) -> Floats:
        """The approximate signed distance to an ellipse, accurate near its edge."""
        dx, dy = self.x[window] - np.float32(x), self.y[window] - np.float32(y)
        if turn:
            cos, sin = np.float32(math.cos(turn)), np.float32(math.sin(turn))
            dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
        u, v = dx * np.float32(1 / rx), dy * np.float32(1 / ry)
        level = hypot(u, v)
        steepness = hypot(u * np.float32(1 / rx), v * np.float32(1 / ry)) + np.float32(1e-6)
        if rough:
            angle = np.arctan2(v, u)
            a, b = (np.float32(phase) for phase in self.rng.uniform(0, math.tau, 2))
            waves = np.sin(3 * angle + a) + np.float32(0.6) * np.sin(5 * angle + b)
            level = level * (1 + np.float32(rough) * waves)
        distance: Floats = level * (level - 1) / steepness
        return distance


def hypot(x: Floats, y: Floats) -> Floats:
    # Three times as fast as np.hypot, whose guard against overflow is not needed here.
    root: Floats = np.sqrt(x * x + y * y)
    return root


def pick(rng: Rng, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def near(rng: Rng, place: tuple[float, float], spread: float = 0.05) -> tuple[float, float]:
    return place[0] + rng.uniform(-spread, spread), place[1] + rng.uniform(-spread, spread)


def is_normal(rng: Rng) -> bool:
    return bool(rng.random() < _NORMAL_SHARE)


def blob(canvas: Canvas, x: float, y: float, size: str, grey: float) -> None:
    """A lesion: nearly round, with a slightly uneven border."""
    radius = canvas.rng.uniform(*RADII[size])
    stretch = canvas.rng.uniform(0.93, 1.07)
    turn = canvas.rng.uniform(0, math.pi)
    mask = canvas.ellipse(x, y, radius * stretch, radius / stretch, turn, rough=0.04, soft=1.6)
    canvas.paint(mask, grey)


def rim(canvas: Canvas, x: float, y: float, size: str, wall: float, core: float) -> None:
    """A lesion whose wall and core differ in grey."""
    radius = canvas.rng.uniform(*RADII[size])
    canvas.paint(canvas.ellipse(x, y, radius, radius, soft=1.3), wall)
    canvas.paint(canvas.ellipse(x, y, radius * 0.55, radius * 0.55, soft=1.3), core)


def box(canvas: Canvas, x: float, y: float, rx: float, ry: float) -> Floats:
    """An upright box with rounded corners."""
    corner = 0.035
    u = np.maximum(np.abs(canvas.x - np.float32(x)) - np.float32(rx - corner), 0)
    v = np.maximum(np.abs(canvas.y - np.float32(y)) - np.float32(ry - corner), 0)
    return canvas.edge(hypot(u, v) - np.float32(corner))


def sector(canvas: Canvas) -> tuple[Floats, Floats]:
    """The mask of what an ultrasound probe sees, and each pixel's depth from the probe."""
    x, y = canvas.x, canvas.y - np.float32(APEX)
    depth: Floats = hypot(x, y)
    angle = np.abs(np.arctan2(x, y))
    mask = (
        canvas.edge(np.float32(0.42) - depth)
        * canvas.edge(depth - np.float32(2.2))
        * canvas.edge((angle - np.float32(0.62)) * depth)
    )
    return mask, depth


def shadow(canvas: Canvas, x: float, y: float, radius: float, depth: Floats, grey: float) -> None:
    """Shades the region behind a lesion along the beam: dark behind a stone, brighter behind fluid."""
    own_depth = math.hypot(x, y - APEX)
    beam = np.arctan2(canvas.x, canvas.y - np.float32(APEX)) - np.float32(math.atan2(x, y - APEX))
    behind = canvas.edge((np.abs(beam) - np.float32(radius / own_depth)) * depth, 2)
    canvas.paint(behind * canvas.edge(np.float32(own_depth) - depth, 2), grey)
