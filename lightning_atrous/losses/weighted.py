"""Several losses in one: their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_atrous.losses.base import Loss, LossFactory
from lightning_atrous.losses.pixel_mean import PixelMean
from lightning_atrous.types import ClassInfo

__all__ = ["WeightedSum"]


class WeightedSum(Loss):
    """A weighted sum of losses on the same logits and target.

    In YAML::

        loss:
          class_path: WeightedSum
          init_args:
            losses: [{class_path: CrossEntropy, init_args: {label_smoothing: 0.1}}, {class_path: Dice}]
            weights: [1.0, 0.5]

    Args:
        classes: Of every part.
        losses: The class of each part, with its options.
        weights: One per part, finite, none negative and not all 0; all 1 where not given.

    Raises:
        ValueError: No part, or weights out of range.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from lightning_atrous.losses import CrossEntropy, Dice, WeightedSum
        >>> from lightning_atrous.types import ClassInfo
        >>> parts = [partial(CrossEntropy, label_smoothing=0.1), Dice]
        >>> loss = WeightedSum(ClassInfo(("road", "car")), losses=parts, weights=(1.0, 0.5))
        >>> loss(torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 1], [0, 1]]]))  # log 2 + 0.5 · 0.5
        tensor(0.9431)
    """

    def __init__(
        self, classes: ClassInfo, *, losses: Sequence[LossFactory], weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if not losses:
            raise ValueError("WeightedSum got no losses; give one at least, such as CrossEntropy")
        weights = [1.0] * len(losses) if weights is None else weights
        if len(weights) != len(losses):
            raise ValueError(f"WeightedSum got {len(weights)} weights for {len(losses)} losses; give one each")
        if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
            raise ValueError(f"the weights of losses must be finite, none negative and not all 0, got {tuple(weights)}")
        self.parts = nn.ModuleList(loss(classes) for loss in losses)
        self.weights = tuple(float(weight) for weight in weights)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare, as `Loss.forward`."""
        values = [weight * part(logits, target) for weight, part in zip(self.weights, self.parts, strict=True)]
        return torch.stack(values).sum()

    def weight(self, target: Tensor) -> Tensor | None:
        """That of the parts, where all of them are means over the same pixels that count alike; else None.

        A sum of means with different divisors, or with a part that is no mean over pixels, is no mean over pixels: in
        an accumulation every batch then counts the same, as it does for such a part alone.
        """
        means = [part for part in self.parts if isinstance(part, PixelMean)]
        if len(means) < len(self.parts) or not all(_alike(means[0].class_weights, m.class_weights) for m in means):
            return None
        return means[0].weight(target)


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether class weights are the same. They are options, and so the same on every rank."""
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
