"""The situations in which a head is tried: networks of several kinds, and maps of the very sizes that they give."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch

from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.types import Features

__all__ = ["HEAD_CASES", "WIDE", "HeadCase", "backbone_at", "features_at", "other_stride"]


@dataclass(frozen=True)
class HeadCase:
    """A situation in which a head works, or refuses to be built.

    Args:
        backbone: As timm names it.
        output_stride: Of the backbone.
        size: Height and width of the image.
        batch: How many images.
        precision: That of an autocast, or none.
    """

    backbone: str
    output_stride: int
    size: tuple[int, int]
    batch: int
    precision: Literal["float32", "bfloat16"]

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.backbone} at output stride {self.output_stride}, {self.batch}×{height}×{width}, {self.precision}"


CNN, PHASED, PATCHED, WINDOWS = "resnet18", "mobilenetv3_small_100", "convnext_femto", "swin_tiny_patch4_window7_224"
PLAIN = "test_vit"
"""Three levels, and all of one stride."""

HEAD_CASES = (
    HeadCase(PLAIN, 16, (65, 97), 2, "float32"),
    HeadCase(CNN, 8, (65, 97), 1, "float32"),
    HeadCase(CNN, 16, (33, 32), 2, "bfloat16"),
    HeadCase(CNN, 32, (72, 45), 1, "bfloat16"),
    HeadCase(PHASED, 8, (33, 32), 2, "float32"),
    HeadCase(PHASED, 16, (72, 45), 1, "bfloat16"),
    HeadCase(PHASED, 32, (65, 97), 2, "bfloat16"),
    HeadCase(PATCHED, 8, (33, 32), 1, "bfloat16"),
    HeadCase(PATCHED, 16, (65, 97), 2, "float32"),
    HeadCase(PATCHED, 32, (72, 45), 2, "float32"),
    HeadCase(WINDOWS, 8, (72, 45), 2, "bfloat16"),
    HeadCase(WINDOWS, 16, (65, 97), 1, "bfloat16"),
    HeadCase(WINDOWS, 32, (33, 32), 1, "float32"),
)
"""A plain transformer; then every network at every stride, and any two values of the other axes together somewhere."""

_TIMM_OPTIONS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {WINDOWS: {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}}
)
"""What makes a network small whose kind alone matters here."""

WIDE = (33, 193)
"""Few positions, and yet so long that a rate meant for another stride meets other ones."""


@functools.cache
def backbone_at(name: str, output_stride: int) -> TimmBackbone:
    """The network at a stride, on weights drawn at random; one for all who ask, so nobody may change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = _TIMM_OPTIONS.get(name)
        return TimmBackbone(name, output_stride=output_stride, pretrained=False, timm_options=options).eval()


def other_stride(name: str, output_stride: int) -> int:
    """Where to move a network that is at a stride: to the next larger one that it has, or from the largest to 8."""
    native = backbone_at(name, output_stride).dilation.native
    return next((stride for stride in (16, 32) if output_stride < stride <= native), 8)


@functools.cache
def _sizes(name: str, output_stride: int, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Of the maps that the network gives for an image: patches round down where strides round up."""
    with torch.no_grad():
        maps = backbone_at(name, output_stride)(torch.zeros(1, 3, *size))
    return tuple((level.shape[-2], level.shape[-1]) for level in maps)


def features_at(backbone: str, output_stride: int, size: tuple[int, int], batch: int) -> Features:
    """Maps ``(B, C_i, h_i, w_i)`` drawn at random, as many and as large as the network gives of images of a size."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(batch, level.channels, *hw, generator=generator)
        for level, hw in zip(
            backbone_at(backbone, output_stride).info, _sizes(backbone, output_stride, size), strict=True
        )
    )
