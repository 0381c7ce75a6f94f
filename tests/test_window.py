"""Deep values -> 8 bits: what decides black and white, and what does not."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rococap.window import colours, windowed

CT = np.asarray(Image.open(Path(__file__).parent / "pictures" / "CT_small_raw16.png")).astype(np.int32)
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
    ("dtype", "factor"), [(np.uint16, 8), (np.uint16, 1), (np.uint32, 1 << 20), (np.uint64, 1 << 50)]
)
def test_colours_beyond_14_bits_stay_and_others_are_windowed(dtype, factor):
    rgb = np.repeat(CT[..., None], 3, axis=2).astype(dtype) * dtype(factor)
    everywhere = np.ones(CT.shape, dtype=bool)
    shades = colours(rgb, everywhere)
    is_full = int(rgb.max()) >> (8 * rgb.dtype.itemsize - 2) > 0
    expected = (rgb >> (8 * rgb.dtype.itemsize - 8)) if is_full else np.repeat(windowed(CT)[..., None], 3, axis=2)
    assert (shades == expected).all()


def test_a_label_does_not_make_12_bit_colours_full_range():
    rgb = np.repeat(with_values(CT, (LABEL, 65535))[..., None], 3, axis=2).astype(np.uint16)
    shades = colours(rgb, np.ones(CT.shape, dtype=bool))
    assert np.abs(shades[~LABEL][:, 0].astype(int) - without(LABEL)).max() <= 1


def test_nothing_but_padding_is_black():
    assert (windowed(np.full((4, 4), np.nan)) == 0).all()
    assert (windowed(np.zeros((4, 4)), np.zeros((4, 4), dtype=bool)) == 0).all()
