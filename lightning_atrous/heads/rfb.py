"""Receptive field block: kernels and rates that grow together.

Liu, Huang, Wang: Receptive Field Block Net for Accurate and Fast Object Detection (ECCV 2018), section 3.2 and figure
4, here as the context of a segmentation head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_atrous.context import ReceptiveFieldBlock, rates_at_reduction
from lightning_atrous.heads.base import HEADS, Head
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["RFB"]


@HEADS.register("rfb")
class RFB(Head):
    """Kernels of 1, 3, 5, followed by 3×3 of rates 1, 3, 5; then scores. Reads the last level; any backbone will do.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        rates_at: The output stride at which the kernels have no holes; at finer ones all are dilated to the same reach.
        channels: Width of the block's output.
        branch_channels: Width of each branch; an eighth of the map's where not given, as in the paper's code.
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
        self.rates_at = rates_at
        last = info[-1]
        (unit,) = rates_at_reduction((1,), rates_at, last.reduction)
        self.block = ReceptiveFieldBlock(
            last.channels, channels, branch_channels or max(last.channels // 8, 1), unit=unit, scale=scale
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Scale every kernel's rate to the new stride."""
        (self.block.unit,) = rates_at_reduction((1,), self.rates_at, info[-1].reduction)

    def forward(self, features: Features) -> Tensor:
        """Scores at the backbone's output stride."""
        return self.classifier(self.dropout(self.block(features[-1])))
