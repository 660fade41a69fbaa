"""A decoder in the manner of SegNet: what was strongest in the finer map says where the coarser one's values go.

Badrinarayanan, Kendall, Cipolla: SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation
(TPAMI 2017), section 3. SegNet keeps the indices of VGG's own pools; here any backbone will do, so that the finer
level is pooled for its indices, which are all that the decoder takes from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_atrous.context import ASPP, rates_at_reduction
from lightning_atrous.heads.base import HEADS, Head
from lightning_atrous.layers import ConvNormAct
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["SegNet"]


@HEADS.register("segnet")
class SegNet(Head):
    """From the last map upwards: convolutions, and unpooling by the indices of the next finer level.

    Reads the places of the maxima in every finer level, and no value there. It cannot follow the backbone to another
    output stride, where it would have fewer or more steps.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        stride: Of the finest level to which it goes; all the way where not given.
        convs: How many 3×3 convolutions follow each unpooling.
        rates: Atrous rates of a pyramid (ASPP) before the decoder, as in DeepLabV3; none where empty, as in the paper.
        rates_at: The output stride for which ``rates`` are given.
        channels: Width of that pyramid.

    Raises:
        ValueError: A backbone without levels finer than its last, or without one of that stride; or a rate that is no
            whole number of at least 1.
    """

    paper: ClassVar[str] = "Badrinarayanan, Kendall, Cipolla 2017, arXiv:1511.00561"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        stride: int | None = None,
        convs: int = 1,
        rates: tuple[int, ...] = (),
        rates_at: int = 16,
        channels: int = 256,
    ) -> None:
        super().__init__(info, num_classes)
        if convs < 1:
            raise ValueError(f"convs must be at least 1, got {convs}")
        self.levels = _levels(info, stride)
        self._strides = tuple(level.reduction for level in info)
        width = info[-1].channels
        self.aspp = None
        if rates:
            effective = rates_at_reduction(rates, rates_at, info[-1].reduction)
            self.aspp, width = ASPP(width, channels, rates=effective), channels
        self.narrow, self.refine = nn.ModuleList(), nn.ModuleList()
        for i in self.levels:
            self.narrow.append(ConvNormAct(width, info[i].channels, 3))
            width = info[i].channels
            self.refine.append(nn.Sequential(*(ConvNormAct(width, width, 3) for _ in range(convs))))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Refuse other strides.

        Raises:
            ValueError: They are others.
        """
        strides = tuple(level.reduction for level in info)
        if strides != self._strides:
            raise ValueError(
                f"segnet was built for levels of strides {_list(self._strides)} and has a step between each; it cannot "
                f"follow to {_list(strides)}; train it there, or take deeplabv3plus, which follows"
            )

    def forward(self, features: Features) -> Tensor:
        """Scores at the stride of the finest level that it goes to."""
        x = features[-1] if self.aspp is None else self.aspp(features[-1])
        coarse = self._strides[-1]
        for i, narrow, refine in zip(self.levels, self.narrow, self.refine, strict=True):
            x = refine(_unpool(narrow(x), features[i], coarse // self._strides[i]))
            coarse = self._strides[i]
        return self.classifier(x)


def _unpool(x: Tensor, finer: Tensor, window: int) -> Tensor:
    """Each value to where the finer map has its maximum in that window, zeros elsewhere.

    ``(B, C, h, w)`` and ``(B, C, h', w')`` → ``(B, C, h', w')``.
    """
    _, indices = F.max_pool2d(finer, window, ceil_mode=True, return_indices=True)
    indices = indices[..., : x.shape[-2], : x.shape[-1]].contiguous()  # patches round sizes down
    return F.max_unpool2d(x, indices, (window, window), output_size=finer.shape[-2:])


def _levels(info: Sequence[FeatureInfo], stride: int | None) -> tuple[int, ...]:
    """The levels to which it goes, one a stride, the coarsest first."""
    finest = {level.reduction: i for i, level in reversed(list(enumerate(info)))}
    strides = sorted((s for s in finest if s < info[-1].reduction), reverse=True)
    if not strides or (stride is not None and stride not in strides):
        wanted = "a level finer than the last" if stride is None else f"a level of stride {stride} before the last"
        raise ValueError(
            f"segnet needs {wanted}, but this backbone gives strides "
            f"{_list([level.reduction for level in info])}; take a convolutional backbone, or deeplabv3"
        )
    return tuple(finest[s] for s in strides if stride is None or s >= stride)


def _list(strides: Sequence[int]) -> str:
    return ", ".join(map(str, strides))
