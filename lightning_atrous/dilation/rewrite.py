"""What becomes of an operation at another output stride: arithmetic on its attributes, and a forward around its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_atrous.dilation.grids import join, split
from lightning_atrous.dilation.ops import KERNELS, Call, DilationError, Op, pair

__all__ = ["keep", "rewrite", "take_apart"]


def rewrite(op: Op, output_stride: int) -> dict[str, Any]:
    """The attributes that an op takes on at an output stride, its kernel dilated.

    Raises:
        DilationError: It is called at several strides, which want different ones.
    """
    return _one(op, output_stride, [_rewrite_call(op, call, output_stride) for call in op.calls])


def keep(op: Op) -> dict[str, Any]:
    """The attributes of an op that gives up nothing and is dilated only by what it was told: mostly none.

    Raises:
        DilationError: It is called at several strides, or its taps would stand between pixels.
    """
    coarsest = max(call.stride_out for call in op.calls)
    return _one(op, coarsest, [_rewrite_call(op, call, max(call.stride_in, call.stride_out)) for call in op.calls])


def take_apart(op: Op, output_stride: int) -> dict[str, Any]:
    """The attributes of an op that gives up its stride, and takes its map apart in place of that.

    Raises:
        DilationError: It is called at several strides, which want different ones.
    """
    changes = []
    for call in op.calls:
        finest = max(call.stride_in, output_stride)
        change = _rewrite_call(op, call, finest)
        k = call.stride_out // finest
        forward = _Apart(op.module, change.get("forward"), k, _sizes(op, call), first=_widens(op, k))
        changes.append(change | {"forward": forward})
    return _one(op, output_stride, changes)


def _one(op: Op, output_stride: int, changes: list[dict[str, Any]]) -> dict[str, Any]:
    first, *others = changes
    if any(other != first for other in others):
        strides = sorted({call.stride_in for call in op.calls})
        raise DilationError(
            f"'{op.name}' ({type(op.module).__name__}) is called at the strides {strides}, and an op has one dilation "
            f"at output stride {output_stride}"
        )
    return first


def _rewrite_call(op: Op, call: Call, output_stride: int) -> dict[str, Any]:
    rate = max(call.stride_in // output_stride, 1)  # by which its input is denser
    given_up = max(call.stride_out // output_stride, 1) // rate  # of its own stride
    taps = rate * op.times if op.reach is None else _whole_rate(op, min(call.stride_in, output_stride))
    if taps == given_up == 1:
        return {}
    module, settings = op.module, op.settings
    if isinstance(module, nn.ConstantPad2d):
        return {"padding": tuple(rate * pad for pad in settings["padding"])}
    if not isinstance(module, KERNELS) or getattr(module, "padding_mode", "zeros") != "zeros":
        stride = settings["stride"]
        less = stride // given_up if isinstance(stride, int) else tuple(s // given_up for s in stride)
        return {"stride": less, "forward": _Forward(module, phases=taps)}
    return _rewrite_kernel(op, call, taps, given_up)


def _whole_rate(op: Op, stride: int) -> int:
    assert op.reach is not None
    rate, rest = divmod(op.reach, stride)
    if rest or rate < 1:
        raise DilationError(
            f"the taps of '{op.name}' were told to stand {op.reach} image pixels apart, which are "
            f"{op.reach / stride:g} pixels of a map of stride {stride}"
        )
    return rate


def _rewrite_kernel(op: Op, call: Call, rate: int, given_up: int) -> dict[str, Any]:
    """A convolution or a pool; one that can't be dilated is kept as it is, on phases."""
    module, settings = op.module, op.settings
    assert isinstance(module, KERNELS)
    phases = 1 if "dilation" in settings else rate
    rate = rate // phases
    kernels, dilations = pair(module.kernel_size), pair(settings.get("dilation", 1))
    strides, paddings = pair(settings["stride"]), _padding(op)
    new: dict[str, Any] = {"stride": pair([s // given_up for s in strides]), "padding": (0, 0)}
    if "dilation" in settings:  # a 1×1 kernel has nothing to dilate, and is faster so
        new["dilation"] = pair([d * rate if k > 1 else d for k, d in zip(kernels, dilations, strict=True)])
    if "ceil_mode" in settings:
        new["ceil_mode"] = False
    reaches = [d * (k - 1) for d, k in zip(dilations, kernels, strict=True)]
    same = None
    if call.pads_itself:
        same = [_Same(r, s, rate) for r, s in zip(reaches, strides, strict=True)]
        rows, columns = (_Pad(0, axis.shift(axis.stride)) for axis in same)
    else:
        sides = zip(reaches, strides, paddings, call.spare or (None, None), strict=True)
        rows, columns = (_pad(r, s // given_up, p, rate, spare) for r, s, p, spare in sides)
    even = rows.left == rows.right and columns.left == columns.right
    pools = not isinstance(module, nn.Conv2d)  # torch lets these have half a kernel of padding at most
    if even and not (pools and (2 * rows.left > kernels[0] or 2 * columns.left > kernels[1])):
        new["padding"] = (rows.left, columns.left)
        return new if phases == 1 else new | {"forward": _Forward(module, phases=phases)}
    counted = None
    if isinstance(module, nn.AvgPool2d) and module.divisor_override is None and not call.pads_itself:
        counted = paddings if settings["count_include_pad"] else (0, 0)
        new["count_include_pad"] = True
    new["forward"] = _Forward(
        module,
        phases=phases,
        pad=(columns.left, columns.right, rows.left, rows.right),
        fill=-math.inf if isinstance(module, nn.MaxPool2d) else 0.0,
        same=same,
        counted=counted,
    )
    return new


class _Pad(NamedTuple):
    """Pixels to add along an axis."""

    left: int
    right: int


def _pad(reach: int, stride: int, padding: int, rate: int, spare: int | None) -> _Pad:
    """What goes around a map of ``rate`` times the pixels, for a kernel that saw ``reach + 1`` of the old.

    On the left the taps stay in place. On the right comes what a whole map needs, where it was whole before.
    """
    left = rate * padding
    if spare is None:
        return _Pad(left, left)
    right = max(rate * (reach - spare) + 1 - stride - left, 0)
    return _Pad(left, max(right, left) if stride > 1 else right)  # at a stride a little more changes no whole map


class _Same(NamedTuple):
    """What is to be done along an axis where the op pads by itself: at stride 1, half its reach on the left."""

    reach: int
    stride: int
    rate: int

    def shift(self, n: int) -> int:
        """By how many pixels that is too much, for a strided map of ``n``: TensorFlow pads it as its end needs."""
        if torch.compiler.is_exporting() and not isinstance(n, int):  # left open: torch can't solve for remainders
            n = self.stride
        short = self.reach + 1 - self.stride + -n % self.stride
        left = (short if self.reach + 1 >= self.stride else max(short, 0)) // 2
        return self.rate * self.reach // 2 - self.rate * left


def _padding(op: Op) -> tuple[int, int]:
    """The left padding of a strided kernel, some of which torch spells."""
    padding, kernels = op.settings["padding"], vars(op.module)["kernel_size"]
    if padding == "same":
        return pair([d * (k - 1) // 2 for d, k in zip(op.settings["dilation"], kernels, strict=True)])
    return (0, 0) if padding == "valid" else pair(padding)


@dataclass(frozen=True)
class _Forward:
    """The forward of a rewritten op, where attributes alone can't say it.

    The op's own forward stays inside (it may standardise its weights). Around it the map is padded, unequally
    on its sides, and split into phases: on every ``phases``-th pixel, an undilated kernel is a dilated one.
    """

    op: nn.Module
    phases: int = 1
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    fill: float = 0.0
    same: list[_Same] | None = None
    """Of an op that pads by itself: in place of ``pad``, and as much is dropped on the left."""
    counted: tuple[int, int] | None = None
    """For an average that counts pixels: the padding that counts as such."""

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        height, width = x.shape[-2:]
        x = split(x, self.phases)
        forward, pad, crop = type(self.op).forward, self.pad, (0, 0)
        if self.same is not None:
            down, across = self.same
            crop = down.shift(-(-height // down.rate)), across.shift(-(-width // across.rate))
            pad = (0, crop[1], 0, crop[0])
        y = forward(self.op, F.pad(x, pad, value=self.fill) if any(pad) else x, *rest)
        if self.counted is not None:  # the share of each window that is there to be averaged
            rows, columns = self.counted
            ones = F.pad(x.new_ones(1, 1, *x.shape[-2:]), (columns, columns, rows, rows), value=1.0)
            left, right, top, bottom = pad
            around = (left - columns, right - columns, top - rows, bottom - rows)
            y = y / forward(self.op, F.pad(ones, around))
        y = join(y[..., crop[0] :, crop[1] :], self.phases)
        return y[..., : y.shape[-2] - -height % self.phases, : y.shape[-1] - -width % self.phases]


def _widens(op: Op, k: int) -> bool:
    """Whether it sees single pixels, none of them twice, and makes them wider: then its input is less to copy."""
    module, settings = op.module, op.settings
    return (
        isinstance(module, nn.Conv2d)
        and pair(module.kernel_size) == (1, 1)
        and pair(settings["stride"]) == (k, k)
        and _padding(op) == (0, 0)
        and module.in_channels < module.out_channels
    )


class _Size(NamedTuple):
    """How many outputs the strided op has along an axis."""

    reach: int
    stride: int
    padding: int
    ceil: bool

    def __call__(self, n: int) -> int:
        free = n + 2 * self.padding - self.reach - 1
        m = free // self.stride + 1
        # torch drops a window that would begin behind the map
        return m + (self.ceil and free % self.stride > 0 and m * self.stride < n + self.padding)


def _sizes(op: Op, call: Call) -> list[_Size]:
    """For both axes; of an op that pads by itself, or in ways that are not known here, one for each stride begun."""
    module, settings = op.module, op.settings
    strides = pair(settings["stride"])
    if call.pads_itself or not isinstance(module, KERNELS):
        return [_Size(s - 1, s, 0, ceil=True) for s in strides]
    dilations, kernels = pair(settings.get("dilation", 1)), pair(module.kernel_size)
    axes = zip(dilations, kernels, strides, _padding(op), strict=True)
    return [_Size(d * (k - 1), s, p, settings.get("ceil_mode", False)) for d, k, s, p in axes]


@dataclass(frozen=True)
class _Apart:
    """The forward of an op that gave up its stride, and the sub-grids of what comes out.

    Each has as many pixels as the strided op gives, so that statistics are taken over no other.
    """

    op: nn.Module
    forward: _Forward | None
    k: int
    sizes: list[_Size]
    first: bool
    """Whether the input is taken apart, in place of the output."""

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        if self.first:
            return type(self.op).forward(self.op, split(x, self.k), *rest)
        y = type(self.op).forward(self.op, x, *rest) if self.forward is None else self.forward(x, *rest)
        rows, columns = (self.k * size(n) for size, n in zip(self.sizes, x.shape[-2:], strict=True))
        return split(y[..., :rows, :columns], self.k)
