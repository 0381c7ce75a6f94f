"""Draws a contact sheet: one image that shows pictures with their original and generated captions."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image, ImageDraw, ImageFont

TITLE: Final = "Drawings made by a program, captioned by a small demonstration model. Not for clinical use."

_COLUMNS: Final = 4
_CELL: Final = 300
_GAP: Final = 28
_MARGIN: Final = 36
_PADDING: Final = 16
_LEADING: Final = 1.35

_PAPER: Final = "#f4f5f7"
_CARD: Final = "#ffffff"
_FRAME: Final = "#dfe2e7"
_MOUNT: Final = "#0b0d10"
_INK: Final = "#1c2126"
_FAINT: Final = "#667080"
_EQUAL: Final = "#19734a"
_DIFFERENT: Final = "#b3261e"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True, slots=True)
class _Line:
    text: str
    font: Font
    colour: str
    top: int


def contact_sheet(rows: Sequence[tuple[Image.Image, str, str]], path: Path) -> None:
    """Writes `path` as PNG. A row is (picture, original caption, generated caption)."""
    sheet = _draw(rows)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        sheet.save(partial, "PNG")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _draw(rows: Sequence[tuple[Image.Image, str, str]]) -> Image.Image:
    columns = max(1, min(_COLUMNS, len(rows)))
    width = max(2 * _MARGIN + columns * _CELL + (columns - 1) * _GAP, 2 * _MARGIN + _CELL * 2 + _GAP)
    heading, top = _lines(_heading(rows), width - 2 * _MARGIN, _MARGIN)
    captions = [_lines(_captions(original, generated), _CELL - 2 * _PADDING) for _, original, generated in rows]
    bands = [range(start, min(start + columns, len(rows))) for start in range(0, len(rows), columns)]
    heights = [_CELL + 2 * _PADDING + max(captions[i][1] for i in band) for band in bands]
    height = top + _GAP + sum(heights) + _GAP * max(0, len(bands) - 1) + _MARGIN

    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, heading, _MARGIN, 0)
    top += _GAP
    for band, card in zip(bands, heights, strict=True):
        for column, i in enumerate(band):
            left = _MARGIN + column * (_CELL + _GAP)
            pen.rounded_rectangle((left - 1, top - 1, left + _CELL, top + card), 9, _CARD, _FRAME)
            _mount(sheet, rows[i][0], left, top)
            _write(pen, captions[i][0], left + _PADDING, top + _CELL + _PADDING)
        top += card + _GAP
    return sheet


def _mount(sheet: Image.Image, picture: Image.Image, left: int, top: int) -> None:
    """Pastes the picture into the middle of a dark square, at twice its size or scaled down to fit."""
    scale = min(2.0, _CELL / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    enlarged = picture.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    ImageDraw.Draw(sheet).rounded_rectangle((left, top, left + _CELL - 1, top + _CELL - 1), 8, _MOUNT)
    sheet.paste(enlarged, (left + (_CELL - size[0]) // 2, top + (_CELL - size[1]) // 2))


def _heading(rows: Sequence[tuple[Image.Image, str, str]]) -> list[tuple[str, float, str]]:
    equal = sum(original == generated for _, original, generated in rows)
    count = f"{equal} of {len(rows)} generated captions equal the original."
    return [(TITLE, 21, _INK), (count, 15, _FAINT)]


def _captions(original: str, generated: str) -> list[tuple[str, float, str]]:
    verdict, colour = ("equal", _EQUAL) if original == generated else ("different", _DIFFERENT)
    return [
        ("Original", 12, _FAINT),
        (original, 15, _INK),
        ("", 8, _INK),
        (f"Generated: {verdict}", 12, colour),
        (generated, 15, colour),
    ]


def _lines(paragraphs: Sequence[tuple[str, float, str]], width: int, top: int = 0) -> tuple[list[_Line], int]:
    """The wrapped lines, and the vertical position below them in pixels."""
    lines = []
    for text, size, colour in paragraphs:
        font = ImageFont.load_default(size=size)
        for line in _wrap(text, font, width):
            lines.append(_Line(line, font, colour, top))
            top += round(size * _LEADING)
    return lines, top


def _wrap(text: str, font: Font, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _write(pen: ImageDraw.ImageDraw, lines: Sequence[_Line], left: int, top: int) -> None:
    for line in lines:
        pen.text((left, top + line.top), line.text, line.colour, line.font)
