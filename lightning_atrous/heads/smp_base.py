"""What SMP's decoders have in common as heads: which maps they are given, what they score, what they refuse.

segmentation_models_pytorch gives its decoders the image, then a map for every halving of it (strides 2, 4, 8, ...).
Backbones here give other levels: none of stride 2, or several of one stride where they are dilated. This file lays out
the levels as SMP does, continues maps whose sides do not divide, and says which decoders cannot do with what is there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch.nn.functional as F
from segmentation_models_pytorch.base.initialization import initialize_decoder, initialize_head
from torch import Tensor, nn

from lightning_atrous.heads.base import Head, at_least, level_of_reduction, odd
from lightning_atrous.layers import SingleValueNorm, enlarge
from lightning_atrous.types import FeatureInfo, Features

__all__ = [
    "Interpolation",
    "Norm",
    "Pyramid",
    "SMPHead",
    "check_doubling",
    "continued",
    "empty_above",
    "norm_of",
    "norms_of_single_values",
    "one_of",
    "one_width_per_step",
]

Interpolation = Literal["nearest", "bilinear", "bicubic", "area", "nearest-exact"]
"""How SMP's decoders raise their maps."""

Norm = Literal["batchnorm", "instancenorm", "identity"]
"""SMP's norms that run on maps as they are: its ``layernorm`` takes the width for the channels, its ``inplace`` wants a
package of its own."""


@dataclass(frozen=True)
class Pyramid:
    """Where the maps that SMP's decoders expect stand among a backbone's levels.

    Where a backbone has no level of stride 1 or 2, an empty map of 0 channels takes its place, as in SMP.

    Args:
        image: Index of the level of stride 1.
        half: Index of the level of stride 2.
        coarse: Indices of all levels of stride 4 and more.
        channels: Of all these maps.
        strides: Of all these maps.
    """

    image: int | None
    half: int | None
    coarse: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, info: Sequence[FeatureInfo], head: str) -> Pyramid:
        """Lay out a backbone's levels for a head.

        Raises:
            ValueError: The backbone has no level of stride 4.
        """
        level_of_reduction(info, 4, head)
        at = {level.reduction: index for index, level in enumerate(info)}
        image, half = at.get(1), at.get(2)
        coarse = tuple(index for index, level in enumerate(info) if level.reduction >= 4)
        return cls(
            image,
            half,
            coarse,
            tuple(0 if index is None else info[index].channels for index in (image, half, *coarse)),
            (1, 2, *(info[index].reduction for index in coarse)),
        )

    def maps(self, features: Features) -> list[Tensor]:
        """The list that SMP's encoders would give, from features ``(B, C_i, h_i, w_i)``."""
        coarse = [features[index] for index in self.coarse]
        half = empty_above(coarse[0]) if self.half is None else features[self.half]
        image = empty_above(half) if self.image is None else features[self.image]
        return [image, half, *coarse]


def empty_above(pixels: Tensor, times: int = 2) -> Tensor:
    """A map of no channels, finer than another by a factor: ``(B, C, h, w)`` → ``(B, 0, times * h, times * w)``."""
    return pixels.new_empty(pixels.shape[0], 0, times * pixels.shape[-2], times * pixels.shape[-1])


class SMPHead(Head):
    """A decoder of SMP over the levels of a backbone, and the convolution that scores its map.

    The weights are those of an SMP model: its ``decoder.*`` are ``decoder.*`` here, its ``segmentation_head.0.*`` are
    ``classifier.*``. They start as SMP has them start.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        pyramid: Those levels, laid out for the decoder.
        decoder: List of maps → one map of ``width`` channels.
        width: Channels of the decoder's map.
        segmentation_kernel: Kernel of the scoring convolution.
        upsampling: By how much the head raises its own logits, corners aligned.

    Raises:
        ValueError: An even kernel, or a raise by less than 1.
    """

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        pyramid: Pyramid,
        decoder: nn.Module,
        width: int,
        segmentation_kernel: int,
        upsampling: int,
    ) -> None:
        super().__init__(info, num_classes)
        at_least(1, "upsampling", upsampling)
        odd("segmentation_kernel", segmentation_kernel)
        self.pyramid = pyramid
        self.upsampling = upsampling
        self.decoder = decoder
        self.classifier = nn.Conv2d(width, num_classes, segmentation_kernel, padding=segmentation_kernel // 2)
        initialize_decoder(self.decoder)
        initialize_head(self.classifier)

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Stay: convolutions and pooling run on the levels' own grids, and would see another extent on others.

        Raises:
            ValueError: A level has another stride than the head was built for.
        """
        self._stay(Pyramid.of(info, _name(self)).strides, self.pyramid.strides)

    def _stay(self, strides: Sequence[int], built: Sequence[int]) -> None:
        if tuple(strides) != tuple(built):
            raise ValueError(
                f"{_name(self)} runs its convolutions on maps of strides {_list(built)}, for which it was built; on "
                f"maps of strides {_list(strides)} the same weights would see another extent of the image: build and "
                f"train it at that output stride, or take a head that follows, such as deeplabv3plus"
            )

    def score(self, maps: list[Tensor], like: Tensor) -> Tensor:
        """Decode and score: logits ``(B, K, h, w)``, of the size of a map where ``upsampling`` is 1.

        Args:
            maps: As the decoder expects them.
            like: The map ``(B, C, h, w)`` at whose end the decoder's own is cut off.
        """
        height, width = like.shape[-2:]
        logits = self.classifier(self.decoder(maps))[..., :height, :width]
        assert logits.shape[-2:] == like.shape[-2:]  # or the raise below would hide it
        return enlarge(logits, self.upsampling)


def continued(maps: Sequence[Tensor], strides: Sequence[int], *, least: int = 1) -> list[Tensor]:
    """Maps whose sizes are those of the last, times the ratio of strides: zeros to the right and below where needed.

    Args:
        maps: ``(B, C_i, h_i, w_i)``, each covering the same image from its upper left corner.
        strides: One per map, each dividing the last.
        least: Of the last map's sides.
    """
    sides = [
        max(
            least,
            *(-(-pixels.shape[axis] * stride // strides[-1]) for pixels, stride in zip(maps, strides, strict=True)),
        )
        for axis in (-2, -1)
    ]
    fitting = []
    for pixels, stride in zip(maps, strides, strict=True):
        below, right = (side * strides[-1] // stride - now for side, now in zip(sides, pixels.shape[-2:], strict=True))
        fitting.append(F.pad(pixels, (0, right, 0, below)) if below or right else pixels)
    return fitting


def check_doubling(strides: Sequence[int], head: str) -> None:
    """Refuse levels of which one is not twice as coarse as the one before.

    Raises:
        ValueError: There is one.
    """
    if any(2 * fine != coarse for fine, coarse in itertools.pairwise(strides)):
        raise ValueError(
            f"{head} doubles its maps from level to level and so needs levels of strides that double, but this "
            f"backbone gives {_list(strides)}; take output_stride: {strides[0] * 2 ** (len(strides) - 1)}, or a head "
            f"that raises maps to any size, such as unet or upernet"
        )


def norms_of_single_values(module: nn.Module) -> None:
    """Replace every batch norm within a module, in place; the names of the tensors stay."""
    for parent in list(module.modules()):
        for name, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, SingleValueNorm(norm.num_features, eps=norm.eps, momentum=norm.momentum))


def norm_of(use_norm: Norm) -> Any:
    """What SMP takes for a norm.

    Instance norm gets weights, without which SMP's initialisation fails.

    Raises:
        ValueError: None of those.
    """
    one_of(get_args(Norm), "use_norm", use_norm)
    return {"type": use_norm, "affine": True} if use_norm == "instancenorm" else use_norm


def one_of(choices: Sequence[object], option: str, value: object) -> None:
    """Refuse what is not among the choices.

    Raises:
        ValueError: It is not.
    """
    if value not in choices:
        raise ValueError(f"{option} must be one of {_list(choices)}; got {value!r}")


def one_width_per_step(channels: Sequence[int], pyramid: Pyramid, head: str) -> None:
    """Refuse widths that are not one for each step from the last map to the image.

    Raises:
        ValueError: Too many, too few, or one that is not positive.
    """
    steps = pyramid.strides[-2::-1]
    if len(channels) != len(steps):
        raise ValueError(
            f"{head} takes {len(steps)} entries of channels, one for each of its steps to strides {_list(steps)}; got "
            f"{len(channels)}: {_list(channels)}"
        )
    at_least(1, "channels", *channels)


def _name(head: Head) -> str:
    return type(head).__name__.lower()


def _list(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
