"""Pixel-wise cross-entropy on logits that are raised to the labels' size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_atrous.losses.base import check_pair
from lightning_atrous.losses.pixel_mean import PixelMean
from lightning_atrous.losses.raised import raised_cross_entropy
from lightning_atrous.types import ClassInfo

__all__ = ["CrossEntropy"]


class CrossEntropy(PixelMean):
    """Pixel-wise cross-entropy: the mean over the valid pixels of the global batch, in float32 or better.

    On one process it is ``F.cross_entropy`` on the raised logits, to rounding; but where no valid pixel has a weight it
    is 0 with zero gradients, not nan.

    The raised logits are never held as a whole (`raised_cross_entropy`). It is a `PixelMean`: over several ranks and
    accumulated batches it is what it would be on all images in one.

    Args:
        classes: Gives ``K`` and the ignore index.
        class_weights: One per class, finite, none negative and not all 0. As in ``F.cross_entropy`` the
            divisor is then the sum of the valid pixels' weights, so only the ratios matter.
        label_smoothing: The share of each target spread evenly over the classes, in ``[0, 1)`` (Szegedy et
            al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7).
        shrink_labels: Take the labels at the logits' size (of every cell the pixel in its middle) in place of raising
            the logits to the labels': what DeepLabV3 (section 4.1) advises against, for the comparison. Gradients are
            still accumulated by the weights of the labels as they came.

    Raises:
        ValueError: Weights or smoothing out of range.

    Example:
        >>> import torch
        >>> from lightning_atrous.losses import CrossEntropy
        >>> from lightning_atrous.types import ClassInfo
        >>> loss = CrossEntropy(ClassInfo(("road", "car")), class_weights=(1.0, 3.0))
        >>> loss(torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 1, 1, 255]] * 4]))  # log 2
        tensor(0.6931)
    """

    def __init__(
        self,
        classes: ClassInfo,
        *,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        shrink_labels: bool = False,
    ) -> None:
        super().__init__(classes, class_weights=class_weights)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self.shrink_labels = shrink_labels

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare, as `Loss.forward`.

        Raises:
            ValueError: Shapes that do not fit each other or the classes, or a target that is not int64.
        """
        check_pair(logits, target, self.classes)
        if self.shrink_labels:
            target = _shrink(target, logits.shape[-2:])
        total = raised_cross_entropy(
            logits,
            target,
            class_weights=self.class_weights,
            ignore_index=self.classes.ignore_index,
            label_smoothing=self.label_smoothing,
        )
        return self.mean(total, target)


def _shrink(target: Tensor, size: Sequence[int]) -> Tensor:
    """Labels ``(B, H, W)`` → ``(B, *size)``: of each cell the pixel in its middle."""
    rows, columns = (
        ((torch.arange(cells, device=target.device) + 0.5) * (pixels / cells)).long()
        for cells, pixels in zip(size, target.shape[-2:], strict=True)
    )
    return target[:, rows[:, None], columns]
