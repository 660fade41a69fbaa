"""Losses that are a mean over the valid pixels of all ranks and all accumulated batches, however these are spread."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_atrous.losses.base import Loss, mean_over_ranks
from lightning_atrous.types import ClassInfo

__all__ = ["PixelMean", "check_class_weights"]


class PixelMean(Loss):
    """A loss that is a sum over valid pixels, divided by how many they are or by the sum of their classes' weights.

    While gradients are recorded and `torch.distributed` is initialised, the divisor goes through
    `mean_over_ranks`: the gradients that DDP averages, and the losses averaged over ranks, are then those of
    all batches in one, however the valid pixels are spread. This is a collective: every rank has to call the
    loss equally often. Under ``torch.no_grad`` the mean is over this rank's pixels. That divisor is also the
    batch's `weight` in a gradient accumulation.

    Args:
        classes: Gives ``K`` and the ignore index.
        class_weights: How much a pixel of each class counts in the divisor; 1 where not given.

    Raises:
        ValueError: Weights out of range.
    """

    class_weights: Tensor | None

    def __init__(self, classes: ClassInfo, *, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        check_class_weights(class_weights, classes)
        self.classes = classes
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        # not persistent: an option, kept with the others, is no weight of the network
        self.register_buffer("class_weights", weights, persistent=False)

    def mean(self, total: Tensor, target: Tensor) -> Tensor:
        """The mean whose sum over this rank's valid pixels is given; 0 with a graph where nothing counts."""
        divisor = self.weight(target).to(total.dtype)
        counted = divisor > 0
        return total * counted / torch.where(counted, divisor, 1)

    def weight(self, target: Tensor) -> Tensor:
        """The number of valid pixels, or the sum of their weights; the mean over ranks while gradients are recorded."""
        wide = torch.float32 if target.device.type == "mps" else torch.float64  # which Apple's devices do not have
        valid = target != self.classes.ignore_index
        if self.class_weights is None:
            divisor = valid.sum().to(wide)
        else:
            divisor = (self.class_weights.to(wide)[target.masked_fill(~valid, 0)] * valid).sum()
        return mean_over_ranks(divisor) if torch.is_grad_enabled() else divisor


def check_class_weights(weights: Sequence[float] | None, classes: ClassInfo) -> None:
    """Refuse weights of which no mean over classes can be taken.

    Raises:
        ValueError: Another number than that of the classes, or weights out of range.
    """
    if weights is None:
        return
    if len(weights) != len(classes):
        raise ValueError(
            f"{len(weights)} class_weights for {len(classes)} classes; "
            f"give one each, in the order {', '.join(classes.names)}"
        )
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise ValueError(f"class_weights must be finite, none negative and not all 0, got {tuple(weights)}")
