"""DeepLab v1, LargeFOV: VGG's classifier as an atrous convolution of a large field of view.

Chen, Papandreou, Kokkinos, Murphy, Yuille: Semantic Image Segmentation with Deep Convolutional Nets and Fully
Connected CRFs (ICLR 2015), sections 3.1 and 3.2: on VGG-16 at output stride 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from lightning_atrous.context import FieldOfView, rates_at_reduction
from lightning_atrous.heads.base import HEADS, Head, at_least, share
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["DeepLabV1"]


@HEADS.register("deeplabv1")
class DeepLabV1(Head):
    """LargeFOV: one 3×3 at rate 12, a 1×1, scores. Reads the last level; made for VGG, any backbone will do.

    The CRF is left out. VGG's pools keep their 2×2 windows, dilated, where the authors took 3×3.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        rate: Atrous rate of the 3×3, at the output stride ``rates_at``.
        rates_at: The output stride for which ``rate`` is given; elsewhere it is scaled to the same reach.
        channels: Width of the 3×3 and the 1×1.
        dropout: Behind each of them.

    Raises:
        ValueError: A rate that is no whole number of at least 1 at the backbone's stride.
    """

    paper: ClassVar[str] = "Chen, Papandreou, Kokkinos, Murphy, Yuille 2015, arXiv:1412.7062"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        rate: int = 12,
        rates_at: int = 8,
        channels: int = 1024,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(info, num_classes)
        at_least(1, "channels", channels)
        share("dropout", dropout)
        self.rate, self.rates_at = rate, rates_at
        (effective,) = rates_at_reduction((rate,), rates_at, info[-1].reduction)
        self.field = FieldOfView(info[-1].channels, channels, num_classes, rate=effective, dropout=dropout)

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Scale the rate to the new stride."""
        (self.field.rate,) = rates_at_reduction((self.rate,), self.rates_at, info[-1].reduction)

    def forward(self, features: Features) -> Tensor:
        """Scores at the backbone's output stride."""
        return self.field(features[-1])
