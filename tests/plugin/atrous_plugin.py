"""A head of one layer, in a package of its own."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_atrous.heads import Head
from lightning_atrous.types import FeatureInfo, Features


class Linear(Head):
    """A 1×1 on the last map.

    Args:
        info: The backbone's levels.
        num_classes: K.
        dropout: Before the scores.
    """

    def __init__(self, info: Sequence[FeatureInfo], num_classes: int, *, dropout: float = 0.0) -> None:
        super().__init__(info, num_classes)
        self.layers = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(info[-1].channels, num_classes, 1))

    def forward(self, features: Features) -> Tensor:
        return self.layers(features[-1])
