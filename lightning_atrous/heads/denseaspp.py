"""DenseASPP: atrous layers that read all layers before them.

Yang, Yu, Zhang, Li, Yang: DenseASPP for Semantic Segmentation in Street Scenes (CVPR 2018), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_atrous.context import DenseASPP, rates_at_reduction
from lightning_atrous.heads.base import HEADS, Head, at_least, share
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["DenseASPPHead"]


@HEADS.register("denseaspp")
class DenseASPPHead(Head):
    """Atrous layers of growing rate, densely connected, then a 1×1 to the classes. Reads the last level; any backbone.

    Norm and ReLU stand behind each convolution, not before it as in the authors' code, for the backbones here end in
    their own.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        rates: Atrous rates of the layers, at the output stride ``rates_at``.
        rates_at: The output stride for which ``rates`` are given; elsewhere they are scaled to the same reach.
        channels: What each layer adds; an eighth of the map's where not given, as in the paper.
        bottleneck: To which a 1×1 narrows before each 3×3; half of the map's where not given, as in the paper.
        dropout: Behind each layer, and before the scores.

    Raises:
        ValueError: No rate, or one that is no whole number of at least 1 at the backbone's stride.
    """

    paper: ClassVar[str] = "Yang, Yu, Zhang, Li, Yang 2018, CVPR"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        rates: tuple[int, ...] = (3, 6, 12, 18, 24),
        rates_at: int = 8,
        channels: int | None = None,
        bottleneck: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(info, num_classes)
        if not rates:
            raise ValueError("denseaspp needs at least one rate, got none")
        at_least(1, "channels", channels)
        at_least(1, "bottleneck", bottleneck)
        share("dropout", dropout)
        self.rates, self.rates_at = tuple(rates), rates_at
        last = info[-1]
        self.aspp = DenseASPP(
            last.channels,
            channels or max(last.channels // 8, 1),
            bottleneck or max(last.channels // 2, 1),
            rates=rates_at_reduction(self.rates, rates_at, last.reduction),
            dropout=dropout,
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(self.aspp.out_channels, num_classes, 1)

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Scale the rates to the new stride."""
        self.aspp.rates = rates_at_reduction(self.rates, self.rates_at, info[-1].reduction)

    def forward(self, features: Features) -> Tensor:
        """Scores at the backbone's output stride."""
        return self.classifier(self.dropout(self.aspp(features[-1])))
