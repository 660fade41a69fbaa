"""The plain head: a few 3×3 convolutions on one level, then scores.

Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation (CVPR 2015), in the form that is the
baseline and the auxiliary head of PSPNet and its successors: one map, no skips, bilinear upsampling by whoever asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_atrous.heads.base import HEADS, Head
from lightning_atrous.layers import ConvNormAct
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["FCN"]


@HEADS.register("fcn")
class FCN(Head):
    """3×3 convolutions on one level, then a 1×1 to the classes. Reads one level; any backbone will do.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        level: Which level it reads: -1 the last, -2 the one before (the usual place of an auxiliary head).
        channels: Width of the 3×3 convolutions; a quarter of the level's where not given.
        convs: How many 3×3 convolutions.
        dropout: Before the scores.

    Raises:
        ValueError: A level that the backbone does not have.
    """

    paper: ClassVar[str] = "Long et al., CVPR 2015, arXiv:1411.4038"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        level: int = -1,
        channels: int | None = None,
        convs: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(info, num_classes)
        if not -len(info) <= level < len(info):
            raise ValueError(f"level {level} asked of a backbone with {len(info)} levels; take -{len(info)} to -1")
        if convs < 0:
            raise ValueError(f"convs must be 0 or more, got {convs}")
        self.level = level
        width = info[level].channels
        layers: list[nn.Module] = []
        for _ in range(convs):
            out = channels or info[level].channels // 4
            layers.append(ConvNormAct(width, out, 3))
            width = out
        self.layers = nn.Sequential(*layers, nn.Dropout(dropout), nn.Conv2d(width, num_classes, 1))

    def forward(self, features: Features) -> Tensor:
        """Scores at the level's own stride."""
        return self.layers(features[self.level])
