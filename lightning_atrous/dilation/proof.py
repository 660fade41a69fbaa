"""The proof: weights drawn at random, the strided and the dilated network side by side, and where they part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_atrous.dilation.ops import is_map, is_op

__all__ = ["TOLERANCE", "calibrate", "channels_first", "departure", "drawn", "hooked", "relative_error", "run", "trace"]

TOLERANCE = 1e-4
"""Of the relative error in float32: what is right measures 1e-5, what is wrong 4e-3 and more."""

_Hook = Callable[..., None]


def run(module: nn.Module, image: Tensor, *, training: bool = False) -> tuple[Tensor, ...]:
    """The maps of a module, in eval mode or in training; what is random is always the same, and the state left alone.

    Raises:
        ValueError: What comes out are no maps.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = module.train(training)(image)
    maps = (output,) if isinstance(output, Tensor) else output
    maps = tuple(maps.values()) if isinstance(maps, Mapping) else maps
    if not isinstance(maps, (tuple, list)) or not maps or not all(is_map(x) for x in maps):
        raise ValueError(
            f"expected a map (B, C, h, w), or maps in a sequence or a mapping, got {type(output).__name__}"
        )
    return tuple(maps)


def channels_first(maps: Sequence[Tensor], layouts: Sequence[bool]) -> tuple[Tensor, ...]:
    """Maps as ``(B, C, h, w)``, of which some are ``(B, h, w, C)``."""
    return tuple(x.permute(0, 3, 1, 2) if last else x for x, last in zip(maps, layouts, strict=True))


@contextmanager
def hooked(module: nn.Module, *, before: _Hook | None = None, after: _Hook | None = None) -> Iterator[None]:
    """Call ``before`` and ``after`` every submodule's forward, within the block."""
    handles = [child.register_forward_pre_hook(before) for child in module.modules() if before is not None]
    handles += [child.register_forward_hook(after) for child in module.modules() if after is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def drawn(module: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> dict[int, Any]:
    """A memo for `copy.deepcopy`: in place of every parameter a drawn one, on the CPU; buffers as they are.

    Kernels and matrices keep the second moment through a ReLU (He et al. 2015), scales are about one.
    """
    memo: dict[int, Any] = {}
    for name, old in module.named_parameters():
        low, high = (-0.5, 0.5) if name.endswith("bias") else (0.5, 1.5)
        if old.numel() != max(old.shape, default=1):
            high = math.sqrt(6 * old.shape[0] / old.numel())
            low = -high
        new = torch.empty(old.shape, dtype=dtype, device="cpu").uniform_(low, high, generator=generator)
        memo[id(old)] = nn.Parameter(new, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", dtype if buffer.is_floating_point() else None, copy=True)
    return memo


def calibrate(module: nn.Module, image: Tensor, generator: torch.Generator) -> None:
    """Set running statistics near, but not at, those of the maps that come.

    Else the maps of a deep network grow until its gates saturate, and a saturated gate hides what differs.
    """

    def calibrate(child: nn.Module, args: tuple[Any, ...]) -> None:
        mean, variance = getattr(child, "running_mean", None), getattr(child, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            x = args[0].transpose(0, 1).flatten(1)
            here, average = torch.var_mean(x, dim=1, correction=0)
            if x.shape[1] == 1:  # pooled to one pixel: of no variance, which would have everything magnified
                here = x.square().mean().expand_as(here)
            noise = image.new_empty(2, *mean.shape).uniform_(-0.5, 0.5, generator=generator)
            # half of it the whole map's: a channel of almost no variance would have its rounding magnified
            variance.copy_((here + here.mean()) / 2 * (1 + noise[0]) + 1e-4)
            mean.copy_(average + noise[1] * variance.sqrt())

    with hooked(module, before=calibrate):
        run(module, image)


def relative_error(dense: Tensor, strided: Tensor) -> float:
    """The largest difference over the largest value; infinite between shapes and where it is no number."""
    if dense.shape != strided.shape:
        return math.inf
    error = (dense - strided).abs().max() / strided.abs().max().clamp(min=torch.finfo(strided.dtype).tiny)
    return float(error.nan_to_num(nan=math.inf))


class _Step(NamedTuple):
    """What went into and came out of one call of a submodule, where these are tensors."""

    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None


def trace(module: nn.Module, image: Tensor) -> list[_Step]:
    """The calls of all submodules, in the order in which they ended."""
    steps: list[_Step] = []
    names = {child: name for name, child in module.named_modules()}

    def note(child: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # copies, for later ops may work in place
        seen = [x.clone() if isinstance(x, Tensor) else None for x in (*args[:1], output)]
        steps.append(_Step(names[child], child, seen[0] if args else None, seen[-1]))

    # the proof has told of a failure; here the steps before it count
    with hooked(module, after=note), suppress(Exception):
        run(module, image)
    return steps


def departure(strided: list[_Step], dense: list[_Step]) -> str:
    """Words for the first submodule whose dense output is not the strided one on its grid, and for why."""
    for old, new in zip(strided, dense, strict=False):
        if new.module is not old.module or not _departs(new.output, old.output):
            continue
        where = f"; it departs first at {repr(new.name) if new.name else 'its root'} ({type(new.module).__name__})"
        if not _departs(new.input, old.input):
            local = any(is_op(child) for child in new.module.modules())
            why = ", which takes statistics over the whole map, or hides an op in its forward"
            return where if local else where + why
        if new.input is not None and old.input is not None and new.input.shape == old.input.shape:
            return f"{where}, whose input is statistics over the whole map"
        return f"{where}, after an operation outside of any submodule"
    return ""


def _departs(dense: Tensor | None, strided: Tensor | None) -> bool:
    """Whether two maps ``(B, C, h, w)`` or ``(B, h, w, C)``, or two tensors of one shape, surely differ."""
    if dense is None or strided is None or not strided.is_floating_point() or not strided.numel():
        return False
    if dense.shape != strided.shape:
        if not (is_map(dense) and is_map(strided)):
            return False
        ratios = (max(n / m, 1) for n, m in zip(dense.shape, strided.shape, strict=True))
        dense = dense[tuple(slice(None, None, 2 ** math.ceil(math.log2(ratio))) for ratio in ratios)]
    return relative_error(dense, strided) > TOLERANCE
