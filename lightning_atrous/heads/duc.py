"""Dense upsampling convolution: the scores of every image pixel, learned, not interpolated.

Wang, Chen, Yuan, Liu, Huang, Hou, Cottrell: Understanding Convolution for Semantic Segmentation (WACV 2018), section
3.1, on the summed pyramid of DeepLab v2 as in its experiments. The paper's other half, hybrid dilated convolution, is
the option ``hdc`` of the backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_atrous.context import rates_at_reduction
from lightning_atrous.heads.base import HEADS, Head, at_least, share
from lightning_atrous.layers import ConvNormAct
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["DUC"]


@HEADS.register("duc")
class DUC(Head):
    """r²·K channels at every position of the last map, rearranged into scores that are r times finer.

    Reads the last level; any backbone will do. It cannot follow the backbone to another output stride, for r is part of
    its weights' shape.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        stride: Of the scores: 1 gives one for each image pixel.
        rates: Atrous rates of the 3×3 branches that are summed, at the output stride ``rates_at``.
        rates_at: The output stride for which ``rates`` are given; elsewhere they are scaled to the same reach.
        channels: To which a 1×1 brings the map before; where not given it is taken whole, as in the paper. (At output
            stride 16 and 19 classes a branch on 2048 channels has 90 million weights.)
        dropout: Before the branches.

    Raises:
        ValueError: A stride that does not divide that of the backbone, no rate, or one that is no whole number of at
            least 1 at the backbone's stride.
    """

    paper: ClassVar[str] = "Wang, Chen, Yuan, Liu, Huang, Hou, Cottrell 2018, arXiv:1702.08502"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        stride: int = 1,
        rates: tuple[int, ...] = (6, 12, 18, 24),
        rates_at: int = 8,
        channels: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(info, num_classes)
        last = info[-1]
        if stride < 1 or last.reduction % stride:
            raise ValueError(
                f"duc's stride must divide the backbone's output stride of {last.reduction}, got {stride}; take 1, "
                "or a smaller power of two"
            )
        if not rates:
            raise ValueError("duc needs at least one rate, got none; (1,) is a single plain 3×3")
        at_least(1, "channels", channels)
        share("dropout", dropout)
        self.times = last.reduction // stride
        self._finest = (info[0].reduction, stride)
        self.reduce = nn.Identity() if channels is None else ConvNormAct(last.channels, channels)
        self.dropout = nn.Dropout(dropout)
        self.branches = nn.ModuleList(
            ConvNormAct(channels or last.channels, num_classes * self.times**2, 3, dilation=rate, norm=False, act=False)
            for rate in rates_at_reduction(rates, rates_at, last.reduction)
        )

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Refuse another output stride.

        Raises:
            ValueError: It is another.
        """
        before = self.times * self._finest[1]
        if info[-1].reduction != before:
            raise ValueError(
                f"duc was built for output stride {before} and has {self.times}×{self.times} scores at every position; "
                f"it cannot follow to {info[-1].reduction}; train it there, or take deeplabv2 or deeplabv3"
            )

    def forward(self, features: Features) -> Tensor:
        """Scores at ``stride``, as far as the finest level reaches."""
        x = self.dropout(self.reduce(features[-1]))
        first, *others = (branch(x) for branch in self.branches)
        logits = F.pixel_shuffle(sum(others, start=first), self.times)
        # the last cells of the map reach beyond an image that the stride does not divide
        reduction, stride = self._finest
        rows, columns = (-(-n * reduction // stride) for n in features[0].shape[-2:])
        return logits[..., :rows, :columns]
