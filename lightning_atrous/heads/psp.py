"""PSPNet: the means of the image's parts, at four scales.

Zhao, Shi, Qi, Wang, Jia: Pyramid Scene Parsing Network (CVPR 2017), section 3.2 and figure 3. Its auxiliary loss is
the head ``fcn`` with ``level: -2`` in the slot for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_atrous.context import PyramidPooling
from lightning_atrous.heads.base import HEADS, Head, at_least, share
from lightning_atrous.layers import ConvNormAct
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["PSP"]


@HEADS.register("psp")
class PSP(Head):
    """Pyramid pooling beside the last map, a 3×3, scores. Reads the last level; any backbone will do.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        bins: Parts along each axis, one number a scale.
        branch_channels: Width of each scale; the map's divided by their number where not given, as in the paper.
        channels: Width of the 3×3 that joins them.
        dropout: Before the scores.

    Raises:
        ValueError: A number of parts below 1.
    """

    paper: ClassVar[str] = "Zhao, Shi, Qi, Wang, Jia 2017, arXiv:1612.01105"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        bins: tuple[int, ...] = (1, 2, 3, 6),
        branch_channels: int | None = None,
        channels: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(info, num_classes)
        if not bins or min(bins) < 1:
            raise ValueError(f"psp's bins are parts along each axis, at least 1 each, got {tuple(bins)}")
        at_least(1, "branch_channels", branch_channels)
        at_least(1, "channels", channels)
        share("dropout", dropout)
        width = info[-1].channels
        self.pyramid = PyramidPooling(width, branch_channels or max(width // len(bins), 1), bins=bins)
        self.project = ConvNormAct(self.pyramid.out_channels, channels, 3)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        """Scores at the backbone's output stride."""
        return self.classifier(self.dropout(self.project(self.pyramid(features[-1]))))
