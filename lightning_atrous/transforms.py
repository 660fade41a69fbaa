"""Joint transforms of an image and its mask, on torchvision's ``tv_tensors``.

One class, because the order is part of the method: the window is cut before anything is resized, the
colours are changed before the padding is added, and every random number comes from one generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lightning_atrous import colours

__all__ = ["Augment", "Sample", "distort", "largest_share", "window"]

GREY = 124
"""What the padding of an image is filled with, in 0..255: the mean of ImageNet, about zero once normalised."""

TRIES = 10
"""Crops that are drawn at most until `Augment.max_share` allows one: as in mmsegmentation's ``RandomCrop``."""


class Sample(TypedDict):
    """One image with its labels.

    Keys:
        image: ``(C, H, W)``, uint8 or floating in 0..1.
        mask: Integer ``(H, W)``: classes ``0..K-1`` or the ignore index.
        name: Tells the sample from the others of its split.
    """

    image: tv_tensors.Image
    mask: tv_tensors.Mask
    name: str


@dataclass(frozen=True)
class Augment:
    """Random scale, crop, flip and photometric distortion of training samples.

    Args:
        crop: Height and width of what comes out, whatever comes in.
        scale: Lowest and highest factor on the image's own size; uniform between them.
        flip: Probability of a horizontal flip, in 0..1.
        distort: Probability of each of the four changes of colour, in 0..1.
        max_share: The largest share of a crop that one class may have, of the pixels that are not ignored. A crop
            beyond it, or without such pixels, is drawn again at the same scale, until ten are drawn: then the last is
            taken. 0.75 is common; none takes every crop.

    Raises:
        ValueError: A crop below two pixels, a scale that is not positive or runs backwards, a probability
            or a share outside 0..1.
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    distort: float = 0.5
    max_share: float | None = None

    def __post_init__(self) -> None:
        if len(self.crop) != 2 or min(self.crop) < 2:
            raise ValueError(f"crop must be a height and a width of at least 2 pixels, got {tuple(self.crop)}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise ValueError(f"scale must be two positive factors, the lower first, got {tuple(self.scale)}")
        for name, p in (("flip", self.flip), ("distort", self.distort)):
            if not 0 <= p <= 1:
                raise ValueError(f"{name} is a probability and must lie in 0..1, got {p}")
        if self.max_share is not None and not 0 < self.max_share < 1:
            raise ValueError(
                f"max_share must lie between 0 and 1, got {self.max_share}; try 0.75, or null to take every crop"
            )

    def __call__(self, sample: Sample, generator: torch.Generator | None = None, *, ignore_index: int = 255) -> Sample:
        """Transform one sample; the given one is left as it is.

        Args:
            sample: Image ``(C, H, W)``, uint8 or floating in 0..1, and mask ``(H, W)`` of any size.
            generator: Decides everything; torch's global one by default.
            ignore_index: What the mask is padded with where the image has ended.
        """
        image = sample["image"].as_subclass(Tensor)

        def read(rows: slice, columns: slice) -> Tensor:
            return image[:, rows, columns]

        return self.reading(sample["mask"], read, name=sample["name"], generator=generator, ignore_index=ignore_index)

    def reading(
        self,
        mask: Tensor,
        read: Callable[[slice, slice], Tensor],
        *,
        name: str,
        generator: torch.Generator | None = None,
        ignore_index: int = 255,
    ) -> Sample:
        """Transform a sample of whose image no more is read than the crop needs.

        Args:
            mask: ``(H, W)``, which says how large the image is.
            read: Rows and columns of the image → ``(C, h, w)``, uint8 or floating in 0..1. Called once.
            name: Of the sample.
            generator: As for `__call__`.
            ignore_index: As for `__call__`.
        """
        s = _uniform(*self.scale, generator)
        y, x, padding, mask = self._crop(mask.as_subclass(Tensor), s, generator, ignore_index)
        image = F.resize_image(read(y, x).as_subclass(Tensor), list(mask.shape), antialias=True)
        image = distort(image, self.distort, generator)
        image = F.pad_image(image, padding, fill=GREY / 255 if image.is_floating_point() else GREY)
        mask = F.pad_image(mask[None], padding, fill=ignore_index)[0]
        if _uniform(0, 1, generator) < self.flip:
            image, mask = image.flip(-1), mask.flip(-1)
        return Sample(image=tv_tensors.Image(image), mask=tv_tensors.Mask(mask), name=name)

    def _crop(
        self, mask: Tensor, scale: float, generator: torch.Generator | None, ignore_index: int
    ) -> tuple[slice, slice, list[int], Tensor]:
        """A crop that `max_share` allows, or the last one tried.

        Returns:
            The rows and columns of the image to resize, the padding of the result (left, top, right, bottom), and the
            mask ``(h, w)`` within that padding.
        """
        height, width = mask.shape
        for _ in range(1 if self.max_share is None else TRIES):
            y, pad_y = window(height, self.crop[0], scale, _uniform(0, 1, generator))
            x, pad_x = window(width, self.crop[1], scale, _uniform(0, 1, generator))
            size = [self.crop[0] - sum(pad_y), self.crop[1] - sum(pad_x)]
            # exact: the label at the centre of each pixel; plain NEAREST would shift it by up to half a pixel
            cut = F.resize_image(mask[None, y, x], size, interpolation=InterpolationMode.NEAREST_EXACT)[0]
            if self.max_share is None or largest_share(cut, ignore_index) <= self.max_share:
                break
        return y, x, [pad_x[0], pad_y[0], pad_x[1], pad_y[1]], cut


def window(length: int, crop: int, scale: float, position: float) -> tuple[slice, tuple[int, int]]:
    """Where a crop of the scaled image lies in the image itself, along one axis.

    Cutting first and resizing after leaves ``crop`` pixels to compute, where scaling the whole image would
    leave ``scale · length``. The window is whole pixels wide, so the scale is met to within half a pixel.

    Args:
        length: Of the image, in pixels.
        crop: Of the result, in pixels.
        scale: Pixels of the result per pixel of the image.
        position: In 0..1: of the window in the image or, if the window is larger, of the image in the window.

    Returns:
        The slice of the image to resize, and the padding before and after it in the result, of which at least
        two pixels are left: torch resizes uint8 wrongly to a width of one.
    """
    size = max(1, round(crop / scale))
    spare = length - size
    # a whole number of places, each equally likely; below 0 the image starts inside the window
    start = min(int(position * (abs(spare) + 1)), abs(spare)) * (1 if spare > 0 else -1)
    first, last = max(0, start), min(length, start + size)
    before = min(round((first - start) * crop / size), crop - 2)
    after = max(before + 2, round((last - start) * crop / size))
    return slice(first, last), (before, crop - after)


def largest_share(mask: Tensor, ignore_index: int) -> float:
    """How much of a mask its largest class takes up, in 0..1.

    Args:
        mask: Integer ``(H, W)``: classes ``0..K-1`` or the ignore index, which does not count.
        ignore_index: Of any sign and size.

    Returns:
        The share of the largest class among the pixels that count; infinity where none does.
    """
    if mask.dtype == torch.uint8:  # taking pixels out would cost ten times as much as counting them
        counts = torch.bincount(mask.flatten(), minlength=256)
        counts[ignore_index] = 0
    else:
        counts = torch.bincount(mask[mask != ignore_index], minlength=1)
    total = int(counts.sum())
    return int(counts.max()) / total if total else math.inf


def distort(image: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Brightness, contrast, saturation and hue, each changed with probability ``p``.

    The ranges are those of torchvision's ``RandomPhotometricDistort`` (after SSD, Liu et al. 2016), without
    the permutation of channels: a green sky teaches nothing. Bytes are rounded once, at the end; torchvision
    cuts them down to whole levels after each change, so that its images are about one level of 255 darker. Other
    numbers of channels than three are no colours: brightness and contrast alone are changed, the contrast of each
    channel about its own mean.

    Args:
        image: ``(C, H, W)``, uint8 or floating in 0..1.
        p: In 0..1.
        generator: Torch's global one by default.
    """
    ranges = (
        (colours.brightness, (0.875, 1.125)),
        (colours.contrast, (0.5, 1.5)),
        (colours.saturation, (0.5, 1.5)),
        (colours.hue, (-0.05, 0.05)),
    )[: 4 if image.shape[0] == 3 else 2]
    drawn = [(change, _uniform(*ends, generator)) for change, ends in ranges if _uniform(0, 1, generator) < p]
    if not drawn:
        return image
    # channels apart, however they come out of a file: the sums over them are faster so
    x = (image if image.is_floating_point() else image.float().div_(255)).contiguous()
    for change, amount in drawn:
        x = change(x, amount)
    return x if image.is_floating_point() else x.mul_(255).round_().to(image.dtype)


def _uniform(low: float, high: float, generator: torch.Generator | None) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
