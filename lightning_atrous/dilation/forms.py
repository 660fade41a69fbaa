"""The forms a network takes at an output stride: for each of its modules, the attributes that are set.

What is not named keeps the value it has in the strided network.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from lightning_atrous.dilation.layout import Either, Layout, Switch, view
from lightning_atrous.dilation.ops import DilationError
from lightning_atrous.dilation.phases import Joined, Shift, plan
from lightning_atrous.dilation.probe import Probe
from lightning_atrous.dilation.rewrite import keep, rewrite, take_apart

__all__ = ["Changes", "apart", "dilated", "either", "strided"]

Changes = dict[nn.Module, dict[str, Any]]


def strided(probe: Probe) -> Changes:
    """The network as it is, but for rates of their own in its blocks."""
    return {op.module: keep(op) for op in probe.ops}


def dilated(probe: Probe, output_stride: int) -> Changes:
    """Every kernel dilated."""
    return {op.module: rewrite(op, output_stride) for op in probe.ops}


def apart(root: nn.Module, probe: Probe, output_stride: int, depth: int) -> Changes:
    """Nothing dilated: maps taken apart where a stride is given up, and put together at the outputs."""
    places = plan(root, probe.stages, probe.ops, output_stride, depth)
    changes = strided(probe) | {op.module: take_apart(op, output_stride) for op in places.ops}
    changes |= {stage.module: {"forward": Shift.of(stage, output_stride)} for stage in places.stages}
    shifts = 1 if depth else max(probe.reductions) // output_stride
    changes[root] = {"forward": Joined(root, probe.reductions, probe.channels_last, output_stride, shifts).forward}
    return changes


def either(
    root: nn.Module, probe: Probe, output_stride: int, depth: int, layout: Layout, modes: frozenset[bool]
) -> Changes:
    """Every kernel dilated, and, in some modes, the same function on maps taken apart.

    Raises:
        DilationError: What gives up its stride is not in ops alone.
    """
    changes = dilated(probe, output_stride)
    places = plan(root, probe.stages, probe.ops, output_stride, depth)
    if places.stages:
        raise DilationError(f"{len(places.stages)} modules would have to run on shifted copies")
    giving_up = {op.module for op in places.ops}
    for op in probe.ops:
        twin = dataclasses.replace(op, module=view(op.module, op.settings))
        settings = take_apart(twin, output_stride) if op.module in giving_up else keep(twin)
        if settings or changes[op.module]:
            for name, value in settings.items():
                setattr(twin.module, name, value)
            forward = Either(layout, op.module, changes[op.module].get("forward"), twin.module)
            changes[op.module] |= {"forward": forward}
    joined = Joined(root, probe.reductions, probe.channels_last, output_stride)
    changes[root] = {"forward": Switch(layout, joined, max(probe.reductions), modes).forward}
    return changes
