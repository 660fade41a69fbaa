"""Readers and writers of pictures: every mode, every refusal, and what is never changed without a word."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import full_disk
from made import pixels, save, save_png
from PIL import Image

from lightning_atrous.images import RGB, Reader, as_image, write_png

DEEP = (0.0, 65535.0)


def chw(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 0, 1)


# --- files


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (33, 2)])
def test_rgb_is_what_the_file_holds(tmp_path: Path, size: tuple[int, int]) -> None:
    image = RGB(save(tmp_path / "a.png", "RGB", *size))
    assert image.dtype == torch.uint8
    assert np.array_equal(image, chw(pixels(*size, 3)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "PA"])
def test_rgb_refuses_what_convert_takes(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / ("a.tif" if mode in ("CMYK", "PA") else "a.png"), mode)
    with Image.open(path) as image:
        stored, expected = image.mode, image.convert("RGBA" if image.mode in ("P", "PA") else "RGB").convert("RGB")
    with pytest.raises(
        ValueError, match=rf"a\.\w+ is a picture of mode {stored}, expected RGB.*reader\.mode \(--reader\) to .*convert"
    ):
        RGB(path)
    assert np.array_equal(Reader("convert")(path), chw(np.array(expected)))


def test_alpha_is_dropped_not_blended(tmp_path: Path) -> None:
    rgba = pixels(5, 7, 4)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.array_equal(Reader("convert")(tmp_path / "a.png"), chw(rgba[..., :3]))
    palette = Image.fromarray(pixels(5, 7, 1)[..., 0] % 4)
    palette.putpalette([9, 8, 7, 200, 100, 50, 1, 2, 3, 4, 5, 6])
    palette.save(tmp_path / "p.png", transparency=b"\x00\x80\xff")  # of which Pillow warns
    assert Reader("convert")(tmp_path / "p.png").shape == (3, 5, 7)
    assert set(Reader("convert")(tmp_path / "p.png")[0].unique().tolist()) <= {9, 200, 1, 4}


@pytest.mark.parametrize("reader", [RGB, Reader("convert"), Reader("grey", value_range=DEEP)])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits_are_not_cut_to_8(tmp_path: Path, reader: Reader, channels: int) -> None:
    path = save_png(tmp_path / "a.png", pixels(5, 7, channels, dtype=np.uint16))
    refused = r"mode RGBA? with 16 bits a channel, expected .* reader\.mode \(--reader\) to array"
    with pytest.raises(ValueError, match=refused):
        reader(path)
    with Image.open(path) as opened, pytest.raises(ValueError, match=refused):
        as_image(opened, reader)


def test_other_formats_of_16_bits_are_not_cut_either(tmp_path: Path) -> None:
    (tmp_path / "a.ppm").write_bytes(b"P6 2 2 65535\n" + bytes(24))
    with pytest.raises(ValueError, match="RGB with 16 bits"):
        RGB(tmp_path / "a.ppm")
    (tmp_path / "b.ppm").write_bytes(b"P6 2 2 255\n" + bytes(12))
    assert RGB(tmp_path / "b.ppm").shape == (3, 2, 2)
    for suffix in ("jpg", "bmp", "webp", "tif"):  # wide enough for a row of bytes that is mistaken for a depth
        assert RGB(save(tmp_path / f"a.{suffix}", width=400)).shape == (3, 5, 400)


def test_grey_is_one_channel_of_any_depth(tmp_path: Path) -> None:
    image = Reader("grey")(save(tmp_path / "l.png", "L"))
    assert (image.shape, image.dtype) == ((1, 5, 7), torch.uint8)
    deep = pixels(5, 7, dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "16.png")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "32.tif")
    for name, mode in (("16.png", "I;16"), ("32.tif", "I")):
        with pytest.raises(ValueError, match=rf"of mode {mode}, expected one grey channel.*value_range"):
            Reader("grey")(tmp_path / name)
        with pytest.raises(
            ValueError,
            match=rf"of mode {mode}, expected.*reader\.mode \(--reader\) to grey, with a reader\.value_range",
        ):
            Reader("convert")(tmp_path / name)
        image = Reader("grey", value_range=DEEP)(tmp_path / name)
        assert image.dtype == torch.float32
        np.testing.assert_allclose(image, deep[None] / 65535, rtol=1e-6)
    with pytest.raises(ValueError, match=r"of mode RGB, expected one grey channel.*reader\.mode \(--reader\) to rgb"):
        Reader("grey")(save(tmp_path / "c.png"))


@pytest.mark.parametrize("reader", [RGB, Reader("convert"), Reader("grey"), Reader("grey", value_range=DEEP)])
def test_pictures_are_turned_upright(tmp_path: Path, reader: Reader) -> None:
    dtype = np.uint16 if reader.value_range else np.uint8
    turned = np.zeros((4, 6, 3) if reader.out_channels == 3 else (4, 6), dtype)
    turned[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(turned).save(tmp_path / "a.png", exif=exif)
    image = reader(tmp_path / "a.png")
    assert image.shape == (reader.out_channels, 6, 4)
    assert image[0].nonzero().tolist() == [[0, 3]]
    with Image.open(tmp_path / "a.png") as opened:  # in memory it lines up with np.asarray
        assert as_image(opened, reader)[0].nonzero().tolist() == [[0, 0]]


def test_values_are_mapped_linearly_and_clipped(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[-50.0, 0, 100], [150, 200, np.inf]], ">f4"))
    image = Reader("array", 1, (0, 200))(tmp_path / "a.npy")
    assert image.tolist() == [[[0, 0, 0.5], [0.75, 1, 1]]]
    image = Reader("rgb", value_range=(0, 255))(save(tmp_path / "a.png"))
    np.testing.assert_allclose(image, chw(pixels(5, 7, 3)) / 255, rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_arrays_come_from_png(tmp_path: Path, channels: int, dtype: Any) -> None:
    array = pixels(5, 7, channels, dtype=dtype)
    path = save_png(tmp_path / "a.png", array)
    if dtype == np.uint8:
        assert np.array_equal(Reader("array", channels)(path), chw(array))
    else:
        with pytest.raises(
            ValueError, match=r"a\.png has values of type uint16, expected uint8; set reader\.value_range"
        ):
            Reader("array", channels)(path)
        np.testing.assert_allclose(Reader("array", channels, DEEP)(path), chw(array) / 65535, rtol=1e-6)
    with pytest.raises(ValueError, match=f"has {channels} channels, expected 6; set reader.channels"):
        Reader("array", 6)(path)


def test_arrays_come_from_npy_with_channels_first_or_last(tmp_path: Path) -> None:
    array = pixels(5, 7, 6)
    np.save(tmp_path / "last.npy", array)
    np.save(tmp_path / "first.npy", np.asfortranarray(chw(array)))
    for name in ("last.npy", "first.npy"):
        image = Reader("array", 6)(tmp_path / name)
        assert image.dtype == torch.uint8
        assert np.array_equal(image, chw(array))
    for shape in ((5, 7), (1, 5, 7), (5, 7, 1)):
        np.save(tmp_path / "grey.npy", pixels(*shape))
        assert Reader("array", 1)(tmp_path / "grey.npy").shape == (1, 5, 7)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_come_from_tiff(tmp_path: Path, planar: str, dtype: Any) -> None:
    tifffile = pytest.importorskip("tifffile")
    array = pixels(5, 7, 6, dtype=dtype)
    stored = array if planar == "contig" else chw(array)
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=planar)
    if dtype == np.uint8:
        assert np.array_equal(Reader("array", 6)(tmp_path / "a.tif"), chw(array))
    else:
        image = Reader("array", 6, (0, 1000))(tmp_path / "a.tif")
        np.testing.assert_allclose(image, np.clip(chw(array) / 1000, 0, 1), rtol=1e-5)


def test_tiff_without_its_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ValueError, match=r"needs the package tifffile; pip install 'lightning-atrous\[tiff\]'"):
        Reader("array", 3)(save(tmp_path / "a.tif"))


def _npy(path: Path, array: np.ndarray) -> None:
    np.save(path, array, allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "array", "says"),
    [
        ("a.npy", pixels(5, 7, 4), "a.npy has the shape (5, 7, 4), expected (C, H, W) or (H, W, C) with 6 channels"),
        ("a.npy", pixels(6, 7, 6), "in which 6 channels may come first or last"),
        ("a.npy", pixels(5, 7), "has the shape (5, 7)"),
        ("a.npy", pixels(6, 0, 7), "has the shape (6, 0, 7)"),
        ("a.npy", pixels(2, 6, 5, 7), "has the shape (2, 6, 5, 7)"),
        ("a.npy", pixels(6, 5, 7, dtype=np.uint16), "values of type uint16, expected uint8; set reader.value_range"),
        ("a.npy", pixels(6, 5, 7, dtype=np.float32), "values of type float32, expected uint8"),
        ("a.npy", pixels(6, 5, 7) > 9, "values of type bool, expected integers or floating numbers"),
        ("a.npy", np.zeros((6, 5, 7), complex), "values of type complex128"),
        ("a.npy", np.full((6, 5, 7), None), "a.npy cannot be decoded"),
        ("a.npy", b"\x93NUMPY\x01\x00", "a.npy cannot be decoded"),
        ("a.npy", None, "a.npy does not exist"),
        ("a.png", b"\x89PNG\r\n\x1a\n", "a.png cannot be decoded"),
        ("a.png", None, "a.png does not exist"),
        ("a.jpg", b"", "a.jpg is no file that reader.mode: array reads, expected one of .npy, .png, .tif, .tiff"),
    ],
)
def test_what_is_wrong_with_an_array_is_said_in_a_sentence(tmp_path: Path, name: str, array: Any, says: str) -> None:
    if isinstance(array, bytes):
        (tmp_path / name).write_bytes(array)
    elif array is not None:
        _npy(tmp_path / name, array)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        Reader("array", 6)(tmp_path / name)
    assert "\n" not in str(error.value)


def test_pixels_that_are_no_number_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[0.5, np.nan]]))
    with pytest.raises(ValueError, match=r"pixels that are no number \(nan\)"):
        Reader("array", 1, (0, 1))(tmp_path / "a.npy")


@pytest.mark.parametrize("mode", ["P", "1"])
def test_a_palette_is_no_channel(tmp_path: Path, mode: str) -> None:
    with pytest.raises(ValueError, match=r"a palette or fewer than 8 bits.*reader\.mode \(--reader\) to convert"):
        Reader("array", 3)(save(tmp_path / "a.png", mode))


def test_damage_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", height=90, width=90)
    path.write_bytes(path.read_bytes()[:2000])
    tiff = tmp_path / "a.tif"
    tiff.write_bytes(b"II*\0 nothing")
    readers = [(RGB, path), (Reader("convert"), path), (Reader("array", 3), path), (RGB, tiff)]
    for reader, file in readers:
        with pytest.raises(ValueError, match=rf"{file.name} cannot be decoded \(.*\); replace it with an intact file"):
            reader(file)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"mode": "gray"}, "no reader mode 'gray'; give one of rgb, convert, grey, array"),
        ({"mode": "array"}, "needs the number of channels, got None"),
        ({"mode": "array", "channels": 0}, "got 0"),
        ({"channels": 4}, "reader mode rgb has 3 channels, got channels: 4"),
        ({"mode": "grey", "channels": 3}, "reader mode grey has 1 channels"),
        ({"value_range": (1, 0)}, "the lower first, got [1.0, 0.0]"),
        ({"value_range": (0, float("inf"))}, "value_range must be two numbers"),
        ({"value_range": (0,)}, "value_range must be two numbers"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        Reader(**options)


def test_a_reader_knows_its_channels_and_equals_its_like() -> None:
    assert Reader() == Reader("rgb", 3)
    assert [r.out_channels for r in (RGB, Reader("convert"), Reader("grey"), Reader("array", 7))] == [3, 3, 1, 7]
    assert Reader("grey", value_range=[0, 1]) == Reader("grey", 1, (0.0, 1.0))  # type: ignore[arg-type]  # as from YAML


# --- memory


def test_arrays_and_tensors_become_what_the_file_would() -> None:
    rgb, grey = pixels(5, 7, 3), pixels(5, 7)
    expected = chw(rgb)
    for image in (Image.fromarray(rgb), rgb, rgb[..., ::-1][..., ::-1], torch.from_numpy(expected.copy())):
        assert np.array_equal(as_image(image), expected)
    rgb.flags.writeable = False
    assert as_image(rgb).dtype == torch.uint8
    as_float = as_image((rgb / 255).astype(np.float32))
    assert as_float.dtype == torch.float32
    np.testing.assert_allclose(as_float, expected / 255, rtol=1e-6)
    assert as_image(torch.zeros(2, 3, 5, 7)).shape == (2, 3, 5, 7)
    for image in (grey, grey[..., None], Image.fromarray(grey)):
        assert np.array_equal(as_image(image, Reader("grey")), grey[None])
        assert np.array_equal(as_image(image, Reader("convert")), np.stack([grey] * 3))
    rgba = pixels(5, 7, 4)
    for image in (rgba, Image.fromarray(rgba)):
        assert np.array_equal(as_image(image, Reader("convert")), chw(rgba[..., :3]))
        assert np.array_equal(as_image(image, Reader("array", 4)), chw(rgba))


def test_integers_in_memory_are_those_of_a_file_and_floats_are_not() -> None:
    reader = Reader("array", 2, (0, 1000))
    deep = pixels(5, 7, 2, dtype=np.uint16)
    expected = np.clip(chw(deep) / 1000, 0, 1)
    for image in (deep, chw(deep), torch.from_numpy(chw(deep).copy())):
        np.testing.assert_allclose(as_image(image, reader), expected, rtol=1e-6)
    half = np.full((5, 7, 2), 0.5)
    assert bool((as_image(half, reader) == 0.5).all())


@pytest.mark.parametrize(
    ("image", "reader", "says"),
    [
        ("photo.jpg", RGB, "got str; open a file with PIL.Image.open"),
        ([[1, 2]], RGB, "got list"),
        (pixels(5, 7), RGB, "the array has the shape (5, 7), expected (H, W, C) with 3 channels"),
        (pixels(3, 5, 7), RGB, "the array has the shape (3, 5, 7)"),
        (pixels(5, 7, 4), RGB, "the array has the shape (5, 7, 4)"),
        (pixels(0, 7, 3), RGB, "the array has the shape (0, 7, 3)"),
        (pixels(5, 7, 3), Reader("grey"), "with 1 channels"),
        (pixels(5, 7, 3, dtype=np.uint16), RGB, "the array has values of type uint16, expected uint8"),
        (pixels(5, 7, 3).astype(np.int64), RGB, "the array has values of type int64"),
        (pixels(5, 7, 3) > 3, RGB, "the array holds values of type bool"),
        (pixels(5, 7, 3).astype(np.float32), RGB, "the array has values from 0 to 255, expected floating ones in 0..1"),
        (np.full((5, 7, 3), np.nan), RGB, "the array has values from nan to nan"),
        (torch.zeros(5, 7), RGB, "the tensor has the shape (5, 7)"),
        (torch.zeros(5, 7, 3), RGB, "expected (C, H, W) or (B, C, H, W) with 3 channels"),
        (torch.zeros(0, 3, 5, 7), RGB, "the tensor has the shape (0, 3, 5, 7)"),
        (torch.zeros(3, 5, 7) - 1, RGB, "the tensor has values from -1 to -1"),
        (torch.zeros(3, 5, 7, dtype=torch.int64), RGB, "the tensor has values of type int64, expected uint8"),
        (Image.new("L", (7, 5)), RGB, "picture of mode L, expected RGB"),
        (Image.new("RGB", (7, 5)), Reader("array", 4), "picture of mode RGB, expected 4 channels"),
        (Image.new("I;16", (7, 5)), Reader("convert"), "picture of mode I;16"),
    ],
)
def test_what_is_no_image_is_said_in_a_sentence(image: Any, reader: Reader, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        as_image(image, reader)
    assert "\n" not in str(error.value)


# --- writing


@pytest.mark.parametrize("array", [pixels(5, 7), pixels(5, 7, dtype=np.uint16), pixels(5, 7, 3)])
def test_a_png_comes_back_as_it_was(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "a" / "b" / "c.png"
    for _ in range(2):  # over itself too
        write_png(path, array)
    assert np.array_equal(np.asarray(Image.open(path)), array)
    assert [file.name for file in path.parent.iterdir()] == ["c.png"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_png(path, pixels(5, 7))
    with full_disk(2000), pytest.raises(ValueError, match=r"a\.png cannot be written \(File too large\); make room"):
        write_png(path, pixels(90, 90))
    assert np.array_equal(np.asarray(Image.open(path)), pixels(5, 7))
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/a\.png cannot be written"):
        write_png(tmp_path / "file" / "a.png", pixels(5, 7))
