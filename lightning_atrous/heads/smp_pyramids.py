"""Decoders of SMP that bring all levels to stride 4 and score there: FPN, PAN, UPerNet, SegFormer.

segmentation_models_pytorch's own decoders, over backbones of this package. Options and defaults are those of SMP's
models, without ``decoder_`` before them; SMP's ``upsampling: 4`` is 1 here, for whoever asks raises the logits.

SMP's DPT is not among them: it wants four maps from across a plain vision transformer's depth, and its class token,
where backbones here give the last three maps and no token. SMP's DeepLabV3(+) and PSPNet are heads of this package's
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.pan.decoder import PANDecoder
from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor

from lightning_atrous.heads.base import HEADS, at_least, share
from lightning_atrous.heads.smp_base import (
    Interpolation,
    Pyramid,
    SMPHead,
    check_doubling,
    continued,
    empty_above,
    norms_of_single_values,
    one_of,
)
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["FPN", "PAN", "Segformer", "UPerNet"]

Merge = Literal["add", "cat"]
PooledNorm = Literal["batchnorm", "identity"]

GROUPS = 32
"""Of the group norms in SMP's FPN."""

PAN_SIDE = 8
"""The least side of a map that PAN's pyramid can halve three times."""


@HEADS.register("fpn")
class FPN(SMPHead):
    """A feature pyramid as SMP has it, with the semantic branch of Panoptic FPN (Kirillov et al. 2019, section 3.1).

    Reads the last four levels. Maps are doubled, so their strides must double: it is refused over dilated backbones.
    Maps whose sides do not divide are continued with zeros, which its group norms count in.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        pyramid_channels: Width of the pyramid.
        segmentation_channels: Width of the semantic branch, a multiple of 32.
        merge_policy: Whether the four maps are added or stand side by side before they are scored.
        dropout: Of whole channels, before the scores.
        interpolation: How the pyramid's maps are raised.
        segmentation_kernel: Kernel of the scoring convolution.
        upsampling: By how much the head raises its own logits, corners aligned, 4 in SMP; at 1 whoever asks does.

    Raises:
        ValueError: Levels whose strides do not double from 4 on, fewer than four of them, or an option out of range.
    """

    paper: ClassVar[str] = "Lin, Dollár, Girshick, He, Hariharan, Belongie 2016, arXiv:1612.03144"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        pyramid_channels: int = 256,
        segmentation_channels: int = 128,
        merge_policy: Merge = "add",
        dropout: float = 0.2,
        interpolation: Interpolation = "nearest",
        segmentation_kernel: int = 1,
        upsampling: int = 1,
    ) -> None:
        pyramid = Pyramid.of(info, "fpn")
        check_doubling(pyramid.strides[2:], "fpn")
        _check_number(pyramid, "fpn", least=4)
        at_least(1, "pyramid_channels", pyramid_channels)
        share("dropout", dropout)
        if segmentation_channels < 1 or segmentation_channels % GROUPS:
            raise ValueError(
                f"segmentation_channels must be a multiple of {GROUPS}, the groups of fpn's norms; got "
                f"{segmentation_channels}"
            )
        one_of(get_args(Merge), "merge_policy", merge_policy)
        one_of(get_args(Interpolation), "interpolation", interpolation)
        decoder = FPNDecoder(
            encoder_channels=pyramid.channels,
            pyramid_channels=pyramid_channels,
            segmentation_channels=segmentation_channels,
            dropout=dropout,
            merge_policy=merge_policy,
            interpolation_mode=interpolation,
        )
        super().__init__(
            info,
            num_classes,
            pyramid=pyramid,
            decoder=decoder,
            width=decoder.out_channels,
            segmentation_kernel=segmentation_kernel,
            upsampling=upsampling,
        )

    def forward(self, features: Features) -> Tensor:
        """Scores at stride 4, or at that of the fourth level from the end."""
        maps = self.pyramid.maps(features)
        return self.score(continued(maps, self.pyramid.strides), maps[-4])


@HEADS.register("pan")
class PAN(SMPHead):
    """Pyramid attention as SMP has it: a pyramid over the last level, then each finer one weighed by what is above it.

    Maps are raised to the size of the next, whatever that is, so it runs at every output stride; SMP's model takes 16
    and 32. The pyramid halves the last map three times: one of fewer than 8 pixels a side, which SMP cannot run on, is
    continued with zeros, which the pooling counts in. Pooled norms use their running statistics where a batch leaves
    them a single value.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        channels: Width of the decoder.
        interpolation: How maps are raised.
        segmentation_kernel: Kernel of the scoring convolution.
        upsampling: By how much the head raises its own logits, corners aligned, 4 in SMP; at 1 whoever asks does.

    Raises:
        ValueError: No level of stride 4, not two to four from there on, or an option out of range.
    """

    paper: ClassVar[str] = "Li, Xiong, An, Wang 2018, arXiv:1805.10180"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        channels: int = 32,
        interpolation: Interpolation = "bilinear",
        segmentation_kernel: int = 3,
        upsampling: int = 1,
    ) -> None:
        pyramid = Pyramid.of(info, "pan")
        _check_number(pyramid, "pan", least=2, most=4)
        at_least(1, "channels", channels)
        one_of(get_args(Interpolation), "interpolation", interpolation)
        decoder = PANDecoder(
            encoder_channels=pyramid.channels,
            encoder_depth=len(pyramid.coarse) + 1,
            decoder_channels=channels,
            interpolation_mode=interpolation,
        )
        norms_of_single_values(decoder.fpa.branch1)
        norms_of_single_values(decoder.fpa.down3)
        for attention in ("gau1", "gau2", "gau3")[: len(pyramid.coarse) - 1]:
            norms_of_single_values(getattr(decoder, attention).conv1)
        super().__init__(
            info,
            num_classes,
            pyramid=pyramid,
            decoder=decoder,
            width=channels,
            segmentation_kernel=segmentation_kernel,
            upsampling=upsampling,
        )

    def forward(self, features: Features) -> Tensor:
        """Scores at stride 4."""
        maps = self.pyramid.maps(features)
        small = min(maps[-1].shape[-2:]) < PAN_SIDE
        return self.score(continued(maps, self.pyramid.strides, least=PAN_SIDE) if small else maps, maps[2])


@HEADS.register("upernet")
class UPerNet(SMPHead):
    """UPerNet's decoder as SMP has it: pyramid pooling over the last level, a feature pyramid, all joined at stride 4.

    Maps are raised to the size of the next, whatever that is, so it runs at every output stride and image size. SMP
    puts a layer norm before every level, which the paper does not. The norm of the bin that holds the whole image uses
    its running statistics where a batch leaves it a single value.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        channels: Width of the decoder.
        use_norm: After each convolution; ``identity`` for none.
        segmentation_kernel: Kernel of the scoring convolution.
        upsampling: By how much the head raises its own logits, corners aligned, 4 in SMP; at 1 whoever asks does.

    Raises:
        ValueError: No level of stride 4, or none beside it; an option out of range.
    """

    paper: ClassVar[str] = "Xiao, Liu, Zhou, Jiang, Sun 2018, arXiv:1807.10221"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        channels: int = 256,
        use_norm: PooledNorm = "batchnorm",
        segmentation_kernel: int = 1,
        upsampling: int = 1,
    ) -> None:
        pyramid = Pyramid.of(info, "upernet")
        _check_number(pyramid, "upernet", least=2)
        at_least(1, "channels", channels)
        # an instance norm has nothing to normalise in the bin that holds the whole image
        one_of(get_args(PooledNorm), "use_norm", use_norm)
        decoder = UPerNetDecoder(
            encoder_channels=pyramid.channels,
            encoder_depth=len(pyramid.coarse) + 1,
            decoder_channels=channels,
            use_norm=use_norm,
        )
        norms_of_single_values(decoder.psp.blocks[0])
        super().__init__(
            info,
            num_classes,
            pyramid=pyramid,
            decoder=decoder,
            width=channels,
            segmentation_kernel=segmentation_kernel,
            upsampling=upsampling,
        )

    def forward(self, features: Features) -> Tensor:
        """Scores at stride 4."""
        maps = self.pyramid.maps(features)
        return self.score(maps, maps[2])


@HEADS.register("segformer")
class Segformer(SMPHead):
    """SegFormer's all-MLP decoder as SMP has it: every level projected by a 1×1, brought to stride 4, joined by a 1×1.

    It looks at no neighbours, so it runs at every output stride and image size, and follows from one to another. Unlike
    the paper's, SMP's reads a level of stride 2 too, where the backbone has one.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        segmentation_channels: Width of the decoder.
        segmentation_kernel: Kernel of the scoring convolution.
        upsampling: By how much the head raises its own logits, corners aligned, 4 in SMP; at 1 whoever asks does.

    Raises:
        ValueError: No level of stride 4, or none beside it; an option out of range.
    """

    paper: ClassVar[str] = "Xie, Wang, Yu, Anandkumar, Alvarez, Luo 2021, arXiv:2105.15203"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        segmentation_channels: int = 256,
        segmentation_kernel: int = 1,
        upsampling: int = 1,
    ) -> None:
        pyramid = Pyramid.of(info, "segformer")
        _check_number(pyramid, "segformer", least=2)
        at_least(1, "segmentation_channels", segmentation_channels)
        decoder = SegformerDecoder(
            encoder_channels=pyramid.channels,
            encoder_depth=len(pyramid.coarse) + 1,
            segmentation_channels=segmentation_channels,
        )
        super().__init__(
            info,
            num_classes,
            pyramid=pyramid,
            decoder=decoder,
            width=segmentation_channels,
            segmentation_kernel=segmentation_kernel,
            upsampling=upsampling,
        )

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Follow anywhere that leaves a level of stride 4.

        Raises:
            ValueError: There is none.
        """
        Pyramid.of(info, "segformer")

    def forward(self, features: Features) -> Tensor:
        """Scores at stride 4."""
        _, half, *coarse = self.pyramid.maps(features)
        # the decoder scores at a quarter of the image, rounded down: of one that ends where the level of stride 4 does
        return self.score([empty_above(coarse[0], 4), half, *coarse], coarse[0])


def _check_number(pyramid: Pyramid, head: str, *, least: int, most: int | None = None) -> None:
    given = len(pyramid.coarse)
    if given < least or (most is not None and given > most):
        raise ValueError(
            f"{head} reads {least} {'or more' if most is None else f'to {most}'} levels from stride 4 on, but this "
            f"backbone gives {given}; take another backbone, or a head that reads any number, such as unet"
        )
