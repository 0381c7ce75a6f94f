"""Deep values -> 8 bits: what decides black and white, and what does not."""

import tracemalloc
import warnings

import numpy as np
import pytest
from PIL import Image, ImageDraw
from places import PICTURES

from rococap.data.window import colours, windowed

CT = np.asarray(Image.open(PICTURES / "CT_small_raw16.png")).astype(np.int32)
"""Values from 0 to 2063."""

ROWS, COLUMNS = np.ogrid[: CT.shape[0], : CT.shape[1]]
OUTSIDE = (ROWS - 64) ** 2 + (COLUMNS - 64) ** 2 > 60**2
"""The corners around a round field of view: 31 % of the pixels."""
LABEL = (ROWS < 12) & (COLUMNS < 40)


def with_values(values, *changes):
    changed = values.copy()
    for where, value in changes:
        changed[where] = value
    return changed


def without(where):
    """The shades that the rest of the picture has by itself."""
    return windowed(CT[~where])


@pytest.mark.parametrize(
    ("values", "padding", "shade"),
    [
        (CT, -2000, 0),
        (CT.astype(np.int16), -3024, 0),
        (CT.astype(np.int16), -32768, 0),
        ((CT + 32768 - 1024).astype(np.uint16), 0, 0),
        ((CT + 2000).astype(np.uint16), 0, 0),
        (CT.astype(np.uint16), 63536, 255),
        (CT.astype(np.float32), -9999.0, 0),
        (CT.astype(np.float32), -1e30, 0),
        (CT.astype(np.float64), 1e30, 255),
        (CT.astype(np.float32), np.nan, 0),
        (CT.astype(np.float32), -np.inf, 0),
    ],
)
def test_padding_outside_the_field_of_view_does_not_decide_the_window(values, padding, shade):
    shades = windowed(with_values(values, (OUTSIDE, padding)))
    assert (shades[OUTSIDE] == shade).all()
    assert np.abs(shades[~OUTSIDE].astype(int) - without(OUTSIDE)).max() <= 1


@pytest.mark.parametrize("value", [65535, 32767, 10_000, 4095])
def test_a_label_that_was_burnt_in_does_not_decide_the_window(value):
    shades = windowed(with_values(CT.astype(np.uint16), (LABEL, value)))
    assert (shades[LABEL] == 255).all()
    assert (shades[~LABEL] == without(LABEL)).all()


def test_padding_and_a_label_and_an_offset_may_come_together():
    shades = windowed(with_values((CT + 31_744).astype(np.uint16), (OUTSIDE, 0), (LABEL, 65535)))
    both = OUTSIDE | LABEL
    assert (shades[OUTSIDE & ~LABEL] == 0).all()
    assert (shades[LABEL] == 255).all()
    assert (shades[~both] == without(both)).all()


def letters(size):
    """The share of a label at each pixel, with the smooth edges that drawn letters have."""
    large = Image.new("L", (4 * size[0], 4 * size[1]))
    ImageDraw.Draw(large).text((20, 20), "R  AXIAL CT\nJ. D. 1/24", fill=255, font_size=44)
    return np.asarray(large.resize(size, Image.Resampling.BOX)) / 255


@pytest.mark.parametrize("value", [65535, 20_000])
def test_smooth_letters_do_not_decide_the_window(value):
    share = letters(CT.shape[::-1])
    assert (share == 1).mean() > 0.001
    assert ((share > 0) & (share < 1)).mean() > 0.02
    shades = windowed(np.rint(CT * (1 - share) + value * share).astype(np.uint16))
    assert np.abs(shades.astype(int) - windowed(CT))[share == 0].max() <= 12
    assert (shades[share == 1] == 255).all()


@pytest.mark.parametrize("offset", [32_768 - 1024, 20_000])
def test_the_resampled_edge_of_padding_does_not_decide_the_window(offset):
    share = np.clip(62 - np.sqrt((ROWS - 64) ** 2 + (COLUMNS - 64) ** 2), 0, 1)
    shades = windowed(np.rint((CT + offset) * share).astype(np.uint16))
    assert np.abs(shades.astype(int) - windowed(CT))[share == 1].max() <= 12
    assert (shades[share == 0] == 0).all()


def test_one_odd_pixel_beside_padding_changes_nothing():
    padded = with_values((CT + 31_744).astype(np.uint16), (OUTSIDE, 0), ((ROWS == 0) & (COLUMNS == 0), 1))
    assert (windowed(padded)[~OUTSIDE] == without(OUTSIDE)).all()


def test_numbers_at_the_ends_of_their_type_make_no_noise():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert windowed(np.array([[-1e308, 0.0, 1e308]])).tolist() == [[0, 128, 255]]


def test_a_picture_of_many_megapixels_takes_little_more_than_itself():
    tracemalloc.start()
    shades = windowed(np.tile(CT.astype(np.uint16), (40, 40)))
    peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    assert peak_mb < 52 + 52 + 26 + 180, "26 megapixels, twice in 16 bits, once in 8, and what decides"
    assert np.abs(shades[:128, :128].astype(int) - windowed(CT)).max() <= 1


def test_two_values_of_padding_are_both_left_out():
    outer = (ROWS - 64) ** 2 + (COLUMNS - 64) ** 2 > 75**2
    shades = windowed(with_values(CT, (OUTSIDE, -2000), (outer, -4000)))
    assert (shades[~OUTSIDE] == without(OUTSIDE)).all()


def test_a_background_that_joins_the_picture_is_part_of_it():
    """Air at 0 is frequent, and not far from the rest."""
    values = with_values(CT, (OUTSIDE, 0))
    black, white = np.percentile(values, (0.5, 99.5))
    expected = np.rint(((values - black) / (white - black)).clip(0, 1) * 255)
    assert np.abs(windowed(values) - expected).max() <= 1


def test_all_levels_of_a_drawing_count():
    levels = np.repeat(np.array([0, 1, 1000, 65535], dtype=np.uint16), 500).reshape(40, 50)
    assert [int(windowed(levels)[row, 0]) for row in (0, 10, 20, 30)] == [0, 0, 4, 255]


def test_a_mask_of_two_levels_is_black_and_white():
    mask = np.where(OUTSIDE, 0, 40_000).astype(np.uint16)
    assert (windowed(mask) == np.where(OUTSIDE, 0, 255)).all()


def test_a_few_hot_spots_are_cut_and_not_taken_for_labels():
    spots = ROWS * 128 + COLUMNS < 20
    shades = windowed(with_values(CT, (spots, 60_000)))
    assert (shades[spots] == 255).all()
    assert np.abs(shades.astype(int) - windowed(CT).astype(int))[~spots].max() <= 6


def test_values_that_do_not_fit_into_floats_of_32_bits_keep_their_contrast():
    far = CT.astype(np.uint32) + 4_000_000_000
    assert (windowed(far) == windowed(CT)).all()


@pytest.mark.parametrize(
    ("dtype", "factor"), [(np.uint16, 16), (np.uint16, 4), (np.uint16, 1), (np.uint32, 1 << 20), (np.uint64, 1 << 50)]
)
def test_colours_beyond_14_bits_stay_and_others_are_windowed(dtype, factor):
    rgb = np.repeat(CT[..., None], 3, axis=2).astype(dtype) * dtype(factor)
    everywhere = np.ones(CT.shape, dtype=bool)
    shades = colours(rgb, everywhere)
    is_full = factor in (16, 1 << 20)
    expected = (rgb >> (8 * rgb.dtype.itemsize - 8)) if is_full else np.repeat(windowed(CT)[..., None], 3, axis=2)
    assert (shades == expected).all()


def test_a_label_does_not_make_12_bit_colours_full_range():
    rgb = np.repeat(with_values(CT, (LABEL, 65535))[..., None], 3, axis=2).astype(np.uint16)
    shades = colours(rgb, np.ones(CT.shape, dtype=bool))
    assert np.abs(shades[~LABEL][:, 0].astype(int) - without(LABEL)).max() <= 1


def test_nothing_but_padding_is_black():
    assert (windowed(np.full((4, 4), np.nan)) == 0).all()
    assert (windowed(np.zeros((4, 4)), np.zeros((4, 4), dtype=bool)) == 0).all()
