"""The words that the whole package speaks.

Shape legend, used by every docstring: ``B`` batch, ``C`` channels, ``H W`` the image, ``h w`` a feature map,
``K`` classes. Images are uint8 in 0..255, or floating in 0..1 (torchvision's convention); masks are int64
``(B, H, W)`` with values in ``0..K-1`` or the ignore index.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

from torch import Tensor

__all__ = ["ClassInfo", "FeatureInfo", "Features", "Preprocess"]

Features = tuple[Tensor, ...]
"""Feature maps ``(B, C_i, h_i, w_i)`` of a backbone, the finest first."""


@dataclass(frozen=True)
class FeatureInfo:
    """One level of a backbone: all that a head knows about it.

    Args:
        channels: ``C_i`` of the level.
        reduction: Image pixels per feature pixel, along each axis.
    """

    channels: int
    reduction: int


@dataclass(frozen=True)
class ClassInfo:
    """What the integers in a mask mean.

    Args:
        names: One per class, in the order of their indices.
        palette: One RGB triple in 0..255 per class; evenly spaced hues where none is given.
        ignore_index: The mask value that no loss and no metric counts. Outside ``0..K-1``.

    Raises:
        ValueError: No class, a name twice, a palette of another length, an ignore index that is a class.
    """

    names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...] = ()
    ignore_index: int = 255

    def __post_init__(self) -> None:
        names = tuple(str(name) for name in self.names)
        if not names:
            raise ValueError("ClassInfo got no class names; a segmentation task needs at least one class")
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(f"class names must differ, but {', '.join(twice)} stand more than once")
        if 0 <= self.ignore_index < len(names):
            raise ValueError(
                f"ignore_index {self.ignore_index} is the class '{names[self.ignore_index]}'; "
                f"choose a value outside 0..{len(names) - 1}, such as 255"
            )
        palette = tuple((int(r), int(g), int(b)) for r, g, b in self.palette) or _even_hues(len(names))
        if len(palette) != len(names):
            raise ValueError(f"a palette of {len(palette)} colours for {len(names)} classes; give one colour each")
        # frozen: the normalised forms replace what YAML or a checkpoint gave (lists)
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "palette", palette)

    def __len__(self) -> int:
        return len(self.names)


def _even_hues(n: int) -> tuple[tuple[int, int, int], ...]:
    """``n`` colours at evenly spaced hues, alternately bright and dark so that neighbours differ."""
    rgb = (colorsys.hsv_to_rgb(i / n, 0.65, 0.95 if i % 2 == 0 else 0.65) for i in range(n))
    return tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in rgb)


@dataclass(frozen=True)
class Preprocess:
    """How pixels become a backbone's input: ``(pixel / 255 - mean) / std``, per channel.

    Args:
        mean: One per input channel, in units of the full range (0..1).
        std: One per input channel, positive.

    Raises:
        ValueError: Lengths that differ, or a deviation that is not positive.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        mean, std = tuple(float(m) for m in self.mean), tuple(float(s) for s in self.std)
        if len(mean) != len(std) or not mean:
            raise ValueError(f"mean has {len(mean)} channels and std {len(std)}; give one of each per input channel")
        if min(std) <= 0:
            raise ValueError(f"std must be positive in every channel, got {std}")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @property
    def channels(self) -> int:
        """The number of image channels."""
        return len(self.mean)
