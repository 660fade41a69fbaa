"""Strides that drop nothing: the sub-grids that a stride would skip go on as further images of the batch.

A network of stride ``s`` computes one of ``s·s`` grids of image positions, and nothing in it knows which. So an op that
gives up its stride by ``k`` computes the whole map, takes it apart into ``k·k`` grids, and what comes after runs on
each of them as it is: no kernel is dilated, and squeeze-excite, group norm and attention see a map as the strided
network has it. At the outputs the grids are put together. Where a stride is in a forward alone (patches that are merged
by slices), the module that holds it is run, as it is, on shifted copies of its input; at worst the whole network is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_atrous.dilation.grids import join, shifted
from lightning_atrous.dilation.ops import DilationError, Op, Stage

__all__ = ["Joined", "Plan", "Shift", "plan"]


class Plan(NamedTuple):
    """Where a network is taken apart."""

    ops: tuple[Op, ...]
    """That give up their strides."""
    stages: tuple[Stage, ...]
    """That run on shifted copies."""


def plan(
    root: nn.Module, stages: Mapping[nn.Module, Stage], ops: Collection[Op], output_stride: int, depth: int
) -> Plan:
    """The ops and stages at which a network is taken apart.

    A module whose maps go in and come out at one stride is left alone, whatever it does in between (the keys of an
    attention may stand at another stride than its queries).

    Args:
        root: The network.
        stages: Its modules that turn one map into another.
        ops: What mixes neighbours, and where.
        output_stride: The one that is wanted.
        depth: How many strided stages deep an op may stand to be rewritten; beyond that its stage is run on copies.
            At 0 the whole network is, and nothing in it is taken apart.

    Raises:
        DilationError: Nothing was found that could be taken apart.
    """
    if depth == 0:
        return Plan((), ())
    coarse = {op.module: op for op in ops if any(call.stride_out > output_stride for call in op.calls)}
    found = _search(root, stages, coarse, output_stride, depth)
    if not found:
        raise DilationError("no submodule turns one map into a coarser one")
    return Plan(
        tuple(place for place in found if isinstance(place, Op)),
        tuple(place for place in found if isinstance(place, Stage)),
    )


def _search(
    module: nn.Module, stages: Mapping[nn.Module, Stage], coarse: Mapping[nn.Module, Op], output_stride: int, depth: int
) -> list[Op | Stage]:
    found: list[Op | Stage] = []
    for child in module.children():
        stage = stages.get(child)
        if stage is not None and stage.stride_out <= max(stage.stride_in, output_stride):
            continue
        if child in coarse:
            op = coarse[child]
            found += [op] if any(call.stride_out > call.stride_in for call in op.calls) else []
        elif stage is not None and depth == 1:
            found.append(stage)
        else:
            inside = _search(child, stages, coarse, output_stride, depth - (stage is not None))
            found += inside or ([] if stage is None else [stage])
    return found


@dataclass(frozen=True)
class Shift:
    """A module's forward on shifted copies of its input, in place of dropping what lies between."""

    module: nn.Module
    shift: int
    """Pixels of its input per pixel of the dense output."""
    k: int
    """Pixels of the dense output per pixel of its own, along each axis."""
    channels_last: bool
    """Whether the maps are ``(B, h, w, C)``."""

    @classmethod
    def of(cls, stage: Stage, output_stride: int) -> Shift:
        """For a stage in a network of another output stride."""
        finest = max(stage.stride_in, output_stride)
        return cls(stage.module, finest // stage.stride_in, stage.stride_out // finest, stage.channels_last)

    def __call__(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        """``(B, C, h, w)`` → ``(k·k·B, C, h', w')``."""
        if self.channels_last:
            x = x.permute(0, 3, 1, 2)
        x = shifted(x, shift=self.shift, k=self.k)
        if self.channels_last:
            x = x.permute(0, 2, 3, 1)
        return type(self.module).forward(self.module, x, *rest, **options)


@dataclass(frozen=True)
class Joined:
    """The network's own forward, its outputs put together."""

    module: nn.Module
    reductions: Sequence[int]
    """Of each output in the strided network."""
    channels_last: Sequence[bool]
    output_stride: int
    shifts: int = 1
    """The whole network on shifted images: how many, along each axis."""

    def forward(self, image: Tensor, *rest: Any, **options: Any) -> Any:
        """Of the root. A method, for torch reads the code of a network's forward when it exports it."""
        images = shifted(image, shift=self.output_stride, k=self.shifts)
        output = type(self.module).forward(self.module, images, *rest, **options)
        if isinstance(output, Tensor):
            return self._whole(output, image, self.reductions[0], self.channels_last[0])
        maps = output.values() if isinstance(output, Mapping) else output
        kinds = zip(maps, self.reductions, self.channels_last, strict=True)
        maps = [self._whole(x, image, reduction, last) for x, reduction, last in kinds]
        if isinstance(output, Mapping):
            return type(output)(zip(output, maps, strict=True))  # type: ignore[call-arg]
        return getattr(output, "_make", type(output))(maps)  # a named tuple takes them one by one

    def _whole(self, x: Tensor, image: Tensor, reduction: int, channels_last: bool) -> Tensor:
        k = max(reduction // self.output_stride, 1)
        if self.shifts > k:
            x = x[: k * k * image.shape[0]]
        if k == 1:
            return x
        x = join(x.permute(0, 3, 1, 2) if channels_last else x, k)
        rows, columns = (-(-n // self.output_stride) for n in image.shape[-2:])
        x = x[..., :rows, :columns]
        return x.permute(0, 2, 3, 1) if channels_last else x
