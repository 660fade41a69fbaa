"""Where every operation of the strided network stands: at which strides it is called."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_atrous.dilation.ops import KERNELS, SETTINGS, Call, DilationError, Op, Stage, is_map, is_op, pair
from lightning_atrous.dilation.proof import channels_first, drawn, hooked, run

__all__ = ["Probe", "probe"]

SIZES = ((64, 96), (128, 192), (320, 384), (256, 384), (224, 224), (256, 256))
"""Of the probe's image; the larger for networks that don't pad, the last for those that take one size only."""


class Probe(NamedTuple):
    """What one run of the strided network has shown."""

    size: tuple[int, int]
    """Of the image."""
    ops: list[Op]
    """Those that were called."""
    stages: dict[nn.Module, Stage]
    """The modules that turned one map into another, and were called once."""
    reductions: tuple[int, ...]
    """Of each output."""
    channels_last: tuple[bool, ...]
    """Of each output: whether it is ``(B, h, w, C)``."""


def probe(module: nn.Module, in_channels: int) -> Probe:
    """Run the strided network on the smallest image that leaves no doubt about its strides."""
    twin = copy.deepcopy(module, drawn(module, torch.Generator(), torch.float32))
    originals = dict(zip(twin.modules(), module.modules(), strict=True))
    failure, found = None, None
    for size in SIZES:
        recorder = _Recorder(twin, size)
        try:
            with hooked(twin, after=recorder):
                outputs = run(twin, torch.zeros(1, in_channels, *size, device="cpu"))
        except Exception as raised:  # whatever a foreign module raises on a size that it does not take
            failure = raised
            continue
        layouts = tuple(recorder.is_channels_last(x) for x in outputs)
        outputs = channels_first(outputs, layouts)
        found = recorder, tuple(map(recorder.stride, outputs)), layouts
        if recorder.certain and min(x.shape[-2] for x in outputs) > 1:
            break
    if found is None:
        raise DilationError(f"the network ran on no image of a size in {SIZES}: {failure}") from failure
    recorder, reductions, layouts = found
    if any(abs(math.log2(1.5 * x.shape[-2] / x.shape[-1])) > 0.6 for x in outputs):
        shapes = [tuple(x.shape) for x in outputs]
        raise DilationError(f"expected maps (B, C, h, w), but an image of {recorder.size} gave {shapes}")
    ops = [replace(op, module=originals[op.module]) for op in recorder.ops.values() if op.calls]
    stages = {
        originals[module]: stage._replace(module=originals[module])
        for module, stage in recorder.stages.items()
        if stage is not None and module is not twin and "forward" not in vars(module)
    }
    return Probe(recorder.size, ops, stages, reductions, layouts)


class _Recorder:
    """Forward hook: at which strides every op is called."""

    def __init__(self, module: nn.Module, size: tuple[int, int]) -> None:
        self.size = size
        self.certain = True
        self.stages: dict[nn.Module, Stage | None] = {}
        self.ops = {
            child: Op(name, child, {key: vars(child)[key] for key in SETTINGS if key in vars(child)})
            for name, child in module.named_modules()
            if is_op(child)
        }

    def stride(self, x: Tensor) -> int:
        """Image pixels per pixel of the map: a power of two, unless that does not fit and another number does."""
        stride = self._stride(x)
        self.certain &= all(abs(exponent - math.log2(stride)) < 0.2 for exponent in self._exponents(x))
        return stride

    def _stride(self, x: Tensor) -> int:
        nearest = 2 ** max(round(sum(self._exponents(x)) / 2), 0)
        sides = list(zip(self.size, x.shape[-2:], strict=True))
        (height, below), (width, right) = (divmod(whole, n) for whole, n in sides)
        fits = all(n in (whole // nearest, -(-whole // nearest)) for whole, n in sides)
        return nearest if fits or height != width or below or right else height  # patches of 14

    def _stage(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Stage | None:
        """The module as one that turns a map into a map, if it is and was not called before."""
        if module in self.stages or not args or not (is_map(args[0]) and is_map(output)):
            return None
        if any(isinstance(other, Tensor) for other in args[1:]):
            return None
        layouts = [self.is_channels_last(x) for x in (args[0], output)]
        maps = channels_first((args[0], output), layouts)
        if layouts[0] != layouts[1] or not all(map(self._is_whole, maps)):
            return None
        return Stage(module, self._stride(maps[0]), self._stride(maps[1]), layouts[0])

    def is_channels_last(self, x: Tensor) -> bool:
        """Whether the image's axes are the second and the third, and not the last two."""
        return not self._is_whole(x) and self._is_whole(x.permute(0, 3, 1, 2))

    def _is_whole(self, x: Tensor) -> bool:
        """Whether the last two axes are those of the image, at one stride."""
        rows, columns = self._exponents(x)
        return abs(rows - columns) < 0.6

    def _exponents(self, x: Tensor) -> list[float]:
        """Binary logarithms of the image's pixels per pixel of a map, along both axes."""
        return [math.log2(whole / n) for whole, n in zip(self.size, x.shape[-2:], strict=True)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.stages[module] = self._stage(module, args, output)
        if module not in self.ops or not (args and is_map(args[0]) and is_map(output)):
            return
        x = args[0]
        if x.shape[-2:].numel() == 1:  # the gate of a squeeze-excite: no neighbours to hold apart
            return
        stride_in, stride_out = self.stride(x), self.stride(output)
        if stride_out >= stride_in:  # what refines is left for the proof to judge
            fills = _fills(module, x, output)
            sizes = zip(output.shape[-2:], self.size, strict=True)
            covers = all(n * stride_out == whole for n, whole in sizes)
            strides = zip(x.shape[-2:], output.shape[-2:], pair(vars(module).get("stride", 1)), strict=True)
            spare = pair([max(n - m * s, 0) for n, m, s in strides]) if fills or covers else None
            self.ops[module].calls.add(Call(stride_in, stride_out, spare, fills and _pads_itself(module, x)))


def _fills(module: nn.Module, x: Tensor, output: Tensor) -> bool:
    strides = pair(vars(module).get("stride", 1))
    return all(m == -(-n // s) for n, m, s in zip(x.shape[-2:], output.shape[-2:], strides, strict=True))


def _pads_itself(module: nn.Module, x: Tensor) -> bool:
    """Try a foreign forward, told to pad nothing, on one pixel less: only its own padding fills that."""
    forward = type(module).forward
    if not isinstance(module, KERNELS) or any(forward is kind.forward for kind in KERNELS):
        return False
    if module.padding not in (0, (0, 0)) or getattr(module, "ceil_mode", False):
        return False
    smaller = x[..., 1:, 1:]
    return _fills(module, smaller, forward(module, smaller))
