"""Repairs picture files that are damaged only in form: viewers show them, but Pillow refuses to open them.

Nothing is guessed: pixels that are not in the file are never made up. Decodes nothing.
"""

import re
import struct
import zlib
from collections.abc import Iterator

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_STRAY, MAX_STRAY_BINARY = 1024, 16
"""The most bytes of text, and of other data, that may precede the start of a file."""
MAX_TEXT = 1 << 20
"""In bytes, of one text chunk once unpacked: Pillow's own limit."""
MAX_TOTAL_TEXT = 64 * MAX_TEXT
"""In bytes, of all text chunks together."""

_AFFECTS_DISPLAY = frozenset({b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"})
"""Ancillary chunks of PNG that affect what is shown: transparency, orientation, and the frames of an animation."""
_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
"""Older writers, and XMP, store the orientation as text."""

_PADDINGS = (b"", b"\x00" * 64, b"\x55" * 64, b"\xaa" * 64, b"\xf0\xcc" * 32)
"""Bytes appended to the coded data of a JPEG: a decoder that still lacks pixels reads different ones from each."""


def without_stray_bytes(data: bytes) -> bytes | None:
    """Returns a file without the stray bytes before it.

    None if no JPEG or PNG starts shortly after the first byte, or if the bytes before it may belong to another picture.
    """
    starts = [data.find(start, 1, MAX_STRAY + len(start)) for start in (JPEG_START + b"\xff", PNG_SIGNATURE)]
    found = [start for start in starts if start > 0]
    if not found or not _is_stray(data[: min(found)]):
        return None
    return data[min(found) :]


def _is_stray(before: bytes) -> bool:
    """Whether these are text, such as HTTP headers, or a few bytes, and not part of a JPEG that lost its own start."""
    is_text = all(byte in b"\t\r\n" or 0x20 <= byte < 0x7F for byte in before.removeprefix(b"\xef\xbb\xbf"))
    return is_text or (len(before) <= MAX_STRAY_BINARY and not re.search(rb"\xff[\xc0-\xfe]|Exif|JFIF", before))


# ---- PNG


def without_ancillary(data: bytes) -> bytes:
    """Returns a PNG with only the chunks that affect what is shown, and with text of bounded size.

    Like libpng, drops ancillary chunks whose checksum is wrong. Critical chunks are kept as they are.
    """
    kept, budget = [PNG_SIGNATURE], MAX_TOTAL_TEXT
    for kind, body, chunk in _chunks(data):
        if kind in _TEXT:
            size = _text_size(kind, body)
            if size > min(budget, MAX_TEXT) or not _is_sound(kind, body, chunk):
                continue
            budget -= size
        elif _is_ancillary(kind) and not (kind in _AFFECTS_DISPLAY and _is_sound(kind, body, chunk)):
            continue
        kept.append(chunk)
    return b"".join(kept)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yields (type, content, entire chunk) for each chunk; the last one may be truncated."""
    offset = len(PNG_SIGNATURE)
    while offset < len(data):
        length = int.from_bytes(data[offset : offset + 4], "big")
        chunk = data[offset : offset + 12 + length]
        yield chunk[4:8], chunk[8 : 8 + length], chunk
        offset += 12 + length


def _is_ancillary(kind: bytes) -> bool:
    return bool(kind and kind[0] & 0x20)


def _is_sound(kind: bytes, body: bytes, chunk: bytes) -> bool:
    return chunk[-4:] == struct.pack(">I", zlib.crc32(kind + body)) and len(chunk) == 12 + len(body)


def _text_size(kind: bytes, body: bytes) -> int:
    """The size of a text in bytes, once unpacked; unpacking stops as soon as it is too large."""
    _, _, rest = body.partition(b"\0")
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return len(body)
    try:
        return len(zlib.decompressobj().decompress(packed, MAX_TEXT + 1))
    except zlib.error:
        return MAX_TEXT + 1


# ---- JPEG


def is_padded(data: bytes) -> bool:
    """Whether a JPEG ends in zeros instead of its end marker: a decoder would take the zeros for pixels."""
    return data.startswith(JPEG_START) and data.endswith(b"\0") and not data.rstrip(b"\0").endswith(JPEG_END)


def with_end_marker(data: bytes) -> list[bytes]:
    """Returns copies of a JPEG that lacks its end marker, each with different padding and then the marker appended.

    If all copies decode to the same picture, no pixels are missing: a decoder that still lacks some would read them
    from the padding. Empty if the data is not a JPEG, if it has its end marker, or if whole scans or restart intervals
    are missing, which no decoder would notice.
    """
    if not data.startswith(JPEG_START) or JPEG_END in data[-2:]:
        return []
    data = data.rstrip(b"\0").removesuffix(b"\xff")  # trailing zeros would be read as missing pixels
    if not _has_all_scans(data):
        return []
    return [data + padding + JPEG_END for padding in _PADDINGS]


def _has_all_scans(data: bytes) -> bool:
    """Whether a JPEG's scans (ITU-T T.81, B.2) contain every coefficient to its last bit, and as many restart intervals
    as the picture's size requires.
    """
    missing: set[tuple[int, int]] = set()
    intervals = restarts = interval = 0
    for marker, body in _segments(data):
        if 0xC0 <= marker <= 0xC3 and len(body) > 5 and len(body) >= 6 + 3 * body[5]:
            components = [(body[6 + 3 * n], body[7 + 3 * n]) for n in range(body[5])]
            missing = {(id, k) for id, _ in components for k in range(64)}
            intervals = _n_units(body, [factors for _, factors in components])
        elif marker == 0xDD and len(body) == 2:
            interval = int.from_bytes(body, "big")
        elif marker == 0xDA and body and len(body) == 4 + 2 * body[0]:
            first, last, precision = body[-3], body[-2], body[-1] & 15
            ids = {body[1 + 2 * n] for n in range(body[0])}
            if precision == 0:
                missing -= {(id, k) for id in ids for k in range(first, last + 1)}
        elif 0xD0 <= marker <= 0xD7:
            restarts += 1
    return not missing and (not interval or restarts >= -(-intervals // interval) - 1)


def _n_units(frame: bytes, factors: list[int]) -> int:
    """The number of minimum coded units in an interleaved scan, from the body of the frame header."""
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    if len(factors) == 1:
        return -(-width // 8) * -(-height // 8)
    across, down = max((factor >> 4 for factor in factors), default=1), max((f & 15 for f in factors), default=1)
    return -(-width // (8 * max(across, 1))) * -(-height // (8 * max(down, 1)))


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields (marker, content) for each segment up to the end marker; skips the coded data in between."""
    offset = 2
    while (offset := data.find(b"\xff", offset)) >= 0 and offset + 1 < len(data):
        marker = data[offset + 1]
        if marker in (0x00, 0xFF):
            offset += 2 - (marker == 0xFF)
        elif marker == 0xD9:
            return
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:
            yield marker, b""
            offset += 2
        else:
            length = int.from_bytes(data[offset + 2 : offset + 4], "big")
            yield marker, data[offset + 4 : offset + 2 + length]
            offset += 2 + max(length, 2)
