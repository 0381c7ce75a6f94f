"""Phantoms: drawings that look like radiology pictures, each with a caption that its pixels determine.

Everything follows from an integer seed. Positions are in units of 56 pixels from the centre of the picture, x to the
right and y down; greys range from 0 (black) to 1 (white). Axial pictures are seen from the feet, as is customary: the
patient's right is on the left of the picture.
"""

import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rococap.errors import DatasetError

TRAINING_SEEDS: Final = range(0, 10_000_000)
HELD_OUT_SEEDS: Final[Mapping[str, range]] = {
    "train": range(10_000_000, 20_000_000),
    "validation": range(20_000_000, 30_000_000),
    "test": range(30_000_000, 40_000_000),
}

CT: Final = "C0040405"
MRI: Final = "C0024485"
PLAIN_XRAY: Final = "C1306645"
ULTRASOUND: Final = "C0041618"
ABDOMEN: Final = "C0000726"
BRAIN: Final = "C0006104"
CHEST: Final = "C0817096"
HEAD: Final = "C0018670"
LIVER: Final = "C0023884"
SPINE: Final = "C0037949"

MODALITIES: Final = (CT, MRI, PLAIN_XRAY, ULTRASOUND)

SCHEMA: Final = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("image_id", pa.string()),
        ("caption", pa.string()),
        ("cui", pa.list_(pa.string())),
    ]
)
_INFIX: Final = {"train": "train", "validation": "valid", "test": "test"}

# No lesion has a radius between 0.13 and 0.19: whether it is small or large would be a guess.
_RADII: Final = {"small": (0.095, 0.13), "large": (0.19, 0.235)}
_SIZES: Final = ("small", "large")
_NORMAL_SHARE: Final = 0.12
_RGB_SHARE: Final = 0.15

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
    finding: Finding | None


def draw(seed: int) -> Phantom:
    """The phantom of this seed: the same on every machine."""
    rng = np.random.default_rng(seed)
    return _pick(rng, _SCENES[_pick(rng, MODALITIES)])(rng)


class _Canvas:
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
        distance = _length(x - along * dx, y - along * dy) - np.float32(width / 2)
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
        level = _length(u, v)
        steepness = _length(u * np.float32(1 / rx), v * np.float32(1 / ry)) + np.float32(1e-6)
        if rough:
            angle = np.arctan2(v, u)
            a, b = (np.float32(phase) for phase in self.rng.uniform(0, math.tau, 2))
            waves = np.sin(3 * angle + a) + np.float32(0.6) * np.sin(5 * angle + b)
            level = level * (1 + np.float32(rough) * waves)
        distance: Floats = level * (level - 1) / steepness
        return distance


def _length(x: Floats, y: Floats) -> Floats:
    # Three times as fast as np.hypot, whose guard against overflow is not needed here.
    length: Floats = np.sqrt(x * x + y * y)
    return length


def _pick(rng: Rng, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _near(rng: Rng, place: tuple[float, float], spread: float = 0.05) -> tuple[float, float]:
    return place[0] + rng.uniform(-spread, spread), place[1] + rng.uniform(-spread, spread)


def _is_normal(rng: Rng) -> bool:
    return bool(rng.random() < _NORMAL_SHARE)


def _phantom(image: Image.Image, caption: str, cui: tuple[str, ...], finding: Finding | None = None) -> Phantom:
    return Phantom(image, caption, cui, finding)


def _finding(canvas: _Canvas, kind: str, x: float, y: float) -> Finding:
    return Finding(kind, *canvas.place(x, y))


def _blob(canvas: _Canvas, x: float, y: float, size: str, grey: float) -> None:
    """A lesion: nearly round, with a slightly uneven border."""
    radius = canvas.rng.uniform(*_RADII[size])
    stretch = canvas.rng.uniform(0.93, 1.07)
    turn = canvas.rng.uniform(0, math.pi)
    mask = canvas.ellipse(x, y, radius * stretch, radius / stretch, turn, rough=0.04, soft=1.6)
    canvas.paint(mask, grey)


def _rim(canvas: _Canvas, x: float, y: float, size: str, wall: float, core: float) -> None:
    """A lesion whose wall and core differ in grey."""
    radius = canvas.rng.uniform(*_RADII[size])
    canvas.paint(canvas.ellipse(x, y, radius, radius, soft=1.3), wall)
    canvas.paint(canvas.ellipse(x, y, radius * 0.55, radius * 0.55, soft=1.3), core)


# --- axial CT ---------------------------------------------------------------------------------------------------


def _ct_abdomen(rng: Rng) -> Phantom:
    canvas = _Canvas(rng, int(rng.integers(128, 151)), int(rng.integers(100, 121)), 0.02)
    _trunk(canvas, 1.13, 0.86)
    canvas.paint(canvas.ellipse(0, -0.02, 0.93, 0.66), 0.27)
    _bowel_and_organs(canvas)
    _vertebra(canvas, 0.42)
    canvas.paint(canvas.ellipse(0.08, 0.2, 0.075, 0.075), 0.66)
    canvas.paint(canvas.ellipse(-0.13, 0.2, 0.085, 0.065), 0.56)
    if _is_normal(rng):
        return _phantom(canvas.picture(0.035), "Normal axial CT of the abdomen.", (CT, ABDOMEN))
    sites = {
        "right lobe of the liver": (-0.6, 0.0),
        "left lobe of the liver": (-0.08, -0.34),
        "spleen": (0.72, 0.1),
    }
    site, kind, size = _pick(rng, tuple(sites)), _pick(rng, ("hypodense", "hyperdense")), _pick(rng, _SIZES)
    x, y = _near(rng, sites[site])
    _blob(canvas, x, y, size, 0.3 if kind == "hypodense" else 0.88)
    caption = f"Axial CT of the abdomen showing a {size} {kind} lesion in the {site}."
    return _phantom(canvas.picture(0.035), caption, (CT, ABDOMEN), _finding(canvas, f"{size} {kind}", x, y))


def _trunk(canvas: _Canvas, rx: float, ry: float) -> None:
    """Skin, fat, muscle and ribs of a slice through the trunk."""
    canvas.paint(canvas.ellipse(0, 0, rx, ry, rough=0.006), 0.44)
    canvas.paint(canvas.ellipse(0, 0, rx - 0.025, ry - 0.025), 0.22)
    canvas.paint(canvas.ellipse(0, -0.01, rx - 0.11, ry - 0.11), 0.47)
    start = canvas.rng.uniform(0.1, 0.3)
    for step in range(9):
        angle = math.pi * (start + 1.15 * step / 8) - 0.5
        for side in (-1, 1):
            x, y = side * math.sin(angle) * (rx - 0.145), math.cos(angle) * (ry - 0.15)
            canvas.paint(canvas.ellipse(x, y, 0.065, 0.028, -side * angle), 0.9)


def _bowel_and_organs(canvas: _Canvas) -> None:
    liver = np.maximum(
        canvas.ellipse(-0.5, -0.06, 0.4, 0.5, 0.15, rough=0.015),
        canvas.ellipse(-0.12, -0.34, 0.42, 0.25, 0.12, rough=0.015),
    )
    canvas.paint(liver, 0.57 + 0.025 * canvas.cloud(9))
    stomach = canvas.ellipse(0.5, -0.27, 0.3, 0.25, -0.3, rough=0.02)
    canvas.paint(canvas.ellipse(0.5, -0.27, 0.325, 0.275, -0.3), 0.5)
    level = np.float32(-0.3 + canvas.rng.uniform(-0.04, 0.04))
    canvas.paint(stomach, np.where(canvas.y < level, np.float32(0.02), np.float32(0.42)))
    canvas.paint(canvas.ellipse(0.72, 0.1, 0.2, 0.33, -0.2, rough=0.02), 0.57)
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * 0.4, 0.4, 0.15, 0.18, -side * 0.35), 0.64)
        canvas.paint(canvas.ellipse(side * 0.36, 0.4, 0.05, 0.08, -side * 0.35), 0.3)


def _vertebra(canvas: _Canvas, y: float) -> None:
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * 0.23, y + 0.2, 0.19, 0.13, side * 0.3), 0.48)
        canvas.paint(canvas.stroke(side * 0.08, y + 0.13, side * 0.27, y + 0.15, 0.05), 0.85)
        canvas.paint(canvas.stroke(side * 0.09, y + 0.12, 0, y + 0.27, 0.045), 0.88)
    canvas.paint(canvas.stroke(0, y + 0.26, 0, y + 0.33, 0.05), 0.88)
    canvas.paint(canvas.ellipse(0, y, 0.17, 0.135), 0.93)
    canvas.paint(canvas.ellipse(0, y, 0.135, 0.1), 0.74)
    canvas.paint(canvas.ellipse(0, y + 0.16, 0.065, 0.05), 0.4)


def _ct_chest(rng: Rng) -> Phantom:
    canvas = _Canvas(rng, int(rng.integers(128, 151)), int(rng.integers(100, 121)), 0.02)
    _trunk(canvas, 1.14, 0.84)
    _lungs(canvas)
    _vertebra(canvas, 0.4)
    if _is_normal(rng):
        return _phantom(canvas.picture(0.03), "Normal axial CT of the chest.", (CT, CHEST))
    side, kind, size = (
        _pick(rng, ("right", "left")),
        _pick(rng, ("solid", "cavitating")),
        _pick(rng, _SIZES),
    )
    x, y = _near(rng, (-0.58 if side == "right" else 0.64, 0.0), 0.09)
    if kind == "solid":
        _blob(canvas, x, y, size, 0.62)
    else:
        _rim(canvas, x, y, size, 0.66, 0.03)
    caption = f"Axial CT of the chest showing a {size} {kind} nodule in the {side} lung."
    return _phantom(canvas.picture(0.03), caption, (CT, CHEST), _finding(canvas, f"{size} {kind}", x, y))


def _lungs(canvas: _Canvas) -> None:
    rng = canvas.rng
    for x, rx, turn in ((-0.52, 0.4, 0.12), (0.57, 0.36, -0.12)):
        lung = canvas.ellipse(x, 0.02, rx, 0.58, turn, rough=0.02)
        canvas.paint(lung, 0.1 + 0.012 * canvas.cloud(4))
        vessels: Floats = np.zeros_like(canvas.grey)
        for _ in range(7):
            angle, length = rng.uniform(-1.25, 1.25), rng.uniform(0.25, 0.5)
            inner = x - math.copysign(rx * 0.85, x)
            tip = (inner + math.copysign(math.cos(angle) * length, x), math.sin(angle) * length)
            vessels = np.maximum(vessels, canvas.stroke(inner, 0.02, *tip, 0.022, soft=2))
        canvas.paint(lung * vessels, 0.36)
    canvas.paint(canvas.ellipse(0.1, -0.16, 0.36, 0.33, 0.5, rough=0.02), 0.56)
    canvas.paint(canvas.ellipse(0.14, -0.16, 0.13, 0.2, 0.5), 0.64)
    canvas.paint(canvas.ellipse(0.15, 0.28, 0.085, 0.085), 0.66)
    canvas.paint(canvas.ellipse(-0.03, 0.2, 0.05, 0.035), 0.45)


_LOBES: Final = ("frontal", "occipital")
_SIDES: Final = ("right", "left")


def _lobe_place(side: str, lobe: str, reach: float) -> tuple[float, float]:
    return (-0.31 if side == "right" else 0.31), (-reach if lobe == "frontal" else reach)


def _ct_head(rng: Rng) -> Phantom:
    canvas = _Canvas(rng, int(rng.integers(88, 109)), int(rng.integers(108, 127)), 0.01)
    canvas.paint(canvas.ellipse(0, 0, 0.79, 0.97), 0.3)
    canvas.paint(canvas.ellipse(0, 0, 0.755, 0.935), 0.98)
    canvas.paint(canvas.ellipse(0, 0, 0.665, 0.845), 0.33)
    brain = canvas.ellipse(0, 0, 0.645, 0.825, rough=0.008)
    canvas.paint(brain, 0.43 + 0.02 * canvas.cloud(8))
    _sulci(canvas, 0.31, 0.645, 0.825)
    _ventricles(canvas, 0.17)
    canvas.paint(canvas.stroke(0, -0.82, 0, -0.42, 0.018), 0.6)
    canvas.paint(canvas.stroke(0, 0.45, 0, 0.82, 0.018), 0.6)
    if _is_normal(rng):
        return _phantom(canvas.picture(0.03), "Normal axial CT of the head.", (CT, HEAD))
    side, lobe, size = _pick(rng, _SIDES), _pick(rng, _LOBES), _pick(rng, _SIZES)
    kind = _pick(rng, ("hyperdense haemorrhage", "hypodense infarct"))
    x, y = _near(rng, _lobe_place(side, lobe, 0.44))
    _blob(canvas, x, y, size, 0.82 if kind == "hyperdense haemorrhage" else 0.16)
    caption = f"Axial CT of the head showing a {size} {kind} in the {side} {lobe} lobe."
    return _phantom(canvas.picture(0.03), caption, (CT, HEAD), _finding(canvas, f"{size} {kind}", x, y))


def _sulci(canvas: _Canvas, grey: float, rx: float, ry: float) -> None:
    rng = canvas.rng
    grooves: Floats = np.zeros_like(canvas.grey)
    for step in range(18):
        angle = math.tau * (step + rng.uniform(-0.25, 0.25)) / 18
        outer, inner = 0.99, rng.uniform(0.83, 0.91)
        bend = angle + rng.uniform(-0.1, 0.1)
        start = (outer * rx * math.cos(angle), outer * ry * math.sin(angle))
        end = (inner * rx * math.cos(bend), inner * ry * math.sin(bend))
        grooves = np.maximum(grooves, canvas.stroke(*start, *end, 0.022, soft=1.5))
    canvas.paint(grooves, grey)


def _ventricles(canvas: _Canvas, grey: float) -> None:
    wide = canvas.rng.uniform(0.85, 1.15)
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * 0.085, -0.15, 0.05 * wide, 0.16, side * 0.35, soft=1.4), grey)
        canvas.paint(canvas.ellipse(side * 0.13, 0.16, 0.05 * wide, 0.15, -side * 0.4, soft=1.4), grey)
    canvas.paint(canvas.ellipse(0, 0.06, 0.022, 0.08, soft=1.4), grey)


# --- MRI --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Weighting:
    """The greys of one MRI sequence."""

    fat: float
    fluid: float
    cortex: float
    white_matter: float
    lesions: tuple[str, str]


_WEIGHTINGS: Final = {
    "T1": _Weighting(0.88, 0.1, 0.42, 0.58, ("hypointense", "ring-enhancing")),
    "T2": _Weighting(0.7, 0.92, 0.58, 0.36, ("hypointense", "hyperintense")),
}


def _mri_brain(rng: Rng) -> Phantom:
    canvas = _Canvas(rng, int(rng.integers(92, 121)), int(rng.integers(108, 127)), 0.02)
    sequence = _pick(rng, tuple(_WEIGHTINGS))
    weighting = _WEIGHTINGS[sequence]
    _brain(canvas, weighting)
    if _is_normal(rng):
        caption = f"Normal axial {sequence}-weighted MRI of the brain."
        return _phantom(canvas.picture(0.025), caption, (MRI, BRAIN))
    side, lobe, size = _pick(rng, _SIDES), _pick(rng, _LOBES), _pick(rng, _SIZES)
    kind = _pick(rng, weighting.lesions)
    x, y = _near(rng, _lobe_place(side, lobe, 0.42))
    if kind == "ring-enhancing":
        _rim(canvas, x, y, size, 0.97, 0.25)
    else:
        _blob(canvas, x, y, size, 0.1 if kind == "hypointense" else 0.97)
    caption = f"Axial {sequence}-weighted MRI of the brain showing a {size} {kind} lesion in the {side} {lobe} lobe."
    return _phantom(canvas.picture(0.025), caption, (MRI, BRAIN), _finding(canvas, f"{size} {kind}", x, y))


def _brain(canvas: _Canvas, weighting: _Weighting) -> None:
    canvas.paint(canvas.ellipse(0, 0, 0.8, 0.97), weighting.fat)
    canvas.paint(canvas.ellipse(0, 0, 0.755, 0.925), 0.06)
    canvas.paint(canvas.ellipse(0, 0, 0.695, 0.865), weighting.fluid)
    canvas.paint(canvas.ellipse(0, 0, 0.665, 0.835, rough=0.01), weighting.cortex)
    for side in (-1, 1):
        matter = canvas.ellipse(side * 0.29, 0, 0.26, 0.66, side * 0.03, rough=0.045, soft=4)
        canvas.paint(matter, weighting.white_matter + 0.02 * canvas.cloud(7))
    _sulci(canvas, weighting.fluid, 0.67, 0.84)
    canvas.paint(canvas.stroke(0, -0.82, 0, -0.36, 0.03, soft=1.5), weighting.fluid)
    canvas.paint(canvas.stroke(0, 0.4, 0, 0.82, 0.03, soft=1.5), weighting.fluid)
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * 0.22, 0.02, 0.08, 0.15, side * 0.25, soft=3), weighting.cortex)
    _ventricles(canvas, weighting.fluid)


_LEVELS: Final = ("L1", "L2", "L3", "L4", "L5", "S1")


def _mri_spine(rng: Rng) -> Phantom:
    canvas = _Canvas(rng, int(rng.integers(78, 96)), int(rng.integers(130, 151)), 0.12)
    canvas.grey += 0.04 * canvas.cloud(14)
    middles = [(0.16 * math.cos(1.1 * (i - 2.2) / 2.2) - 0.22, -0.98 + 0.37 * i) for i in range(5)]
    collapsed = herniated = -1
    if not _is_normal(rng):
        if rng.random() < 0.5:
            collapsed = int(rng.integers(0, 3))
        else:
            herniated = int(rng.integers(2, 5))
    _spine(canvas, middles, collapsed)
    caption = "Normal sagittal T2-weighted MRI of the lumbar spine."
    finding = None
    opening = "Sagittal T2-weighted MRI of the lumbar spine showing"
    if collapsed >= 0:
        caption = f"{opening} a compression fracture of {_LEVELS[collapsed]}."
        finding = _finding(canvas, "fracture", *middles[collapsed])
    if herniated >= 0:
        x, y = middles[herniated][0] + 0.3, middles[herniated][1] + 0.185
        canvas.paint(canvas.ellipse(x, y, 0.14, 0.075, soft=1.5), 0.1)
        caption = f"{opening} a disc herniation at {_LEVELS[herniated]}-{_LEVELS[herniated + 1]}."
        finding = _finding(canvas, "herniation", x, y)
    return _phantom(canvas.picture(0.025), caption, (MRI, SPINE), finding)


def _spine(canvas: _Canvas, middles: Sequence[tuple[float, float]], collapsed: int) -> None:
    rng = canvas.rng
    _spinal_canal(canvas, middles)
    for level, (x, y) in enumerate(middles):
        canvas.paint(canvas.ellipse(x + 0.01, y + 0.185, 0.2, 0.05), 0.3)
        canvas.paint(canvas.ellipse(x + 0.01, y + 0.185, 0.13, 0.025, soft=2), 0.78)
        height = 0.13
        if level == collapsed:
            canvas.paint(_box(canvas, x, y, 0.23, height), 0.14)
            height = 0.06
        canvas.paint(_box(canvas, x, y, 0.23, height), 0.28)
        grey = 0.88 if level == collapsed else 0.5
        canvas.paint(_box(canvas, x, y, 0.21, height - 0.018), grey + 0.03 * canvas.cloud(5))
    x, y = middles[-1]
    for step in range(3):
        turn = 0.35 + 0.2 * step
        center = (x + 0.07 + 0.13 * step, y + 0.34 + 0.25 * step)
        canvas.paint(canvas.ellipse(*center, 0.2 - 0.03 * step, 0.12, turn), 0.3)
        canvas.paint(canvas.ellipse(*center, 0.18 - 0.03 * step, 0.1, turn), 0.5 + rng.uniform(-0.02, 0.02))


def _box(canvas: _Canvas, x: float, y: float, rx: float, ry: float) -> Floats:
    """An upright box with rounded corners."""
    corner = 0.035
    u = np.maximum(np.abs(canvas.x - np.float32(x)) - np.float32(rx - corner), 0)
    v = np.maximum(np.abs(canvas.y - np.float32(y)) - np.float32(ry - corner), 0)
    return canvas.edge(_length(u, v) - np.float32(corner))


def _spinal_canal(canvas: _Canvas, middles: Sequence[tuple[float, float]]) -> None:
    x0, y0 = middles[0]
    points = [(x0 - 0.02, y0 - 0.4), *middles, (middles[-1][0] + 0.12, middles[-1][1] + 0.45)]
    for dx, width, grey in ((0.4, 0.25, 0.08), (0.38, 0.16, 0.92), (0.39, 0.03, 0.45)):
        canal: Floats = np.zeros_like(canvas.grey)
        for (xa, ya), (xb, yb) in itertools.pairwise(points):
            canal = np.maximum(canal, canvas.stroke(xa + dx, ya, xb + dx, yb, width))
        canvas.paint(canal, grey)
    cord = canvas.stroke(x0 + 0.37, y0 - 0.6, x0 + 0.39, y0 + 0.2, 0.075)
    canvas.paint(cord, 0.4)
    for x, y in middles:
        canvas.paint(canvas.ellipse(x + 0.68, y + 0.12, 0.15, 0.085, 0.35), 0.5)
    canvas.paint(canvas.edge(np.float32(middles[2][0] + 0.95) - canvas.x, 3), 0.78)


# --- frontal chest X-ray ----------------------------------------------------------------------------------------


def _chest_xray(rng: Rng) -> Phantom:
    canvas = _Canvas(rng, int(rng.integers(104, 134)), int(rng.integers(104, 127)), 0.04)
    kind = "normal" if _is_normal(rng) else _pick(rng, _XRAY_KINDS)
    _thorax(canvas, enlarged=kind == "cardiomegaly")
    caption, finding = "Normal frontal chest X-ray.", None
    if kind == "cardiomegaly":
        caption = "Frontal chest X-ray showing cardiomegaly."
        finding = _finding(canvas, kind, 0.1, 0.3)
    elif kind == "effusion":
        caption, finding = _effusion(canvas)
    elif kind == "pacemaker":
        caption, finding = _pacemaker(canvas)
    elif kind == "opacity":
        caption, finding = _opacity(canvas)
    return _phantom(canvas.picture(0.02), caption, (PLAIN_XRAY, CHEST), finding)


# Opacities are the most frequent finding, since they vary in size, side and zone.
_XRAY_KINDS: Final = ("opacity", "opacity", "opacity", "effusion", "effusion", "pacemaker", "cardiomegaly")


def _thorax(canvas: _Canvas, enlarged: bool) -> None:
    body = np.maximum(canvas.ellipse(0, 0.45, 0.98, 1.25, soft=3), canvas.ellipse(0, -0.9, 0.26, 0.5, soft=3))
    canvas.paint(body, 0.5 + 0.02 * canvas.cloud(20))
    canvas.paint(canvas.edge(np.float32(0.62) - canvas.y, 14) * canvas.ellipse(0, 0.45, 0.9, 1.2, soft=6), 0.6)
    for side in (-1, 1):
        canvas.paint(_lung_field(canvas, side), 0.16 + 0.02 * canvas.cloud(6))
    canvas.paint(canvas.stroke(0, -1.1, 0, 1.1, 0.17, soft=4), 0.64)
    canvas.paint(canvas.stroke(0, -1.0, -0.01, -0.35, 0.06, soft=2), 0.5)
    for step in range(9):
        canvas.paint(canvas.stroke(-0.06, -0.85 + 0.22 * step, 0.06, -0.85 + 0.22 * step, 0.02, soft=2), 0.56)
    _ribs(canvas)
    _heart(canvas, enlarged)
    canvas.paint(canvas.ellipse(0.45, 0.78, 0.13, 0.07, -0.2, soft=3), 0.3)


def _lung_field(canvas: _Canvas, side: int) -> Floats:
    lung = np.maximum(
        canvas.ellipse(side * 0.44, -0.12, 0.34, 0.66, side * 0.1, soft=4),
        canvas.ellipse(side * 0.5, 0.22, 0.36, 0.42, soft=4),
    )
    return lung * (1 - canvas.ellipse(side * 0.5, 1.05 if side < 0 else 1.09, 0.56, 0.5, soft=3))


def _ribs(canvas: _Canvas) -> None:
    ribs: Floats = np.zeros_like(canvas.grey)
    for side in (-1, 1):
        for step in range(8):
            y = -0.72 + 0.19 * step
            rx = 0.42 + 0.05 * min(step, 6)
            arc = canvas.ring(side * 0.33, y + 0.22, rx, 0.2, 0.045, side * 0.45)
            ribs = np.maximum(ribs, arc * canvas.edge(np.float32(0.06) - side * canvas.x))
        collar = canvas.stroke(side * 0.07, -0.68, side * 0.78, -0.84, 0.06, soft=1.5)
        canvas.grey += 0.17 * collar
    canvas.grey += 0.085 * ribs


def _heart(canvas: _Canvas, enlarged: bool) -> None:
    rng = canvas.rng
    rx = rng.uniform(0.5, 0.56) if enlarged else rng.uniform(0.3, 0.34)
    x = 0.13 if enlarged else 0.12
    canvas.paint(canvas.ellipse(x, 0.32, rx, 0.31 + 0.1 * enlarged, 0.45, soft=3), 0.66)
    canvas.paint(canvas.ellipse(0.1, -0.2, 0.1, 0.11, soft=3), 0.6)
    for side in (-1, 1):
        for _ in range(5):
            angle, length = rng.uniform(-0.9, 1.1), rng.uniform(0.2, 0.38)
            tip = (side * (0.14 + math.cos(angle) * length), 0.02 + math.sin(angle) * length)
            canvas.grey += 0.06 * canvas.stroke(side * 0.14, 0.02, *tip, 0.03, soft=3)


def _opacity(canvas: _Canvas) -> tuple[str, Finding]:
    rng = canvas.rng
    side, zone, size = _pick(rng, _SIDES), _pick(rng, ("upper", "lower")), _pick(rng, _SIZES)
    x, y = _near(rng, ((-0.47 if side == "right" else 0.49), -0.36 if zone == "upper" else 0.26))
    radius = rng.uniform(*_RADII[size])
    canvas.paint(canvas.ellipse(x, y, radius, radius, rough=0.04, soft=2.5), 0.74)
    caption = f"Frontal chest X-ray showing a {size} round opacity in the {side} {zone} zone."
    return caption, _finding(canvas, f"{size} opacity", x, y)


def _effusion(canvas: _Canvas) -> tuple[str, Finding]:
    """Fluid at the base of one lung, higher at the chest wall than at the heart."""
    rng = canvas.rng
    side, size = _pick(rng, _SIDES), _pick(rng, _SIZES)
    sign = -1 if side == "right" else 1
    level = rng.uniform(0.3, 0.36) if size == "small" else rng.uniform(-0.16, -0.08)
    surface = np.float32(level + 0.12) - np.float32(0.5) * np.clip(sign * canvas.x - 0.4, 0, 1)
    fluid = canvas.edge(surface - canvas.y, 3) * canvas.edge(np.float32(0.1) - sign * canvas.x, 5)
    canvas.paint(fluid * _lung_field(canvas, sign), 0.66)
    canvas.paint(fluid * canvas.ellipse(sign * 0.5, 0.62, 0.42, 0.22, soft=8), 0.66)
    caption = f"Frontal chest X-ray showing a {size} {side} pleural effusion."
    return caption, _finding(canvas, f"{size} effusion", sign * 0.6, 0.5)


def _pacemaker(canvas: _Canvas) -> tuple[str, Finding]:
    side = _pick(canvas.rng, _SIDES)
    sign = -1 if side == "right" else 1
    x, y = _near(canvas.rng, (sign * 0.6, -0.48), 0.04)
    path = [(x, y), (sign * 0.34, -0.66), (0.04, -0.5), (0.0, 0.0), (0.1, 0.36), (0.24, 0.44)]
    for (xa, ya), (xb, yb) in itertools.pairwise(path):
        canvas.paint(canvas.stroke(xa, ya, xb, yb, 0.028), 0.98)
    canvas.paint(_box(canvas, x, y, 0.15, 0.12), 0.98)
    caption = f"Frontal chest X-ray showing a cardiac pacemaker on the {side} side."
    return caption, _finding(canvas, "pacemaker", x, y)


# --- ultrasound -------------------------------------------------------------------------------------------------


_APEX: Final = -1.32
_LESION_ECHO: Final = {"anechoic cyst": 0.02, "hyperechoic mass": 0.92}


def _ultrasound(rng: Rng) -> Phantom:
    canvas = _Canvas(rng, int(rng.integers(124, 151)), int(rng.integers(104, 119)), 0.0)
    sector, depth = _liver_tissue(canvas)
    doppler = bool(rng.random() < 0.5)
    opening = f"{'Colour Doppler ultrasound' if doppler else 'Ultrasound'} of the liver"
    caption, finding = f"Normal {opening[0].lower()}{opening[1:]}.", None
    side = _pick(rng, ("left", "right"))
    if not _is_normal(rng):
        text, finding = _echo_lesion(canvas, side, depth)
        caption = f"{opening} showing {text}."
    canvas.grey *= 1 + 0.26 * canvas.cloud(1.7) + 0.1 * canvas.cloud(4)
    canvas.grey *= sector
    image = canvas.picture(0.012)
    if doppler:
        image = _with_flow(canvas, image, -1 if side == "right" else 1)
    return _phantom(image, caption, (ULTRASOUND, LIVER), finding)


def _liver_tissue(canvas: _Canvas) -> tuple[Floats, Floats]:
    """Paints the liver; returns the sector's mask and each pixel's depth from the probe."""
    rng = canvas.rng
    x, y = canvas.x, canvas.y - np.float32(_APEX)
    depth: Floats = _length(x, y)
    angle = np.abs(np.arctan2(x, y))
    sector = (
        canvas.edge(np.float32(0.42) - depth)
        * canvas.edge(depth - np.float32(2.2))
        * canvas.edge((angle - np.float32(0.62)) * depth)
    )
    canvas.grey[:] = 0.4 + 0.04 * canvas.cloud(12)
    canvas.paint(canvas.edge(depth - np.float32(0.56), 3), 0.66)
    canvas.paint(canvas.edge(np.abs(depth - np.float32(0.53)) - np.float32(0.015), 2), 0.85)
    for _ in range(3):
        vx, vy = rng.uniform(-0.6, 0.6), rng.uniform(-0.2, 0.5)
        canvas.paint(canvas.stroke(vx, vy, vx + rng.uniform(-0.3, 0.3), vy + 0.2, 0.04, soft=2), 0.27)
    diaphragm = np.abs(_length(x - np.float32(0.1), y - np.float32(0.7)) - np.float32(1.43))
    canvas.paint(canvas.edge(diaphragm - np.float32(0.03), 2.5), 0.9)
    return sector, depth


def _echo_lesion(canvas: _Canvas, side: str, depth: Floats) -> tuple[str, Finding]:
    rng = canvas.rng
    field = _pick(rng, ("near", "far"))
    sign = -1 if side == "left" else 1
    x, y = _near(rng, ((0.3, -0.32) if field == "near" else (0.46, 0.3)))
    x *= sign
    kind = _pick(rng, ("anechoic cyst", "hyperechoic mass", "stone"))
    if kind == "stone":
        _shadow(canvas, x, y, 0.1, depth, 0.05)
        canvas.paint(canvas.ellipse(x, y, 0.115, 0.07, soft=1.4), 1.0)
        text = f"a stone with acoustic shadow in the {field} field on the {side}"
        return text, _finding(canvas, kind, x, y)
    size = _pick(rng, _SIZES)
    if kind == "anechoic cyst":
        _shadow(canvas, x, y, _RADII[size][0] * 0.9, depth, 0.56)
    _blob(canvas, x, y, size, _LESION_ECHO[kind])
    text = f"a {size} {kind} in the {field} field on the {side}"
    return text, _finding(canvas, f"{size} {kind}", x, y)


def _shadow(canvas: _Canvas, x: float, y: float, radius: float, depth: Floats, grey: float) -> None:
    """Shades the region behind a lesion along the beam: dark behind a stone, brighter behind fluid."""
    own_depth = math.hypot(x, y - _APEX)
    beam = np.arctan2(canvas.x, canvas.y - np.float32(_APEX)) - np.float32(math.atan2(x, y - _APEX))
    behind = canvas.edge((np.abs(beam) - np.float32(radius / own_depth)) * depth, 2)
    canvas.paint(behind * canvas.edge(np.float32(own_depth) - depth, 2), grey)


def _with_flow(canvas: _Canvas, image: Image.Image, sign: int) -> Image.Image:
    """A colour box on the side without the lesion: flow towards the probe in red, away from it in blue."""
    rng = canvas.rng
    x, y = sign * rng.uniform(0.3, 0.38), rng.uniform(-0.1, 0.04)
    pixels = np.asarray(image.convert("RGB"), np.float32)
    red, blue = np.array((235, 70, 30), np.float32), np.array((50, 100, 235), np.float32)
    for colour, dx in ((red, -0.09), (blue, 0.09)):
        bend = (x + dx + rng.uniform(-0.05, 0.05), y)
        upper = canvas.stroke(x + dx * 1.5, y - 0.24, *bend, 0.09, soft=1.8)
        vessel = np.maximum(upper, canvas.stroke(*bend, x + dx * 0.8, y + 0.24, 0.1, soft=1.8))
        shade = colour * (0.85 + 0.16 * canvas.cloud(3))[..., None]
        pixels += vessel[..., None] * (shade - pixels)
    frame = _box(canvas, x, y, 0.27, 0.32) - _box(canvas, x, y, 0.255, 0.305)
    pixels += np.float32(0.7) * frame[..., None] * (np.float32(225) - pixels)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


_SCENES: Final[Mapping[str, tuple[Callable[[Rng], Phantom], ...]]] = {
    CT: (_ct_abdomen, _ct_head, _ct_chest),
    MRI: (_mri_brain, _mri_spine),
    PLAIN_XRAY: (_chest_xray,),
    ULTRASOUND: (_ultrasound,),
}


# --- the data set -----------------------------------------------------------------------------------------------


def write_dataset(root: Path, counts: Mapping[str, int], rows_per_shard: int = 1000, rows_per_group: int = 100) -> None:
    """Writes phantoms of held-out seeds to `root`/data, in the layout that ROCOv2 has on the hub.

    `counts` maps each split to its number of phantoms. Writing the same data set again leaves the same files.

    Raises DatasetError if the folder holds other shards of a split, since a reader would read both.
    """
    data = root / "data"
    data.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        shards = max(1, math.ceil(count / rows_per_shard))
        paths = [data / f"{split}-{shard:05}-of-{shards:05}.parquet" for shard in range(shards)]
        if set(data.glob(f"{split}-*.parquet")) - set(paths):
            raise DatasetError(f"{data} holds other shards of {split}: delete them, or choose another folder.")
        for shard, path in enumerate(paths):
            rows = range(shard * rows_per_shard, min(count, (shard + 1) * rows_per_shard))
            _write_shard(path, split, rows, rows_per_group)


def _write_shard(path: Path, split: str, rows: range, rows_per_group: int) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with pq.ParquetWriter(partial, SCHEMA) as writer:
            for start in range(0, len(rows), rows_per_group):
                group = list(_rows(split, rows[start : start + rows_per_group]))
                writer.write_table(pa.Table.from_pylist(group, SCHEMA), row_group_size=rows_per_group)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _rows(split: str, numbers: range) -> Iterator[dict[str, object]]:
    for number in numbers:
        phantom = draw(HELD_OUT_SEEDS[split][number])
        yield {
            "image": {"bytes": _png(phantom.image), "path": None},
            "image_id": f"PHANTOM_{_INFIX[split]}_{number + 1:06}",
            "caption": phantom.caption,
            "cui": list(phantom.cui),
        }


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
