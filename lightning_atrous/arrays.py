"""Files of channels that are no pictures for people: NumPy's, TIFF, and PNG of every depth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["ARRAYS", "channels_first", "damaged", "missing", "read_array", "to_tensor"]

ARRAYS = (".npy", ".png", ".tif", ".tiff")
"""Suffixes of what `read_array` reads."""

UNPACKED = {
    "L": ("L",),
    "LA": ("LA",),
    "RGB": ("RGB",),
    "RGBA": ("RGBA",),
    "I;16B": ("I;16B",),
    "LA;16B": ("RGBA",),  # as long
    "RGB;16B": ("RGB;16B", "RGB;16L"),
    "RGBA;16B": ("RGBA;16B", "RGBA;16L"),
}
"""Raw modes of PNG with channels of 8 or 16 bits, and those that together unpack all their bits."""


def read_array(path: Path, channels: int) -> Tensor:
    """The channels ``(C, H, W)`` of a file as they are, in its own type.

    Args:
        path: Of a `.npy` file, a TIFF or a PNG.
        channels: ``C``, which tells where in the file's shape the channels are.

    Raises:
        ValueError: A file that is missing, damaged, or of other channels; TIFF without the package for it.
    """
    suffix = path.suffix.lower()
    if suffix not in ARRAYS:
        raise ValueError(f"{path} is no file that reader.mode: array reads, expected one of {', '.join(ARRAYS)}")
    if suffix == ".png":
        return _read_png(path, channels)
    try:
        array = np.lib.format.open_memmap(path, mode="r") if suffix == ".npy" else _read_tiff(path)
    except FileNotFoundError:
        raise missing(path) from None
    except ImportError:
        raise ValueError(f"{path} needs the package tifffile; pip install 'lightning-atrous[tiff]'") from None
    except Exception as error:  # truncated files, pickles, unknown compressions: each has its own error
        if "imagecodecs" in str(error):  # tifffile's word for what it cannot unpack by itself
            raise ValueError(f"{path}: {error}; pip install 'lightning-atrous[tiff]'") from error
        raise damaged(path, error) from error
    return channels_first(array, channels, str(path))


def _read_tiff(path: Path) -> np.ndarray:
    import tifffile  # optional

    return tifffile.imread(path)


def _read_png(path: Path, channels: int) -> Tensor:
    """Channels ``(C, H, W)`` of 8 or 16 bits, as they stand in the file."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            raw = str(image.tile[0][3])
        array = _unpack(path, raw) if raw in UNPACKED else None
    except FileNotFoundError:
        raise missing(path) from None
    except Exception as error:
        raise damaged(path, error) from error
    if array is None:
        raise ValueError(
            f"{path} has a palette or fewer than 8 bits a pixel, expected channels of 8 or 16; "
            "set reader.mode (--reader) to convert"
        )
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[-1] != channels:
        raise ValueError(
            f"{path} has {array.shape[-1]} channels, expected {channels}; set reader.channels to what the files have"
        )
    return to_tensor(array, str(path)).permute(2, 0, 1)


def _unpack(path: Path, raw: str) -> np.ndarray:
    """The pixels of a PNG whose raw mode is ``raw`` in Pillow's words.

    Of colours of 16 bits Pillow keeps the upper 8 in the byte order that it is told. Told both, it keeps all.
    """
    first, *second = UNPACKED[raw]
    upper = _unpack_as(path, first)
    if raw == "LA;16B":
        return upper[..., 0::2].astype(np.uint16) << 8 | upper[..., 1::2]
    return upper.astype(np.uint16) << 8 | _unpack_as(path, second[0]) if second else upper


def _unpack_as(path: Path, raw: str) -> np.ndarray:
    with Image.open(path, formats=("PNG",)) as image:
        image.tile = [(*image.tile[0][:3], raw)]  # type: ignore[list-item]  # a named tuple since Pillow 11.1
        return np.array(image)


def channels_first(array: np.ndarray, channels: int, name: str) -> Tensor:
    """``(H, W)``, ``(C, H, W)`` or ``(H, W, C)`` → ``(C, H, W)``, told apart by the number of channels alone."""
    shape = array.shape
    if array.ndim == 2 and channels == 1 and array.size:
        return to_tensor(array, name)[None]
    if array.ndim != 3 or channels not in (shape[0], shape[2]) or not array.size:
        raise ValueError(
            f"{name} has the shape {shape}, expected (C, H, W) or (H, W, C) with {channels} channels; "
            "set reader.channels to what the files have"
        )
    if shape[0] == shape[2]:
        raise ValueError(
            f"{name} has the shape {shape}, in which {channels} channels may come first or last; "
            "make its height or width another"
        )
    return to_tensor(array, name) if shape[0] == channels else to_tensor(array, name).permute(2, 0, 1)


def to_tensor(array: np.ndarray, name: str) -> Tensor:
    """A copy in the same shape, of any type of real numbers."""
    if array.dtype.kind not in "uif" or array.dtype.itemsize > 8:
        raise ValueError(
            f"{name} holds values of type {array.dtype}, expected integers or floating numbers; convert it"
        )
    # a copy: torch takes neither negative strides nor foreign byte orders, and warns of what is read-only
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def missing(path: Path) -> ValueError:
    """The sentence for a file that is not there."""
    return ValueError(f"{path} does not exist; put the file there or take it off the list")


def damaged(path: Path, error: Exception) -> ValueError:
    """The sentence for a file that a library cannot read."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"{path} cannot be decoded ({reason}); replace it with an intact file")
