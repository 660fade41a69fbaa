"""Online hard example mining: cross-entropy of the pixels that the network does not yet get right.

Shrivastava, Gupta, Girshick: Training Region-based Object Detectors with Online Hard Example Mining (CVPR 2016); for
pixels Wu, Shen, van den Hengel: Bridging Category-level and Instance-level Semantic Image Segmentation (2016), section
2.2, whose threshold on the probability and least number the field has kept since.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_atrous.losses.base import Loss, check_pair
from lightning_atrous.losses.pixel_mean import check_class_weights
from lightning_atrous.losses.raised import raised_cross_entropy, true_log_probability
from lightning_atrous.types import ClassInfo

__all__ = ["OHEM"]


class OHEM(Loss):
    """The mean cross-entropy of the hard pixels, in float32 or better.

    Hard are the valid pixels whose own class has a probability below a threshold; where these are too few, as many as
    are wanted, from the least probable on. With a threshold of 1 and no weights it is `CrossEntropy`.

    Which pixels are hard depends on all pixels of the batch, and here they are those of one rank: the mean does not
    decompose over ranks, nor over accumulated batches, of which every one counts the same. ``min_kept`` is for each.

    Args:
        classes: Gives ``K`` and the ignore index.
        threshold: Probability of the own class below which a pixel is hard, in ``(0, 1]``.
        min_kept: Pixels of the batch that are kept at least, hard or not; all where it has fewer. Several of equal
            probability are kept together.
        class_weights: One per class, finite, none negative and not all 0; the divisor is then the sum of the kept
            pixels' weights.

    Raises:
        ValueError: An option out of range.

    Example:
        >>> import torch
        >>> from lightning_atrous.losses import OHEM
        >>> from lightning_atrous.types import ClassInfo
        >>> loss = OHEM(ClassInfo(("road", "car")), threshold=0.7, min_kept=1)
        >>> logits = torch.tensor([[[[3.0, 0.0]], [[0.0, 0.0]]]])
        >>> loss(logits, torch.tensor([[[0, 1]]]))  # log 2: the first is sure by now
        tensor(0.6931)
    """

    class_weights: Tensor | None

    def __init__(
        self,
        classes: ClassInfo,
        *,
        threshold: float = 0.7,
        min_kept: int = 100_000,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be a probability in (0, 1], got {threshold}")
        if min_kept < 0:
            raise ValueError(f"min_kept must be a number of pixels, 0 or more, got {min_kept}")
        check_class_weights(class_weights, classes)
        self.classes = classes
        self.threshold = threshold
        self.min_kept = min_kept
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare, as `Loss.forward`.

        Raises:
            ValueError: Shapes that do not fit each other or the classes, or a target that is not int64.
        """
        check_pair(logits, target, self.classes)
        kept = self._hard(logits, target).to(torch.promote_types(logits.dtype, torch.float32))
        total = raised_cross_entropy(
            logits,
            target,
            class_weights=self.class_weights,
            ignore_index=self.classes.ignore_index,
            label_smoothing=0.0,
            pixel_weights=kept,
        )
        if self.class_weights is None:
            divisor = kept.sum()
        else:
            valid = target != self.classes.ignore_index
            divisor = (self.class_weights.to(kept.dtype)[target.masked_fill(~valid, 0)] * kept).sum()
        counted = divisor > 0
        return total * counted / torch.where(counted, divisor, 1)

    def _hard(self, logits: Tensor, target: Tensor) -> Tensor:
        """Which pixels are kept: ``(B, H, W)``, none that is ignored."""
        ignore_index = self.classes.ignore_index
        valid = target != ignore_index
        log_p = true_log_probability(logits, target, ignore_index=ignore_index)
        if self.threshold == 1:
            return valid
        hard = valid & (log_p < math.log(self.threshold))
        if int(hard.sum()) >= self.min_kept:
            return hard
        ranked = log_p[valid]
        wanted = min(self.min_kept, ranked.numel())
        if wanted == ranked.numel():
            return valid
        return valid & (log_p <= ranked.topk(wanted, largest=False, sorted=False).values.max())
