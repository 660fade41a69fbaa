"""Decoders of SMP that climb from the last map to the image, a level at a time: Unet, Unet++, LinkNet, MAnet.

segmentation_models_pytorch's own decoders, over backbones of this package. Options and defaults are those of SMP's
models, without ``decoder_`` before them. Features know the image's size only as far as their own strides say, so the
logits are of the size of the finest map times its stride: 66 pixels for an image of 65.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, get_args

from segmentation_models_pytorch.decoders.linknet.decoder import LinknetDecoder
from segmentation_models_pytorch.decoders.manet.decoder import MAnetDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from segmentation_models_pytorch.decoders.unetplusplus.decoder import UnetPlusPlusDecoder
from torch import Tensor

from lightning_atrous.heads.base import HEADS, at_least
from lightning_atrous.heads.smp_base import (
    Interpolation,
    Norm,
    Pyramid,
    SMPHead,
    check_doubling,
    continued,
    norm_of,
    one_of,
    one_width_per_step,
)
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["Linknet", "MAnet", "Unet", "UnetPlusPlus"]

Attention = Literal["scse"]
SCSE_SQUEEZE = 16
"""By how much SMP's ``scse`` narrows the channels that it weighs."""


@HEADS.register("unet")
class Unet(SMPHead):
    """U-Net's decoder as SMP has it: raise, join with the next finer level, two 3×3 convolutions; down to stride 1.

    Each map is raised to the size of the next, whatever that is, so it runs at every output stride and image size.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        use_norm: After each convolution; ``identity`` for none.
        channels: Width of each step, the one after the last level first.
        attention_type: ``scse`` weighs channels and positions (Roy, Navab, Wachinger 2018) around each step.
        interpolation: How maps are raised.
        center: Two 3×3 convolutions on the last level before anything else, as SMP has over VGG networks.
        segmentation_kernel: Kernel of the scoring convolution.
        upsampling: By how much the head raises its own logits, corners aligned; at 1 whoever asks raises them.

    Raises:
        ValueError: No level of stride 4, another number of ``channels`` than there are steps, or an unknown choice.
    """

    paper: ClassVar[str] = "Ronneberger, Fischer, Brox 2015, arXiv:1505.04597"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        use_norm: Norm = "batchnorm",
        channels: tuple[int, ...] = (256, 128, 64, 32, 16),
        attention_type: Attention | None = None,
        interpolation: Interpolation = "nearest",
        center: bool = False,
        segmentation_kernel: int = 3,
        upsampling: int = 1,
    ) -> None:
        pyramid = Pyramid.of(info, "unet")
        one_width_per_step(channels, pyramid, "unet")
        one_of(get_args(Interpolation), "interpolation", interpolation)
        _check_attention(attention_type, channels)
        decoder = UnetDecoder(
            encoder_channels=pyramid.channels,
            decoder_channels=channels,
            n_blocks=len(channels),
            use_norm=norm_of(use_norm),
            attention_type=attention_type,
            add_center_block=center,
            interpolation_mode=interpolation,
        )
        super().__init__(
            info,
            num_classes,
            pyramid=pyramid,
            decoder=decoder,
            width=channels[-1],
            segmentation_kernel=segmentation_kernel,
            upsampling=upsampling,
        )
        self.center = center

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Follow where the last level alone has another stride: it is raised to the one before and only then convolved.

        Raises:
            ValueError: Another level has another stride, or the last one has and ``center`` convolves it.
        """
        convolved = slice(None) if self.center else slice(-1)
        self._stay(Pyramid.of(info, "unet").strides[convolved], self.pyramid.strides[convolved])

    def forward(self, features: Features) -> Tensor:
        """Scores at stride 1."""
        maps = self.pyramid.maps(features)
        return self.score(maps, maps[0])


class DoublingHead(SMPHead):
    """A decoder that doubles its maps from step to step; those whose sides do not divide are continued with zeros."""

    def forward(self, features: Features) -> Tensor:
        """Scores at stride 1."""
        maps = self.pyramid.maps(features)
        return self.score(continued(maps, self.pyramid.strides), maps[0])


@HEADS.register("unetplusplus")
class UnetPlusPlus(DoublingHead):
    """Unet++'s decoder as SMP has it: between the levels and the steps of a U-Net, a dense grid of more such steps.

    Maps are doubled, so the strides must double from level to level: it is refused over dilated backbones. Maps whose
    sides do not divide are continued with zeros, which its norms count in.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        use_norm: After each convolution; ``identity`` for none.
        channels: Width of each step on the way to the scores, the one after the last level first.
        attention_type: ``scse`` weighs channels and positions (Roy, Navab, Wachinger 2018) around each step.
        interpolation: How maps are raised.
        segmentation_kernel: Kernel of the scoring convolution.
        upsampling: By how much the head raises its own logits, corners aligned; at 1 whoever asks raises them.

    Raises:
        ValueError: Levels whose strides do not double from 4 on, another number of ``channels`` than there are steps,
            or an unknown choice.
    """

    paper: ClassVar[str] = "Zhou, Siddiquee, Tajbakhsh, Liang 2018, arXiv:1807.10165"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        use_norm: Norm = "batchnorm",
        channels: tuple[int, ...] = (256, 128, 64, 32, 16),
        attention_type: Attention | None = None,
        interpolation: Interpolation = "nearest",
        segmentation_kernel: int = 3,
        upsampling: int = 1,
    ) -> None:
        pyramid = Pyramid.of(info, "unetplusplus")
        check_doubling(pyramid.strides[2:], "unetplusplus")
        one_width_per_step(channels, pyramid, "unetplusplus")
        one_of(get_args(Interpolation), "interpolation", interpolation)
        _check_attention(attention_type, (*channels, *filter(None, pyramid.channels[1:-1])))
        decoder = UnetPlusPlusDecoder(
            encoder_channels=pyramid.channels,
            decoder_channels=channels,
            n_blocks=len(channels),
            use_norm=norm_of(use_norm),
            attention_type=attention_type,
            interpolation_mode=interpolation,
        )
        super().__init__(
            info,
            num_classes,
            pyramid=pyramid,
            decoder=decoder,
            width=channels[-1],
            segmentation_kernel=segmentation_kernel,
            upsampling=upsampling,
        )


@HEADS.register("linknet")
class Linknet(DoublingHead):
    """LinkNet's decoder as SMP has it: 1×1, transposed convolution by 2, 1×1, and the next finer level added.

    Maps are doubled, so the strides must double from level to level: it is refused over dilated backbones. Maps whose
    sides do not divide are continued with zeros, which its norms count in. The map that is scored has 32 channels.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        use_norm: After each convolution; ``identity`` for none.
        segmentation_kernel: Kernel of the scoring convolution.
        upsampling: By how much the head raises its own logits, corners aligned; at 1 whoever asks raises them.

    Raises:
        ValueError: Levels whose strides do not double from 4 on, or an unknown choice.
    """

    paper: ClassVar[str] = "Chaurasia, Culurciello 2017, arXiv:1707.03718"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        use_norm: Norm = "batchnorm",
        segmentation_kernel: int = 1,
        upsampling: int = 1,
    ) -> None:
        pyramid = Pyramid.of(info, "linknet")
        check_doubling(pyramid.strides[2:], "linknet")
        width = 32  # SMP's models have no choice here
        decoder = LinknetDecoder(
            encoder_channels=pyramid.channels,
            prefinal_channels=width,
            n_blocks=len(pyramid.strides) - 1,
            use_norm=norm_of(use_norm),
        )
        super().__init__(
            info,
            num_classes,
            pyramid=pyramid,
            decoder=decoder,
            width=width,
            segmentation_kernel=segmentation_kernel,
            upsampling=upsampling,
        )


@HEADS.register("manet")
class MAnet(DoublingHead):
    """MA-Net's decoder as SMP has it: attention between all positions of the last level, then of channels at each step.

    Maps are doubled, so the strides must double from level to level: it is refused over dilated backbones. Maps whose
    sides do not divide are continued with zeros, which its norms and its attention count in. The attention holds the
    square of the last map's positions in memory.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        use_norm: After each convolution of the steps; ``identity`` for none.
        channels: Width of each step, the one after the last level first.
        pab_channels: Width in which positions are compared.
        interpolation: How maps are raised.
        segmentation_kernel: Kernel of the scoring convolution.
        upsampling: By how much the head raises its own logits, corners aligned; at 1 whoever asks raises them.

    Raises:
        ValueError: Levels whose strides do not double from 4 on, another number of ``channels`` than there are steps,
            or an unknown choice.
    """

    paper: ClassVar[str] = "Fan, Wang, Li, Wang 2020, doi:10.1109/ACCESS.2020.3025372"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        use_norm: Norm = "batchnorm",
        channels: tuple[int, ...] = (256, 128, 64, 32, 16),
        pab_channels: int = 64,
        interpolation: Interpolation = "nearest",
        segmentation_kernel: int = 3,
        upsampling: int = 1,
    ) -> None:
        pyramid = Pyramid.of(info, "manet")
        check_doubling(pyramid.strides[2:], "manet")
        one_width_per_step(channels, pyramid, "manet")
        at_least(1, "pab_channels", pab_channels)
        one_of(get_args(Interpolation), "interpolation", interpolation)
        decoder = MAnetDecoder(
            encoder_channels=pyramid.channels,
            decoder_channels=channels,
            n_blocks=len(channels),
            use_norm=norm_of(use_norm),
            pab_channels=pab_channels,
            interpolation_mode=interpolation,
        )
        super().__init__(
            info,
            num_classes,
            pyramid=pyramid,
            decoder=decoder,
            width=channels[-1],
            segmentation_kernel=segmentation_kernel,
            upsampling=upsampling,
        )


def _check_attention(attention_type: str | None, widths: Sequence[int]) -> None:
    one_of(("scse", None), "attention_type", attention_type)
    if attention_type and min(widths) < SCSE_SQUEEZE:
        raise ValueError(
            f"attention_type scse narrows channels by {SCSE_SQUEEZE} and has none left of {min(widths)}; take channels "
            f"(and a backbone) of at least {SCSE_SQUEEZE} throughout, or no attention_type"
        )
