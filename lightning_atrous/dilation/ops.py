"""The operations that mix neighbours, and how each was called in the strided network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

__all__ = ["KERNELS", "SETTINGS", "Call", "DilationError", "Op", "Stage", "is_map", "is_op", "pair"]

KERNELS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
SETTINGS = ("stride", "padding", "dilation", "ceil_mode", "count_include_pad", "forward")
"""The attributes that are rewritten, and put back."""


class DilationError(ValueError):
    """The network can't have this output stride exactly. It is left as it was."""


class Call(NamedTuple):
    """How an op was called in the strided network."""

    stride_in: int
    """Image pixels per pixel of its input, to the nearest power of two."""
    stride_out: int
    spare: tuple[int, int] | None
    """Pixels of the input beyond ``s`` per output, where the output covers the image; else None."""
    pads_itself: bool
    """Whether its forward computes the padding for that from the map that comes (TensorFlow's "SAME")."""


@dataclass
class Op:
    """A module that mixes neighbours, its attributes in the strided network, and its calls there."""

    name: str
    module: nn.Module
    settings: dict[str, Any]
    calls: set[Call] = field(default_factory=set)
    times: int = 1
    """By which its rate is multiplied (multi-grid)."""
    reach: int | None = None
    """Image pixels between its taps, where that is said for itself (HDC)."""

    @property
    def is_told(self) -> bool:
        """Whether it has been given a rate of its own."""
        return self.times != 1 or self.reach is not None


class Stage(NamedTuple):
    """A module that was called once, and turned one map into another."""

    module: nn.Module
    stride_in: int
    stride_out: int
    channels_last: bool
    """Whether its maps are ``(B, h, w, C)``."""


def is_map(x: Any) -> bool:
    """Whether it is a tensor of four dimensions."""
    return isinstance(x, Tensor) and x.ndim == 4


def is_op(module: nn.Module) -> bool:
    """Whether it may mix neighbours: a kernel, padding, or another leaf with a stride (a blur pool)."""
    if isinstance(module, (*KERNELS, nn.ConstantPad2d)):
        return True
    return isinstance(vars(module).get("stride"), (int, tuple, list)) and not any(module.children())


def pair(value: Any) -> tuple[int, int]:
    """Rows and columns."""
    rows, columns = (value, value) if isinstance(value, int) else value
    return rows, columns
