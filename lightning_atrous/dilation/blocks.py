"""The blocks of a network's stages, and rates of their own for them: multi-grid and hybrid dilated convolution.

Stacked kernels of one rate read one sub-grid and leave holes in what they see. Rates that differ from block to block
fill them: multi-grid multiplies the rate that a block of the last stage has anyway (Chen et al., DeepLabv3,
arXiv:1706.05587, section 3.2.1), HDC puts saw-tooth rates in its place (Wang et al., arXiv:1702.08502, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from torch import nn

from lightning_atrous.dilation.ops import DilationError, Op, pair
from lightning_atrous.dilation.probe import Probe

__all__ = ["blocks", "spread"]


def blocks(probe: Probe, stride: int) -> list[list[Op]]:
    """The dilatable convolutions of every block whose maps have that stride in the strided network, in their order.

    A block is the smallest module from map to map that has two layers of weights at least, one of them a convolution
    that mixes neighbours.
    """
    convs = {op.module: op for op in probe.ops if _mixes(op)}
    candidates = [
        stage.module
        for stage in probe.stages.values()
        if stage.stride_out == stride
        and type(stage.module) not in (nn.Sequential, nn.ModuleList)
        and sum(_has_weights(leaf) for leaf in stage.module.modules()) > 1
        and any(module in convs for module in stage.module.modules())
    ]
    smallest = [
        block
        for block in candidates
        if not any(inner is not block and inner in block.modules() for inner in candidates)
    ]
    return [[convs[module] for module in block.modules() if module in convs] for block in smallest]


def spread(
    probe: Probe, native: int, *, multi_grid: Sequence[int], hdc: Mapping[int, Sequence[int]], hdc_at: int
) -> None:
    """Tell the convolutions of the blocks their rates.

    Args:
        probe: The network.
        native: Its output stride: that of the stage that multi-grid is about.
        multi_grid: Factors, in turn.
        hdc: Rates by the stride of the stage, in turn.
        hdc_at: The output stride at which those are quoted.

    Raises:
        DilationError: There are no such blocks.
        ValueError: A factor or rate below 1, or two words about one stage.
    """
    _check_rates("multi_grid", multi_grid)
    _check_rates("hdc_at", (hdc_at,))
    if not isinstance(hdc, Mapping) or not all(type(stride) is int for stride in hdc):
        raise ValueError(f"hdc must be rates by the stride of the stage, such as {{32: (5, 9, 17)}}, got {hdc!r}")
    for rates in hdc.values():
        _check_rates("hdc", rates)
    if native in hdc and set(multi_grid) != {1}:
        raise ValueError(
            f"the stage of stride {native} has rates by hdc and factors by multi_grid; give one of the two"
        )
    if set(multi_grid) != {1}:
        for block, times in zip(_blocks(probe, native, len(multi_grid)), cycle(multi_grid)):
            for op in block:
                op.times = times
    for stride, rates in hdc.items():
        for block, rate in zip(_blocks(probe, stride, len(rates)), cycle(rates)):
            for op in block:
                op.reach = rate * hdc_at


def _check_rates(what: str, rates: Sequence[int]) -> None:
    whole = isinstance(rates, Sequence) and all(type(rate) is int and rate > 0 for rate in rates)
    if not whole or not rates:
        raise ValueError(f"{what}: rates must be whole numbers of at least 1, got {rates!r}")


def _blocks(probe: Probe, stride: int, rates: int) -> list[list[Op]]:
    found = blocks(probe, stride)
    if 0 < len(found) < rates:
        raise ValueError(
            f"{rates} rates were given for the {len(found)} blocks at stride {stride}; give no more than that"
        )
    if not found:
        strides = sorted({stage.stride_out for stage in probe.stages.values() if blocks(probe, stage.stride_out)})
        raise DilationError(
            f"no block of convolutions at stride {stride} could be given a rate of its own; "
            f"this network has blocks at the strides {', '.join(map(str, strides)) or 'none'}"
        )
    return found


def _mixes(op: Op) -> bool:
    return isinstance(op.module, nn.Conv2d) and max(pair(op.module.kernel_size)) > 1


def _has_weights(module: nn.Module) -> bool:
    weight = vars(module).get("_parameters", {}).get("weight")
    return weight is not None and weight.ndim > 1
