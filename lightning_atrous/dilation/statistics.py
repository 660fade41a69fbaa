"""Modules that mix a map by no kernel: what they take in of it (squeeze-excite, group norm, attention), per sub-grid.

Dilated, a network shows them denser maps, and they give other numbers. To tell that from a mistake in the dilation,
they are made to see each sub-grid for itself, as they do in the strided network; then all must be exact again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_atrous.dilation.grids import join, split
from lightning_atrous.dilation.ops import Op, Stage, pair
from lightning_atrous.dilation.proof import TOLERANCE, relative_error

__all__ = ["PerGrid", "per_grid"]


@dataclass(frozen=True)
class PerGrid:
    """A module's forward on each of the ``k·k`` sub-grids of its map, if it knows no neighbours.

    That is seen by shuffling the pixels: what takes statistics gives the same, shuffled likewise, and what has a kernel
    in its forward does not. The latter is left to see the whole map.
    """

    module: nn.Module
    k: int
    channels_last: bool

    def __call__(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        """``(B, C, h, w)`` → ``(B, C', h, w)``."""

        def forward(x: Tensor) -> Tensor:
            y = type(self.module).forward(
                self.module, x.permute(0, 2, 3, 1) if self.channels_last else x, *rest, **options
            )
            return y.permute(0, 3, 1, 2) if self.channels_last else y

        x = x.permute(0, 3, 1, 2) if self.channels_last else x
        y, height, width = forward(x), *x.shape[-2:]
        order = torch.randperm(height * width, generator=torch.Generator().manual_seed(0))
        if relative_error(forward(_shuffled(x, order)), _shuffled(y, order)) <= TOLERANCE:
            y = join(forward(split(x, self.k)), self.k)[..., :height, :width]
        return y.permute(0, 2, 3, 1) if self.channels_last else y


def _shuffled(x: Tensor, order: Tensor) -> Tensor:
    return x.flatten(2)[..., order].unflatten(2, x.shape[-2:])


def per_grid(
    root: nn.Module, stages: Mapping[nn.Module, Stage], ops: Collection[Op], output_stride: int
) -> dict[nn.Module, PerGrid]:
    """The forwards of all such modules in a network that was dilated to an output stride, the outermost of each."""
    mixing = {op.module for op in ops if max(pair(getattr(op.module, "kernel_size", 2))) > 1}
    return {
        stage.module: PerGrid(stage.module, stage.stride_in // output_stride, stage.channels_last)
        for stage in _still(root, stages, mixing)
        if stage.stride_in > output_stride
    }


def _still(module: nn.Module, stages: Mapping[nn.Module, Stage], mixing: Collection[nn.Module]) -> Iterator[Stage]:
    for child in module.children():
        stage = stages.get(child)
        if stage is None or stage.stride_in != stage.stride_out or any(inner in mixing for inner in child.modules()):
            yield from _still(child, stages, mixing)
        else:
            yield stage
