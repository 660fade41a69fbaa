"""DeepLabV3+: DeepLabV3 as the encoder, and a small decoder that brings the edges back.

Chen, Zhu, Papandreou, Schroff, Adam: Encoder-Decoder with Atrous Separable Convolution for Semantic Image
Segmentation (ECCV 2018), section 3.1 and figure 2; defaults are the best rows of its tables 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_atrous.context import ASPP, rates_at_reduction
from lightning_atrous.heads.base import HEADS, Head, level_of_reduction
from lightning_atrous.layers import ConvNormAct, SeparableConv, resize
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["DeepLabV3Plus"]


@HEADS.register("deeplabv3plus")
class DeepLabV3Plus(Head):
    """ASPP, raised to stride 4, joined with the low-level features there, refined, scored.

    Reads the level of stride 4 and the last one.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        rates: Atrous rates of the 3×3 branches, at the output stride ``rates_at``.
        rates_at: The output stride for which ``rates`` are given; elsewhere they are scaled to the same reach.
        channels: Width of the pyramid and of the decoder.
        low_level_channels: To which a 1×1 brings the stride-4 features, so that they do not outweigh the pyramid.
        decoder_convs: How many 3×3 convolutions refine the joined features.
        separable: Atrous separable convolutions in the pyramid and the decoder.
        dropout: After the pyramid's projection.

    Raises:
        ValueError: No level of stride 4, or a rate that is no whole number of at least 1 at the backbone's stride.
    """

    paper: ClassVar[str] = "Chen et al., ECCV 2018, arXiv:1802.02611"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        rates: tuple[int, ...] = (6, 12, 18),
        rates_at: int = 16,
        channels: int = 256,
        low_level_channels: int = 48,
        decoder_convs: int = 2,
        separable: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(info, num_classes)
        if decoder_convs < 1:
            raise ValueError(f"decoder_convs must be at least 1, got {decoder_convs}; without a decoder take deeplabv3")
        self.rates, self.rates_at = tuple(rates), rates_at
        self.low_level = level_of_reduction(info, 4, "deeplabv3plus")
        last = info[-1]
        effective = rates_at_reduction(self.rates, rates_at, last.reduction)
        self.aspp = ASPP(last.channels, channels, rates=effective, separable=separable, dropout=dropout)
        self.reduce = ConvNormAct(info[self.low_level].channels, low_level_channels)
        conv = SeparableConv if separable else ConvNormAct
        widths = [low_level_channels + channels] + [channels] * (decoder_convs - 1)
        self.refine = nn.Sequential(*(conv(width, channels, 3) for width in widths))
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Scale the pyramid's rates to the new stride."""
        self.aspp.rates = rates_at_reduction(self.rates, self.rates_at, info[-1].reduction)

    def forward(self, features: Features) -> Tensor:
        """Scores at stride 4."""
        low = self.reduce(features[self.low_level])
        high = resize(self.aspp(features[-1]), low.shape[-2:])
        return self.classifier(self.refine(torch.cat([high, low], dim=1)))
