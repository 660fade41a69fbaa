"""Pictures and masks: files into tensors, what Python users hold into tensors, and pixels into PNG files."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, PngImagePlugin
from torch import Tensor
from torchvision import tv_tensors

from lightning_atrous.arrays import ARRAYS, channels_first, damaged, missing, read_array, to_tensor
from lightning_atrous.files import whole_file

__all__ = ["RGB", "Reader", "as_image", "read_mask", "write_png"]

Mode = Literal["rgb", "convert", "grey", "array"]

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
OWN_CHANNELS = {"rgb": 3, "convert": 3, "grey": 1}
EXPECTED = {"rgb": "RGB of 8 bits", "convert": "8 bits a channel", "grey": "one grey channel of 8 bits"}
DEEP_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Pillow's modes of one channel with more than 8 bits."""
ORIENTATION = 0x0112
"""The tag of EXIF."""


@dataclass(frozen=True)
class Reader:
    """How an image file becomes an image tensor. A checkpoint keeps it, so that it knows how to read files itself.

    Args:
        mode: ``rgb`` takes 8-bit RGB pictures and nothing else; ``convert`` makes RGB of any 8-bit picture (grey,
            palette, CMYK, with alpha, which is dropped); ``grey`` takes one channel; ``array`` takes the channels
            as they stand in a ``.npy`` file, a TIFF or a PNG. All but ``array`` turn a picture upright as its EXIF
            orientation says.
        channels: Of the files, for ``array``; the other modes have their own.
        value_range: The values that become 0 and 1, linearly; beyond them is clipped. The image is then float32.
            Needed for everything deeper than 8 bits.

    Raises:
        ValueError: Options that contradict each other; on reading, a file that is missing, damaged or not of the kind.
    """

    mode: Mode = "rgb"
    channels: int | None = None
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"there is no reader mode '{self.mode}'; give one of {', '.join(get_args(Mode))}")
        own = OWN_CHANNELS.get(self.mode)
        if own is None and (self.channels is None or self.channels < 1):
            raise ValueError(f"reader mode array needs the number of channels, got {self.channels}; give channels")
        if own is not None:
            if self.channels not in (None, own):
                raise ValueError(
                    f"reader mode {self.mode} has {own} channels, got channels: {self.channels}; "
                    "leave it out or take mode array"
                )
            object.__setattr__(self, "channels", None)  # one form, so that another mode can be laid over it
        if self.value_range is not None:
            value_range = tuple(float(value) for value in self.value_range)
            if len(value_range) != 2 or not -math.inf < value_range[0] < value_range[1] < math.inf:
                raise ValueError(
                    f"value_range must be two numbers, the lower first, got {list(value_range)}; try [0, 65535]"
                )
            object.__setattr__(self, "value_range", value_range)

    def __str__(self) -> str:
        limits = "" if self.value_range is None else f", value_range: {list(self.value_range)}"
        return f"mode: {self.mode}, channels: {self.out_channels}{limits}"

    @property
    def out_channels(self) -> int:
        """Of every image that is read."""
        return self.channels or OWN_CHANNELS[self.mode]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files that are looked for in folders, in lower case."""
        return ARRAYS if self.mode == "array" else PICTURES

    def __call__(self, path: Path) -> tv_tensors.Image:
        """Read a file: ``(C, H, W)``, uint8, or float32 in 0..1 with a `value_range`."""
        return self.window(path, slice(None), slice(None))[0]

    def window(self, path: Path, rows: slice, columns: slice) -> tuple[tv_tensors.Image, tuple[int, int]]:
        """Read a part of a file: what `__call__` would give there, in less time.

        Args:
            path: Of the file.
            rows: Of the upright image, counted from its top, without a step. What a PNG holds below them is not
                decoded, so that damage there is not found.
            columns: Likewise, from its left.

        Returns:
            The part, ``(C, h, w)``, and the height and width of the whole image.

        Raises:
            ValueError: As for the whole file.
        """
        if self.mode == "array":
            whole = read_array(path, self.out_channels)
            image, size = whole[:, rows, columns], (whole.shape[1], whole.shape[2])
        else:
            picture, deep = _open(path, upright=True, last_row=rows.stop)
            size = (picture.height, picture.width)
            top, bottom, _ = rows.indices(picture.height)
            left, right, _ = columns.indices(picture.width)
            if (bottom - top, right - left) != size:
                picture = picture.crop((left, top, right, bottom))
            image = torch.from_numpy(_pixels(picture, deep, self, str(path))).permute(2, 0, 1)
        return tv_tensors.Image(_scaled(image, self, str(path))), size


RGB = Reader()
"""8-bit RGB pictures, and nothing else."""


def read_mask(path: Path) -> np.ndarray:
    """Class indices ``(H, W)``, in the file's own integer type; those of a palette picture, not its colours.

    Raises:
        ValueError: The file is missing, damaged, or holds colours instead of indices.
    """
    image, _ = _open(path)
    if image.mode not in ("1", "L", "P", "I", "I;16"):
        raise ValueError(
            f"{path} is a mask of mode {image.mode}, expected class indices in one grey or palette channel; "
            "convert its colours to indices"
        )
    labels = np.array(image)
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def as_image(image: Image.Image | np.ndarray | Tensor, reader: Reader = RGB) -> Tensor:
    """What is in memory → ``(C, H, W)`` or ``(B, C, H, W)``, uint8 or floating in 0..1, as the model takes it.

    Args:
        image: A PIL picture of the mode that the reader takes, as it is, whatever its EXIF orientation says; an array
            ``(H, W, C)``, or ``(H, W)`` if it is grey; or a tensor ``(C, H, W)`` or ``(B, C, H, W)``. Floating values
            are in 0..1; integers are those of a file, so that all but uint8 need the reader's `value_range`.
        reader: How files are read.

    Raises:
        ValueError: Another type, mode, shape or range.
    """
    if isinstance(image, Image.Image):
        deep = _is_deep(image)
        pixels = _pixels(image, deep, reader, "the picture")
        return _scaled(torch.from_numpy(pixels).permute(2, 0, 1), reader, "the picture")
    if isinstance(image, np.ndarray):
        name, x = "the array", _from_array(image, reader)
    elif isinstance(image, Tensor):
        name, x = "the tensor", image.as_subclass(Tensor)
        if x.ndim not in (3, 4) or x.shape[-3] != reader.out_channels or 0 in x.shape:
            raise ValueError(
                f"the tensor has the shape {tuple(x.shape)}, expected (C, H, W) or (B, C, H, W) with "
                f"{reader.out_channels} channels; permute it, or give the channels that the model was trained on"
            )
    else:
        raise ValueError(
            f"expected a PIL picture, a NumPy array or a tensor, got {type(image).__name__}; "
            "open a file with PIL.Image.open first"
        )
    if not x.is_floating_point():
        return _scaled(x, reader, name)
    if not bool((x.amin() >= 0) & (x.amax() <= 1)):
        raise ValueError(
            f"{name} has values from {x.amin():g} to {x.amax():g}, expected floating ones in 0..1; "
            "divide by the largest value they can have, or give uint8"
        )
    return x


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write a PNG that is there whole or not at all, and the folders it lies in.

    Args:
        path: Whatever stands there is replaced.
        pixels: uint8 or uint16 ``(H, W)``, or uint8 ``(H, W, 3)``.

    Raises:
        ValueError: The disk is full, a permission is missing, and the like.
    """
    with whole_file(path, durable=False) as file:
        Image.fromarray(pixels).save(file, format="PNG", compress_level=1)  # higher ones cost more time than they save


def _open(path: Path, *, upright: bool = False, last_row: int | None = None) -> tuple[Image.Image, bool]:
    """A picture, loaded, and whether the file was colour of more than 8 bits a channel.

    Args:
        path: Of the file.
        upright: Whether to turn it as its EXIF orientation says.
        last_row: Where the rows that are needed end; beyond it there may be anything.
    """
    try:
        with Image.open(path) as image:
            deep = _is_deep(image)
            short = last_row is not None and _end_at(image, last_row)
            image.load()
        if short and image.getexif().get(ORIENTATION, 1) != 1:  # which may stand behind the pixels
            return _open(path, upright=upright)
        return ImageOps.exif_transpose(image) if upright else image, deep
    except FileNotFoundError:
        raise missing(path) from None
    except Exception as error:  # Pillow's words for damage: each format has its own
        raise damaged(path, error) from error


def _end_at(image: Image.Image, row: int) -> bool:
    """Have only the rows above one decoded, if the file that is not loaded yet is a PNG of one picture, row by row."""
    if not isinstance(image, PngImagePlugin.PngImageFile) or image.is_animated or image.info.get("interlace"):
        return False
    codec, _, offset, arguments = image.tile[0]
    rows = (0, 0, image.width, min(max(row, 1), image.height))
    image.tile = [(codec, rows, offset, arguments)]  # type: ignore[list-item]  # a named tuple since Pillow 11.1
    return True


def _is_deep(image: Image.Image) -> bool:
    """Whether a file that is not loaded yet holds colours of 16 bits, of which Pillow drops 8 without a word."""
    if image.mode in DEEP_GREY or not isinstance(image, ImageFile.ImageFile):
        return False
    for codec, _, _, given in image.tile:
        # a raw mode such as RGB;16B, alone or first; of PPM, the mode and the largest value
        arguments = [given] if isinstance(given, str) else list(given or ())
        if any(isinstance(argument, str) and re.search(r";16[BLN]", argument) for argument in arguments):
            return True
        if codec.startswith("ppm") and any(isinstance(argument, int) and argument > 255 for argument in arguments):
            return True
    return False


def _pixels(image: Image.Image, deep: bool, reader: Reader, name: str) -> np.ndarray:
    """A picture's pixels ``(H, W, C)`` in its own type, if the reader takes its mode."""
    mode = image.mode
    taken = {
        "rgb": mode == "RGB",
        "convert": mode not in DEEP_GREY,
        "grey": mode == "L" or (mode in DEEP_GREY and reader.value_range is not None),
        "array": len(image.getbands()) == reader.out_channels and mode not in ("P", "1"),
    }[reader.mode]
    if deep or not taken:
        expected = EXPECTED.get(reader.mode, f"{reader.out_channels} channels")
        raise ValueError(
            f"{name} is a picture of mode {mode}{' with 16 bits a channel' if deep else ''}, expected {expected}; "
            f"set reader.mode (--reader) to {_taken_by(mode, deep)}"
        )
    if reader.mode == "convert":
        # by way of RGBA: Pillow warns of a palette with transparency
        image = (image.convert("RGBA") if mode == "P" else image).convert("RGB")
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _taken_by(mode: str, deep: bool) -> str:
    """The reader's options that take a picture, in words."""
    if deep:
        return "array, with reader.channels and a reader.value_range such as [0, 65535]"
    if mode in DEEP_GREY:
        return "grey, with a reader.value_range such as [0, 65535]"
    return {"L": "convert, or to grey for a model of one channel", "RGB": "rgb"}.get(mode, "convert")


def _scaled(x: Tensor, reader: Reader, name: str) -> Tensor:
    """Values as they stand in a file → uint8, or float32 in 0..1 where the reader has a range of values."""
    if reader.value_range is None:
        if x.dtype == torch.uint8:
            return x
        raise ValueError(
            f"{name} has values of type {str(x.dtype).removeprefix('torch.')}, expected uint8; "
            "set reader.value_range to the two values that become 0 and 1"
        )
    if x.is_floating_point() and bool(x.isnan().any()):
        raise ValueError(f"{name} has pixels that are no number (nan), expected none; fill them with a value")
    low, high = reader.value_range
    return ((x.double() - low) / (high - low)).clamp(0, 1).float()


def _from_array(array: np.ndarray, reader: Reader) -> Tensor:
    """An array in memory ``(H, W, C)`` or ``(H, W)`` → ``(C, H, W)``, in its own type."""
    if reader.mode == "array":
        return channels_first(array, reader.out_channels, "the array")
    shape = array.shape
    if array.ndim == 2 and reader.mode in ("grey", "convert"):
        array = array[..., None]
    if array.ndim == 3 and reader.mode == "convert":
        array = array[..., :-1] if array.shape[-1] in (2, 4) else array  # alpha
        array = array.repeat(3, axis=-1) if array.shape[-1] == 1 else array
    if array.ndim != 3 or array.shape[-1] != reader.out_channels or 0 in shape:
        raise ValueError(
            f"the array has the shape {shape}, expected (H, W, C) with {reader.out_channels} channels; "
            "transpose or convert it"
        )
    return to_tensor(array, "the array").permute(2, 0, 1)
