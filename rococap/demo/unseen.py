"""Kinds of phantom that the demonstration model was never trained on: mammograms, X-rays of the knee, ultrasound of the
kidney.

They are drawn as those in `phantoms`, and each follows from an integer seed.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np

from rococap.demo import phantoms
from rococap.demo.canvas import (
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
    is_normal,
    near,
    pick,
    sector,
    shadow,
)
from rococap.demo.phantoms import HELD_OUT_SEEDS, PLAIN_XRAY, ULTRASOUND

BREAST: Final = "C0006141"
LEG: Final = "C0023216"
KIDNEY: Final = "C0022646"

OLD_EVERY: Final = 2
"""Every second phantom is of an old kind: in training, so that these are not forgotten."""
OLD, NEW = "PHANTOM", "UNSEEN"
"""What the ids of old and new kinds begin with."""


def draw(seed: int) -> Phantom:
    """The phantom of this seed: the same on every machine."""
    rng = np.random.default_rng(seed)
    return pick(rng, _SCENES)(rng)


def mixed(split: str, number: int) -> tuple[str, Phantom]:
    """The phantom of a row, counted from 0, in a data set of old and new kinds, and what its id begins with."""
    seed = HELD_OUT_SEEDS[split][number]
    is_old = number % OLD_EVERY == 0
    return (OLD, phantoms.draw(seed)) if is_old else (NEW, draw(seed))


# --- mammogram --------------------------------------------------------------------------------------------------


def _mammogram(rng: Rng) -> Phantom:
    """A mediolateral view: the chest wall of the right breast is on the right of the picture."""
    canvas = Canvas(rng, int(rng.integers(96, 117)), int(rng.integers(116, 139)), 0.02)
    side = pick(rng, SIDES)
    sign = 1 if side == "right" else -1
    _breast(canvas, sign)
    opening = f"ammogram of the {side} breast"
    if is_normal(rng):
        return Phantom(canvas.picture(0.025), f"Normal m{opening}.", (PLAIN_XRAY, BREAST))
    half = pick(rng, ("upper", "lower"))
    x, y = near(rng, (sign * 0.2, -0.42 if half == "upper" else 0.42), 0.07)
    if rng.random() < 0.3:
        for _ in range(9):
            dx, dy = rng.uniform(-0.14, 0.14, 2)
            canvas.paint(canvas.ellipse(x + dx, y + dy, 0.025, 0.025), 1.0)
        text, kind = f"microcalcifications in the {half} half", "microcalcifications"
    else:
        size, shape = pick(rng, SIZES), pick(rng, ("round", "spiculated"))
        if shape == "spiculated":
            _spikes(canvas, x, y, size)
        blob(canvas, x, y, size, 0.92)
        text, kind = f"a {size} {shape} mass in the {half} half", f"{size} {shape}"
    caption = f"M{opening} showing {text}."
    return Phantom(canvas.picture(0.025), caption, (PLAIN_XRAY, BREAST), canvas.finding(kind, x, y))


def _breast(canvas: Canvas, sign: int) -> None:
    """Skin, fat and glandular tissue, with the chest wall on the side of `sign`."""
    wall = sign * 0.92
    canvas.paint(canvas.ellipse(wall, 0, 1.55, 0.98), 0.5)
    canvas.paint(canvas.ellipse(wall, 0, 1.52, 0.95), 0.3 + 0.03 * canvas.cloud(12))
    gland = canvas.ellipse(wall - sign * 0.75, 0, 0.68, 0.7, rough=0.03, soft=8)
    canvas.paint(gland, 0.46 + 0.05 * canvas.cloud(6))
    for _ in range(6):
        y = canvas.rng.uniform(-0.55, 0.55)
        canvas.paint(canvas.stroke(-sign * 0.55, y * 0.15, sign * 0.4, y, 0.03, soft=2), 0.52)
    chest = np.float32(0.72) + np.float32(0.1) * np.abs(canvas.y)
    muscle = canvas.edge(chest - np.float32(sign) * canvas.x, 2)
    canvas.paint(muscle * canvas.ellipse(wall, 0, 1.52, 0.95), 0.72)
    canvas.paint(canvas.ellipse(-sign * 0.64, 0, 0.05, 0.06), 0.6)


def _spikes(canvas: Canvas, x: float, y: float, size: str) -> None:
    rng = canvas.rng
    reach = 2.1 * RADII[size][1]
    for step in range(9):
        angle = math.tau * (step + rng.uniform(-0.2, 0.2)) / 9
        canvas.paint(canvas.stroke(x, y, x + reach * math.cos(angle), y + reach * math.sin(angle), 0.03), 0.85)


# --- X-ray of the knee ------------------------------------------------------------------------------------------

_BONES: Final = {"femur": (0.0, -0.62), "tibia": (0.0, 0.68), "fibula": (0.46, 0.68)}


def _knee(rng: Rng) -> Phantom:
    """A frontal view: the fibula is on the outside, which for the right knee is the left of the picture."""
    canvas = Canvas(rng, int(rng.integers(84, 105)), int(rng.integers(124, 147)), 0.04)
    side = pick(rng, SIDES)
    sign = -1 if side == "right" else 1
    kind = "normal" if is_normal(rng) else pick(rng, ("fracture", "fracture", "osteoarthritis", "replacement"))
    _bones(canvas, sign, 0.035 if kind == "osteoarthritis" else 0.13)
    opening, finding = f"rontal X-ray of the {side} knee", None
    caption = f"Normal f{opening}."
    if kind == "fracture":
        bone = pick(rng, tuple(_BONES))
        x, y = near(rng, _BONES[bone], 0.03)
        _break(canvas, sign * x, y, 0.11 if bone == "fibula" else 0.24)
        caption, finding = f"F{opening} showing a fracture of the {bone}.", canvas.finding(bone, sign * x, y)
    elif kind == "osteoarthritis":
        for spur in (-1, 1):
            canvas.paint(canvas.ellipse(spur * 0.43, 0.05, 0.06, 0.05), 0.9)
        caption, finding = f"F{opening} showing osteoarthritis.", canvas.finding(kind, 0, 0)
    elif kind == "replacement":
        canvas.paint(box(canvas, 0, -0.14, 0.42, 0.12), 1.0)
        canvas.paint(box(canvas, 0, 0.13, 0.42, 0.07), 1.0)
        canvas.paint(canvas.stroke(0, 0.13, 0, 0.5, 0.1), 1.0)
        caption, finding = f"F{opening} showing a total knee replacement.", canvas.finding(kind, 0, 0)
    return Phantom(canvas.picture(0.02), caption, (PLAIN_XRAY, LEG), finding)


def _bones(canvas: Canvas, sign: int, gap: float) -> None:
    canvas.paint(canvas.stroke(0, -1.5, 0, 1.5, 1.3, soft=4), 0.3 + 0.02 * canvas.cloud(14))
    for y, grey in ((-1, 0.62), (1, 0.62)):
        shaft: Floats = canvas.stroke(0, y * 0.2, 0, y * 1.5, 0.4, soft=2)
        canvas.paint(shaft, grey)
        canvas.paint(canvas.stroke(0, y * 0.6, 0, y * 1.5, 0.2, soft=2), 0.5)
        for condyle in (-1, 1):
            center = y * (gap / 2 + 0.16)
            canvas.paint(canvas.ellipse(condyle * 0.2, center, 0.24, 0.16, soft=1.5), 0.66 + 0.03 * canvas.cloud(5))
    canvas.paint(canvas.ellipse(sign * 0.46, 0.36, 0.1, 0.1, soft=1.5), 0.6)
    canvas.paint(canvas.stroke(sign * 0.46, 0.36, sign * 0.46, 1.5, 0.13, soft=1.5), 0.6)


def _break(canvas: Canvas, x: float, y: float, reach: float) -> None:
    """A dark line across a bone."""
    slope = canvas.rng.uniform(-0.12, 0.12)
    canvas.paint(canvas.stroke(x - reach, y - slope, x + reach, y + slope, 0.08), 0.14)


# --- ultrasound of the kidney -----------------------------------------------------------------------------------


def _kidney(rng: Rng) -> Phantom:
    """A longitudinal view: the upper pole is on the left of the picture."""
    canvas = Canvas(rng, int(rng.integers(124, 151)), int(rng.integers(100, 115)), 0.0)
    seen, depth = sector(canvas)
    canvas.grey[:] = 0.5 + 0.04 * canvas.cloud(12)
    canvas.paint(canvas.ellipse(0, 0.02, 0.86, 0.46, soft=2), 0.8)
    canvas.paint(canvas.ellipse(0, 0.02, 0.81, 0.41, rough=0.01, soft=2), 0.3)
    canvas.paint(canvas.ellipse(0, 0.02, 0.42, 0.17, rough=0.05, soft=4), 0.82)
    caption, finding = "Normal ultrasound of the kidney.", None
    if not is_normal(rng):
        text, finding = _renal_finding(canvas, depth)
        caption = f"Ultrasound of the kidney showing {text}."
    canvas.grey *= 1 + 0.26 * canvas.cloud(1.7) + 0.1 * canvas.cloud(4)
    canvas.grey *= seen
    return Phantom(canvas.picture(0.012), caption, (ULTRASOUND, KIDNEY), finding)


def _renal_finding(canvas: Canvas, depth: Floats) -> tuple[str, Finding]:
    rng = canvas.rng
    kind = pick(rng, ("cyst", "cyst", "cyst", "stone", "hydronephrosis"))
    if kind == "hydronephrosis":
        canvas.paint(canvas.ellipse(0, 0.02, 0.36, 0.15, soft=2), 0.02)
        for x in (-0.36, 0, 0.36):
            canvas.paint(canvas.ellipse(x, 0.02, 0.12, 0.2, soft=2), 0.02)
        return "hydronephrosis", canvas.finding(kind, 0, 0.02)
    pole = pick(rng, ("upper", "lower"))
    x, y = near(rng, (-0.56 if pole == "upper" else 0.56, 0.02), 0.04)
    if kind == "stone":
        shadow(canvas, x, y, 0.1, depth, 0.05)
        canvas.paint(canvas.ellipse(x, y, 0.115, 0.07, soft=1.4), 1.0)
        return f"a stone with acoustic shadow in the {pole} pole", canvas.finding(kind, x, y)
    size = pick(rng, SIZES)
    shadow(canvas, x, y, RADII[size][0] * 0.9, depth, 0.62)
    blob(canvas, x, y, size, 0.02)
    return f"a {size} anechoic cyst in the {pole} pole", canvas.finding(f"{size} cyst", x, y)


_SCENES: Final[tuple[Callable[[Rng], Phantom], ...]] = (_mammogram, _knee, _kidney)
