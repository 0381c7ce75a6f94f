"""Bytes of a picture file -> an upright 8-bit RGB picture ready for a model, or a PictureError.

Knows no data set, no queue and no model, holds no state, and may be called from any thread.
Codes: `empty`, `not_an_image`, `zero_size`, `too_large`, `extreme_ratio`, `truncated`, `corrupt`.
"""

import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from rococap.errors import PictureError

# Checked on the header, before anything is decoded. Below Pillow's own limit, so that ours speaks first.
MAX_PIXELS = 8192 * 8192

# Longest to shortest side. Qwen2-VL's resizing raises beyond it, and takes the whole batch with it.
MAX_RATIO = 200

WINDOW_PERCENTILES = (0.5, 99.5)

# Pillow would try every plugin it has, and the one for EPS starts Ghostscript on the bytes it is given.
FORMATS = ("PNG", "JPEG", "JPEG2000", "TIFF", "GIF", "BMP", "WEBP", "PPM")

# MPO is what Pillow calls a JPEG that holds several pictures.
_ENDINGS = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2", "tiff": "tif"}

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Once, at import: warnings.catch_warnings around each picture is not thread-safe. MAX_PIXELS refuses these.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_picture(data: bytes) -> Image.Image:
    """The first frame, upright, RGB, without metadata."""
    if not data:
        raise PictureError("empty", "The picture has zero bytes: replace it at its source, then retry.")
    with _identify(data) as picture:
        _check_size(picture.size)
        with _blaming_the_file():
            picture.load()
        upright = _turn(_rgb(picture), _orientation(picture))
    # What is left here would turn the picture a second time in anyone's exif_transpose.
    upright.info.clear()
    return upright


def suffix_of(data: bytes) -> str:
    """The usual ending of the file's name, by what its bytes are: `.png`, `.jpg` … Decodes nothing."""
    with _identify(data) as picture:
        kind = str(picture.format).lower()
    return "." + _ENDINGS.get(kind, kind)


def _identify(data: bytes) -> Image.Image:
    try:
        with _blaming_the_file():
            return Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        if data.startswith(PNG_SIGNATURE) and b"\0\0\0\0" in (data[16:20], data[20:24]):
            raise _zero_size() from error
        raise PictureError(
            "not_an_image",
            f"Not a picture, it begins with {data[:12]!r}: replace it at its source, then retry.",
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large("The picture is") from error


@contextmanager
def _blaming_the_file() -> Iterator[None]:
    try:
        yield
    except (
        MemoryError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ):
        raise
    # Pillow raises whatever broken bytes lead it to: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        cut = isinstance(error, EOFError | struct.error) or "truncated" in str(error).lower()
        raise PictureError(
            "truncated" if cut else "corrupt",
            f"The picture cannot be decoded ({error}): replace it at its source, then retry.",
        ) from error


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise _zero_size()
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width}x{height} pixels are")
    if max(size) > MAX_RATIO * min(size):
        raise PictureError(
            "extreme_ratio",
            f"{width}x{height} pixels are over the limit of {MAX_RATIO}:1: crop or pad it, then retry.",
        )


def _too_large(subject: str) -> PictureError:
    return PictureError("too_large", f"{subject} over the limit of {MAX_PIXELS:,} pixels: scale it down, then retry.")


def _zero_size() -> PictureError:
    return PictureError("zero_size", "The picture is 0 pixels wide or high: replace it at its source, then retry.")


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return _window(np.asarray(picture, dtype=np.float32)).convert("RGB")
    if picture.has_transparency_data:
        return _flatten(picture.convert("RGBA"))
    return picture.convert("RGB")


def _window(grey: NDArray[np.float32]) -> Image.Image:
    """Grey values of any depth -> 8 bit; black and white are percentiles of the picture itself."""
    finite = np.isfinite(grey)
    black, white = _levels(grey[finite])
    shades = (np.where(finite, grey, black) - black) * (255 / (white - black))
    return Image.fromarray(np.rint(shades.clip(0, 255)).astype(np.uint8))


def _levels(values: NDArray[np.float32]) -> tuple[float, float]:
    """Two different levels, always: a constant picture is black."""
    if not values.size:
        return 0.0, math.inf
    black, white = (float(level) for level in np.percentile(values, WINDOW_PERCENTILES))
    if black == white:
        # Nearly all of it has one value: what differs is the picture, so the full range counts.
        black, white = float(values.min()), float(values.max())
    return (black, white) if white > black else (black, math.inf)


def _flatten(picture: Image.Image) -> Image.Image:
    """On black, unless only the alpha holds a picture: then that is it."""
    *colours, alpha = picture.split()
    if all(_constant(colour) for colour in colours) and not _constant(alpha):
        return Image.merge("RGB", (alpha, alpha, alpha))
    black = Image.new("RGBA", picture.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, picture).convert("RGB")


def _constant(band: Image.Image) -> bool:
    lowest, highest = band.getextrema()
    return lowest == highest


def _orientation(picture: Image.Image) -> object:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        # Broken metadata says nothing about the pixels, and those are whole.
        return None


def _turn(picture: Image.Image, orientation: object) -> Image.Image:
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def reduced(picture: Image.Image, most: int) -> Image.Image:
    """The picture in at most so many pixels, in its own shape as far as whole pixels allow."""
    width, height = picture.size
    if width * height <= most:
        return picture
    ratio = math.sqrt(most / (width * height))
    width, height = (max(1, math.floor(side * ratio)) for side in picture.size)
    width = max(1, min(width, most // height))  # a side that would be less than a pixel is one
    return picture.resize((width, min(height, most // width)), Image.Resampling.LANCZOS)
