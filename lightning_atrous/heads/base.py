"""What a head is, and where heads are found.

A head is a module from feature maps to logits. It owns no loss, no metric and no resizing to the image. Fifteen
lines make one: subclass `Head`, take ``(info, num_classes, *, your options)``, implement `forward`, register a name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_atrous.registry import Registry
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["HEADS", "Head", "HeadFactory", "at_least", "create_head", "level_of_reduction", "odd", "share"]


class Head(nn.Module, ABC):
    """Feature maps → logits ``(B, K, h, w)``, at the head's own stride.

    Args:
        info: Channels and reduction of every level that `forward` will get, the finest first.
        num_classes: ``K``.
    """

    paper: ClassVar[str] = ""
    """Authors, year, and where it can be read."""

    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """Logits ``(B, K, h, w)`` from features ``(B, C_i, h_i, w_i)``, the finest first."""

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Follow the backbone to another output stride: same channels, other reductions, same weights.

        A head whose layers do not depend on the stride needs nothing here. One that cannot follow raises a
        ValueError that says why.

        Args:
            info: The levels as they are now.
        """


HEADS: Registry[Head] = Registry("head", "lightning_atrous.heads")
"""Every head by name; other packages add theirs by the entry-point group ``lightning_atrous.heads``."""

HeadFactory = Callable[[Sequence[FeatureInfo], int], Head]
"""A head class, or one with its options already given (`functools.partial`)."""


def create_head(name: str, info: Sequence[FeatureInfo], num_classes: int, **options: object) -> Head:
    """Build a head by its registered name.

    Args:
        name: As in ``lightning-atrous list heads``.
        info: The backbone's levels.
        num_classes: ``K``.
        **options: The head's own.

    Raises:
        ValueError: An unknown name.
    """
    return HEADS[name](info, num_classes, **options)


def level_of_reduction(info: Sequence[FeatureInfo], reduction: int, head: str) -> int:
    """Index of the level with that reduction, which ``head`` cannot do without.

    Raises:
        ValueError: The backbone has none.
    """
    for index, level in enumerate(info):
        if level.reduction == reduction:
            return index
    raise ValueError(
        f"{head} needs a feature level of stride {reduction}, but this backbone gives strides "
        f"{', '.join(str(level.reduction) for level in info)}; take a convolutional backbone, or a head that reads "
        f"the last level alone, such as fcn or deeplabv3"
    )


def at_least(least: int, option: str, *values: int | None) -> None:
    """Refuse numbers that are too small; none is none.

    Raises:
        ValueError: One is.
    """
    given = [value for value in values if value is not None]
    if given and min(given) < least:
        raise ValueError(f"{option} must be at least {least}, got {', '.join(map(str, given))}")


def odd(option: str, kernel: int) -> None:
    """Refuse kernels that would not leave a map at its size.

    Raises:
        ValueError: It is even, or less than 1.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"{option} must be odd, so that maps keep their size; got {kernel}")


def share(option: str, value: float) -> None:
    """Refuse what is no share of a whole.

    Raises:
        ValueError: It is outside 0 to 1.
    """
    if not 0 <= value <= 1:
        raise ValueError(f"{option} must be from 0 to 1, got {value}")
