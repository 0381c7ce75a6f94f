import random
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rococap.errors import PictureError
from rococap.images import MAX_PIXELS, open_picture, reduced, suffix_of

PICTURES = Path(__file__).parent / "pictures"
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "images"

BLACK, WHITE, RED, GREEN, BLUE = (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(picture, fmt="PNG", **options):
    buffer = BytesIO()
    picture.save(buffer, fmt, **options)
    return buffer.getvalue()


def png(width, height, kind=0, depth=8, rows=b""):
    """A PNG by hand: for headers that Pillow would not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def greys(data):
    """The grey values of a picture that is grey: R, G and B are the same everywhere."""
    pixels = np.asarray(open_picture(data))
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


def colours(data):
    return [tuple(pixel) for row in np.asarray(open_picture(data)).tolist() for pixel in row]


def code_of(data):
    with pytest.raises(PictureError) as caught:
        open_picture(data)
    assert str(caught.value).endswith("then retry.")
    return caught.value.code


def ramp(mode, dtype, values=range(0, 5001)):
    """Values in one row: black is the 0.5 percentile, white the 99.5 one."""
    row = np.array([list(values)], dtype=dtype)
    return Image.frombytes(mode, (row.shape[1], 1), row.tobytes()).resize((row.shape[1], 26), 0)


# ---- modes


@pytest.mark.parametrize(
    ("fmt", "ending"),
    [("PNG", ".png"), ("JPEG", ".jpg"), ("JPEG2000", ".jp2"), ("TIFF", ".tif"), ("BMP", ".bmp"), ("WEBP", ".webp")],
)
def test_the_ending_of_a_file_is_told_by_its_bytes(fmt, ending):
    assert suffix_of(encoded(Image.new("L", (32, 32)), fmt)) == ending


def test_a_jpeg_of_several_pictures_ends_as_a_jpeg_does():
    two = encoded(Image.new("RGB", (32, 32)), "MPO", save_all=True, append_images=[Image.new("RGB", (32, 32))])
    assert Image.open(BytesIO(two)).format == "MPO"
    assert suffix_of(two) == ".jpg"


def test_8_bit_grey_keeps_every_value():
    row = Image.frombytes("L", (256, 2), bytes(range(256)) * 2)
    assert greys(encoded(row)).tolist() == [list(range(256))] * 2


def test_rgb_keeps_every_pixel():
    picture = Image.frombytes("RGB", (2, 2), bytes(range(12)))
    opened = open_picture(encoded(picture))
    assert (opened.mode, opened.size, opened.tobytes()) == ("RGB", (2, 2), bytes(range(12)))


@pytest.mark.parametrize(
    ("mode", "dtype", "fmt"),
    [
        ("I;16", "<u2", "PNG"),
        ("I;16", "<u2", "TIFF"),
        ("I;16B", ">u2", "TIFF"),
        ("I", "<i4", "TIFF"),
        ("F", "<f4", "TIFF"),
    ],
)
def test_deep_grey_is_windowed_between_its_own_percentiles(mode, dtype, fmt):
    data = encoded(ramp(mode, dtype), fmt)
    assert Image.open(BytesIO(data)).mode == mode
    # 0..5000: black is 25, white 4975.
    expected = [round(255 * min(max((value - 25) / 4950, 0), 1)) for value in range(5001)]
    assert greys(data)[0].tolist() == expected


def test_a_window_does_not_depend_on_offset_or_unit():
    row = np.arange(5001, dtype=np.float32) / 5000
    pictures = [Image.fromarray(np.tile(values, (26, 1))) for values in (row, row * 2000 - 1000)]
    small, shifted = (greys(encoded(picture, "TIFF")).astype(int) for picture in pictures)
    whole_numbers = greys(encoded(ramp("I", "<i4"), "TIFF"))
    assert np.abs(small - whole_numbers).max() <= 1
    assert np.abs(shifted - whole_numbers).max() <= 1


@pytest.mark.parametrize("value", [0, 700, 65535])
def test_a_constant_16_bit_picture_is_black(value):
    assert (greys(encoded(Image.fromarray(np.full((5, 7), value, np.uint16)))) == 0).all()


@pytest.mark.parametrize("value", [0.0, -3.5, 1e30, float("nan"), float("inf")])
def test_a_constant_float_picture_is_black(value):
    assert (greys(encoded(Image.fromarray(np.full((5, 7), value, np.float32)), "TIFF")) == 0).all()


def test_a_lone_bright_spot_is_not_lost_to_the_percentiles():
    values = np.full((100, 100), 40, np.uint16)
    values[3, 4] = 3000
    shades = greys(encoded(Image.fromarray(values)))
    assert shades[3, 4] == 255
    assert int(shades.sum()) == 255


def test_nan_in_a_float_picture_is_black_and_moves_no_other_pixel():
    values = np.tile(np.arange(5001, dtype=np.float32), (26, 1))
    whole = greys(encoded(Image.fromarray(values), "TIFF"))
    values[0, 2000], values[0, 3000] = float("nan"), float("inf")
    shades = greys(encoded(Image.fromarray(values), "TIFF"))
    assert (shades[0, 2000], shades[0, 3000]) == (0, 0)
    assert (shades[1:] == whole[1:]).all()


def test_a_real_12_bit_ct_keeps_its_contrast():
    shades = greys((PICTURES / "CT_small_raw16.png").read_bytes())
    raw = np.asarray(Image.open(PICTURES / "CT_small_raw16.png")).astype(float)
    black, white = np.percentile(raw, (0.5, 99.5))
    assert np.abs(shades - ((raw - black) / (white - black)).clip(0, 1) * 255).max() <= 0.51
    assert len(np.unique(shades)) > 200


def test_1_bit_is_black_and_white():
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert colours(encoded(bits)) == [BLACK, WHITE]


def test_a_palette_gives_its_colours():
    picture = Image.new("P", (3, 1))
    picture.putpalette([*RED, *GREEN, *BLUE])
    picture.putdata([2, 0, 1])
    assert colours(encoded(picture)) == [BLUE, RED, GREEN]


def test_cmyk_becomes_the_colours_meant():
    inks = Image.new("CMYK", (2, 1))
    inks.putdata([(0, 255, 255, 0), (0, 0, 0, 255)])
    assert colours(encoded(inks, "TIFF")) == [RED, BLACK]


def test_cmyk_jpeg_is_not_inverted():
    white = open_picture(encoded(Image.new("CMYK", (16, 16)), "JPEG"))
    assert (white.mode, white.getpixel((5, 5))) == ("RGB", WHITE)


def test_lab_becomes_rgb():
    assert open_picture(encoded(Image.new("LAB", (3, 2)), "TIFF")).mode == "RGB"


# ---- transparency


def test_alpha_is_laid_on_black():
    picture = Image.new("RGBA", (3, 1))
    picture.putdata([(255, 0, 0, 255), (0, 200, 0, 128), (255, 255, 255, 0)])
    assert colours(encoded(picture)) == [RED, (0, 100, 0), BLACK]


def test_grey_with_alpha_is_laid_on_black():
    picture = Image.new("LA", (3, 1))
    picture.putdata([(90, 255), (200, 128), (255, 0)])
    assert colours(encoded(picture)) == [(90, 90, 90), (100, 100, 100), BLACK]


def test_a_palette_with_alpha_is_laid_on_black():
    picture = Image.new("P", (3, 1))
    picture.putpalette([*RED, *GREEN, *BLUE])
    picture.putdata([0, 1, 2])
    assert colours(encoded(picture, transparency=bytes([255, 0, 255]))) == [RED, BLACK, BLUE]
    assert colours(encoded(picture, transparency=2)) == [RED, GREEN, BLACK]


def test_a_pa_picture_is_laid_on_black():
    palette = Image.new("P", (3, 1))
    palette.putpalette([*RED, *GREEN, *BLUE])
    palette.putdata([0, 1, 2])
    picture = palette.convert("PA")
    picture.putalpha(Image.frombytes("L", (3, 1), bytes([255, 0, 255])))
    data = encoded(picture, "TIFF")
    assert Image.open(BytesIO(data)).mode == "PA"
    assert colours(data) == [RED, BLACK, BLUE]


def test_a_transparent_grey_level_is_laid_on_black():
    picture = Image.frombytes("L", (3, 1), bytes([10, 255, 20]))
    assert colours(encoded(picture, transparency=255)) == [(10, 10, 10), BLACK, (20, 20, 20)]


@pytest.mark.parametrize("colour", [0, 255, 130])
@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_where_the_colour_is_constant_the_alpha_is_the_picture(mode, colour):
    shape = Image.open(PICTURES / "MR_small.png")
    picture = Image.new("L", shape.size, colour).convert(mode)
    picture.putalpha(shape)
    assert (greys(encoded(picture)) == np.asarray(shape)).all()


def test_one_constant_channel_is_not_a_constant_colour():
    picture = Image.new("RGBA", (2, 1))
    picture.putdata([(255, 0, 0, 255), (0, 0, 0, 128)])
    assert colours(encoded(picture)) == [RED, BLACK]


def test_a_plain_opaque_colour_stays_that_colour():
    assert colours(encoded(Image.new("RGBA", (2, 1), (9, 8, 7, 255)))) == [(9, 8, 7)] * 2


# ---- orientation and frames

UPRIGHT = [[1, 2, 3], [4, 5, 6]]
# How the file's rows lie for each EXIF orientation of that picture.
AS_STORED = {
    1: [[1, 2, 3], [4, 5, 6]],
    2: [[3, 2, 1], [6, 5, 4]],
    3: [[6, 5, 4], [3, 2, 1]],
    4: [[4, 5, 6], [1, 2, 3]],
    5: [[1, 4], [2, 5], [3, 6]],
    6: [[3, 6], [2, 5], [1, 4]],
    7: [[6, 3], [5, 2], [4, 1]],
    8: [[4, 1], [5, 2], [6, 3]],
}


def stored(orientation):
    picture = Image.fromarray(np.array(AS_STORED[orientation], dtype=np.uint8))
    exif = picture.getexif()
    exif[0x0112] = orientation
    return picture, exif


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_exif_orientation_is_undone(orientation, fmt):
    picture, exif = stored(orientation)
    assert greys(encoded(picture, fmt, exif=exif)).tolist() == UPRIGHT


def test_an_upright_picture_cannot_be_turned_again():
    picture, exif = stored(6)
    opened = open_picture(encoded(picture, exif=exif))
    assert opened.getexif().get(0x0112) is None
    assert opened.info == {}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF at all", b"Exif\0\0II*\0\x08\0\0\0\x20\0" + b"\xff" * 9])
def test_broken_exif_leaves_the_picture_as_it_is(exif):
    picture = Image.frombytes("L", (3, 2), bytes(range(1, 7)))
    assert greys(encoded(picture, exif=exif)).tolist() == UPRIGHT


@pytest.mark.parametrize("fmt", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_several_frames_the_first_counts(fmt):
    frames = [Image.new("RGB", (8, 6), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert Image.open(BytesIO(data)).n_frames == 3
    assert set(colours(data)) == {RED}


# ---- refusals


def test_no_bytes_are_empty():
    assert code_of(b"") == "empty"


@pytest.mark.parametrize(
    "data",
    [
        b"<!DOCTYPE html><html><body>404</body></html>",
        b"\0",
        b"\0" * 4096,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
        b"\0" * 128 + b"DICM" + b"\0" * 64,
    ],
)
def test_what_is_no_picture_is_not_an_image(data):
    assert code_of(data) == "not_an_image"


def test_the_message_shows_what_the_bytes_begin_with():
    with pytest.raises(PictureError) as caught:
        open_picture(b"<html>no such file</html>")
    assert str(caught.value) == ("Not a picture, it begins with b'<html>no suc': replace it at its source, then retry.")


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
def test_a_file_cut_short_is_truncated(fmt, share):
    whole = encoded(Image.open(PICTURES / "CT_small.png").convert("RGB").resize((300, 300)), fmt)
    assert open_picture(whole).size == (300, 300)
    assert code_of(whole[: int(len(whole) * share)]) == "truncated"


def test_a_progressive_jpeg_cut_short_is_truncated():
    whole = encoded(Image.open(PICTURES / "CT_small.png").resize((300, 300)), "JPEG", progressive=True)
    assert code_of(whole[: len(whole) // 2]) == "truncated"


@pytest.mark.parametrize("fmt", ["WEBP", "JPEG2000"])
def test_a_webp_or_jpeg2000_cut_short_is_corrupt(fmt):
    whole = encoded(Image.open(PICTURES / "CT_small.png").convert("RGB"), fmt)
    assert code_of(whole[: len(whole) // 2]) == "corrupt"


def test_broken_pixel_data_is_corrupt():
    whole = bytearray(encoded(Image.open(PICTURES / "CT_small.png")))
    start = whole.index(b"IDAT") + 4
    whole[start : start + 40] = b"\xff" * 40
    assert code_of(bytes(whole)) == "corrupt"


@pytest.mark.parametrize("size", [(20_000, 20_000), (10_000, 10_000), (8193, 8192), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_by_its_header(size):
    assert code_of(png(*size)) == "too_large"


def test_a_picture_at_the_limit_is_decoded():
    # No rows follow, so getting as far as `truncated` shows that the size was let through.
    assert MAX_PIXELS == 8192 * 8192
    assert code_of(png(8192, 8192)) == "truncated"


def test_a_bomb_prints_no_warning():
    script = (
        "from rococap.images import open_picture\n"
        "from rococap.errors import PictureError\n"
        "import sys\n"
        "try: open_picture(sys.stdin.buffer.read())\n"
        "except PictureError as error: print(error.code)\n"
    )
    run = subprocess.run(
        [sys.executable, "-W", "default", "-c", script], input=png(10_000, 10_000), capture_output=True
    )
    assert (run.stdout, run.stderr) == (b"too_large\n", b"")


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_pixels_has_zero_size(size):
    assert code_of(png(*size)) == "zero_size"


@pytest.mark.parametrize("size", [(201, 1), (1, 201), (4, 804 + 1)])
def test_a_ratio_over_200_is_extreme(size):
    assert code_of(encoded(Image.new("L", size))) == "extreme_ratio"


@pytest.mark.parametrize("size", [(200, 1), (4, 800)])
def test_a_ratio_of_200_is_let_through(size):
    assert open_picture(encoded(Image.new("L", size))).size == size


# ---- robustness


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
def test_damaged_bytes_give_a_picture_or_a_picture_error(fmt):
    whole = encoded(Image.open(PICTURES / "MR_small.png").convert("RGB"), fmt)
    dice = random.Random(7)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 4, 30])):
            damaged[dice.randrange(min(len(damaged), dice.choice([64, 10**6])))] = dice.randrange(256)
        with suppress(PictureError):
            assert open_picture(bytes(damaged)).mode == "RGB"


def test_threads_give_what_one_thread_gives():
    sources = [path.read_bytes() for path in sorted(PICTURES.glob("*.png"))]
    sources += [png(10_000, 10_000), b"<html>"]

    def outcome(data):
        try:
            return open_picture(data).tobytes()
        except PictureError as error:
            return error.code

    expected = [outcome(data) for data in sources]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, sources * 40)) == expected * 40


def test_no_memory_is_not_blamed_on_the_picture():
    script = (
        "import resource, sys\n"
        "from rococap.images import open_picture\n"
        "data = sys.stdin.buffer.read()\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + (16 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try: open_picture(data)\n"
        "except MemoryError: print('MemoryError')\n"
    )
    data = encoded(Image.new("L", (8192, 8192)))
    run = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True)
    assert run.stdout == b"MemoryError\n", run.stderr.decode()


@pytest.mark.skipif(not REAL.is_dir(), reason="the collection of real pictures is not beside the checkout")
def test_real_pictures_open_with_their_size_and_contrast():
    paths = sorted(REAL.glob("*.png"))
    assert len(paths) >= 19
    for path in paths:
        with Image.open(path) as original:
            size = original.size
        opened = open_picture(path.read_bytes())
        assert (opened.mode, opened.size) == ("RGB", size), path.name
        assert np.asarray(opened).std() > 10, path.name


@pytest.mark.parametrize(
    ("size", "most", "reduced_to"),
    [
        ((900, 700), 10_000, (113, 88)),
        ((100, 100), 10_000, (100, 100)),
        ((2_000, 10), 100, (100, 1)),
        ((10, 2_000), 100, (1, 100)),
        ((7, 9), 1, (1, 1)),
    ],
)
def test_a_picture_is_reduced_to_so_many_pixels_in_its_own_shape(size, most, reduced_to):
    assert reduced(Image.new("RGB", size), most).size == reduced_to
