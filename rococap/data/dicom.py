"""Decodes the bytes of a DICOM file to an upright 8-bit RGB picture. Needs the extra `dicom`.

Only attributes that describe pixels are read; no text in the header is kept, logged, or quoted in a message. Pixel
values are interpreted according to PS3.3 of the standard: stored values pass through the modality LUT or rescale slope
(C.11.1), then through the file's first VOI LUT or window (C.11.2) or, without one, through a window of our own
(`rococap.data.window`), which ignores pixel padding (C.7.5.1.1.2). MONOCHROME1 is inverted. Overlays are not drawn, and
no presentation state is applied. Knows no data set and no queue.
"""

import importlib.util
import logging
import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rococap.data.window import colours, scaled, windowed
from rococap.errors import PictureError

_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_OF_FRAMES = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_OF_A_FRAME = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
_TAGS = [
    *_PIXELS,
    *_OF_FRAMES,
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleIntercept", "RescaleSlope", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
    *(f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")),
    *(f"{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
]
_JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
_LOSSLESS_JPEG = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
_PLUGINS = {
    "1.2.840.10008.1.2.4.50": "pillow",
    _JPEG_EXTENDED: "pillow",
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg",
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
    "1.2.840.10008.1.2.5": "pydicom",
}
"""Which of pydicom's decoding plugins to use, by transfer syntax. If it is installed, GDCM kills the process on damaged
data, and the compiled plugin for RLE panics, which no `except Exception` catches.
"""
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_MAX_INFLATED = 1 << 29
"""In bytes: enough for 67 million pixels of 64 bits."""

EXTRA_IS_MISSING = (
    "This is a DICOM file, and opening it needs the extra `dicom`: pip install 'rococap[dicom]', or convert it to PNG "
    "at its source, then retry."
)

# Set once, at import, because it applies to the whole process. pydicom's warnings may quote the header.
warnings.filterwarnings("ignore", module=r"pydicom\b")


def open_dicom(data: bytes, frame: int, check_size: Callable[[tuple[int, int]], None]) -> Image.Image:
    """Returns one frame, counted from 1. Calls `check_size` with (width, height) before it decodes any pixel.

    Raises PictureError: `unsupported`, `not_an_image`, `no_frame`, `too_large`, `truncated`, `corrupt`.
    """
    if importlib.util.find_spec("pydicom") is None:
        raise PictureError("unsupported", EXTRA_IS_MISSING)
    _check_deflated(data)
    header = _header(data)
    try:
        return _open(header, frame, check_size)
    except (PictureError, MemoryError):
        raise
    # A damaged file can make pydicom raise any exception, whose text may quote the header.
    except Exception:
        raise PictureError(
            "corrupt",
            f"The pixels of this DICOM file ({_coding(header)}) cannot be decoded: convert it to PNG at its source, or "
            "replace it, then retry.",
        ) from None


def _check_deflated(data: bytes) -> None:
    """Raises PictureError for a file that inflates to too many bytes: pydicom itself has no limit."""
    if data[128:132] == b"DICM" and _DEFLATED in data[:1024]:
        meta = int.from_bytes(data[140:144], "little")
        inflating = zlib.decompressobj(-zlib.MAX_WBITS)
        with suppress(zlib.error):  # reported later, when the file is read
            inflating.decompress(data[144 + meta :], _MAX_INFLATED)
        if inflating.unconsumed_tail:
            raise PictureError(
                "too_large",
                f"The file inflates to more than {_MAX_INFLATED:,} bytes: replace it at its source, then retry.",
            )


def _open(header: Any, frame: int, check_size: Callable[[tuple[int, int]], None]) -> Image.Image:
    n_frames = header.NumberOfFrames = _n_frames(header)
    if frame > n_frames:
        raise no_frame(n_frames, frame)
    check_size((int(header.get("Columns") or 0), int(header.get("Rows") or 0)))
    _apply_functional_groups(header, frame)
    return Image.fromarray(_shades(header, _stored_values(header, frame))).convert("RGB")


def no_frame(n_frames: int, frame: int) -> PictureError:
    """Returns the error for a frame, counted from 1, after the last of `n_frames`."""
    return PictureError(
        "no_frame",
        f"The file has {n_frames} frame{'s' if n_frames > 1 else ''}, but frame {frame} was requested: leave this "
        "picture out, or enqueue a run with another --frame, then retry.",
    )


def _header(data: bytes) -> Any:
    from pydicom import config, dcmread
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    config.settings.reading_validation_mode = config.IGNORE
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    try:
        header = dcmread(BytesIO(data), specific_tags=_TAGS, force=True)
        if not any(name in header for name in _PIXELS):
            raise PictureError("not_an_image", "This DICOM file contains no picture: leave it out, then retry.")
        if "TransferSyntaxUID" not in header.file_meta:  # older writers left it out
            is_implicit, is_little = header.original_encoding
            explicit = ExplicitVRLittleEndian if is_little else ExplicitVRBigEndian
            header.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if is_implicit else explicit
    except (PictureError, MemoryError):
        raise
    except Exception:  # as above
        raise PictureError(
            "corrupt", "This DICOM file's header cannot be read: replace it at its source, then retry."
        ) from None
    return header


def _apply_functional_groups(header: Any, frame: int) -> None:
    """Copies rescaling and window into the header: enhanced objects keep them per frame or shared (PS3.3, C.7.6.16)."""
    shared = (header.get(_OF_FRAMES[0]) or [])[:1]
    per_frame = (header.get(_OF_FRAMES[1]) or [])[frame - 1 : frame]
    for group in (*shared, *per_frame):
        for name in _OF_A_FRAME:
            for item in (group.get(name) or [])[:1]:
                header.update(item)


def _stored_values(header: Any, frame: int) -> NDArray[Any]:
    """Returns the stored values in the shape (rows, columns), or (rows, columns, 3) with colours as RGB."""
    from pydicom.pixels.utils import pixel_array

    syntax = str(header.file_meta.TransferSyntaxUID)
    if syntax in _LOSSLESS_JPEG or (syntax == _JPEG_EXTENDED and int(header.BitsStored) > 8):
        return _jpeg(header, frame)
    surplus = _surplus_bits(header)
    if surplus:
        header.BitsStored = int(header.BitsStored) + surplus
    try:
        values = np.asarray(pixel_array(header, index=frame - 1, decoding_plugin=_PLUGINS.get(syntax, "")))
    except ValueError as error:
        if "less than expected" not in str(error):
            raise
        problem = f"The pixels of this DICOM file ({_coding(header)}) end too early"
        raise PictureError("truncated", f"{problem}: replace it at its source, then retry.") from None
    if not surplus:
        return values
    header.BitsStored = int(header.BitsStored) - surplus
    return np.asarray(values >> surplus)


def _surplus_bits(header: Any) -> int:
    """Counts the unused bits below the stored ones: older writers put 12 bits at the upper end of 16."""
    allocated, stored, highest = (int(header.get(name) or 0) for name in ("BitsAllocated", "BitsStored", "HighBit"))
    is_native = not header.file_meta.TransferSyntaxUID.is_encapsulated
    return highest + 1 - stored if is_native and stored <= highest < allocated else 0


def _jpeg(header: Any, frame: int) -> NDArray[Any]:
    """Decodes 12-bit JPEG and lossless JPEG, neither of which Pillow reads."""
    import imagecodecs
    from pydicom.encaps import get_frame
    from pydicom.pixels.processing import convert_color_space

    coded = get_frame(header.PixelData, frame - 1, number_of_frames=_n_frames(header))
    decoded = np.asarray(imagecodecs.jpeg8_decode(coded))
    if str(header.get("PhotometricInterpretation", "")).startswith("YBR_FULL"):
        return np.asarray(convert_color_space(decoded, "YBR_FULL", "RGB"))
    is_signed = bool(header.get("PixelRepresentation"))
    return (
        decoded.view(f"i{decoded.itemsize}")
        if is_signed and int(header.BitsStored) == 8 * decoded.itemsize
        else decoded
    )


def _n_frames(header: Any) -> int:
    return max(1, int(header.get("NumberOfFrames") or 1))


def _coding(header: Any) -> str:
    """The name that the standard gives to the transfer syntax."""
    from pydicom.uid import UID

    syntax = UID(str(header.file_meta.get("TransferSyntaxUID", "")))
    return syntax.name if syntax.is_transfer_syntax else "unknown transfer syntax"


# ---- from stored values to shades


def _shades(header: Any, stored: NDArray[Any]) -> NDArray[np.uint8]:
    from pydicom.pixels.processing import apply_color_lut

    kind = str(header.get("PhotometricInterpretation", ""))
    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, header)[..., :3]
    if stored.ndim == 3:
        everywhere = np.ones(stored.shape[:2], dtype=bool)
        return stored if stored.dtype == np.uint8 else colours(stored, everywhere)
    shades = _grey(header, stored)
    if kind == "MONOCHROME1":
        shades = 255 - shades
    return np.where(_is_padding(header, stored), np.uint8(0), shades)


def _grey(header: Any, stored: NDArray[Any]) -> NDArray[np.uint8]:
    from pydicom.pixels.processing import apply_modality_lut

    if _number_of(header, "RescaleSlope") == 0:
        header.RescaleSlope = 1  # a slope of 0 would make all pixels equal
    values = apply_modality_lut(stored, header)
    shades = _through_voi(header, values)
    if shades is not None and shades.min() < shades.max():
        return shades
    bits = int(header.get("BitsStored") or 0)
    if stored.dtype == np.uint8 and 0 < bits <= 8 and stored.min() < stored.max():
        return scaled(stored.astype(np.float64), 0.0, 2.0**bits - 1)  # without a window, 8 bits are shown unchanged
    return windowed(values, ~_is_padding(header, stored))


def _through_voi(header: Any, values: NDArray[Any]) -> NDArray[np.uint8] | None:
    """Applies the first VOI LUT, else the first window; None if the file has neither, or none that is usable."""
    from pydicom.pixels.processing import apply_windowing

    if (shades := _through_voi_table(header, values)) is not None:
        return shades
    if _number_of(header, "WindowWidth") is None or _number_of(header, "WindowCenter") is None:
        return None
    try:
        # The window's black and white are its outputs for values far outside it.
        ends = apply_windowing(np.array([-1e12, 1e12]), header, index=0)
        levels = apply_windowing(values.astype(np.float64), header, index=0)
    except (ValueError, AttributeError, TypeError):  # for example, a width of 0
        return None
    return scaled(levels.astype(np.float64), float(ends[0]), float(ends[1]))


def _through_voi_table(header: Any, values: NDArray[Any]) -> NDArray[np.uint8] | None:
    """Applies the first VOI LUT; None if the file has none, or one with fewer entries than its descriptor states.

    Entries may be bytes or 16-bit words, whatever bit depth the descriptor gives; the brightest entry is white.
    """
    for item in (header.get("VOILUTSequence") or [])[:1]:
        n, first, _ = (int(number) for number in item.LUTDescriptor)
        n = n or 1 << 16  # 0 stands for 65,536 entries: PS3.3, C.11.2.1.1
        data = item.LUTData
        if isinstance(data, bytes):
            table = np.frombuffer(data, np.dtype(np.uint8 if len(data) < 2 * n else "<u2"))[:n]
        else:
            table = np.array(data)[:n]
        if len(table) == n and table.max() > table.min():
            indexes = (values.astype(np.int64) - first).clip(0, n - 1)
            return scaled(table[indexes].astype(np.float64), float(table.min()), float(table.max()))
    return None


def _number_of(header: Any, name: str) -> float | None:
    """The first value of an attribute; None if it is absent or not a number."""
    value = header.get(name)
    try:
        return float(value if isinstance(value, int | float | str) else value[0])
    except (TypeError, ValueError, IndexError):
        return None


def _is_padding(header: Any, stored: NDArray[Any]) -> NDArray[np.bool_]:
    value, limit = _number_of(header, "PixelPaddingValue"), _number_of(header, "PixelPaddingRangeLimit")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    ends = sorted((value, value if limit is None else limit))
    return np.asarray((stored >= ends[0]) & (stored <= ends[1]))
