"""DeepLabV3: atrous spatial pyramid pooling on the last map.

Chen, Papandreou, Schroff, Adam: Rethinking Atrous Convolution for Semantic Image Segmentation (arXiv:1706.05587),
section 3.3 and figure 5. Deviation: dropout of 0.1 behind the pyramid, as in the authors' released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_atrous.context import ASPP, rates_at_reduction
from lightning_atrous.heads.base import HEADS, Head
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["DeepLabV3"]


@HEADS.register("deeplabv3")
class DeepLabV3(Head):
    """ASPP, then a 1×1 to the classes. Reads the last level; any backbone will do.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        rates: Atrous rates of the 3×3 branches, at the output stride ``rates_at``.
        rates_at: The output stride for which ``rates`` are given; elsewhere they are scaled to the same reach.
        channels: Width of every branch and of the projection.
        separable: Atrous separable convolutions in the branches.
        dropout: After the projection.

    Raises:
        ValueError: A rate that is no whole number of at least 1 at the backbone's stride.
    """

    paper: ClassVar[str] = "Chen et al., 2017, arXiv:1706.05587"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        rates: tuple[int, ...] = (6, 12, 18),
        rates_at: int = 16,
        channels: int = 256,
        separable: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(info, num_classes)
        self.rates, self.rates_at = tuple(rates), rates_at
        last = info[-1]
        effective = rates_at_reduction(self.rates, rates_at, last.reduction)
        self.aspp = ASPP(last.channels, channels, rates=effective, separable=separable, dropout=dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Scale the pyramid's rates to the new stride."""
        self.aspp.rates = rates_at_reduction(self.rates, self.rates_at, info[-1].reduction)

    def forward(self, features: Features) -> Tensor:
        """Scores at the backbone's output stride."""
        return self.classifier(self.aspp(features[-1]))
