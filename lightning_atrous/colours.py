"""Changes of an image's colours, as pure functions of floats in 0..1.

They are those of torchvision's ``adjust_…``, in as few passes over the pixels as each takes; hue in particular without
the way to HSV and back. Nothing is rounded between them. Products and sums are kept apart, and means are taken in
float64, so that the number of threads changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["brightness", "contrast", "hue", "saturation"]


def brightness(image: Tensor, factor: float) -> Tensor:
    """Multiply: 0 is black, 1 the image as it is.

    Args:
        image: ``(C, H, W)``, floating in 0..1, as for all of them.
        factor: At least 0.
    """
    return (image * factor).clamp_(0, 1)


def contrast(image: Tensor, factor: float) -> Tensor:
    """Move away from the mean of the grey image or, unless there are three channels, of each channel.

    Args:
        image: ``(C, H, W)``.
        factor: At least 0, which is the mean alone; 1 is the image as it is.
    """
    mean = (_grey(image) if len(image) == 3 else image).mean((1, 2), keepdim=True, dtype=torch.float64)
    return (image * factor).add_((mean * (1 - factor)).to(image.dtype)).clamp_(0, 1)


def saturation(image: Tensor, factor: float) -> Tensor:
    """Move away from grey, each pixel from its own.

    Args:
        image: ``(3, H, W)``.
        factor: At least 0, which is grey; 1 is the image as it is.
    """
    return (image * factor).add_(_grey(image).mul_(1 - factor)).clamp_(0, 1)


def hue(image: Tensor, turn: float) -> Tensor:
    """Turn the hue of HSV; saturation and value stay.

    Around the circle of hues each channel is a trapezium between `lo` and `hi`, the least and the largest of the three,
    with a side of a sixth of the circle; the three are a third of the circle apart. Turned by at most half a side, a
    channel `x` is therefore ``max(lo, min(hi, x + (lo + d - y)⁺) - (y - hi + d)⁺)``: ``d = 6 · |turn| · (hi - lo)``,
    and `y` is the channel that the hue is turned towards: of red, green, of green, blue, of blue, red; or backwards.

    Args:
        image: ``(3, H, W)``.
        turn: Of a whole circle, from -1/12 to 1/12.
    """
    assert abs(turn) <= 1 / 12
    hi = torch.maximum(torch.maximum(image[0], image[1]), image[2])
    lo = torch.minimum(torch.minimum(image[0], image[1]), image[2])
    d = (hi - lo).mul_(6 * abs(turn))
    towards = image.roll(-1 if turn > 0 else 1, 0)
    risen = torch.minimum((lo + d - towards).clamp_(min=0).add_(image), hi)
    return torch.maximum(risen.sub_(towards.sub_(hi - d).clamp_(min=0)), lo)


def _grey(image: Tensor) -> Tensor:
    """Luma ``(1, H, W)`` with the weights of ITU-R BT.601."""
    return (image[:1] * 0.2989).add_(image[1:2] * 0.587).add_(image[2:] * 0.114)
