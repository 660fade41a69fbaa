"""One function, two ways to compute it: by dilated kernels on whole maps, or by plain kernels on their sub-grids.

A dilated kernel reads every ``r``-th pixel, so that on the ``r·r`` sub-grids of its map it is a plain one. Many
machines are far slower at dilated kernels than at plain ones, above all at depthwise ones in training. So a network
that was dilated may run on sub-grids, from where it first gives up a stride to its outputs, with the same numbers:
where its maps divide, and where nothing in it takes statistics over a map.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_atrous.dilation.phases import Joined

__all__ = ["Either", "Layout", "Switch", "view"]


class Layout(threading.local):
    """Whether the maps of the forward that is under way are taken apart: in each thread its own.

    A thread that began no forward (autograd's, which repeats a part of one for a checkpoint) has that of the latest.
    """

    def __init__(self, latest: list[bool]) -> None:
        self.latest = latest
        self.here: bool | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Layout, ([False],)

    @property
    def split(self) -> bool:
        """Settable, at the beginning of a forward."""
        return self.latest[0] if self.here is None else self.here

    @split.setter
    def split(self, split: bool) -> None:
        self.here = self.latest[0] = split


@dataclass(frozen=True)
class Either:
    """An op's forward, in the layout of the maps that come."""

    layout: Layout
    op: nn.Module
    dilated: Callable[..., Tensor] | None
    """In place of the op's own forward."""
    split: nn.Module
    """What it is on sub-grids: a `view` of it."""

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        """``(B, C, h, w)``, or ``(k·k·B, C, h/k, w/k)``."""
        if self.layout.split:
            return self.split.forward(x, *rest)
        return type(self.op).forward(self.op, x, *rest) if self.dilated is None else self.dilated(x, *rest)


def view(module: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """A leaf with other attributes, and the very tensors of the given one: what happens to those happens to both."""
    twin = copy.copy(module)
    vars(twin).pop("forward", None)
    for name, value in settings.items():
        setattr(twin, name, value)
    return twin


@dataclass(frozen=True)
class Switch:
    """A dilated network's forward, on sub-grids where it may."""

    layout: Layout
    joined: Joined
    multiple: int
    """Of the image's sides: of those all maps divide."""
    modes: Collection[bool]
    """Whether in training, or out of it, or in both."""

    def forward(self, image: Tensor, *rest: Any, **options: Any) -> Any:
        """Of the root. A method, for torch reads the code of a network's forward when it exports it."""
        root = self.joined.module
        self.layout.split = (
            root.training in self.modes
            # what is exported should say dilation where it means it, and take other sizes
            and not (torch.compiler.is_exporting() or torch.jit.is_tracing())
            and image.shape[-2] % self.multiple == 0
            and image.shape[-1] % self.multiple == 0
        )
        if self.layout.split:
            return self.joined.forward(image, *rest, **options)
        return type(root).forward(root, image, *rest, **options)
