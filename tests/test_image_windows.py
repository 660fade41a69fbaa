"""Parts of picture files: what the whole file holds there, whatever the file is."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from made import pixels, save, save_png
from PIL import Image

from lightning_atrous.images import RGB, Reader

DEEP = (0.0, 65535.0)


def interlaced(path: Path, array: np.ndarray) -> Path:
    """A PNG ``(H, W, 3)`` in Adam7's seven passes, written by hand: Pillow writes none."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    parts = [array[y::dy, x::dx] for y, x, dy, dx in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    data = save_png(path, array).read_bytes()
    header = data[16:28] + b"\1"
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(
        data[:8] + b"".join(struct.pack(">I", len(x)) + t + x + struct.pack(">I", zlib.crc32(t + x)) for t, x in chunks)
    )
    return path


def turned(path: Path, *, last: bool) -> Path:
    """A PNG that is to be turned a quarter, as it says before its pixels or behind them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    save(path, height=20, width=30)
    data = path.read_bytes()
    place = data.index(b"IEND" if last else b"IDAT") - 4
    content = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(content)) + b"eXIf" + content + struct.pack(">I", zlib.crc32(b"eXIf" + content))
    path.write_bytes(data[:place] + chunk + data[place:])
    return path


def animated(path: Path) -> Path:
    frames = [Image.fromarray(pixels(20, 30, 3) // n) for n in (1, 2)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    return path


def array_file(path: Path) -> Path:
    np.save(path, pixels(20, 30, 5))
    return path


PARTS = {
    "RGB": (RGB, lambda p: save(p / "a.png", height=20, width=30)),
    "RGB as JPEG": (RGB, lambda p: save(p / "a.jpg", height=20, width=30)),
    "interlaced": (RGB, lambda p: interlaced(p / "a.png", pixels(20, 30, 3))),
    "turned": (RGB, lambda p: turned(p / "a.png", last=False)),
    "turned at its end": (RGB, lambda p: turned(p / "a.png", last=True)),
    "animated": (RGB, lambda p: animated(p / "a.png")),
    "palette": (Reader("convert"), lambda p: save(p / "a.png", "P", height=20, width=30)),
    "two colours": (Reader("convert"), lambda p: save(p / "a.png", "1", height=20, width=30)),
    "alpha": (Reader("convert"), lambda p: save(p / "a.png", "RGBA", height=20, width=30)),
    "grey": (Reader("grey"), lambda p: save(p / "a.png", "L", height=20, width=30)),
    "deep grey": (
        Reader("grey", value_range=DEEP),
        lambda p: save_png(p / "a.png", pixels(20, 30, 1, dtype=np.uint16)),
    ),
    "array": (Reader("array", 5), lambda p: array_file(p / "a.npy")),
    "deep array": (
        Reader("array", 3, DEEP),
        lambda p: save_png(p / "a.png", pixels(20, 30, 3, dtype=np.uint16)),
    ),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_window_is_a_piece_of_the_whole(tmp_path: Path, kind: str) -> None:
    reader, make = PARTS[kind]
    path = make(tmp_path)
    whole = reader(path)
    height, width = whole.shape[1:]
    for rows, columns in (
        (slice(0, 1), slice(0, width)),
        (slice(3, 11), slice(5, 6)),
        (slice(height - 1, height), slice(2, 9)),
        (slice(0, height), slice(0, width)),
        (slice(None), slice(4, None)),
        (slice(2, height + 9), slice(3, width + 9)),
        (slice(height + 3, height + 9), slice(0, 4)),
    ):
        part, size = reader.window(path, rows, columns)
        assert size == (height, width)
        assert part.dtype == whole.dtype
        assert torch.equal(part, whole[:, rows, columns])


def test_rows_below_a_window_are_not_decoded(tmp_path: Path) -> None:
    """So that what is cut off there does no harm; within the window it is said."""
    path = save(tmp_path / "a.png", height=300, width=40)
    data = path.read_bytes()
    image = RGB(path)
    path.write_bytes(data[: len(data) // 2])
    part, size = RGB.window(path, slice(20, 100), slice(0, 40))
    assert size == (300, 40)
    assert torch.equal(part, image[:, 20:100])
    for bottom in (250, None):
        with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
            RGB.window(path, slice(20, bottom), slice(0, 40))
