"""Receptive field block: kernels and rates that grow together.

Liu, Huang, Wang: Receptive Field Block Net for Accurate and Fast Object Detection (ECCV 2018), section 3.2 and figure
4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_atrous.context import ReceptiveFieldBlock, rates_at_reduction
from lightning_atrous.heads.base import HEADS, Head, at_least, share
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["RFB"]


@HEADS.register("rfb")
class RFB(Head):
    """Kernels of 1, 3, 5, followed by 3×3 of rates 1, 3, 5; then scores. Reads the last level; any backbone will do.

    The block is from a detector. Its rates are the paper's (the authors' code has 1, 2, 3), and all convolutions of a
    branch are as wide as its last, where that code widens them on the way.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        rates_at: The output stride at which the kernels have no holes; at finer ones all are dilated to the same reach.
        channels: Width of the block's output.
        branch_channels: Width of each branch; a quarter of the map's where not given.
        scale: Of the branches beside the shortcut.
        dropout: Before the scores.

    Raises:
        ValueError: A backbone of a coarser stride than ``rates_at``.
    """

    paper: ClassVar[str] = "Liu, Huang, Wang 2018, arXiv:1711.07767"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        rates_at: int = 16,
        channels: int = 256,
        branch_channels: int | None = None,
        scale: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(info, num_classes)
        last = info[-1]
        at_least(1, "channels", channels)
        at_least(1, "branch_channels", branch_channels)
        share("dropout", dropout)
        if last.reduction > rates_at:
            raise ValueError(
                f"rfb's kernels have no holes at output stride {rates_at}, and cannot be finer than that on a map of "
                f"stride {last.reduction}; give rates_at: {last.reduction}, or the backbone a smaller output stride"
            )
        self.rates_at = rates_at
        (unit,) = rates_at_reduction((1,), rates_at, last.reduction)
        self.block = ReceptiveFieldBlock(
            last.channels, channels, branch_channels or max(last.channels // 4, 1), unit=unit, scale=scale
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Scale every kernel's rate to the new stride."""
        (self.block.unit,) = rates_at_reduction((1,), self.rates_at, info[-1].reduction)

    def forward(self, features: Features) -> Tensor:
        """Scores at the backbone's output stride."""
        return self.classifier(self.dropout(self.block(features[-1])))
