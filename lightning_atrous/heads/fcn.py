"""The plain head: a few 3×3 convolutions on one level, then scores.

Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation (CVPR 2015), in the form that is the
baseline and the auxiliary head of PSPNet and its successors: one map, no skips, bilinear upsampling by whoever asks.
The paper's own FCN-32s, 16s and 8s are in `fcn_skips`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_atrous.heads.base import HEADS, Head, at_least, share
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
        concat_input: One more 3×3, on the level and what the others made of it (mmsegmentation).
        dropout: Before the scores.

    Raises:
        ValueError: A level that the backbone does not have.
    """

    paper: ClassVar[str] = "Long, Shelhamer, Darrell 2015, arXiv:1411.4038"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        level: int = -1,
        channels: int | None = None,
        convs: int = 1,
        concat_input: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(info, num_classes)
        if not -len(info) <= level < len(info):
            raise ValueError(f"level {level} asked of a backbone with {len(info)} levels; take -{len(info)} to -1")
        at_least(0, "convs", convs)
        at_least(1, "channels", channels)
        share("dropout", dropout)
        self.level = level
        first = info[level].channels
        inner = channels or max(first // 4, 1)
        widths = [first] + [inner] * convs
        self.convs = nn.Sequential(*(ConvNormAct(width, inner, 3) for width in widths[:-1]))
        self.fuse = ConvNormAct(first + widths[-1], inner, 3) if concat_input else None
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(inner if concat_input else widths[-1], num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        """Scores at the level's own stride."""
        x = features[self.level]
        seen = self.convs(x)
        if self.fuse is not None:
            seen = self.fuse(torch.cat([x, seen], dim=1))
        return self.classifier(self.dropout(seen))
