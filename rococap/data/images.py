"""Decodes the bytes of a picture file to an upright 8-bit RGB picture ready for a model, or raises a PictureError.

Every grey value and colour is kept visible: deep samples pass through a window (`rococap.data.window`), transparency is
laid on a background that hides nothing, and MinIsWhite is inverted. Knows no data set, no queue and no model, holds no
state, and may be called from any thread. Error codes: `empty`, `not_an_image`, `unsupported`, `no_frame`, `zero_size`,
`too_large`, `extreme_ratio`, `truncated`, `corrupt`.
"""

import logging
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from rococap.data import dicom, formats, repair
from rococap.data.window import colours, scaled, windowed
from rococap.errors import PictureError

# Checked against the header, before anything is decoded. Below Pillow's own limit, so that our message is shown.
MAX_PIXELS = 8192 * 8192

# Longest side to shortest side. Beyond it, Qwen2-VL's resizing raises an error that fails the whole batch.
MAX_RATIO = 200

_USUAL = ("PNG", "JPEG", "TIFF", "JPEG2000", "WEBP", "GIF", "BMP", "PPM")
# The EPS plugin runs Ghostscript on the bytes; the others only identify formats that Pillow cannot decode.
_NOT_OPENED = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"})

# MPO is Pillow's name for a JPEG that holds several pictures.
_SUFFIXES = {"jpeg": "jpg", "mpo": "jpg", "jpeg2000": "jp2", "tiff": "tif"}

_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB = 0, 1, 2
_ASSOCIATED, _UNASSOCIATED = 1, 2
_ALPHAS = (_ASSOCIATED, _UNASSOCIATED)
_MAX_SAMPLES = 8
_COMPRESSIONS = (1, 5, 7, 8, 32773, 32946, 34925, 50000)
"""Values of the tag: none, LZW, JPEG, deflate (two numbers), PackBits, LZMA, Zstandard. Other schemes state sizes of
their own.
"""

_DEEP_PNG = (b"\x10\x02", b"\x10\x04", b"\x10\x06")
"""Bit depth and colour type of PNGs whose samples Pillow cuts to 8 bits: RGB, grey with alpha, RGBA."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

VANISHING = 8
"""A pixel within this many levels of its background is practically invisible."""
DARK, WHITE = 48, 250
"""Levels up to which a single colour counts as dark, and from which hidden pixels count as white."""
SPARSE = 0.4
"""Strokes on a page cover less than this share of it."""

# Set once, at import: warnings.catch_warnings around each picture is not thread-safe. MAX_PIXELS covers these cases.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# The exception already says what tifffile logs about a damaged file.
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)

Image.init()
FORMATS = (*_USUAL, *sorted(set(Image.ID) - _NOT_OPENED - set(_USUAL)))


def open_picture(data: bytes, frame: int = 1) -> Image.Image:
    """Returns one frame, counted from 1: upright, RGB, without metadata. Raises PictureError."""
    if not data:
        raise PictureError("empty", "The picture has zero bytes: replace it at its source, then retry.")
    try:
        return _opened(data, frame)
    except PictureError as error:
        picture = _opened_repaired(data, frame, error.code)
        if picture is None:
            raise
        return picture


def is_blank(picture: Image.Image) -> bool:
    """Whether an RGB picture consists of a single colour, so that there is nothing to see."""
    return all(_constant(band) for band in picture.split())


def suffix_of(data: bytes) -> str:
    """The usual file name suffix for the format of the bytes: `.png`, `.jpg` … Decodes no pixels.

    Raises PictureError if the format is not supported.
    """
    if formats.is_dicom(data):
        return ".dcm"
    if data.startswith(_TIFF_STARTS):  # Pillow does not recognise all of these
        return ".tif"
    with _identify(data) as picture:
        kind = str(picture.format).lower()
    return "." + _SUFFIXES.get(kind, kind)


def as_file(data: bytes, frame: int = 1) -> tuple[str, bytes]:
    """Returns (suffix, bytes) for publishing a picture: the file itself, without stray bytes before it.

    DICOM, whose header identifies the patient, and a frame after the first become a PNG of the pixels. Raises
    PictureError if the picture cannot be opened.
    """
    if formats.is_dicom(data) or frame > 1:
        file = BytesIO()
        open_picture(data, frame).save(file, "PNG")
        return ".png", file.getvalue()
    try:
        return suffix_of(data), data
    except PictureError:
        stripped = None if formats.name_of(data) else repair.without_stray_bytes(data)
        if stripped is None:
            raise
        return suffix_of(stripped), stripped


def _opened(data: bytes, frame: int) -> Image.Image:
    if formats.is_dicom(data):  # comes first: its preamble may be that of a TIFF
        return _checked(dicom.open_dicom(data, frame, _check_size))
    if data.startswith(_TIFF_STARTS) and (picture := _open_tiff(data, frame, only_deep=True)) is not None:
        return _without_metadata(picture)
    if repair.is_padded(data):
        raise PictureError("truncated", "The picture ends in zeros: replace it at its source, then retry.")
    with _identify(data) as picture:
        _seek(picture, frame)
        _check_size(picture.size)
        with _blaming_the_file():
            picture.load()
            is_deep_png = frame == 1 and data.startswith(repair.PNG_SIGNATURE) and data[24:26] in _DEEP_PNG
            rgb = _from_samples(_png_samples(data, picture)) if is_deep_png else _rgb(picture)
        upright = _turn(rgb, _orientation(picture))
    return _without_metadata(upright)


def _without_metadata(picture: Image.Image) -> Image.Image:
    # An orientation left here would make a caller's exif_transpose turn the picture a second time.
    picture.info.clear()
    return picture


def _checked(picture: Image.Image) -> Image.Image:
    _check_size(picture.size)
    return picture


def _opened_repaired(data: bytes, frame: int, code: str) -> Image.Image | None:
    """The picture as viewers show it in spite of the damage; None if pixels are missing or no repair applies."""
    if code == "unsupported" and data.startswith(_TIFF_STARTS):
        return _open_tiff(data, frame)
    if code not in ("not_an_image", "truncated", "corrupt"):
        return None
    if data.startswith(repair.PNG_SIGNATURE):
        plain = repair.without_ancillary(data)
        return None if plain == data else _opened(plain, frame)
    if code == "not_an_image":
        stripped = None if formats.name_of(data) else repair.without_stray_bytes(data)
        return None if stripped is None else open_picture(stripped, frame)
    return _if_all_equal([_opened_or_none(ended, frame) for ended in repair.with_end_marker(data)])


def _opened_or_none(data: bytes, frame: int) -> Image.Image | None:
    try:
        return _opened(data, frame)
    except PictureError:
        return None


def _if_all_equal(pictures: list[Image.Image | None]) -> Image.Image | None:
    first = next(iter(pictures), None)
    return first if all(picture is not None and picture == first for picture in pictures) else None


def _identify(data: bytes) -> Image.Image:
    try:
        with _blaming_the_file():
            return Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        if data.startswith(repair.PNG_SIGNATURE) and b"\0\0\0\0" in (data[16:20], data[20:24]):
            raise _zero_size() from error
        raise _not_opened(data) from error


def _not_opened(data: bytes) -> PictureError:
    if data.startswith(_TIFF_STARTS):
        return PictureError("unsupported", f"This is {_describe_tiff(data)}, {formats.CONVERT}, then retry.")
    name = formats.name_of(data)
    if name is None:
        message = f"This is not a picture (it begins with {data[:12]!r}): replace it at its source, then retry."
        return PictureError("not_an_image", message)
    if name in formats.PICTURES:
        return PictureError("unsupported", f"This is {name}, {formats.CONVERT}, then retry.")
    return PictureError("not_an_image", f"This is not a picture but {name}: {formats.next_step(name)}, then retry.")


@contextmanager
def _blaming_the_file() -> Iterator[None]:
    """Turns whatever a decoder raises into a PictureError: only the file can be at fault."""
    try:
        yield
    except (MemoryError, UnidentifiedImageError, PictureError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large("The picture is") from error
    # Broken bytes can make Pillow raise almost anything: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        is_truncated = isinstance(error, EOFError | struct.error) or "truncated" in str(error).lower()
        raise PictureError(
            "truncated" if is_truncated else "corrupt",
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
            f"The aspect ratio of {width}x{height} pixels is over the limit of {MAX_RATIO}:1: crop or pad the picture, "
            "then retry.",
        )


def _too_large(subject: str) -> PictureError:
    return PictureError("too_large", f"{subject} over the limit of {MAX_PIXELS:,} pixels: scale it down, then retry.")


def _zero_size() -> PictureError:
    return PictureError("zero_size", "The picture is 0 pixels wide or high: replace it at its source, then retry.")


# ---- colours and greys


def _seek(picture: Image.Image, frame: int) -> None:
    if frame == 1:
        return
    with _blaming_the_file():
        try:
            picture.seek(frame - 1)  # before counting the frames, for which some formats read all of them
        except EOFError:
            raise dicom.no_frame(getattr(picture, "n_frames", 1), frame) from None


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        return Image.fromarray(windowed(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data:
        return _flatten(picture.convert("RGBA"))
    return picture.convert("RGB")


def _png_samples(data: bytes, picture: Image.Image) -> NDArray[Any]:
    """The samples at full depth, with an alpha channel if the file names a transparent colour."""
    import imagecodecs

    samples = np.asarray(imagecodecs.png_decode(data))
    transparent = picture.info.get("transparency")
    if samples.shape[-1] != 3 or not isinstance(transparent, tuple):
        return samples
    is_opaque = (samples != np.array(transparent, dtype=samples.dtype)).any(-1)
    return np.dstack([samples, np.where(is_opaque, 65535, 0).astype(samples.dtype)])


def _from_samples(samples: NDArray[Any], *, min_is_white: bool = False) -> Image.Image:
    """Makes a picture of deep samples, of shape (height, width) or (height, width, channels).

    There may be up to 4 channels; if their number is even, the last one is alpha.
    """
    height, width = samples.shape[:2]
    samples = samples.reshape(height, width, -1)
    n_colours = 3 if samples.shape[2] >= 3 else 1
    colour, alpha = samples[..., :n_colours], samples[..., n_colours:]
    is_visible = (alpha != 0).all(-1) if alpha.any() else np.ones((height, width), dtype=bool)
    if n_colours == 3:
        shades = colour if colour.dtype == np.uint8 else colours(colour, is_visible)
    else:
        shades = np.repeat(_grey(colour[..., 0], is_visible, min_is_white)[..., None], 3, axis=2)
    if not alpha.size:
        return Image.fromarray(shades)
    return _flatten(Image.fromarray(np.dstack([shades, _alpha_of_8_bits(alpha[..., 0])])))


def _grey(values: NDArray[Any], is_visible: NDArray[np.bool_], min_is_white: bool) -> NDArray[np.uint8]:
    shades = values if values.dtype == np.uint8 else windowed(values, is_visible)
    if min_is_white:
        shades = np.where(np.isfinite(values), 255 - shades, np.uint8(0))
    return shades


def _alpha_of_8_bits(alpha: NDArray[Any]) -> NDArray[np.uint8]:
    if alpha.dtype == np.uint8:
        return alpha
    if alpha.dtype.kind == "f":
        return scaled(np.nan_to_num(alpha), 0.0, 1.0)
    shifted: NDArray[np.uint8] = (alpha >> (8 * alpha.dtype.itemsize - 8)).astype(np.uint8)
    return shifted


def _flatten(picture: Image.Image) -> Image.Image:
    """Lays an RGBA picture on black, or on white where black would hide what it shows.

    Alpha counts relative to its highest value. If it is constant, also if it is 0 everywhere, it carries no information
    and the colours are the picture. If only alpha varies, alpha is the picture.
    """
    *bands, alpha = picture.split()
    if _constant(alpha):
        return Image.merge("RGB", bands)
    if all(_constant(band) for band in bands):
        return Image.merge("RGB", (alpha, alpha, alpha))
    strongest = int(np.asarray(alpha).max())
    if strongest < 255:
        picture.putalpha(alpha.point(lambda value: value * 255 // strongest))
    background = Image.new("RGBA", picture.size, (255,) * 4 if _needs_white(picture) else (0, 0, 0, 255))
    return Image.alpha_composite(background, picture).convert("RGB")


def _needs_white(picture: Image.Image) -> bool:
    """Whether black would hide more of an RGBA picture than white, and too much of it.

    Too much is nearly all of what is visible; or a quarter of it if the picture looks like strokes on a page, because
    the transparent pixels are white underneath or little is visible at all.
    """
    luma, alpha = np.asarray(picture.convert("RGB").convert("L")), np.asarray(picture)[..., 3].astype(np.float64)
    visible, hidden = luma[alpha > 0], luma[alpha == 0]
    vanishing = VANISHING if np.ptp(visible) > VANISHING else DARK  # a single dark colour does not stand out on black
    on_black = float(alpha[luma <= vanishing].sum() / alpha.sum())
    on_white = float(alpha[luma >= 255 - VANISHING].sum() / alpha.sum())
    is_page = hidden.size > 0 and (float(np.median(hidden)) >= WHITE or visible.size < SPARSE * luma.size)
    return on_black > on_white and on_black >= (0.25 if is_page else 0.95)


def _constant(band: Image.Image) -> bool:
    return len(set(band.getextrema())) == 1


# ---- TIFF


def _open_tiff(data: bytes, frame: int, *, only_deep: bool = False) -> Image.Image | None:
    """Opens a grey or RGB TIFF of any depth, following TIFF 6.0; None for other kinds.

    With `only_deep`, opens only those whose samples Pillow would truncate, wrap, invert or refuse.
    """
    import tifffile

    try:
        with _blaming_the_file(), tifffile.TiffFile(BytesIO(data)) as file:
            if frame > 1 and frame > (n_pages := len(file.pages)):
                raise dicom.no_frame(n_pages, frame)
            page: Any = file.pages[frame - 1]
            if (only_deep and not _is_deep(page)) or not _is_grey_or_rgb(page):
                return None
            _check_size((page.imagewidth, page.imagelength))
            _check_segments(page, len(data))
            samples = page.asarray()
            return _turn(_of_tiff(page, samples), _tag(page, "Orientation"))
    except PictureError as error:
        if error.code == "corrupt":
            return None  # Pillow may be able to open it, or to say what is wrong
        raise


def _is_deep(page: Any) -> bool:
    """Whether the samples are anything but unsigned integers of up to 8 bits."""
    bits, kind = page.bitspersample, page.sampleformat
    return bool((bits if isinstance(bits, int) else max(bits)) > 8 or kind not in (1, None))


def _is_grey_or_rgb(page: Any) -> bool:
    bits = page.bitspersample if isinstance(page.bitspersample, int) else max(page.bitspersample)
    return (
        page.photometric in (_MIN_IS_WHITE, _MIN_IS_BLACK, _RGB)
        and page.dtype is not None
        and page.dtype.kind in "iuf"
        and (8 <= bits <= 16 or bits in (32, 64))  # tifffile reads noise from 24-bit integers
        and page.imagedepth == 1
        and page.samplesperpixel <= _MAX_SAMPLES
        and page.compression in _COMPRESSIONS
    )


def _check_segments(page: Any, size: int) -> None:
    """Raises PictureError for tiles that are too large, and for missing data, which would be read as zeros."""
    if math.prod(page.chunks) > MAX_PIXELS * _MAX_SAMPLES:
        raise _too_large("A tile of the picture is")
    ends = [start + length for start, length in zip(page.dataoffsets, page.databytecounts, strict=False)]
    if not ends or max(ends) > size or 0 in page.databytecounts:
        raise PictureError("truncated", "The picture's data ends too early: replace it at its source, then retry.")


def _of_tiff(page: Any, samples: NDArray[Any]) -> Image.Image:
    n_colours = 3 if page.photometric == _RGB else 1
    extra = [int(kind) for kind in page.extrasamples]
    has_alpha = bool(extra and extra[0] in _ALPHAS) or (n_colours == 3 and not extra and page.samplesperpixel == 4)
    if page.planarconfig == 2 and samples.ndim == 3:
        samples = np.moveaxis(samples, 0, -1)
    samples = samples.reshape(page.imagelength, page.imagewidth, -1)[..., : n_colours + has_alpha]
    if has_alpha and extra[:1] == [_ASSOCIATED]:
        samples = _unpremultiplied(samples)
    # The tag has no default; in practice, files without it use the lowest value for black.
    return _from_samples(samples, min_is_white=_tag(page, "PhotometricInterpretation") == _MIN_IS_WHITE)


def _unpremultiplied(samples: NDArray[Any]) -> NDArray[Any]:
    """Restores the colours that associated alpha has multiplied."""
    if samples.dtype.kind not in "uf":
        return samples
    opaque = 1.0 if samples.dtype.kind == "f" else float(np.iinfo(samples.dtype).max)
    colour, alpha = samples[..., :-1].astype(np.float64), samples[..., -1:].astype(np.float64)
    restored = np.divide(colour * opaque, alpha, out=colour.copy(), where=alpha > 0).clip(0, opaque)
    return np.concatenate([restored.astype(samples.dtype), samples[..., -1:]], axis=-1)


def _describe_tiff(data: bytes) -> str:
    import tifffile

    try:
        with _blaming_the_file(), tifffile.TiffFile(BytesIO(data)) as file:
            page: Any = file.pages[0]
            kind = str(getattr(page.photometric, "name", page.photometric)).replace("_", " ").lower()
            return f"a TIFF of {page.samplesperpixel} x {page.dtype or 'unknown'} samples, {kind}"
    except PictureError:
        return "a damaged TIFF"


def _tag(page: Any, name: str) -> object:
    tag = page.tags.get(name)
    return None if tag is None else tag.value


# ---- orientation and size


def _orientation(picture: Image.Image) -> object:
    try:
        return picture.getexif().get(ExifTags.Base.Orientation)
    except Exception:
        # Broken metadata says nothing about the pixels, which are intact.
        return None


def _turn(picture: Image.Image, orientation: object) -> Image.Image:
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def reduced(picture: Image.Image, max_pixels: int) -> Image.Image:
    """Scales a picture down to at most `max_pixels` pixels, keeping its aspect ratio as far as whole pixels allow."""
    width, height = picture.size
    if width * height <= max_pixels:
        return picture
    ratio = math.sqrt(max_pixels / (width * height))
    width, height = (max(1, math.floor(side * ratio)) for side in picture.size)
    width = max(1, min(width, max_pixels // height))  # neither side may be less than one pixel
    return picture.resize((width, min(height, max_pixels // width)), Image.Resampling.LANCZOS)
