import random
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw
from places import PICTURES, SHARED

from rococap.data.images import MAX_PIXELS, as_file, is_blank, open_picture, reduced, suffix_of
from rococap.data.window import windowed
from rococap.errors import PictureError

REAL = SHARED / "images"

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


def damaged_copies(whole, n, header=64):
    """Copies with some bytes replaced, of the header more often than of the rest."""
    dice = random.Random(7)
    for _ in range(n):
        damaged = bytearray(whole)
        for _ in range(dice.choice([1, 4, 30])):
            damaged[dice.randrange(min(len(damaged), dice.choice([header, 10**6])))] = dice.randrange(256)
        yield bytes(damaged)


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


def test_a_page_instead_of_a_picture_is_named():
    with pytest.raises(PictureError) as caught:
        open_picture(b"<html>no such file</html>")
    assert str(caught.value) == (
        "This is not a picture but HTML: download the picture itself instead of a web page, then retry."
    )


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
        "from rococap.data.images import open_picture\n"
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


# ---- greys of every depth

CT = np.asarray(Image.open(PICTURES / "CT_small.png").convert("L"))
DTYPES = ["u1", "u2", ">u2", "i1", "i2", ">i2", "u4", ">u4", "i4", "u8", "i8", "f2", "f4", ">f4", "f8"]


def tiff(samples, **options):
    file = BytesIO()
    order = ">" if samples.dtype.byteorder == ">" else "<"
    tifffile.imwrite(file, samples, byteorder=order, **options)
    return file.getvalue()


def spread(dtype):
    """CT_small over the whole range of a type, but for the last levels of 64 bits."""
    if np.dtype(dtype).kind == "f":
        return (CT / 255).astype(dtype)
    lowest, highest = (int(end) for end in (np.iinfo(dtype).min, np.iinfo(dtype).max))
    steps = [lowest + (highest - lowest) * level // 255 for level in range(256)]
    return np.array(steps, dtype=dtype)[CT]


def alike(one, other, most=3):
    return np.abs(one.astype(int) - other.astype(int)).max() <= most


@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_grey_tiff_of_every_type_shows_its_picture(dtype, compression):
    expected = CT if dtype == "u1" else windowed(CT)
    assert alike(greys(tiff(spread(dtype), photometric="minisblack", compression=compression)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_the_file_says_that_the_lowest_value_is_white_it_is(dtype):
    expected = 255 - (CT if dtype == "u1" else windowed(CT))
    assert alike(greys(tiff(spread(dtype), photometric="miniswhite")), expected)


def test_1_bit_with_the_lowest_value_white_is_the_right_way_round():
    bits = tiff(CT > 127, photometric="miniswhite")
    assert Image.open(BytesIO(bits)).mode == "1"
    assert (greys(bits) == np.where(CT > 127, 0, 255)).all()


def test_a_deep_tiff_is_turned_upright():
    stored_rows = (np.array(AS_STORED[6]) * 1000).astype(np.uint16)
    upright = greys(tiff(stored_rows, photometric="minisblack", extratags=[(274, 3, 1, 6, True)]))
    assert upright.argsort(axis=None).tolist() == np.array(UPRIGHT).argsort(axis=None).tolist()


def test_a_deep_tiff_cut_short_is_truncated():
    whole = tiff(spread("u2"), photometric="minisblack")
    assert code_of(whole[:-1000]) == "truncated"


def test_a_tiff_that_is_not_opened_says_what_it_holds():
    complex_values = tiff(CT.astype(np.complex64), photometric="minisblack")
    with pytest.raises(PictureError) as caught:
        open_picture(complex_values)
    assert (caught.value.code, str(caught.value)) == (
        "unsupported",
        "This is a TIFF of 1 x complex64 samples, minisblack, which is not supported: convert it to PNG at its source, "
        "then retry.",
    )


# ---- deep colours


def deep_png(samples, kind):
    """16-bit samples of shape (height, width, channels) as a PNG of a colour type."""
    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + line.astype(">u2").tobytes() for line in samples)
    return png(width, height, kind, 16, rows)


def channels(n, grey, alpha=65535):
    """`n` of them: grey alone, grey and alpha, RGB, RGBA."""
    bands = [grey] * (1 if n < 3 else 3) + [np.full_like(grey, alpha)] * (n % 2 == 0)
    return np.dstack(bands)


def deep_tiff(samples, kind):
    extra = {4: ["unassalpha"], 6: ["unassalpha"]}.get(kind)
    return tiff(samples.squeeze(), photometric="rgb" if kind in (2, 6) else "minisblack", extrasamples=extra)


DEEP = [(0, 1), (4, 2), (2, 3), (6, 4)]


@pytest.mark.parametrize("write", [deep_png, deep_tiff])
@pytest.mark.parametrize(("kind", "n"), DEEP)
def test_12_bit_values_in_16_bit_colours_are_windowed_as_in_grey(kind, n, write):
    deep = CT.astype(np.uint16) * 16
    assert (greys(write(channels(n, deep), kind)) == windowed(deep)).all()


@pytest.mark.parametrize("write", [deep_png, deep_tiff])
@pytest.mark.parametrize(("kind", "n"), DEEP[2:])
def test_16_bit_colours_of_full_range_stay_as_they_are(kind, n, write):
    assert (greys(write(channels(n, CT.astype(np.uint16) * 257), kind)) == CT).all()


@pytest.mark.parametrize("write", [deep_png, deep_tiff])
def test_deep_colours_have_one_window_for_all_channels(write):
    grey = (CT.astype(np.uint16) * 16)[..., None]
    opened = np.asarray(open_picture(write(np.concatenate([grey, grey // 2, grey // 4], axis=2), 2)))
    ratios = opened[CT > 100].astype(float).mean(axis=0)
    assert ratios[1] / ratios[0] == pytest.approx(0.5, abs=0.02)
    assert ratios[2] / ratios[0] == pytest.approx(0.25, abs=0.02)


def test_planes_that_lie_apart_are_put_together():
    planes = np.stack([CT.astype(np.uint16) * factor for factor in (257, 128, 64)])
    opened = np.asarray(open_picture(tiff(planes, photometric="rgb", planarconfig="separate")))
    assert (opened == np.moveaxis(planes >> 8, 0, -1)).all()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_rgb_in_floating_point_from_0_to_1_keeps_its_levels(dtype):
    levels = np.repeat((CT / 255)[..., None], 3, axis=2).astype(dtype)
    assert alike(greys(tiff(levels, photometric="rgb")), CT, most=1)


def test_transparent_pixels_do_not_decide_the_window_of_a_deep_picture():
    samples = channels(2, CT.astype(np.uint16) * 16)
    samples[:40, :, 0], samples[:40, :, 1] = 60_000, 0
    shades = greys(deep_png(samples, 4))
    assert (shades[:40] == 0).all()
    assert (shades[40:] == windowed(CT[40:].astype(np.uint16) * 16)).all()


# ---- transparency hides nothing


def rgba(colour, alpha):
    return Image.merge("RGBA", [*Image.fromarray(colour).convert("RGB").split(), Image.fromarray(alpha)])


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("alpha", [0, 1, 128])
def test_an_alpha_that_is_the_same_everywhere_hides_no_picture(alpha, fmt):
    options = {"lossless": True, "exact": True} if fmt == "WEBP" else {}
    assert (greys(encoded(rgba(CT, np.full_like(CT, alpha)), fmt, **options)) == CT).all()


def test_grey_with_an_alpha_of_0_everywhere_shows_the_grey():
    picture = Image.merge("LA", [Image.fromarray(CT), Image.fromarray(np.zeros_like(CT))])
    assert (greys(encoded(picture)) == CT).all()


def test_an_alpha_from_0_to_1_counts_as_from_0_to_255():
    """As from code that takes alpha for a share of 1."""
    alpha = np.ones_like(CT)
    alpha[:10] = 0
    shades = greys(encoded(rgba(CT, alpha)))
    assert (shades[10:] == CT[10:]).all()
    assert (shades[:10] == 0).all()


def strokes():
    page = Image.new("L", (160, 120), 255)
    draw = ImageDraw.Draw(page)
    draw.rectangle((20, 20, 140, 100), outline=0, width=3)
    draw.text((40, 50), "AXIAL CT", fill=0)
    return page


def smooth_strokes():
    return strokes().resize((320, 240), Image.Resampling.BICUBIC).resize((150, 110), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("page", [strokes(), smooth_strokes()], ids=["hard", "smooth"])
def test_black_strokes_on_transparent_white_are_seen_on_white(page):
    levels = np.asarray(page)
    assert (greys(encoded(page, transparency=255)) == levels).all()
    alpha = np.where(levels == 255, 0, 255).astype(np.uint8)
    assert (greys(encoded(rgba(levels, alpha))) == levels).all()
    palette = page.convert("P")
    assert (greys(encoded(palette, transparency=255)) == levels).all()


def test_black_strokes_in_1_bit_on_transparent_white_are_seen_on_white():
    page = strokes().point(lambda level: 255 * (level > 127))
    assert (greys(encoded(page.convert("1"), transparency=1)) == np.asarray(page)).all()


def test_black_and_one_coloured_stroke_on_nothing_are_all_seen():
    picture = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((10, 10, 80, 80), outline=(0, 0, 0, 255), width=6)
    draw.line((20, 20, 24, 24), fill=(255, 0, 0, 255))
    opened = open_picture(encoded(picture))
    assert opened.getpixel((10, 10)) == BLACK
    assert opened.getpixel((22, 22)) == RED
    assert opened.getpixel((50, 50)) == WHITE


def test_a_picture_with_transparent_corners_stays_on_black():
    alpha = np.full_like(CT, 255)
    alpha[:30, :30] = 0
    colours_left = CT.copy()
    colours_left[:30, :30] = 0
    shades = greys(encoded(rgba(colours_left, alpha)))
    assert (shades[:30, :30] == 0).all()
    assert (shades[30:] == CT[30:]).all()


# ---- nothing to see


@pytest.mark.parametrize(
    "data",
    [
        encoded(Image.new("L", (9, 9), 77)),
        encoded(Image.new("RGB", (9, 9), (1, 2, 3))),
        encoded(Image.fromarray(np.full((9, 9), 700, np.uint16))),
        encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0))),
    ],
    ids=["grey", "colour", "deep", "transparent"],
)
def test_a_picture_of_one_level_is_blank(data):
    assert is_blank(open_picture(data))


def test_a_picture_with_one_other_pixel_is_not_blank():
    picture = Image.new("L", (9, 9), 77)
    picture.putpixel((4, 4), 78)
    assert not is_blank(open_picture(encoded(picture)))


# ---- files that lack nothing but form


def with_chunk(kind, body, *, checksum=None, before=b"IDAT"):
    """CT_small as a PNG with another chunk in it."""
    plain = encoded(Image.fromarray(CT))
    at = plain.index(before) - 4
    crc = zlib.crc32(kind + body) if checksum is None else checksum
    return plain[:at] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc) + plain[at:]


BOMB = zlib.compress(b"a" * 2_000_000)


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"zTXt", b"k\0\0" + BOMB),
        (b"iTXt", b"k\0\1\0\0\0" + BOMB),
        (b"iCCP", b"k\0\0" + BOMB),
        (b"tEXt", b"k\0" + b"a" * 3_000_000),
    ],
    ids=["zTXt", "iTXt", "iCCP", "tEXt"],
)
def test_a_png_is_read_whatever_the_size_of_its_texts(kind, body, before):
    assert (greys(with_chunk(kind, body, before=before)) == CT).all()


@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iCCP", b"gAMA", b"pHYs", b"eXIf", b"tIME", b"abCd"])
def test_a_wrong_checksum_of_what_no_pixel_needs_does_not_matter(kind):
    assert (greys(with_chunk(kind, b"k\0some", checksum=1)) == CT).all()


def test_what_turns_and_clears_a_png_survives_a_text_that_is_left_out():
    picture, exif = stored(6)
    plain = encoded(picture, exif=exif)
    at = plain.index(b"IDAT") - 4
    body = b"k\0\0" + BOMB
    bomb = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    assert greys(plain[:at] + bomb + plain[at:]).tolist() == UPRIGHT


def test_a_text_of_gigabytes_takes_no_memory():
    """64 MB of text in 64 KB, forty times over: 2.6 GB."""
    script = (
        "import resource, sys\n"
        "from rococap.data.images import open_picture\n"
        "data = sys.stdin.buffer.read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(open_picture(data).size)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    body = b"k\0\0" + zlib.compress(b"\0" * 64_000_000, 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    plain = encoded(Image.fromarray(CT))
    at = plain.index(b"IDAT") - 4
    data = plain[:at] + 40 * chunk + plain[at:]
    run = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=True)
    size, grown_mb = run.stdout.decode().splitlines()
    assert size == "(128, 128)"
    assert int(grown_mb) < 60


JPEGS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "with restarts": {"restart_marker_blocks": 10},
    "colour": {"subsampling": 2},
}


def jpeg(name):
    picture = Image.fromarray(CT).resize((300, 280))
    return encoded(picture.convert("RGB") if name == "colour" else picture, "JPEG", **JPEGS[name])


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_without_its_end_marker_is_whole(name):
    data = jpeg(name)
    whole = open_picture(data).tobytes()
    assert open_picture(data[:-2]).tobytes() == whole
    assert open_picture(data[:-1]).tobytes() == whole


@pytest.mark.parametrize("name", JPEGS)
def test_a_jpeg_that_lacks_one_byte_of_its_pixels_or_more_is_truncated(name):
    data = jpeg(name)
    for cut in (*range(3, 30), *range(30, len(data) - 700, len(data) // 40)):
        assert code_of(data[:-cut]) == "truncated", cut


@pytest.mark.parametrize(
    "start", [b"\n", b"\r\n\r\n", b"\xef\xbb\xbf", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n"]
)
@pytest.mark.parametrize("fmt", ["JPEG", "PNG"])
def test_stray_bytes_before_a_picture_are_passed_over(fmt, start):
    data = encoded(Image.fromarray(CT), fmt)
    assert open_picture(start + data).tobytes() == open_picture(data).tobytes()
    ending, published = as_file(start + data)
    assert (ending, published) == ({"JPEG": ".jpg", "PNG": ".png"}[fmt], data)


# ---- formats


@pytest.mark.parametrize("fmt", ["AVIF", "QOI", "TGA", "PCX", "ICO", "SGI", "DDS"])
def test_whatever_the_installed_pillow_opens_is_opened(fmt):
    options = {"quality": 95} if fmt == "AVIF" else {}
    shades = np.asarray(open_picture(encoded(Image.fromarray(CT).convert("RGB"), fmt, **options)))
    assert np.abs(shades[..., 0].astype(int) - CT).mean() < 3


@pytest.mark.parametrize(
    ("data", "code", "told"),
    [
        (
            b"\0" * 344 + b"n+1\0",
            "unsupported",
            "This is NIfTI, which is not supported: convert it to PNG at its source",
        ),
        (b"\0\0\0\x18ftypheic" + b"\0" * 40, "unsupported", "This is HEIC, which is not supported"),
        (b"NRRD0004\ntype: short\n", "unsupported", "This is NRRD, which is not supported"),
        (b"<?xml version='1.0'?><svg xmlns=''/>", "unsupported", "This is SVG, which is not supported"),
        (b"\xff\x0a" + b"\0" * 40, "unsupported", "This is JPEG XL, which is not supported"),
        (b"%PDF-1.7\n", "not_an_image", "This is not a picture but a PDF: replace it with the picture at its source"),
        (b"PK\x03\x04" + b"\0" * 40, "not_an_image", "This is not a picture but a zip archive"),
        (b"\x93NUMPY\x01\0", "not_an_image", "This is not a picture but a NumPy array"),
        (
            b"iVBORw0KGgoAAAANSUhEUg",
            "not_an_image",
            "This is not a picture but base64 text: decode it to bytes at its source",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "not_an_image",
            "This is not a picture but a Git LFS pointer",
        ),
        (b'{"error": "not found"}', "not_an_image", "This is not a picture but JSON"),
        (
            b"\x13\x37 what",
            "not_an_image",
            "This is not a picture (it begins with b'\\x137 what'): replace it at its source",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_the_message_names_the_format_and_the_next_step(data, code, told):
    with pytest.raises(PictureError) as caught:
        open_picture(data)
    assert caught.value.code == code
    assert str(caught.value).startswith(told)
    assert str(caught.value).endswith(", then retry.")


# ---- frames


@pytest.mark.parametrize("fmt", ["GIF", "TIFF", "PNG", "WEBP"])
def test_the_frame_that_is_asked_for_is_opened(fmt):
    frames = [Image.new("RGB", (8, 6), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if fmt == "WEBP" else {}
    data = encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **options)
    assert open_picture(data, 3).getpixel((2, 2)) == BLUE
    with pytest.raises(PictureError) as caught:
        open_picture(data, 4)
    assert (caught.value.code, str(caught.value)) == (
        "no_frame",
        "The file has 3 frames, but frame 4 was requested: leave this picture out, or enqueue a run with another "
        "--frame, then retry.",
    )


def test_the_frame_that_is_asked_for_of_a_deep_tiff_is_opened():
    file = BytesIO()
    tifffile.imwrite(file, np.stack([spread("u2"), 65535 - spread("u2")]), photometric="minisblack")
    assert (greys_of(file.getvalue(), 2) == windowed(65535 - spread("u2"))).all()
    with pytest.raises(PictureError, match="The file has 2 frames, but frame 3"):
        open_picture(file.getvalue(), 3)


def greys_of(data, frame):
    return np.asarray(open_picture(data, frame))[..., 0]


# ---- what is damaged, hostile or rare


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("before", [b"", b"\r\n"])
def test_a_jpeg_cut_inside_its_header_is_no_picture_and_no_crash(progressive, before):
    data = before + encoded(Image.fromarray(CT), "JPEG", progressive=progressive)
    for cut in range(2, data.index(b"\xff\xda") + 12):
        assert code_of(data[:cut]) in ("truncated", "corrupt", "not_an_image", "unsupported"), cut


@pytest.mark.parametrize("zeros", [1, 4, 64, 4096])
@pytest.mark.parametrize("name", JPEGS)
def test_zeros_in_place_of_pixels_and_end_do_not_make_a_jpeg_whole(name, zeros):
    data = jpeg(name)
    for cut in (3, 5, 8):
        assert code_of(data[:-cut] + b"\0" * zeros) == "truncated", cut
    assert open_picture(data[:-2] + b"\0" * zeros).tobytes() == open_picture(data).tobytes()


def with_thumbnail():
    """A JPEG whose EXIF holds another, smaller one."""
    thumbnail = encoded(Image.new("L", (16, 16), 200), "JPEG")
    exif = b"Exif\0\0" + b"II*\0\x08\0\0\0\0\0\0\0\0\0" + thumbnail
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif
    data = encoded(Image.fromarray(CT), "JPEG")
    return data[:2] + segment + data[2:]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "before",
    [
        b"PK\x03\x04" + b"\0" * 26,
        b"\x80\x05\x95" + b"\0" * 12,
        b"ID3\x04\0\0\0\0\0\x10APIC",
        b"%PDF-1.7\n",
        b"<!DOCTYPE html><html>",
        b"name.jpg" + b"\0" * 249 + b"ustar" + b"\0" * 250,
    ],
    ids=["zip", "pickle", "mp3", "pdf", "html", "tar"],
)
def test_a_picture_inside_another_file_is_not_taken_for_it(before):
    assert code_of(before + encoded(Image.fromarray(CT), "JPEG")) == "not_an_image"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("lost", [1, 2])
def test_the_thumbnail_of_a_picture_that_lost_its_start_is_not_taken_for_it(lost):
    data = with_thumbnail()
    assert open_picture(data).size == (128, 128)
    for damaged in (data[lost:], b"\0" * lost + data[lost:]):
        assert code_of(damaged) in ("not_an_image", "unsupported")


@pytest.mark.parametrize("size", [(512, 512), (40, 48)])
def test_an_icon_with_a_palette_is_opened_or_refused(size):
    with suppress(PictureError):
        assert open_picture(encoded(Image.new("L", size).convert("P"), "ICNS")).mode == "RGB"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fmt", ["TIFF", "GIF", "PNG", "WEBP"])
def test_a_later_frame_of_damaged_bytes_gives_a_picture_or_a_picture_error(fmt):
    frames = [Image.fromarray(CT // n).convert("RGB") for n in (1, 2, 3)]
    whole = encoded(frames[0], fmt, save_all=True, append_images=frames[1:])
    for damaged in damaged_copies(whole, 150):
        with suppress(PictureError):
            assert open_picture(damaged, 2).mode == "RGB"


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", ["u2", "i1", "f4", "f8"])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib"])
def test_damaged_bytes_of_a_deep_tiff_give_a_picture_or_a_picture_error(dtype, compression):
    whole = tiff(spread(dtype), photometric="minisblack", compression=compression)
    for damaged in damaged_copies(whole, 60, header=256):
        with suppress(PictureError):
            assert open_picture(damaged).mode == "RGB"


def test_integers_of_24_bits_are_refused():
    samples = np.frombuffer(b"".join((int(v) * 257).to_bytes(3, "little") for v in CT.ravel()), np.uint8)
    whole = bytearray(tiff(CT, photometric="minisblack"))
    page = tifffile.TiffFile(BytesIO(bytes(whole))).pages[0]
    for name, value in (("BitsPerSample", 24), ("StripByteCounts", samples.size), ("StripOffsets", len(whole))):
        tag = page.tags[name]
        width = 4 if tag.dtype == 4 else 2
        whole[tag.valueoffset : tag.valueoffset + width] = value.to_bytes(width, "little")
    assert code_of(bytes(whole) + samples.tobytes()) == "unsupported"


def test_a_deep_tiff_that_does_not_say_which_end_is_white_has_black_at_the_lowest():
    whole = tiff(spread("u2"), photometric="minisblack")
    tag = tifffile.TiffFile(BytesIO(whole)).pages[0].tags["PhotometricInterpretation"]
    assert (greys(whole[: tag.offset] + b"\xf0\xff" + whole[tag.offset + 2 :]) == windowed(spread("u2"))).all()


def test_a_tiff_of_8_bits_that_only_tifffile_opens_is_opened():
    assert (greys(tiff(255 - CT, photometric="miniswhite", extrasamples=None, compression="lzma")) == CT).all()


def test_premultiplied_deep_colours_are_what_the_same_in_8_bits_are():
    alpha = np.where(CT > 128, 65535, 30_000).astype(np.uint32)
    colour = (CT.astype(np.uint32) * 257 * alpha // 65535).astype(np.uint16)
    samples = np.dstack([colour, colour, colour, alpha.astype(np.uint16)])
    deep = greys(tiff(samples, photometric="rgb", extrasamples=["assocalpha"]))
    shallow = greys(tiff((samples >> 8).astype(np.uint8), photometric="rgb", extrasamples=["assocalpha"]))
    assert alike(deep, shallow, most=4)


def test_a_transparent_colour_of_a_deep_png_hides_nothing_and_decides_no_window():
    page = np.where(np.asarray(strokes()) > 127, 65535, 0).astype(np.uint16)
    white = deep_png(np.repeat(page[..., None], 3, axis=2), 2)
    at = white.index(b"IDAT") - 4
    body = struct.pack(">HHH", 65535, 65535, 65535)
    chunk = struct.pack(">I", 6) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))
    assert (greys(white[:at] + chunk + white[at:]) == page >> 8).all()
    deep = CT.astype(np.uint16) * 16
    deep[:40] = 65535
    outside = deep_png(np.repeat(deep[..., None], 3, axis=2), 2)
    at = outside.index(b"IDAT") - 4
    shades = greys(outside[:at] + chunk + outside[at:])
    assert (shades[:40] == 0).all()
    assert alike(shades[40:], windowed(CT[40:].astype(np.uint16) * 16), most=1)


@pytest.mark.parametrize("colour", [(0, 0, 0), (20, 20, 20), (30, 30, 30), (0, 0, 100)])
def test_dark_strokes_on_transparent_white_are_seen(colour):
    picture = Image.new("RGBA", (100, 100), (255, 255, 255, 0))
    ImageDraw.Draw(picture).rectangle((10, 10, 80, 80), outline=(*colour, 255), width=6)
    opened = open_picture(encoded(picture))
    assert (opened.getpixel((10, 10)), opened.getpixel((50, 50))) == (colour, WHITE)


@pytest.mark.parametrize("n_red", [1, 8, 30])
def test_black_and_red_strokes_on_nothing_are_all_seen(n_red):
    picture = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((10, 10, 80, 80), outline=(0, 0, 0, 255), width=4)
    draw.rectangle((20, 20, 60, 20 + n_red), fill=(255, 0, 0, 255))
    opened = open_picture(encoded(picture))
    assert [opened.getpixel(at) for at in ((10, 10), (22, 20), (90, 90))] == [BLACK, RED, WHITE]


def test_a_later_frame_of_a_deep_animation_is_that_frame():
    frames = [Image.fromarray(CT // n).convert("RGB") for n in (1, 2)]
    data = bytearray(encoded(frames[0], save_all=True, append_images=frames[1:]))
    assert open_picture(bytes(data), 2).tobytes() != open_picture(bytes(data), 1).tobytes()
    assert np.abs(greys_of(bytes(data), 2).astype(int) - CT // 2).max() <= 1


@pytest.mark.slow
def test_the_second_frame_of_a_tiff_of_many_pages_is_opened_at_once():
    """Counting its pages would take Pillow a minute."""
    script = (
        "import sys, time\n"
        "from rococap.data.images import open_picture\n"
        "data = sys.stdin.buffer.read()\n"
        "started = time.process_time()\n"
        "print(open_picture(data, 2).size)\n"
        "print(time.process_time() - started < 5)\n"
    )
    file = BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for _ in range(3000):
            writer.write(np.zeros((2, 2), np.uint8), photometric="minisblack", contiguous=False)
    run = subprocess.run([sys.executable, "-c", script], input=file.getvalue(), capture_output=True, check=True)
    assert run.stdout.decode().split() == ["(2,", "2)", "True"]


# ---- robustness


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
def test_damaged_bytes_give_a_picture_or_a_picture_error(fmt):
    whole = encoded(Image.open(PICTURES / "MR_small.png").convert("RGB"), fmt)
    for damaged in damaged_copies(whole, 150):
        with suppress(PictureError):
            assert open_picture(damaged).mode == "RGB"


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
        "from rococap.data.images import open_picture\n"
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
