"""Stages left as they are, run on every sub-grid of a denser map, and the results put together.

A strided network computes the map of one grid of image positions. Shifted by one pixel of the denser map, the same
stage computes those between. Nothing in it is rewritten, so that whatever it does within a map of its own size
(squeeze-excite, group norm, attention over windows) is what it was: exact at the positions of the strided network by
construction. What it costs is that work before the stage's own stride is done once for each shift, and that a shifted
grid sees zeros where the image has ended.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_atrous.dilation.grids import join, shifted
from lightning_atrous.dilation.ops import DilationError, Op, Stage

__all__ = ["cover"]


def cover(
    root: nn.Module, stages: Mapping[nn.Module, Stage], ops: Collection[Op], output_stride: int
) -> dict[nn.Module, Phases]:
    """The modules to run on phases, outermost first, so that no op is left at a stride beyond the wanted one.

    Args:
        root: The network.
        stages: Its modules that turn one map into another.
        ops: What mixes neighbours, and where.
        output_stride: The one that is wanted.

    Raises:
        DilationError: An op that no such module holds.
    """
    coarse = {op.module: op for op in ops if any(call.stride_out > output_stride for call in op.calls)}
    beyond = {*coarse, *(module for module, stage in stages.items() if stage.stride_out > output_stride)}
    found = _cover(root, stages, coarse, beyond, output_stride)
    if isinstance(found, Op):
        raise DilationError(
            f"'{found.name}' ({type(found.module).__name__}) stands in no submodule that turns one map into another"
        )
    return {stage.module: Phases.of(stage, output_stride) for stage in found}


def _cover(
    module: nn.Module,
    stages: Mapping[nn.Module, Stage],
    coarse: Mapping[nn.Module, Op],
    beyond: Collection[nn.Module],
    output_stride: int,
) -> list[Stage] | Op:
    """The stages among a module's parts that hold whatever goes beyond the stride, or an op that is in none."""
    chosen: list[Stage] = []
    for child in module.children():
        stage = stages.get(child)
        if not any(inner in beyond for inner in child.modules()):
            continue
        if stage is not None and max(stage.stride_in, stage.stride_out) <= output_stride:
            continue  # it sees and gives what it always did, whatever it does in between
        if stage is not None and stage.stride_in >= output_stride:
            chosen.append(stage)
            continue
        inside = coarse.get(child) or _cover(child, stages, coarse, beyond, output_stride)
        if stage is not None and (isinstance(inside, Op) or not inside):
            inside = [stage]
        if isinstance(inside, Op):
            return inside
        chosen += inside
    return chosen


@dataclass(frozen=True)
class Phases:
    """A module's forward on the sub-grids of a denser map.

    Args:
        module: What is run, as it is.
        step: Pixels of the dense input per pixel of the module's own.
        shift: Pixels of the dense input per pixel of the dense output.
        count: Pixels of the dense output per pixel of the module's own, along each axis.
        channels_last: Whether the maps are ``(B, h, w, C)``.
    """

    module: nn.Module
    step: int
    shift: int
    count: int
    channels_last: bool

    @classmethod
    def of(cls, stage: Stage, output_stride: int) -> Phases:
        """For a stage in a network of another output stride."""
        return cls(
            stage.module,
            step=max(stage.stride_in // output_stride, 1),
            shift=max(output_stride // stage.stride_in, 1),
            count=max(stage.stride_out // output_stride, 1),
            channels_last=stage.channels_last,
        )

    def __call__(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        rows, columns = (-(-n // self.shift) for n in x.shape[-2:])
        grids = shifted(x, step=self.step, shift=self.shift, count=self.count)
        if self.channels_last:
            grids = grids.permute(0, 2, 3, 1)
        y = type(self.module).forward(self.module, grids, *rest, **options)
        if self.channels_last:
            y = y.permute(0, 3, 1, 2)
        y = join(y, self.count)[..., :rows, :columns]
        return y.permute(0, 2, 3, 1) if self.channels_last else y
