"""Data sets in their true layouts, made small, and pictures of every kind."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROAD, BUILDING, SKY, CAR, BICYCLE, EGO = 7, 11, 23, 26, 33, 1

TRAIN_ID = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14}
TRAIN_ID |= {28: 15, 31: 16, 32: 17, 33: 18}
"""The official table of Cityscapes, typed once more: the package's own is tested against it."""


def make_cityscapes(
    root: Path,
    cities: Mapping[str, Sequence[str]] | None = None,
    size: tuple[int, int] = (32, 64),
    *,
    images: int = 2,
    kinds: Sequence[str] = ("labelIds", "labelTrainIds"),
) -> Path:
    """Sky over buildings over a road with a car, in flat colours and some noise.

    Args:
        root: Where ``leftImg8bit`` and ``gtFine`` shall be.
        cities: Of each split; by default two of training and one of validation.
        size: Height and width of the images.
        images: In each city.
        kinds: Of the label files.
    """
    rng = np.random.default_rng(0)
    for split, names in (cities or {"train": ["aachen", "bochum"], "val": ["frankfurt"]}).items():
        for city in names:
            for i in range(images):
                stem = f"{city}_{i:06d}_000019"
                ids = _street(rng, *size)
                colours = np.stack([ids * 7, 255 - ids * 7, ids * 3], axis=-1).astype(int)
                pixels = np.clip(colours + rng.integers(-20, 21, colours.shape), 0, 255).astype(np.uint8)
                _save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", pixels)
                labels = {"labelIds": ids, "labelTrainIds": train_ids(ids)}
                for kind in kinds:
                    _save(root / "gtFine" / split / city / f"{stem}_gtFine_{kind}.png", labels[kind])
    return root


def train_ids(label_ids: np.ndarray) -> np.ndarray:
    """Pixel by pixel, as the benchmark's own scripts would write it."""
    flat = [TRAIN_ID.get(int(label), 255) for label in label_ids.ravel()]
    return np.array(flat, np.uint8).reshape(label_ids.shape)


def _street(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """LabelIds with every id of 0..33 somewhere."""
    ids = np.full((height, width), BUILDING, np.uint8)
    ids[: height // 3], ids[height // 2 :] = SKY, ROAD
    x = int(rng.integers(0, width // 2))
    ids[height // 2 : height * 3 // 4, x : x + width // 4] = CAR
    ids[height // 3 : height // 2, x : x + 2] = BICYCLE
    ids[-2:] = EGO
    ids[0, :34] = np.arange(34)
    return ids


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_folder(root: Path) -> Path:
    """Sub-folders: five training images in two folders, two for validation; three classes."""
    for i in range(5):
        save_pair(root, f"{'ab'[i % 2]}/{i}.x", split="train", height=20 + i)
    for i in range(2):
        save_pair(root, f"{i}", split="val", width=31 + 4 * i)
    (root / "classes.txt").write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    return root


def make_camvid(root: Path) -> Path:
    """The official layout, small: labels 0..11, lists with the authors' prefix."""
    labels = (np.arange(36 * 48) % 12).astype(np.uint8).reshape(36, 48)
    for split, number in (("train", 3), ("val", 2)):
        lines = []
        for i in range(number):
            name = f"{split}_{i}.png"
            save_image(root / split / name, 36, 48, seed=i)
            save_mask(root / f"{split}annot" / name, labels)
            lines.append(f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}\n")
        (root / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return root


def save_image(path: Path, height: int = 20, width: int = 30, *, mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def save_mask(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def save_pair(root: Path, name: str, *, split: str = "", height: int = 20, width: int = 30, classes: int = 3) -> None:
    labels = np.random.default_rng(1).integers(0, classes, (height, width)).astype(np.uint8)
    save_image(root / "images" / split / f"{name}.png", height, width)
    save_mask(root / "masks" / split / f"{name}.png", labels)


def pixels(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    high = {"u": np.iinfo(dtype).max + 1 if np.dtype(dtype).kind == "u" else 0, "f": 1000}[np.dtype(dtype).kind]
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def save_png(path: Path, array: np.ndarray) -> Path:
    """A PNG ``(H, W, C)`` of 8 or 16 bits, written by hand: Pillow writes no colours of 16 bits."""
    bits, colour = 8 * array.dtype.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[array.shape[2]]
    rows = b"".join(b"\0" + row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array)
    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"".join(struct.pack(">I", len(x)) + t + x + struct.pack(">I", zlib.crc32(t + x)) for t, x in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def save(path: Path, mode: str = "RGB", height: int = 5, width: int = 7, **options: Any) -> Path:
    Image.fromarray(pixels(height, width, 3)).convert(mode).save(path, **options)
    return path
