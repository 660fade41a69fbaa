"""Lite R-ASPP: the head of MobileNetV3.

Howard and others: Searching for MobileNetV3 (ICCV 2019), section 6.4 and figure 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_atrous.heads.base import HEADS, Head, at_least, level_of_reduction
from lightning_atrous.layers import ConvNormAct, resize
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["LRASPP"]


@HEADS.register("lraspp")
class LRASPP(Head):
    """The last map gated by its own mean, raised to a finer level; the scores of both are added.

    In torchvision's form: the gate pools the whole map, where the paper pools 49×49 windows of it. Reads the level of
    stride 8 and the last one.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        channels: To which a 1×1 brings the last map.
        low_level: Stride of the finer level.

    Raises:
        ValueError: No level of that stride.
    """

    paper: ClassVar[str] = "Howard et al. 2019, arXiv:1905.02244"

    def __init__(
        self, info: Sequence[FeatureInfo], num_classes: int, *, channels: int = 128, low_level: int = 8
    ) -> None:
        super().__init__(info, num_classes)
        at_least(1, "channels", channels)
        self.low_level = level_of_reduction(info, low_level, "lraspp")
        last = info[-1].channels
        self.project = ConvNormAct(last, channels)
        self.gate = nn.Conv2d(last, channels, 1, bias=False)
        self.low_classifier = nn.Conv2d(info[self.low_level].channels, num_classes, 1)
        self.high_classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        """Scores at the stride of the finer level."""
        low, high = features[self.low_level], features[-1]
        gated = self.project(high) * self.gate(high.mean(dim=(2, 3), keepdim=True)).sigmoid()
        return self.low_classifier(low) + self.high_classifier(resize(gated, low.shape[-2:]))
