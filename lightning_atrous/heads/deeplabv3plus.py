"""DeepLabV3+: DeepLabV3 as the encoder, and a small decoder that brings the edges back.

Chen, Zhu, Papandreou, Schroff, Adam: Encoder-Decoder with Atrous Separable Convolution for Semantic Image
Segmentation (ECCV 2018), section 3.1 and figure 2; defaults are the best rows of its tables 1 and 2, whose other rows
are options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_atrous.context import ASPP, rates_at_reduction
from lightning_atrous.heads.base import HEADS, Head, at_least, level_of_reduction, odd, share
from lightning_atrous.layers import ConvNormAct, SeparableConv, enlarge, resize
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
        channels: Width of the pyramid.
        low_levels: Strides of the levels that the decoder joins, one after the other, the finest first: (4,) is the
            paper's, (4, 8) its U-Net-like variant, () is no decoder at all.
        low_level_channels: To which a 1×1 brings each of these, so that they do not outweigh the pyramid.
        decoder_convs: How many convolutions refine what was joined, at each level.
        decoder_channels: Their width; that of the pyramid where not given.
        decoder_kernel: Of these convolutions; the paper tries 1 too.
        separable: Atrous separable convolutions in the pyramid and the decoder.
        inner_norm: Norm and ReLU also between the two parts of a separable convolution.
        image_pool: The branch of the pyramid that sees the mean of the whole map.
        project_kernel: Of the pyramid's projection; 3 in mmsegmentation.
        aspp_convs: How many 3×3 convolutions follow the pyramid; 1 in SMP.
        dropout: After the pyramid's projection.
        align_corners: How the pyramid is raised to the low levels; aligned in SMP.
        upsampling: By how much the head raises its own logits, with corners aligned, as SMP's models do. At 1 they stay
            at their stride, for whoever asks to raise.

    Raises:
        ValueError: A low level that the backbone does not have, or a rate that is no whole number of at least 1 at its
            stride.
    """

    paper: ClassVar[str] = "Chen, Zhu, Papandreou, Schroff, Adam 2018, arXiv:1802.02611"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        rates: tuple[int, ...] = (6, 12, 18),
        rates_at: int = 16,
        channels: int = 256,
        low_levels: tuple[int, ...] = (4,),
        low_level_channels: int = 48,
        decoder_convs: int = 2,
        decoder_channels: int | None = None,
        decoder_kernel: int = 3,
        separable: bool = False,
        inner_norm: bool = True,
        image_pool: bool = True,
        project_kernel: int = 1,
        aspp_convs: int = 0,
        dropout: float = 0.1,
        align_corners: bool = False,
        upsampling: int = 1,
    ) -> None:
        super().__init__(info, num_classes)
        if decoder_convs < 1:
            raise ValueError(
                f"decoder_convs must be at least 1, got {decoder_convs}; for no decoder set low_levels: []"
            )
        if list(low_levels) != sorted(set(low_levels)):
            raise ValueError(f"low_levels are strides, each once, the finest first; got {tuple(low_levels)}")
        at_least(1, "channels", channels)
        at_least(1, "decoder_channels", decoder_channels)
        at_least(1, "low_level_channels", low_level_channels)
        at_least(0, "aspp_convs", aspp_convs)
        at_least(1, "upsampling", upsampling)
        odd("project_kernel", project_kernel)
        odd("decoder_kernel", decoder_kernel)
        share("dropout", dropout)
        self.rates, self.rates_at = tuple(rates), rates_at
        self.align_corners, self.upsampling = align_corners, upsampling
        self.low_levels = tuple(level_of_reduction(info, stride, "deeplabv3plus") for stride in low_levels)
        last = info[-1]
        self.aspp = ASPP(
            last.channels,
            channels,
            rates=rates_at_reduction(self.rates, rates_at, last.reduction),
            separable=separable,
            inner_norm=inner_norm,
            image_pool=image_pool,
            project_kernel=project_kernel,
            dropout=dropout,
        )

        def conv(in_channels: int, out_channels: int, kernel: int) -> nn.Module:
            if separable:
                return SeparableConv(in_channels, out_channels, kernel, inner_norm=inner_norm)
            return ConvNormAct(in_channels, out_channels, kernel)

        self.refine_aspp = nn.Sequential(*(conv(channels, channels, 3) for _ in range(aspp_convs)))
        self.reduce = nn.ModuleList(ConvNormAct(info[i].channels, low_level_channels) for i in self.low_levels)
        self.refine = nn.ModuleList()
        width, inner = channels, decoder_channels or channels
        for _ in self.low_levels:  # run from the coarsest, kept beside `reduce`
            widths = [width + low_level_channels] + [inner] * (decoder_convs - 1)
            self.refine.insert(0, nn.Sequential(*(conv(width, inner, decoder_kernel) for width in widths)))
            width = inner
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Scale the pyramid's rates to the new stride."""
        self.aspp.rates = rates_at_reduction(self.rates, self.rates_at, info[-1].reduction)

    def forward(self, features: Features) -> Tensor:
        """Scores at the stride of the finest low level."""
        x = self.refine_aspp(self.aspp(features[-1]))
        for i, reduce, refine in reversed(list(zip(self.low_levels, self.reduce, self.refine, strict=True))):
            low = reduce(features[i])
            high = resize(x, low.shape[-2:], align_corners=self.align_corners)
            x = refine(torch.cat([high, low], dim=1))
        logits = self.classifier(x)
        return logits if self.upsampling == 1 else enlarge(logits, self.upsampling)
