"""DeepLab v2: fields of view of several rates side by side, their scores summed.

Chen, Papandreou, Kokkinos, Murphy, Yuille: DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous
Convolution, and Fully Connected CRFs (TPAMI 2018), section 3.2 and figure 7: ASPP-L, without norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_atrous.context import FieldOfView, rates_at_reduction
from lightning_atrous.heads.base import HEADS, Head, at_least, share
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["DeepLabV2"]


@HEADS.register("deeplabv2")
class DeepLabV2(Head):
    """The first ASPP: 3×3 branches at several rates, no norm, scores summed. Reads the last level; any backbone.

    The CRF is left out, and the fusion of several image scales.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        rates: Atrous rates of the branches, at the output stride ``rates_at``; (2, 4, 8, 12) is the paper's ASPP-S.
        rates_at: The output stride for which ``rates`` are given; elsewhere they are scaled to the same reach.
        channels: Width of a 3×3 and a 1×1 in each branch before its scores, 1024 on VGG in the paper; where not given
            the 3×3 scores at once, as on ResNet-101 there.
        dropout: Behind each of these two.

    Raises:
        ValueError: No rate, or one that is no whole number of at least 1 at the backbone's stride.
    """

    paper: ClassVar[str] = "Chen, Papandreou, Kokkinos, Murphy, Yuille 2018, arXiv:1606.00915"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        rates: tuple[int, ...] = (6, 12, 18, 24),
        rates_at: int = 8,
        channels: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(info, num_classes)
        if not rates:
            raise ValueError("deeplabv2 needs at least one rate, got none")
        at_least(1, "channels", channels)
        share("dropout", dropout)
        self.rates, self.rates_at = tuple(rates), rates_at
        last = info[-1]
        self.fields = nn.ModuleList(
            FieldOfView(last.channels, channels, num_classes, rate=rate, dropout=dropout)
            for rate in rates_at_reduction(self.rates, rates_at, last.reduction)
        )
        if channels is None:
            for conv in (module for module in self.fields.modules() if isinstance(module, nn.Conv2d)):
                # as the authors', who learn these ten times as fast; wider ones begin far off when they are summed
                nn.init.normal_(conv.weight, std=0.01)
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Scale the rates to the new stride."""
        effective = rates_at_reduction(self.rates, self.rates_at, info[-1].reduction)
        for field, rate in zip(self.fields, effective, strict=True):
            assert isinstance(field, FieldOfView)
            field.rate = rate

    def forward(self, features: Features) -> Tensor:
        """Scores at the backbone's output stride."""
        first, *others = (field(features[-1]) for field in self.fields)
        return sum(others, start=first)
