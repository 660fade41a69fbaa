"""Synthetic images, made in memory, whose classes differ by form alone.

Colours and textures of shapes and background come from one distribution, so that a pixel tells nothing
without its neighbourhood: a network has to see outlines and corners, at two octaves of scale. It is made for
trying things out, and for tests that must learn something in minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from lightning_atrous.data.base import SegmentationData, Split
from lightning_atrous.transforms import Augment, Sample
from lightning_atrous.types import ClassInfo

__all__ = ["SHAPES", "Shapes", "ShapesDataset", "draw"]

SHAPES = ClassInfo(
    names=("background", "disk", "ring", "square", "triangle", "star", "cross"),
    # Okabe and Ito's colours, which the colour-blind tell apart
    palette=(
        (0, 0, 0),
        (230, 159, 0),
        (86, 180, 233),
        (0, 158, 115),
        (240, 228, 66),
        (0, 114, 178),
        (213, 94, 0),
    ),
)
DIAMETER = (0.24, 0.96)
"""Smallest and largest diameter of a shape, over the size of the image; uniform in its logarithm."""

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Coordinates over the radius → about the signed distance to the border over the radius, inside below 0."""


def draw(
    rng: np.random.Generator, size: int = 64, *, shapes: tuple[int, int] = (2, 4)
) -> tuple[np.ndarray, np.ndarray]:
    """One image with its mask.

    Shapes are turned at random and overlap, the smaller over the larger. Each has a dark outline of 2 pixels,
    which is void in the mask. The same state of the generator gives the same image on every platform.

    Args:
        rng: Decides everything.
        size: Height and width in pixels.
        shapes: Fewest and most shapes.

    Returns:
        Image uint8 ``(size, size, 3)``, mask uint8 ``(size, size)`` with the indices of `SHAPES` and 255.
    """
    image = _texture(rng, size, size)
    mask = np.zeros((size, size), np.uint8)
    number = int(rng.integers(shapes[0], shapes[1] + 1))
    radii = np.sort(size / 2 * DIAMETER[0] * (DIAMETER[1] / DIAMETER[0]) ** rng.random(number))[::-1]
    placed: list[tuple[float, float, float]] = []
    for radius in radii.tolist():
        index = int(rng.integers(1, len(SHAPES)))
        x, y = _place(rng, radius, size, placed)
        placed.append((x, y, radius))
        top, left = max(0, int(y - radius) - 1), max(0, int(x - radius) - 1)
        bottom, right = min(size, int(y + radius) + 3), min(size, int(x + radius) + 3)
        v = (np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - y)) / np.float32(radius)
        u = (np.arange(left, right, dtype=np.float32)[None] + np.float32(0.5 - x)) / np.float32(radius)
        c, s = _direction(rng)
        distance = FORMS[index - 1](c * u + s * v, c * v - s * u) * np.float32(radius)
        window = slice(top, bottom), slice(left, right)
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        image[window] += cover * (_texture(rng, bottom - top, right - left) - image[window])
        image[window] *= np.minimum(np.abs(distance), 1)[..., None]
        mask[window][distance < 1] = SHAPES.ignore_index
        mask[window][distance <= -1] = index
    image += rng.random((size, size, 3), np.float32) * 16 - 8
    return np.clip(image, 0, 255).astype(np.uint8), mask


def _place(
    rng: np.random.Generator, radius: float, size: int, placed: list[tuple[float, float, float]]
) -> tuple[float, float]:
    """A centre for a shape: most of it inside the image, and, if 20 tries find one, off every larger shape's middle.

    What is left of a shape with another on its middle cannot always be told from another form's.
    """
    x = y = size / 2
    for _ in range(20):
        x, y = (0.6 * radius + rng.random(2) * (size - 1.2 * radius)).tolist()
        if all(math.hypot(x - u, y - v) >= other for u, v, other in placed):
            break
    return x, y


def _direction(rng: np.random.Generator) -> tuple[np.float32, np.float32]:
    """Cosine and sine of a random angle."""
    angle = 2 * math.pi * rng.random()
    return np.float32(math.cos(angle)), np.float32(math.sin(angle))


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two colours mixed by a pattern: float32 ``(height, width, 3)`` in 0..255."""
    first = rng.random(3, np.float32) * 255
    second = np.clip(first + rng.random(3, np.float32) * 100 - 50, 0, 255)
    y, x = np.arange(height, dtype=np.float32)[:, None], np.arange(width, dtype=np.float32)[None]
    c, s = _direction(rng)
    along, across = c * x + s * y, c * y - s * x
    period = np.float32(4 + 12 * rng.random())
    kind = int(rng.integers(4))
    if kind == 0:  # stripes
        pattern = np.floor(along / period) % 2
    elif kind == 1:  # checks
        pattern = (np.floor(along / period) + np.floor(across / period)) % 2
    elif kind == 2:  # noise, in grains of 2 pixels
        grains = rng.random((height // 2 + 1, width // 2 + 1), np.float32)
        pattern = grains.repeat(2, 0).repeat(2, 1)[:height, :width]
    else:  # gradient
        pattern = (along - along.min()) / (along.max() - along.min())
    return first + pattern[..., None] * (second - first)


def _normals(n: int) -> list[tuple[np.float32, np.float32]]:
    """Unit vectors at ``n`` even angles."""
    angles = [2 * math.pi * i / n for i in range(n)]
    return [(np.float32(math.cos(a)), np.float32(math.sin(a))) for a in angles]


THREE, FIVE = _normals(3), _normals(5)


def _disk(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v) - 1


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(u * u + v * v) - np.float32(0.75)) - np.float32(0.25)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(math.sqrt(0.5))


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum.reduce([c * u + s * v for c, s in THREE]) - np.float32(0.5)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The pentagram: all points on the inner side of at least four of its five lines."""
    lines = np.stack([c * u + s * v for c, s in FIVE])
    return np.partition(lines, 3, axis=0)[3] - np.float32(math.cos(2 * math.pi / 5))


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - np.float32(0.95), np.minimum(u, v) - np.float32(0.3))


FORMS: tuple[Distance, ...] = (_disk, _ring, _square, _triangle, _star, _cross)
"""One per class but the background, in the order of `SHAPES`; each reaches about 1 from its centre."""


class ShapesDataset(Dataset[Sample]):
    """Samples drawn on demand: uint8 image ``(3, size, size)``, uint8 mask ``(size, size)``.

    An index always gives the same image, on every machine; no two splits or seeds share a stream of numbers.

    Args:
        split: Whose stream.
        length: Number of samples.
        size: Height and width in pixels.
        shapes: Fewest and most shapes in an image.
        seed: Not negative.
    """

    def __init__(
        self, split: Split, length: int, *, size: int = 64, shapes: tuple[int, int] = (2, 4), seed: int = 0
    ) -> None:
        self.split, self.length, self.size, self.shapes, self.seed = split, length, size, shapes, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        """Draw one sample."""
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is not in 0..{self.length - 1}")
        stream = ("train", "val", "test").index(self.split)
        seed = np.random.SeedSequence(self.seed, spawn_key=(stream, index))
        image, mask = draw(np.random.Generator(np.random.PCG64(seed)), self.size, shapes=self.shapes)
        return Sample(
            image=tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)),
            mask=tv_tensors.Mask(torch.from_numpy(mask)),
            name=f"{self.split}_{index:06d}",
        )


class Shapes(SegmentationData):
    """Disks, rings, squares, triangles, stars and crosses in random colours: 7 classes with the background.

    Args:
        size: Height and width of the images in pixels, at least 32.
        shapes: Fewest and most shapes in an image.
        train_length: Images an epoch, the same in each.
        val_length: Images of validation.
        test_length: Images of the test.
        seed: Of the images; another one gives other images in all splits.
        batch_size: Of training, over all devices.
        eval_batch_size: Of validation and test, per device.
        num_workers: Processes that draw; 0 does it in the main one, at about a millisecond an image.
        augment: Of training samples; hardly needed, as more images cost nothing.

    Raises:
        ValueError: A size below 32, a length below 1, an empty or negative range of shapes, a negative seed.
    """

    def __init__(
        self,
        size: int = 64,
        shapes: tuple[int, int] = (2, 4),
        *,
        train_length: int = 4000,
        val_length: int = 200,
        test_length: int = 200,
        seed: int = 0,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        num_workers: int = 0,
        augment: Augment | None = None,
    ) -> None:
        super().__init__(
            SHAPES,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            augment=augment,
        )
        for name, value, low in (
            ("size", size, 32),
            ("train_length", train_length, 1),
            ("val_length", val_length, 1),
            ("test_length", test_length, 1),
            ("seed", seed, 0),
        ):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        if len(shapes) != 2 or not 0 <= shapes[0] <= shapes[1]:
            raise ValueError(f"shapes must be the fewest and the most in an image, got {list(shapes)}; try [3, 5]")
        self.size, self.shapes, self.seed = size, shapes, seed
        self.lengths: dict[Split, int] = {"train": train_length, "val": val_length, "test": test_length}

    def build(self, split: Split) -> ShapesDataset:
        """The samples of a split."""
        return ShapesDataset(split, self.lengths[split], size=self.size, shapes=self.shapes, seed=self.seed)
