"""Phantoms: drawings that look like radiology pictures, each with a caption that its pixels determine.

Everything follows from an integer seed. Axial pictures are seen from the feet, as is customary: the patient's right is
on the left of the picture.
"""

import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rococap.demo.canvas import (
    APEX,
    RADII,
    SIDES,
    SIZES,
    Canvas,
    Finding,
    Floats,
    Phantom,
    Rng,
    blob,
    box,
    hypot,
    is_normal,
    near,
    pick,
    rim,
    sector,
    shadow,
)
from rococap.errors import DatasetError
from rococap.progress import Progress, silent

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


def draw(seed: int) -> Phantom:
    """The phantom of this seed: the same on every machine."""
    rng = np.random.default_rng(seed)
    return pick(rng, _SCENES[pick(rng, MODALITIES)])(rng)


# --- axial CT ---------------------------------------------------------------------------------------------------


def _ct_abdomen(rng: Rng) -> Phantom:
    canvas = Canvas(rng, int(rng.integers(128, 151)), int(rng.integers(100, 121)), 0.02)
    _trunk(canvas, 1.13, 0.86)
    canvas.paint(canvas.ellipse(0, -0.02, 0.93, 0.66), 0.27)
    _bowel_and_organs(canvas)
    _vertebra(canvas, 0.42)
    canvas.paint(canvas.ellipse(0.08, 0.2, 0.075, 0.075), 0.66)
    canvas.paint(canvas.ellipse(-0.13, 0.2, 0.085, 0.065), 0.56)
    if is_normal(rng):
        return Phantom(canvas.picture(0.035), "Normal axial CT of the abdomen.", (CT, ABDOMEN))
    sites = {
        "right lobe of the liver": (-0.6, 0.0),
        "left lobe of the liver": (-0.08, -0.34),
        "spleen": (0.72, 0.1),
    }
    site, kind, size = pick(rng, tuple(sites)), pick(rng, ("hypodense", "hyperdense")), pick(rng, SIZES)
    x, y = near(rng, sites[site])
    blob(canvas, x, y, size, 0.3 if kind == "hypodense" else 0.88)
    caption = f"Axial CT of the abdomen showing a {size} {kind} lesion in the {site}."
    return Phantom(canvas.picture(0.035), caption, (CT, ABDOMEN), canvas.finding(f"{size} {kind}", x, y))


def _trunk(canvas: Canvas, rx: float, ry: float) -> None:
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


def _bowel_and_organs(canvas: Canvas) -> None:
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


def _vertebra(canvas: Canvas, y: float) -> None:
    for side in (-1, 1):
        canvas.paint(canvas.ellipse(side * 0.23, y + 0.2, 0.19, 0.13, side * 0.3), 0.48)
        canvas.paint(canvas.stroke(side * 0.08, y + 0.13, side * 0.27, y + 0.15, 0.05), 0.85)
        canvas.paint(canvas.stroke(side * 0.09, y + 0.12, 0, y + 0.27, 0.045), 0.88)
    canvas.paint(canvas.stroke(0, y + 0.26, 0, y + 0.33, 0.05), 0.88)
    canvas.paint(canvas.ellipse(0, y, 0.17, 0.135), 0.93)
    canvas.paint(canvas.ellipse(0, y, 0.135, 0.1), 0.74)
    canvas.paint(canvas.ellipse(0, y + 0.16, 0.065, 0.05), 0.4)


def _ct_chest(rng: Rng) -> Phantom:
    canvas = Canvas(rng, int(rng.integers(128, 151)), int(rng.integers(100, 121)), 0.02)
    _trunk(canvas, 1.14, 0.84)
    _lungs(canvas)
    _vertebra(canvas, 0.4)
    if is_normal(rng):
        return Phantom(canvas.picture(0.03), "Normal axial CT of the chest.", (CT, CHEST))
    side, kind, size = (
        pick(rng, ("right", "left")),
        pick(rng, ("solid", "cavitating")),
        pick(rng, SIZES),
    )
    x, y = near(rng, (-0.58 if side == "right" else 0.64, 0.0), 0.09)
    if kind == "solid":
        blob(canvas, x, y, size, 0.62)
    else:
        rim(canvas, x, y, size, 0.66, 0.03)
    caption = f"Axial CT of the chest showing a {size} {kind} nodule in the {side} lung."
    return Phantom(canvas.picture(0.03), caption, (CT, CHEST), canvas.finding(f"{size} {kind}", x, y))


def _lungs(canvas: Canvas) -> None:
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


def _lobe_place(side: str, lobe: str, reach: float) -> tuple[float, float]:
    return (-0.31 if side == "right" else 0.31), (-reach if lobe == "frontal" else reach)


def _ct_head(rng: Rng) -> Phantom:
    canvas = Canvas(rng, int(rng.integers(88, 109)), int(rng.integers(108, 127)), 0.01)
    canvas.paint(canvas.ellipse(0, 0, 0.79, 0.97), 0.3)
    canvas.paint(canvas.ellipse(0, 0, 0.755, 0.935), 0.98)
    canvas.paint(canvas.ellipse(0, 0, 0.665, 0.845), 0.33)
    brain = canvas.ellipse(0, 0, 0.645, 0.825, rough=0.008)
    canvas.paint(brain, 0.43 + 0.02 * canvas.cloud(8))
    _sulci(canvas, 0.31, 0.645, 0.825)
    _ventricles(canvas, 0.17)
    canvas.paint(canvas.stroke(0, -0.82, 0, -0.42, 0.018), 0.6)
    canvas.paint(canvas.stroke(0, 0.45, 0, 0.82, 0.018), 0.6)
    if is_normal(rng):
        return Phantom(canvas.picture(0.03), "Normal axial CT of the head.", (CT, HEAD))
    side, lobe, size = pick(rng, SIDES), pick(rng, _LOBES), pick(rng, SIZES)
    kind = pick(rng, ("hyperdense haemorrhage", "hypodense infarct"))
    x, y = near(rng, _lobe_place(side, lobe, 0.44))
    blob(canvas, x, y, size, 0.82 if kind == "hyperdense haemorrhage" else 0.16)
    caption = f"Axial CT of the head showing a {size} {kind} in the {side} {lobe} lobe."
    return Phantom(canvas.picture(0.03), caption, (CT, HEAD), canvas.finding(f"{size} {kind}", x, y))


def _sulci(canvas: Canvas, grey: float, rx: float, ry: float) -> None:
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


def _ventricles(canvas: Canvas, grey: float) -> None:
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
    canvas = Canvas(rng, int(rng.integers(92, 121)), int(rng.integers(108, 127)), 0.02)
    sequence = pick(rng, tuple(_WEIGHTINGS))
    weighting = _WEIGHTINGS[sequence]
    _brain(canvas, weighting)
    if is_normal(rng):
        caption = f"Normal axial {sequence}-weighted MRI of the brain."
        return Phantom(canvas.picture(0.025), caption, (MRI, BRAIN))
    side, lobe, size = pick(rng, SIDES), pick(rng, _LOBES), pick(rng, SIZES)
    kind = pick(rng, weighting.lesions)
    x, y = near(rng, _lobe_place(side, lobe, 0.42))
    if kind == "ring-enhancing":
        rim(canvas, x, y, size, 0.97, 0.25)
    else:
        blob(canvas, x, y, size, 0.1 if kind == "hypointense" else 0.97)
    caption = f"Axial {sequence}-weighted MRI of the brain showing a {size} {kind} lesion in the {side} {lobe} lobe."
    return Phantom(canvas.picture(0.025), caption, (MRI, BRAIN), canvas.finding(f"{size} {kind}", x, y))


def _brain(canvas: Canvas, weighting: _Weighting) -> None:
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
    canvas = Canvas(rng, int(rng.integers(78, 96)), int(rng.integers(130, 151)), 0.12)
    canvas.grey += 0.04 * canvas.cloud(14)
    middles = [(0.16 * math.cos(1.1 * (i - 2.2) / 2.2) - 0.22, -0.98 + 0.37 * i) for i in range(5)]
    collapsed = herniated = -1
    if not is_normal(rng):
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
        finding = canvas.finding("fracture", *middles[collapsed])
    if herniated >= 0:
        x, y = middles[herniated][0] + 0.3, middles[herniated][1] + 0.185
        canvas.paint(canvas.ellipse(x, y, 0.14, 0.075, soft=1.5), 0.1)
        caption = f"{opening} a disc herniation at {_LEVELS[herniated]}-{_LEVELS[herniated + 1]}."
        finding = canvas.finding("herniation", x, y)
    return Phantom(canvas.picture(0.025), caption, (MRI, SPINE), finding)


def _spine(canvas: Canvas, middles: Sequence[tuple[float, float]], collapsed: int) -> None:
    rng = canvas.rng
    _spinal_canal(canvas, middles)
    for level, (x, y) in enumerate(middles):
        canvas.paint(canvas.ellipse(x + 0.01, y + 0.185, 0.2, 0.05), 0.3)
        canvas.paint(canvas.ellipse(x + 0.01, y + 0.185, 0.13, 0.025, soft=2), 0.78)
        height = 0.13
        if level == collapsed:
            canvas.paint(box(canvas, x, y, 0.23, height), 0.14)
            height = 0.06
        canvas.paint(box(canvas, x, y, 0.23, height), 0.28)
        grey = 0.88 if level == collapsed else 0.5
        canvas.paint(box(canvas, x, y, 0.21, height - 0.018), grey + 0.03 * canvas.cloud(5))
    x, y = middles[-1]
    for step in range(3):
        turn = 0.35 + 0.2 * step
        center = (x + 0.07 + 0.13 * step, y + 0.34 + 0.25 * step)
        canvas.paint(canvas.ellipse(*center, 0.2 - 0.03 * step, 0.12, turn), 0.3)
        canvas.paint(canvas.ellipse(*center, 0.18 - 0.03 * step, 0.1, turn), 0.5 + rng.uniform(-0.02, 0.02))


def _spinal_canal(canvas: Canvas, middles: Sequence[tuple[float, float]]) -> None:
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
    canvas = Canvas(rng, int(rng.integers(104, 134)), int(rng.integers(104, 127)), 0.04)
    kind = "normal" if is_normal(rng) else pick(rng, _XRAY_KINDS)
    _thorax(canvas, enlarged=kind == "cardiomegaly")
    caption, finding = "Normal frontal chest X-ray.", None
    if kind == "cardiomegaly":
        caption = "Frontal chest X-ray showing cardiomegaly."
        finding = canvas.finding(kind, 0.1, 0.3)
    elif kind == "effusion":
        caption, finding = _effusion(canvas)
    elif kind == "pacemaker":
        caption, finding = _pacemaker(canvas)
    elif kind == "opacity":
        caption, finding = _opacity(canvas)
    return Phantom(canvas.picture(0.02), caption, (PLAIN_XRAY, CHEST), finding)


# Opacities are the most frequent finding, since they vary in size, side and zone.
_XRAY_KINDS: Final = ("opacity", "opacity", "opacity", "effusion", "effusion", "pacemaker", "cardiomegaly")


def _thorax(canvas: Canvas, enlarged: bool) -> None:
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


def _lung_field(canvas: Canvas, side: int) -> Floats:
    lung = np.maximum(
        canvas.ellipse(side * 0.44, -0.12, 0.34, 0.66, side * 0.1, soft=4),
        canvas.ellipse(side * 0.5, 0.22, 0.36, 0.42, soft=4),
    )
    return lung * (1 - canvas.ellipse(side * 0.5, 1.05 if side < 0 else 1.09, 0.56, 0.5, soft=3))


def _ribs(canvas: Canvas) -> None:
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


def _heart(canvas: Canvas, enlarged: bool) -> None:
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


def _opacity(canvas: Canvas) -> tuple[str, Finding]:
    rng = canvas.rng
    side, zone, size = pick(rng, SIDES), pick(rng, ("upper", "lower")), pick(rng, SIZES)
    x, y = near(rng, ((-0.47 if side == "right" else 0.49), -0.36 if zone == "upper" else 0.26))
    radius = rng.uniform(*RADII[size])
    canvas.paint(canvas.ellipse(x, y, radius, radius, rough=0.04, soft=2.5), 0.74)
    caption = f"Frontal chest X-ray showing a {size} round opacity in the {side} {zone} zone."
    return caption, canvas.finding(f"{size} opacity", x, y)


def _effusion(canvas: Canvas) -> tuple[str, Finding]:
    """Fluid at the base of one lung, higher at the chest wall than at the heart."""
    rng = canvas.rng
    side, size = pick(rng, SIDES), pick(rng, SIZES)
    sign = -1 if side == "right" else 1
    level = rng.uniform(0.3, 0.36) if size == "small" else rng.uniform(-0.16, -0.08)
    surface = np.float32(level + 0.12) - np.float32(0.5) * np.clip(sign * canvas.x - 0.4, 0, 1)
    fluid = canvas.edge(surface - canvas.y, 3) * canvas.edge(np.float32(0.1) - sign * canvas.x, 5)
    canvas.paint(fluid * _lung_field(canvas, sign), 0.66)
    canvas.paint(fluid * canvas.ellipse(sign * 0.5, 0.62, 0.42, 0.22, soft=8), 0.66)
    caption = f"Frontal chest X-ray showing a {size} {side} pleural effusion."
    return caption, canvas.finding(f"{size} effusion", sign * 0.6, 0.5)


def _pacemaker(canvas: Canvas) -> tuple[str, Finding]:
    side = pick(canvas.rng, SIDES)
    sign = -1 if side == "right" else 1
    x, y = near(canvas.rng, (sign * 0.6, -0.48), 0.04)
    path = [(x, y), (sign * 0.34, -0.66), (0.04, -0.5), (0.0, 0.0), (0.1, 0.36), (0.24, 0.44)]
    for (xa, ya), (xb, yb) in itertools.pairwise(path):
        canvas.paint(canvas.stroke(xa, ya, xb, yb, 0.028), 0.98)
    canvas.paint(box(canvas, x, y, 0.15, 0.12), 0.98)
    caption = f"Frontal chest X-ray showing a cardiac pacemaker on the {side} side."
    return caption, canvas.finding("pacemaker", x, y)


# --- ultrasound -------------------------------------------------------------------------------------------------


_LESION_ECHO: Final = {"anechoic cyst": 0.02, "hyperechoic mass": 0.92}


def _ultrasound(rng: Rng) -> Phantom:
    canvas = Canvas(rng, int(rng.integers(124, 151)), int(rng.integers(104, 119)), 0.0)
    seen, depth = _liver_tissue(canvas)
    doppler = bool(rng.random() < 0.5)
    opening = f"{'Colour Doppler ultrasound' if doppler else 'Ultrasound'} of the liver"
    caption, finding = f"Normal {opening[0].lower()}{opening[1:]}.", None
    side = pick(rng, ("left", "right"))
    if not is_normal(rng):
        text, finding = _echo_lesion(canvas, side, depth)
        caption = f"{opening} showing {text}."
    canvas.grey *= 1 + 0.26 * canvas.cloud(1.7) + 0.1 * canvas.cloud(4)
    canvas.grey *= seen
    image = canvas.picture(0.012)
    if doppler:
        image = _with_flow(canvas, image, -1 if side == "right" else 1)
    return Phantom(image, caption, (ULTRASOUND, LIVER), finding)


def _liver_tissue(canvas: Canvas) -> tuple[Floats, Floats]:
    """Paints the liver; returns the sector's mask and each pixel's depth from the probe."""
    rng = canvas.rng
    x, y = canvas.x, canvas.y - np.float32(APEX)
    seen, depth = sector(canvas)
    canvas.grey[:] = 0.4 + 0.04 * canvas.cloud(12)
    canvas.paint(canvas.edge(depth - np.float32(0.56), 3), 0.66)
    canvas.paint(canvas.edge(np.abs(depth - np.float32(0.53)) - np.float32(0.015), 2), 0.85)
    for _ in range(3):
        vx, vy = rng.uniform(-0.6, 0.6), rng.uniform(-0.2, 0.5)
        canvas.paint(canvas.stroke(vx, vy, vx + rng.uniform(-0.3, 0.3), vy + 0.2, 0.04, soft=2), 0.27)
    diaphragm = np.abs(hypot(x - np.float32(0.1), y - np.float32(0.7)) - np.float32(1.43))
    canvas.paint(canvas.edge(diaphragm - np.float32(0.03), 2.5), 0.9)
    return seen, depth


def _echo_lesion(canvas: Canvas, side: str, depth: Floats) -> tuple[str, Finding]:
    rng = canvas.rng
    field = pick(rng, ("near", "far"))
    sign = -1 if side == "left" else 1
    x, y = near(rng, ((0.3, -0.32) if field == "near" else (0.46, 0.3)))
    x *= sign
    kind = pick(rng, ("anechoic cyst", "hyperechoic mass", "stone"))
    if kind == "stone":
        shadow(canvas, x, y, 0.1, depth, 0.05)
        canvas.paint(canvas.ellipse(x, y, 0.115, 0.07, soft=1.4), 1.0)
        text = f"a stone with acoustic shadow in the {field} field on the {side}"
        return text, canvas.finding(kind, x, y)
    size = pick(rng, SIZES)
    if kind == "anechoic cyst":
        shadow(canvas, x, y, RADII[size][0] * 0.9, depth, 0.56)
    blob(canvas, x, y, size, _LESION_ECHO[kind])
    text = f"a {size} {kind} in the {field} field on the {side}"
    return text, canvas.finding(f"{size} {kind}", x, y)


def _with_flow(canvas: Canvas, image: Image.Image, sign: int) -> Image.Image:
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
    frame = box(canvas, x, y, 0.27, 0.32) - box(canvas, x, y, 0.255, 0.305)
    pixels += np.float32(0.7) * frame[..., None] * (np.float32(225) - pixels)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


_SCENES: Final[Mapping[str, tuple[Callable[[Rng], Phantom], ...]]] = {
    CT: (_ct_abdomen, _ct_head, _ct_chest),
    MRI: (_mri_brain, _mri_spine),
    PLAIN_XRAY: (_chest_xray,),
    ULTRASOUND: (_ultrasound,),
}


# --- the data set -----------------------------------------------------------------------------------------------


Drawn = Callable[[str, int], tuple[str, Phantom]]


def held_out(split: str, number: int) -> tuple[str, Phantom]:
    """The phantom of a row, counted from 0, and what its id begins with."""
    return "PHANTOM", draw(HELD_OUT_SEEDS[split][number])


def write_dataset(
    root: Path,
    counts: Mapping[str, int],
    rows_per_shard: int = 1000,
    rows_per_group: int = 100,
    *,
    drawn: Drawn = held_out,
    progress: Progress = silent,
) -> None:
    """Writes phantoms of held-out seeds to `root`/data, in the layout that ROCOv2 has on the hub.

    `counts` maps each split to its number of phantoms, and `drawn` draws that of a row. Writing the same data set again
    leaves the same files.

    Raises DatasetError if the folder holds other shards of a split, since a reader would read both.
    """
    data = root / "data"
    data.mkdir(parents=True, exist_ok=True)
    done, total = 0, sum(counts.values())
    for split, count in counts.items():
        shards = max(1, math.ceil(count / rows_per_shard))
        paths = [data / f"{split}-{shard:05}-of-{shards:05}.parquet" for shard in range(shards)]
        if set(data.glob(f"{split}-*.parquet")) - set(paths):
            raise DatasetError(f"{data} holds other shards of {split}: delete them, or choose another folder.")
        for shard, path in enumerate(paths):
            rows = range(shard * rows_per_shard, min(count, (shard + 1) * rows_per_shard))
            for n in _write_shard(path, split, rows, rows_per_group, drawn):
                done += n
                progress("drawing phantoms", done, total)


def _write_shard(path: Path, split: str, rows: range, rows_per_group: int, drawn: Drawn) -> Iterator[int]:
    """Yields the number of rows of each group that is written."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with pq.ParquetWriter(partial, SCHEMA) as writer:
            for start in range(0, len(rows), rows_per_group):
                group = [_row(split, number, drawn) for number in rows[start : start + rows_per_group]]
                writer.write_table(pa.Table.from_pylist(group, SCHEMA), row_group_size=rows_per_group)
                yield len(group)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _row(split: str, number: int, drawn: Drawn) -> dict[str, object]:
    prefix, phantom = drawn(split, number)
    return {
        "image": {"bytes": _png(phantom.image), "path": None},
        "image_id": f"{prefix}_{_INFIX[split]}_{number + 1:06}",
        "caption": phantom.caption,
        "cui": list(phantom.cui),
    }


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
