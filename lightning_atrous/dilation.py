"""À trous: a strided network turned, in place and exactly, into one of a finer output stride.

Where a network gives up a stride, what follows takes its taps at holes (trous) of that width, and every
``k``-th position of the dense map is the map of before. With the same weights, in eval mode, borders too:

    ``dilated(x)[..., ::k, ::k] == strided(x)``,  ``k`` = old stride / new stride.

Sources: Holschneider et al. 1989 (algorithme à trous); Chen et al., DeepLab (arXiv:1412.7062, 1606.00915) and
DeepLabv3 (arXiv:1706.05587, section 3.1). Unlike many implementations, an op that gives up its stride keeps
the dilation of its own input: only what comes after it is dilated.

No family of networks is known here. Every op is placed by the sizes of the maps it meets in one run,
rewritten by arithmetic, and the whole is proved on weights drawn at random. What takes statistics over the
map (squeeze-excite, group norm, attention) sees a denser map, hence other numbers, and is refused.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Dilation", "DilationError", "set_output_stride"]

_TOLERANCE = 1e-4  # of the proof, in float32: what is right measures 1e-5, what is wrong 4e-3 and more
_SIZES = ((64, 96), (128, 192), (320, 384))  # of its image; the larger for networks that don't pad
_KERNELS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_Hook = Callable[..., None]
_SETTINGS = ("stride", "padding", "dilation", "ceil_mode", "count_include_pad", "forward")


class DilationError(ValueError):
    """The network can't have this output stride exactly. It is left as it was."""


class Dilation:
    """The output stride of one network: image ``(B, C, H, W)`` → one map ``(B, C_i, h_i, w_i)``, or several.

    A copy of the network that has drawn weights is run once, in eval mode, to see which op stands at which
    stride, and again to prove each new output stride: the network itself is touched by what is proved alone.
    At every output stride its weights keep names, shapes and values. As an attribute of its module, a
    `Dilation` is copied and pickled along with it.

    Args:
        module: The network as it comes, not dilated yet, and such that `copy.deepcopy` takes it.
        in_channels: ``C``.

    Raises:
        DilationError: The network runs on none of the probe's images, or its outputs are no maps.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(4, 4, 3, 2, padding=1))
        >>> dilation = Dilation(net)
        >>> dilation.output_stride
        4
        >>> dilation.output_stride = 1
        >>> [(conv.stride, conv.dilation) for conv in net]
        [((1, 1), (1, 1)), ((1, 1), (2, 2))]
    """

    native: int
    """The coarsest reduction among the outputs of the strided network."""

    def __init__(self, module: nn.Module, *, in_channels: int = 3) -> None:
        self._module = module
        self._in_channels = in_channels
        self._size, self._ops, self._reductions = _probe(module, in_channels)
        self.native = max(self._reductions)
        self._output_stride = self.native

    @property
    def reductions(self) -> tuple[int, ...]:
        """Image pixels per map pixel of each output, at the present output stride."""
        return tuple(min(reduction, self._output_stride) for reduction in self._reductions)

    @property
    def output_stride(self) -> int:
        """The coarsest of `reductions`. Setting it rewrites the module in place, once that is proved.

        Raises:
            ValueError: Not a power of two up to `native`.
            DilationError: The rewritten network is another function. It says where and, if known, why.
        """
        return self._output_stride

    @output_stride.setter
    def output_stride(self, output_stride: int) -> None:
        choices = [2**i for i in range(self.native.bit_length())]
        if output_stride not in choices:
            raise ValueError(f"this network has no output stride {output_stride!r}; choose one of {choices}")
        if output_stride not in (self._output_stride, self.native):
            self._prove(output_stride)
        self._apply(output_stride)

    def supported(self) -> tuple[int, ...]:
        """Which of 8, 16 and 32 can be set."""
        return tuple(stride for stride in (8, 16, 32) if stride <= self.native and self._passes(stride))

    def errors(self, *, dtype: torch.dtype = torch.float32) -> tuple[float, ...]:
        """How far each output is from the strided network's, on its grid, relative to its largest value.

        Measured on weights and statistics drawn at random (always the same ones), on the CPU.

        Args:
            dtype: In float64 rounding is out of the way: what is exact measures 1e-12 or less.
        """
        return self._measure(self._output_stride, dtype)

    def _apply(self, output_stride: int) -> None:
        # all is worked out before anything is set: a contradiction leaves the module alone
        native = output_stride == self.native
        rewrites = [{} if native else _rewrite(op, output_stride) for op in self._ops]
        for op, rewrite in zip(self._ops, rewrites, strict=True):
            vars(op.module).pop("forward", None)
            for name, value in (op.settings | rewrite).items():
                setattr(op.module, name, value)
        self._output_stride = output_stride

    def _measure(self, output_stride: int, dtype: torch.dtype) -> tuple[float, ...]:
        twin, image = self._twin(dtype)
        strided = _run(twin._module, image)
        twin._apply(output_stride)
        dense = _run(twin._module, image)
        steps = (native // now for native, now in zip(twin._reductions, twin.reductions, strict=True))
        return tuple(_error(d[..., ::k, ::k], s) for d, s, k in zip(dense, strided, steps, strict=True))

    def _twin(self, dtype: torch.dtype) -> tuple[Dilation, Tensor]:
        """The strided network with drawn weights, always the same, and an image ``(1, C, H, W)`` for it."""
        generator = torch.Generator().manual_seed(0)
        twin = copy.deepcopy(self, _drawn(self._module, generator, dtype))
        twin._apply(twin.native)
        image = torch.empty(1, self._in_channels, *self._size, dtype=dtype, device="cpu")
        image.uniform_(-2, 2, generator=generator)
        _calibrate(twin._module, image, generator)
        return twin, image

    def _passes(self, output_stride: int) -> bool:
        try:
            self._prove(output_stride)
        except DilationError:
            return False
        return True

    def _prove(self, output_stride: int) -> None:
        try:
            error = max(self._measure(output_stride, torch.float32))
            if (
                _TOLERANCE < error < 100 * _TOLERANCE
            ):  # a deep network magnifies rounding, which float64 has not
                error = max(self._measure(output_stride, torch.float64))
            if error <= _TOLERANCE:
                return
            what, cause = f"relative error {error:.1e}, where {_TOLERANCE:.0e} is rounding", None
        except DilationError:  # it has said why
            raise
        except Exception as raised:  # whatever a foreign module raises on maps that it was not made for
            what, cause = f"{type(raised).__name__}: {raised}", raised
        twin, image = self._twin(torch.float32)
        strided = _trace(twin._module, image)
        twin._apply(output_stride)
        where = _departure(strided, _trace(twin._module, image))
        raise DilationError(
            f"output stride {output_stride} is not exact for this network ({what}){where}; "
            f"its own output stride is {self.native}"
        ) from cause


def set_output_stride(module: nn.Module, output_stride: int, *, in_channels: int = 3) -> Dilation:
    """Give a strided network another output stride, in place: a `Dilation`, and its ``output_stride`` set.

    Returns:
        What sets it again: ``dilation.output_stride = 32``.

    Raises:
        ValueError: No power of two up to the network's own output stride.
        DilationError: The network can't have it exactly.
    """
    dilation = Dilation(module, in_channels=in_channels)
    dilation.output_stride = output_stride
    return dilation


# --- Where every op stands ---


class _Call(NamedTuple):
    """How an op was called in the strided network."""

    stride_in: int
    """Image pixels per pixel of its input, to the nearest power of two."""
    stride_out: int
    spare: tuple[int, int] | None
    """Pixels of the input beyond ``s`` per output, where the output covers the image; else None."""
    pads_itself: bool
    """Whether its forward computes the padding for that from the map that comes (TensorFlow's "SAME")."""


@dataclass
class _Op:
    """A module that mixes neighbours, its attributes in the strided network, and its calls there."""

    name: str
    module: nn.Module
    settings: dict[str, Any]
    calls: set[_Call] = field(default_factory=set)


def _probe(module: nn.Module, in_channels: int) -> tuple[tuple[int, int], list[_Op], tuple[int, ...]]:
    """Run the strided network on the smallest image that leaves no doubt about its strides.

    Returns:
        The image's size; the ops that were called; the reduction of each output.
    """
    twin = copy.deepcopy(module, _drawn(module, torch.Generator(), torch.float32))
    originals = dict(zip(twin.modules(), module.modules(), strict=True))
    failure, found = None, None
    for size in _SIZES:
        recorder = _Recorder(twin, size)
        try:
            with _hooked(twin, after=recorder):
                outputs = _run(twin, torch.zeros(1, in_channels, *size, device="cpu"))
        except Exception as raised:  # whatever a foreign module raises on a size that it does not take
            failure = raised
            continue
        found = recorder, tuple(map(recorder.stride, outputs))
        if recorder.certain and min(x.shape[-2] for x in outputs) > 1:
            break
    if found is None:
        raise DilationError(f"the network ran on no image of a size in {_SIZES}: {failure}") from failure
    recorder, reductions = found
    if any(abs(math.log2(1.5 * x.shape[-2] / x.shape[-1])) > 0.6 for x in outputs):
        shapes = [tuple(x.shape) for x in outputs]
        raise DilationError(f"expected maps (B, C, h, w), but an image of {recorder.size} gave {shapes}")
    ops = [replace(op, module=originals[op.module]) for op in recorder.ops.values() if op.calls]
    return recorder.size, ops, reductions


class _Recorder:
    """Forward hook: at which strides every op is called."""

    def __init__(self, module: nn.Module, size: tuple[int, int]) -> None:
        self.size = size
        self.certain = True
        self.ops = {
            child: _Op(name, child, {key: vars(child)[key] for key in _SETTINGS if key in vars(child)})
            for name, child in module.named_modules()
            if _is_op(child)
        }

    def stride(self, x: Tensor) -> int:
        """Image pixels per pixel of the map, to the nearest power of two."""
        exponents = [math.log2(whole / n) for whole, n in zip(self.size, x.shape[-2:], strict=True)]
        nearest = max(round(sum(exponents) / 2), 0)
        self.certain &= all(abs(exponent - nearest) < 0.2 for exponent in exponents)
        return 2**nearest

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module not in self.ops or not (args and _is_map(args[0]) and _is_map(output)):
            return
        x = args[0]
        if x.shape[-2:].numel() == 1:  # the gate of a squeeze-excite: no neighbours to hold apart
            return
        stride_in, stride_out = self.stride(x), self.stride(output)
        if stride_out >= stride_in:  # what refines is left for the proof to judge
            fills = _fills(module, x, output)
            sizes = zip(output.shape[-2:], self.size, strict=True)
            covers = all(n * stride_out == whole for n, whole in sizes)
            strides = zip(x.shape[-2:], output.shape[-2:], _pair(vars(module).get("stride", 1)), strict=True)
            spare = _pair([max(n - m * s, 0) for n, m, s in strides]) if fills or covers else None
            self.ops[module].calls.add(_Call(stride_in, stride_out, spare, fills and _pads_itself(module, x)))


def _is_map(x: Any) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4


def _is_op(module: nn.Module) -> bool:
    """Whether it may mix neighbours: a kernel, padding, or another leaf with a stride (a blur pool)."""
    if isinstance(module, (*_KERNELS, nn.ConstantPad2d)):
        return True
    return isinstance(vars(module).get("stride"), (int, tuple, list)) and not any(module.children())


def _fills(module: nn.Module, x: Tensor, output: Tensor) -> bool:
    strides = _pair(vars(module).get("stride", 1))
    return all(m == -(-n // s) for n, m, s in zip(x.shape[-2:], output.shape[-2:], strides, strict=True))


def _pads_itself(module: nn.Module, x: Tensor) -> bool:
    """Try a foreign forward, told to pad nothing, on one pixel less: only its own padding fills that."""
    forward = type(module).forward
    if not isinstance(module, _KERNELS) or any(forward is kind.forward for kind in _KERNELS):
        return False
    if module.padding not in (0, (0, 0)) or getattr(module, "ceil_mode", False):
        return False
    smaller = x[..., 1:, 1:]
    return _fills(module, smaller, forward(module, smaller))


# --- What becomes of it ---


def _rewrite(op: _Op, output_stride: int) -> dict[str, Any]:
    """The attributes that an op takes on at an output stride.

    Raises:
        DilationError: It is called at several strides, which want different ones.
    """
    first, *others = (_rewrite_call(op, call, output_stride) for call in op.calls)
    if any(other != first for other in others):
        strides = sorted({call.stride_in for call in op.calls})
        raise DilationError(
            f"output stride {output_stride} is not exact for this network: '{op.name}' "
            f"({type(op.module).__name__}) is called at the strides {strides}, and an op has one dilation"
        )
    return first


def _rewrite_call(op: _Op, call: _Call, output_stride: int) -> dict[str, Any]:
    rate = max(call.stride_in // output_stride, 1)  # by which its input is denser
    given_up = max(call.stride_out // output_stride, 1) // rate  # of its own stride
    if rate == given_up == 1:
        return {}
    module, settings = op.module, op.settings
    if isinstance(module, nn.ConstantPad2d):
        return {"padding": tuple(rate * pad for pad in settings["padding"])}
    if not isinstance(module, _KERNELS) or getattr(module, "padding_mode", "zeros") != "zeros":
        stride = settings["stride"]
        less = stride // given_up if isinstance(stride, int) else tuple(s // given_up for s in stride)
        return {"stride": less, "forward": _Forward(module, phases=rate)}
    return _rewrite_kernel(op, call, rate, given_up)


def _rewrite_kernel(op: _Op, call: _Call, rate: int, given_up: int) -> dict[str, Any]:
    """A convolution or a pool; one that can't be dilated is kept as it is, on phases."""
    module, settings = op.module, op.settings
    assert isinstance(module, _KERNELS)
    phases = 1 if "dilation" in settings else rate
    rate = rate // phases
    kernels, dilations = _pair(module.kernel_size), _pair(settings.get("dilation", 1))
    strides, paddings = _pair(settings["stride"]), _padding(op)
    new: dict[str, Any] = {"stride": _pair([s // given_up for s in strides]), "padding": (0, 0)}
    if "dilation" in settings:  # a 1×1 kernel has nothing to dilate, and is faster so
        new["dilation"] = _pair([d * rate if k > 1 else d for k, d in zip(kernels, dilations, strict=True)])
    if "ceil_mode" in settings:
        new["ceil_mode"] = False
    reaches = [d * (k - 1) for d, k in zip(dilations, kernels, strict=True)]
    if call.pads_itself:
        rows, columns = (_pad_same(r, s, rate) for r, s in zip(reaches, strides, strict=True))
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
        crop=(rows.crop, columns.crop),
        counted=counted,
    )
    return new


class _Pad(NamedTuple):
    """Pixels to add along an axis, and outputs to drop on its left."""

    left: int
    right: int
    crop: int = 0


def _pad(reach: int, stride: int, padding: int, rate: int, spare: int | None) -> _Pad:
    """What goes around a map of ``rate`` times the pixels, for a kernel that saw ``reach + 1`` of the old.

    On the left the taps stay in place. On the right comes what a whole map needs, where it was whole before.
    """
    left = rate * padding
    return _Pad(left, left if spare is None else max(rate * (reach - spare) + 1 - stride - left, 0))


def _pad_same(reach: int, stride: int, rate: int) -> _Pad:
    """The same where the op pads by itself: at stride 1, half the reach on the left, which is too much."""
    left = rate * (max(reach + 1 - stride, 0) // 2)  # of an even map
    shift = rate * reach // 2 - left
    return _Pad(0, shift, shift)


def _padding(op: _Op) -> tuple[int, int]:
    """The left padding of a strided kernel, some of which torch spells."""
    padding, kernels = op.settings["padding"], vars(op.module)["kernel_size"]
    if padding == "same":
        return _pair([d * (k - 1) // 2 for d, k in zip(op.settings["dilation"], kernels, strict=True)])
    return (0, 0) if padding == "valid" else _pair(padding)


def _pair(value: Any) -> tuple[int, int]:
    """Rows and columns."""
    rows, columns = (value, value) if isinstance(value, int) else value
    return rows, columns


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
    crop: tuple[int, int] = (0, 0)
    counted: tuple[int, int] | None = None
    """For an average that counts pixels: the padding that counts as such."""

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        height, width = x.shape[-2:]
        x = _split(x, self.phases)
        forward, (left, right, top, bottom) = type(self.op).forward, self.pad
        y = forward(self.op, F.pad(x, self.pad, value=self.fill) if any(self.pad) else x, *rest)
        if self.counted is not None:  # the share of each window that is there to be averaged
            rows, columns = self.counted
            ones = F.pad(x.new_ones(1, 1, *x.shape[-2:]), (columns, columns, rows, rows), value=1.0)
            around = (left - columns, right - columns, top - rows, bottom - rows)
            y = y / forward(self.op, F.pad(ones, around))
        y = _join(y[..., self.crop[0] :, self.crop[1] :], self.phases)
        return y[..., : y.shape[-2] - -height % self.phases, : y.shape[-1] - -width % self.phases]


def _split(x: Tensor, phases: int) -> Tensor:
    """``(B, C, h, w)`` → its sub-grids ``(r·r·B, C, ⌈h/r⌉, ⌈w/r⌉)``, that of the first pixel first."""
    if phases == 1:
        return x
    x = F.pad(x, (0, -x.shape[-1] % phases, 0, -x.shape[-2] % phases))
    return torch.cat([x[..., i::phases, j::phases] for i in range(phases) for j in range(phases)])


def _join(x: Tensor, phases: int) -> Tensor:
    """The inverse of `_split`: ``(r·r·B, C, h, w)`` → ``(B, C, r·h, r·w)``, in the same memory format."""
    if phases == 1:
        return x
    contiguous = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if contiguous else torch.contiguous_format
    grids = x.unflatten(0, (phases, phases, -1)).permute(2, 3, 4, 0, 5, 1)  # B C h r w r
    return grids.flatten(4).flatten(2, 3).contiguous(memory_format=layout)


# --- The proof ---


def _run(module: nn.Module, image: Tensor) -> tuple[Tensor, ...]:
    """The maps of a module, in eval mode; the random state is left alone.

    Raises:
        ValueError: What comes out are no maps.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        output = module.eval()(image)
    maps = (output,) if isinstance(output, Tensor) else output
    if not isinstance(maps, (tuple, list)) or not maps or not all(_is_map(x) for x in maps):
        raise ValueError(f"expected a map (B, C, h, w) or a sequence of maps, got {type(output).__name__}")
    return tuple(maps)


@contextmanager
def _hooked(module: nn.Module, *, before: _Hook | None = None, after: _Hook | None = None) -> Iterator[None]:
    handles = [child.register_forward_pre_hook(before) for child in module.modules() if before is not None]
    handles += [child.register_forward_hook(after) for child in module.modules() if after is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drawn(module: nn.Module, generator: torch.Generator, dtype: torch.dtype) -> dict[int, Any]:
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


def _calibrate(module: nn.Module, image: Tensor, generator: torch.Generator) -> None:
    """Set running statistics near, but not at, those of the maps that come.

    Else the maps of a deep network grow until its gates saturate, and a saturated gate hides what differs.
    """

    def calibrate(child: nn.Module, args: tuple[Any, ...]) -> None:
        mean, variance = getattr(child, "running_mean", None), getattr(child, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            here, average = torch.var_mean(args[0].transpose(0, 1).flatten(1), dim=1, correction=0)
            noise = image.new_empty(2, *mean.shape).uniform_(-0.5, 0.5, generator=generator)
            # half of it the whole map's: a channel of almost no variance would have its rounding magnified
            variance.copy_((here + here.mean()) / 2 * (1 + noise[0]) + 1e-4)
            mean.copy_(average + noise[1] * variance.sqrt())

    with _hooked(module, before=calibrate):
        _run(module, image)


def _error(dense: Tensor, strided: Tensor) -> float:
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


def _trace(module: nn.Module, image: Tensor) -> list[_Step]:
    """The calls of all submodules, in the order in which they ended."""
    steps: list[_Step] = []
    names = {child: name for name, child in module.named_modules()}

    def note(child: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # copies, for later ops may work in place
        seen = [x.clone() if isinstance(x, Tensor) else None for x in (*args[:1], output)]
        steps.append(_Step(names[child], child, seen[0] if args else None, seen[-1]))

    # the proof has told of a failure; here the steps before it count
    with _hooked(module, after=note), suppress(Exception):
        _run(module, image)
    return steps


def _departure(strided: list[_Step], dense: list[_Step]) -> str:
    """Words for the first submodule whose dense output is not the strided one on its grid, and for why."""
    for old, new in zip(strided, dense, strict=False):
        if new.module is not old.module or not _departs(new.output, old.output):
            continue
        where = f"; it departs first at '{new.name}' ({type(new.module).__name__})"
        if not _departs(new.input, old.input):
            local = any(_is_op(child) for child in new.module.modules())
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
        if not (_is_map(dense) and _is_map(strided)):
            return False
        ratios = (max(n / m, 1) for n, m in zip(dense.shape, strided.shape, strict=True))
        dense = dense[tuple(slice(None, None, 2 ** math.ceil(math.log2(ratio))) for ratio in ratios)]
    return _error(dense, strided) > _TOLERANCE
