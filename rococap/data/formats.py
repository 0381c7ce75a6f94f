"""Recognises a file by its first bytes: DICOM and, for messages, formats that are not supported. Decodes nothing."""

import re

_JPEG = "a 12-bit, lossless or damaged JPEG"
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"%PDF", "a PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"\x1f\x8b", "a gzip archive, possibly NIfTI"),
    (b"PK\x03\x04", "a zip archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive"),
    (b"NRRD", "NRRD"),
    (b"ObjectType =", "MetaImage"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"MATLAB", "a MATLAB file"),
    (b"PAR1", "Parquet"),
    (b"SQLite format 3", "an SQLite database"),
    *((bytes([0x80, protocol]), "a Python pickle") for protocol in range(2, 6)),
    (b"\xff\xd8\xff", _JPEG),
    (b"\xff\x4f\xff\x51", "a damaged JPEG 2000 codestream"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"AT&TFORM", "DjVu"),
    (b"{\\rtf", "RTF"),
    (b"ID3", "an MP3 file"),
    (b"\xd0\xcf\x11\xe0", "an OLE file, possibly from Word or Excel"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"\x1a\x45\xdf\xa3", "a Matroska or WebM video"),
    (b"OggS", "an Ogg file"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"version https://git-lfs", "a Git LFS pointer"),
)
_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"heif": "HEIF", b"mif1": "HEIF", b"msf1": "HEIF", b"hevc": "HEIC"}
_BASE64 = re.compile(rb"(?:data:image/[\w.+-]+;base64,)?(?:iVBORw0KGgo|/9j/|R0lGOD|SUkqA|TU0AK|UklGR)")

_NEXT_STEPS = {
    "a Git LFS pointer": "fetch the picture itself (git lfs pull)",
    "base64 text": "decode it to bytes at its source",
    "HTML": "download the picture itself instead of a web page",
}
PICTURES = frozenset(
    {"HEIC", "HEIF", "JPEG XL", "JPEG XR", "MetaImage", "NIfTI", "NRRD", "OpenEXR", "Radiance HDR", "SVG", "DjVu"}
)
"""Picture formats that are not supported."""
CONVERT = "which is not supported: convert it to PNG at its source"


def name_of(data: bytes) -> str | None:
    """Returns the format's name, with its article if it takes one; None if the format is unknown."""
    if data[344:348] in (b"n+1\0", b"ni1\0") or data[4:8] in (b"n+2\0", b"ni2\0"):
        return "NIfTI"
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[257:262] == b"ustar":
        return "a tar archive"
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "a video")
    if data[:4] == b"RIFF":
        return "a video" if data[8:12] == b"AVI " else "a RIFF file"
    if _BASE64.match(data):
        return "base64 text"
    return _text_format(data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower())


def _text_format(beginning: bytes) -> str | None:
    if beginning.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "HTML"
    if b"<svg" in beginning:
        return "SVG"
    if beginning.startswith(b"<?xml"):
        return "XML"
    return "JSON" if beginning.startswith((b"{", b"[")) else None


def is_dicom(data: bytes) -> bool:
    """Whether these bytes are a DICOM file. Older writers omitted the preamble: then the file begins with group 0002 or
    0008, in either byte order.
    """
    if data[128:132] == b"DICM":
        return True
    group, element = data[:2], data[2:4]
    if group in (b"\x02\x00", b"\x08\x00"):
        return element[1:] == b"\0" and len(data) > 8
    return group in (b"\x00\x02", b"\x00\x08") and element[:1] == b"\0" and len(data) > 8


def next_step(name: str) -> str:
    """What to do about a file in a format that holds no picture."""
    return _NEXT_STEPS.get(name, "replace it with the picture at its source")
