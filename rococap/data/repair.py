"""Picture files that lack nothing but form: what a viewer shows of them, and Pillow refuses to open.

Nothing is guessed: pixels that are not in the file are never made up.
"""

import re
import struct
import zlib
from collections.abc import Iterator

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

MOST_STRAY, MOST_STRAY_BINARY = 1024, 16
"""Bytes before a file's start."""
LARGEST_TEXT = 1 << 20
"""Of a text chunk once unpacked, as Pillow allows."""
MOST_TEXT = 64 * LARGEST_TEXT

_SHOWN_BY = frozenset({b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT"})
"""Ancillary chunks of PNG that decide what is seen: transparency, orientation, and the frames of an animation."""
_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
"""Older writers, and XMP, say the orientation in text."""

_SCANS_OF_NOTHING = (b"", b"\x00" * 64, b"\x55" * 64, b"\xaa" * 64, b"\xf0\xcc" * 32)
"""What may follow the coded data of a JPEG: whoever is still reading pixels reads other ones from each."""


def from_its_start(data: bytes) -> bytes | None:
    """The file without stray bytes before it; None if there is no JPEG or PNG soon after its first byte, or if what
    stands before it is the beginning of something else that holds a picture.
    """
    starts = [data.find(start, 1, MOST_STRAY + len(start)) for start in (JPEG_START + b"\xff", PNG_SIGNATURE)]
    found = [start for start in starts if start > 0]
    if not found or not _is_stray(data[: min(found)]):
        return None
    return data[min(found) :]


def _is_stray(before: bytes) -> bool:
    """Text, such as an HTTP answer's headers, or a few bytes that are no piece of a JPEG that lost its own start."""
    is_text = all(byte in b"\t\r\n" or 0x20 <= byte < 0x7F for byte in before.removeprefix(b"\xef\xbb\xbf"))
    return is_text or (len(before) <= MOST_STRAY_BINARY and not re.search(rb"\xff[\xc0-\xfe]|Exif|JFIF", before))


# ---- PNG


def without_ancillary(data: bytes) -> bytes:
    """A PNG with the chunks alone that decide what is seen, and with text of a bounded size.

    As libpng does, an ancillary chunk whose checksum is wrong is left out. Critical ones are kept as they are.
    """
    kept, budget = [PNG_SIGNATURE], MOST_TEXT
    for kind, body, chunk in _chunks(data):
        if kind in _TEXT:
            size = _text_size(kind, body)
            if size > min(budget, LARGEST_TEXT) or not _is_sound(kind, body, chunk):
                continue
            budget -= size
        elif _is_ancillary(kind) and not (kind in _SHOWN_BY and _is_sound(kind, body, chunk)):
            continue
        kept.append(chunk)
    return b"".join(kept)


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """(type, content, the whole of it) of each chunk; the last one may be cut off."""
    at = len(PNG_SIGNATURE)
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunk = data[at : at + 12 + length]
        yield chunk[4:8], chunk[8 : 8 + length], chunk
        at += 12 + length


def _is_ancillary(kind: bytes) -> bool:
    return bool(kind and kind[0] & 0x20)


def _is_sound(kind: bytes, body: bytes, chunk: bytes) -> bool:
    return chunk[-4:] == struct.pack(">I", zlib.crc32(kind + body)) and len(chunk) == 12 + len(body)


def _text_size(kind: bytes, body: bytes) -> int:
    """Bytes of a text, unpacked no further than to see that it is too large."""
    _, _, rest = body.partition(b"\0")
    if kind == b"zTXt":
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        return len(body)
    try:
        return len(zlib.decompressobj().decompress(packed, LARGEST_TEXT + 1))
    except zlib.error:
        return LARGEST_TEXT + 1


# ---- JPEG


def is_padded(data: bytes) -> bool:
    """Whether a JPEG ends in zeros and not in its end marker: a decoder would take them for pixels."""
    return data.startswith(JPEG_START) and data.endswith(b"\0") and not data.rstrip(b"\0").endswith(JPEG_END)


def ended(data: bytes) -> list[bytes]:
    """A JPEG without its end marker, with the marker put behind it after nothing and after various other bytes.

    If all of them open as the same picture, its pixels were all there: a decoder that still lacks some would read them
    from what follows. Empty if it is no JPEG, if it has its end, or if whole scans or intervals are missing, which no
    decoder would notice.
    """
    if not data.startswith(JPEG_START) or JPEG_END in data[-2:]:
        return []
    data = data.rstrip(b"\0").removesuffix(b"\xff")  # zeros would be read for pixels that are missing
    if not _has_all_scans(data):
        return []
    return [data + padding + JPEG_END for padding in _SCANS_OF_NOTHING]


def _has_all_scans(data: bytes) -> bool:
    """Whether the scans of a JPEG (ITU-T T.81, B.2) hold every coefficient to its last bit, and its restart intervals
    are as many as its size asks for.
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
    """Minimum coded units of an interleaved scan."""
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    if len(factors) == 1:
        return -(-width // 8) * -(-height // 8)
    across, down = max((factor >> 4 for factor in factors), default=1), max((f & 15 for f in factors), default=1)
    return -(-width // (8 * max(across, 1))) * -(-height // (8 * max(down, 1)))


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of each segment up to the end; what is coded between them is passed over."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker in (0x00, 0xFF):
            at += 2 - (marker == 0xFF)
        elif marker == 0xD9:
            return
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:
            yield marker, b""
            at += 2
        else:
            length = int.from_bytes(data[at + 2 : at + 4], "big")
            yield marker, data[at + 4 : at + 2 + length]
            at += 2 + max(length, 2)
