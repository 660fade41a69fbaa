"""Losses: logits at any resolution and a mask in, a scalar out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_atrous.layers import resize
from lightning_atrous.types import ClassInfo

__all__ = ["CrossEntropy", "Loss", "LossFactory", "mean_over_ranks"]


class Loss(nn.Module, ABC):
    """What a task trains on.

    A loss raises the logits to the target's size itself, and counts no ignored pixel.
    """

    @abstractmethod
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare.

        Args:
            logits: ``(B, K, h, w)`` at any resolution.
            target: ``(B, H, W)`` int64 in ``0..K-1``, or the ignore index.

        Returns:
            A scalar with a graph, even where no pixel counts.
        """

    def weight(self, target: Tensor) -> Tensor | None:
        """How much a batch counts among those whose gradients are accumulated: what its mean was divided by.

        Args:
            target: ``(B, H, W)`` int64 in ``0..K-1``, or the ignore index.

        Returns:
            A scalar, the same on every rank; None for a loss that is no mean over pixels, so that every batch
            counts the same.
        """
        return None


LossFactory = Callable[[ClassInfo], Loss]
"""A loss class, or one with its options already given (`functools.partial`)."""


class CrossEntropy(Loss):
    """Pixel-wise cross-entropy: the mean over the valid pixels of the global batch, in float32 or better.

    On one process exactly ``F.cross_entropy`` on the raised logits; but where no valid pixel has a weight it
    is 0 with zero gradients, not nan.

    While gradients are recorded and `torch.distributed` is initialised, the divisor goes through
    `mean_over_ranks`: the gradients that DDP averages, and the losses averaged over ranks, are then those of
    all batches in one, however the valid pixels are spread. This is a collective: every rank has to call the
    loss equally often. Under ``torch.no_grad`` the mean is over this rank's pixels. That divisor is also the
    batch's `weight` in a gradient accumulation.

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

    class_weights: Tensor | None

    def __init__(
        self,
        classes: ClassInfo,
        *,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        shrink_labels: bool = False,
    ) -> None:
        super().__init__()
        if class_weights is not None:
            _check_weights(class_weights, classes)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.classes = classes
        self.label_smoothing = label_smoothing
        self.shrink_labels = shrink_labels
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        # not persistent: an option, kept with the others, is no weight of the network
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare, as `Loss.forward`.

        Raises:
            ValueError: Shapes that do not fit each other or the classes, or a target that is not int64.
        """
        k, ignore_index = len(self.classes), self.classes.ignore_index
        if logits.ndim != 4 or logits.shape[1] != k:
            raise ValueError(f"expected logits (B, {k}, h, w), one channel a class, got {tuple(logits.shape)}")
        if target.dtype != torch.int64 or target.ndim != 3 or target.shape[0] != logits.shape[0]:
            raise ValueError(
                f"expected an int64 target ({logits.shape[0]}, H, W), got {target.dtype} {tuple(target.shape)}"
            )
        if self.shrink_labels:
            target = _shrink(target, logits.shape[-2:])
        logits = resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), target.shape[-2:])
        weight = None if self.class_weights is None else self.class_weights.to(logits.dtype)
        total = F.cross_entropy(
            logits,
            target,
            weight=weight,
            ignore_index=ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
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


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of a tensor over the ranks of the default process group; itself where there is no group.

    Of a count it is the right divisor of a sum whose gradient DDP averages: with ``S_r`` the sum and ``n_r``
    the count on each of ``R`` ranks, the mean over ranks of ``S_r / (Σ n / R)`` is ``Σ S / Σ n``. It has no
    gradient.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _shrink(target: Tensor, size: Sequence[int]) -> Tensor:
    """Labels ``(B, H, W)`` → ``(B, *size)``: of each cell the pixel in its middle."""
    rows, columns = (
        ((torch.arange(cells, device=target.device) + 0.5) * (pixels / cells)).long()
        for cells, pixels in zip(size, target.shape[-2:], strict=True)
    )
    return target[:, rows[:, None], columns]


def _check_weights(weights: Sequence[float], classes: ClassInfo) -> None:
    if len(weights) != len(classes):
        raise ValueError(
            f"{len(weights)} class_weights for {len(classes)} classes; "
            f"give one each, in the order {', '.join(classes.names)}"
        )
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise ValueError(f"class_weights must be finite, none negative and not all 0, got {tuple(weights)}")
