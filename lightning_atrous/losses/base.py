"""What a loss is: logits at any resolution and a mask in, a scalar out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_atrous.types import ClassInfo

__all__ = ["Loss", "LossFactory", "check_pair", "mean_over_ranks"]


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


def check_pair(logits: Tensor, target: Tensor, classes: ClassInfo) -> None:
    """Refuse logits and a target of which no loss can be taken.

    Args:
        logits: ``(B, K, h, w)``.
        target: ``(B, H, W)`` int64.
        classes: Give ``K``.

    Raises:
        ValueError: Shapes that do not fit each other or the classes, or a target that is not int64.
    """
    k = len(classes)
    if logits.ndim != 4 or logits.shape[1] != k:
        raise ValueError(f"expected logits (B, {k}, h, w), one channel a class, got {tuple(logits.shape)}")
    if target.dtype != torch.int64 or target.ndim != 3 or target.shape[0] != logits.shape[0]:
        raise ValueError(
            f"expected an int64 target ({logits.shape[0]}, H, W), got {target.dtype} {tuple(target.shape)}"
        )


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
