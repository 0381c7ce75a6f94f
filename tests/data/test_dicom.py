"""DICOM as scanners and pydicom's own test files have it."""

import importlib.util
import logging
import subprocess
import sys
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from places import PICTURES
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from rococap.data import dicom
from rococap.data.images import as_file, open_picture, suffix_of
from rococap.data.window import windowed
from rococap.errors import PictureError

FILES = Path(pydicom.__file__).parent / "data" / "test_files"
CT = np.asarray(Image.open(PICTURES / "CT_small_raw16.png")).astype(np.uint16)


def file_of(pixels, **attributes):
    """A DICOM file of grey pixels, with a patient's name; `frames` is how many there are."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = Dataset()
    data.file_meta = meta
    data.PatientName, data.SOPClassUID, data.SOPInstanceUID = "Doe^Jane", CTImageStorage, "1.2.3"
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 8 * pixels.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        data.NumberOfFrames = len(pixels)
    for name, value in attributes.items():
        setattr(data, name, value)
    data.PixelData = pixels.tobytes()
    file = BytesIO()
    data.save_as(file, enforce_file_format=True)
    return file.getvalue()


def greys(data, frame=1):
    pixels = np.asarray(open_picture(data, frame))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def through(values, center, width):
    """PS3.3, C.11.2.1.2: the linear VOI function, onto 0 to 255."""
    return np.rint((((values - (center - 0.5)) / (width - 1)) + 0.5).clip(0, 1) * 255)


def test_the_window_of_the_file_is_applied_to_rescaled_values():
    data = file_of(CT, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    assert np.abs(greys(data) - through(CT * 2.0 - 1024, 40, 400)).max() <= 1


def test_of_several_windows_the_first_counts():
    data = file_of(CT, WindowCenter=[800, 40], WindowWidth=[300, 400])
    assert np.abs(greys(data) - through(CT.astype(float), 800, 300)).max() <= 1


def test_without_a_window_ours_is_applied():
    assert (greys(file_of(CT)) == windowed(CT)).all()
    assert (greys(file_of(CT, RescaleSlope=3, RescaleIntercept=-1024)) == windowed(CT)).all()


@pytest.mark.parametrize(("center", "width"), [(40, 0), (-9000, 10), ("", "")])
def test_a_window_that_shows_nothing_is_replaced_by_ours(center, width):
    assert (greys(file_of(CT, WindowCenter=center, WindowWidth=width)) == windowed(CT)).all()


def test_monochrome1_is_inverted():
    inverted = file_of(CT.max() - CT, PhotometricInterpretation="MONOCHROME1")
    assert np.abs(greys(inverted).astype(int) - windowed(CT)).max() <= 1
    window = {"WindowCenter": 1000, "WindowWidth": 1500}
    assert (
        greys(file_of(CT, PhotometricInterpretation="MONOCHROME1", **window)) == 255 - greys(file_of(CT, **window))
    ).all()


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_pixel_padding_is_black_and_decides_no_window(photometric):
    padded = CT.copy().astype(np.int16)
    padded[:30] = -2000
    data = file_of(padded, PixelPaddingValue=-2000, PhotometricInterpretation=photometric)
    shades = windowed(CT[30:])
    assert (greys(data)[:30] == 0).all()
    assert (greys(data)[30:] == (shades if photometric == "MONOCHROME2" else 255 - shades)).all()


def test_a_range_of_padding_is_left_out_whole():
    padded = CT.copy().astype(np.int16)
    padded[:10], padded[10:20] = -2000, -1990
    data = file_of(padded, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1985)
    assert (greys(data)[:20] == 0).all()
    assert (greys(data)[20:] == windowed(CT[20:])).all()


def voi_table(data, bits):
    table = Dataset()
    table.LUTDescriptor = [4096, 0, bits]
    table.add_new("LUTData", "OW" if isinstance(data, bytes) else "US", data)
    return Sequence([table])


def test_a_voi_table_is_applied():
    table = voi_table([4095 - n for n in range(4096)], 12)
    data = file_of(CT, VOILUTSequence=table, BitsStored=12, HighBit=11)
    assert (greys(data) == np.rint((4095 - CT) * (255 / 4095))).all()


def test_a_voi_table_that_was_cut_short_is_left_to_the_window():
    data = file_of(CT, VOILUTSequence=voi_table(bytes(100), 8), WindowCenter=800, WindowWidth=300)
    assert np.abs(greys(data) - through(CT.astype(float), 800, 300)).max() <= 1


def test_8_bits_without_a_window_stay_as_they_are():
    grey = (CT >> 4).astype(np.uint8)
    assert (greys(file_of(grey)) == grey).all()


def test_enhanced_objects_say_rescaling_and_window_by_frame():
    def group(center):
        transformation, voi, frame = Dataset(), Dataset(), Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = 1, -1000
        voi.WindowCenter, voi.WindowWidth = center, 500
        frame.PixelValueTransformationSequence, frame.FrameVOILUTSequence = Sequence([transformation]), Sequence([voi])
        return frame

    groups = Sequence([group(0), group(300)])
    data = file_of(np.stack([CT, CT]), PerFrameFunctionalGroupsSequence=groups)
    for frame, center in ((1, 0), (2, 300)):
        assert np.abs(greys(data, frame) - through(CT - 1000.0, center, 500)).max() <= 1


def test_the_frame_that_is_asked_for_is_opened():
    data = file_of(np.stack([CT, CT[::-1]]))
    assert (greys(data, 2) == windowed(CT)[::-1]).all()
    with pytest.raises(PictureError, match="The file has 2 frames, but frame 3 was requested"):
        open_picture(data, 3)


# ---- pydicom's files

SAME_MR = ("RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded")


@pytest.mark.parametrize("name", SAME_MR)
def test_every_coding_of_one_picture_gives_that_picture(name):
    plain = open_picture((FILES / "MR_small.dcm").read_bytes())
    assert open_picture((FILES / f"MR_small_{name}.dcm").read_bytes()).tobytes() == plain.tobytes()


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_dcmtk_+eb+cr",  # JPEG baseline, RGB
        "SC_rgb_jpeg_dcmtk",  # JPEG baseline, YBR
        "SC_rgb_jpeg_gdcm",  # JPEG lossless
        "SC_rgb_gdcm_KY",  # JPEG 2000
        "SC_rgb_jls_lossy_line",  # JPEG-LS
        "SC_rgb_rle",
        "SC_rgb_rle_16bit",
        "SC_rgb_rle_32bit",
        "SC_ybr_full_422_uncompressed",
    ],
)
def test_colours_are_the_same_in_every_coding(name):
    picture = open_picture((FILES / f"{name}.dcm").read_bytes())
    assert picture.size == (100, 100)
    seen = [picture.getpixel((50, row)) for row in (5, 25, 45, 65, 95)]
    meant = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)]
    assert np.abs(np.array(seen) - np.array(meant)).max() <= 5


def test_a_jpeg_of_12_bits_is_opened():
    """Neither Pillow nor GDCM reads it: a bone scan, bright in the middle of its width."""
    shades = greys((FILES / "JPEG-lossy.dcm").read_bytes())
    assert shades.shape == (1024, 256)
    assert shades[:, 100:150].mean() > 3 * shades[:, :40].mean()
    assert len(np.unique(shades)) > 100


def test_a_palette_gives_its_colours():
    opened = np.asarray(open_picture((FILES / "examples_palette.dcm").read_bytes()))
    header = pydicom.dcmread(FILES / "examples_palette.dcm")
    table = pydicom.pixels.processing.apply_color_lut(header.pixel_array, header)
    assert (opened == table >> 8).all()


def test_1_bit_is_black_and_white():
    assert np.unique(greys((FILES / "liver_1frame.dcm").read_bytes())).tolist() == [0, 255]


def test_a_file_without_preamble_is_opened():
    whole = (FILES / "MR_small_implicit.dcm").read_bytes()
    header = pydicom.dcmread(BytesIO(whole))
    bare = BytesIO()
    header.save_as(bare, implicit_vr=True, little_endian=True)
    assert bare.getvalue()[128:132] != b"DICM" or suffix_of(bare.getvalue()) == ".dcm"
    without_meta = whole[132 + 12 + header.file_meta.FileMetaInformationGroupLength :]
    assert open_picture(without_meta).tobytes() == open_picture(whole).tobytes()


# ---- refusals


def code_and_message(data):
    with pytest.raises(PictureError) as caught:
        open_picture(data)
    return caught.value.code, str(caught.value)


def test_a_file_without_pixels_holds_no_picture():
    message = "This DICOM file contains no picture: leave it out, then retry."
    assert code_and_message((FILES / "reportsi.dcm").read_bytes()) == ("not_an_image", message)


def test_pixels_that_end_too_early_are_truncated():
    assert code_and_message((FILES / "MR_truncated.dcm").read_bytes())[0] == "truncated"
    assert code_and_message((FILES / "MR_small.dcm").read_bytes()[:-500])[0] == "truncated"


def test_pixels_that_cannot_be_decoded_are_named_by_their_coding():
    code, message = code_and_message((FILES / "JPEG2000-embedded-sequence-delimiter.dcm").read_bytes())
    assert (code, "(JPEG 2000 Image Compression)" in message) == ("corrupt", True)


def test_a_picture_that_is_too_large_is_refused_by_its_header():
    assert code_and_message(file_of(CT, Rows=10_000, Columns=10_000))[0] == "too_large"


@pytest.mark.parametrize("name", ["CT_small", "MR_small_RLE", "JPEG2000", "examples_palette"])
def test_damaged_bytes_give_a_picture_or_a_picture_error(name):
    whole = (FILES / f"{name}.dcm").read_bytes()
    dice = np.random.default_rng(7)
    for _ in range(40):
        damaged = bytearray(whole)
        for at in dice.integers(132, min(len(whole), 3000), 6):
            damaged[at] = dice.integers(256)
        with suppress(PictureError):
            assert open_picture(bytes(damaged)).mode == "RGB"


def test_without_the_extra_the_message_says_how_to_get_it(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *more: None if name == "pydicom" else find(name, *more)
    )
    assert code_and_message(file_of(CT)) == ("unsupported", dicom.EXTRA_IS_MISSING)


# ---- nobody's name


def test_no_header_text_is_logged_or_told(caplog, capfd):
    broken = file_of(CT, StudyDate="Doe^Jane", PatientBirthDate="Doe^Jane", WindowCenter=40, WindowWidth=400)
    with caplog.at_level(logging.DEBUG):
        open_picture(broken)
        _, message = code_and_message(broken[:-9000])
        _, other = code_and_message(file_of(CT, PhotometricInterpretation="DOE^JANE"))
    printed = "".join(capfd.readouterr()) + caplog.text + message + other
    assert "doe" not in printed.lower()


def test_what_is_published_of_it_is_a_png_of_its_pixels():
    data = file_of(CT)
    ending, published = as_file(data)
    assert ending == ".png"
    assert b"Doe" not in published
    assert Image.open(BytesIO(published)).convert("RGB").tobytes() == open_picture(data).tobytes()


# ---- what older writers, and hostile ones, made


def test_values_at_the_upper_end_of_their_word_are_read_there():
    shifted = (CT << 4).astype(np.uint16)
    data = file_of(shifted, BitsStored=12, HighBit=15)
    assert (greys(data) == windowed(CT)).all()
    window = {"WindowCenter": 800, "WindowWidth": 300}
    assert np.abs(greys(file_of(shifted, BitsStored=12, HighBit=15, **window)) - through(CT * 1.0, 800, 300)).max() <= 1


def test_a_voi_table_of_bytes_in_words_is_applied():
    words = np.arange(4096, dtype="<u2") // 16
    data = file_of(CT, VOILUTSequence=voi_table(words.tobytes(), 8), BitsStored=12, HighBit=11)
    assert np.abs(greys(data) - CT // 16).max() <= 1


def test_a_voi_table_of_12_bits_that_says_16_is_applied():
    data = file_of(CT, VOILUTSequence=voi_table(list(range(4096)), 16), BitsStored=12, HighBit=11)
    assert (greys(data) == np.rint(CT * (255 / 4095))).all()


def test_a_rescale_slope_of_0_is_ignored():
    slope = {"RescaleSlope": 0, "RescaleIntercept": 0}
    assert (greys(file_of(CT, **slope)) == windowed(CT)).all()
    seen = greys(file_of(CT, **slope, WindowCenter=800, WindowWidth=300))
    assert np.abs(seen - through(CT * 1.0, 800, 300)).max() <= 1


@pytest.mark.parametrize("n", [0, -3])
def test_a_number_of_frames_that_cannot_be_is_one(n):
    assert (greys(file_of(CT, NumberOfFrames=n)) == windowed(CT)).all()


@pytest.mark.slow
def test_a_file_that_inflates_to_gigabytes_is_refused():
    whole = (FILES / "image_dfl.dcm").read_bytes()
    meta = 144 + int.from_bytes(whole[140:144], "little")
    deflating = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = b"".join(deflating.compress(bytes(1 << 24)) for _ in range(40)) + deflating.flush()
    assert code_and_message(whole[:meta] + bomb)[0] == "too_large"
    assert open_picture(whole).size == (512, 512)


def test_damaged_jpeg_ends_no_process():
    """By GDCM, the first of these ended it."""
    whole = (FILES / "SC_rgb_small_odd_jpeg.dcm").read_bytes()
    start = whole.index(b"\xff\xd8\xff")
    script = (
        "import sys\n"
        "from rococap.data.images import open_picture\n"
        "from rococap.errors import PictureError\n"
        "whole, start = sys.stdin.buffer.read(), int(sys.argv[1])\n"
        "for at in range(start + 2, len(whole)):\n"
        "    for value in (0, 255):\n"
        "        try: open_picture(whole[:at] + bytes([value]) + whole[at + 1 :])\n"
        "        except PictureError: pass\n"
        "print('alive')\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(start)], input=whole, capture_output=True)
    assert run.stdout == b"alive\n", run.stderr[-500:]
