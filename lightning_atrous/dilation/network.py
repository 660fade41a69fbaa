"""The output stride of a network, as a property that can be set."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_atrous.dilation.ops import DilationError
from lightning_atrous.dilation.phases import Phases, cover
from lightning_atrous.dilation.probe import probe
from lightning_atrous.dilation.proof import (
    TOLERANCE,
    calibrate,
    channels_first,
    departure,
    drawn,
    relative_error,
    run,
    trace,
)
from lightning_atrous.dilation.rewrite import rewrite

__all__ = ["Dilation", "Method", "set_output_stride"]

Method = Literal["dilate", "phases"]
METHODS: tuple[Method, ...] = ("dilate", "phases")


class Dilation:
    """The output stride of one network: image ``(B, C, H, W)`` → one map ``(B, C_i, h_i, w_i)``, or several.

    A copy of the network that has drawn weights is run once, in eval mode, to see which op stands at which
    stride, and again to prove each new output stride: the network itself is touched by what is proved alone.
    At every output stride its weights keep names, shapes and values. As an attribute of its module, a
    `Dilation` is copied and pickled along with it.

    Args:
        module: The network as it comes, not dilated yet, and such that `copy.deepcopy` takes it.
        method: How a new output stride is reached: *dilate* rewrites the ops, *phases* runs whole stages, as they
            are, on every sub-grid of the denser map; *auto* takes the first of the two that is exact.
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

    def __init__(self, module: nn.Module, *, method: Literal["auto"] | Method = "auto", in_channels: int = 3) -> None:
        if method not in ("auto", *METHODS):
            raise ValueError(f"there is no method '{method}'; give one of auto, {', '.join(METHODS)}")
        self._module = module
        self._methods: tuple[Method, ...] = METHODS if method == "auto" else (method,)
        self._in_channels = in_channels
        self._probe = probe(module, in_channels)
        self.native = max(self._probe.reductions)
        self._output_stride = self.native
        self._method: Method = self._methods[0]

    @property
    def reductions(self) -> tuple[int, ...]:
        """Image pixels per map pixel of each output, at the present output stride."""
        return tuple(min(reduction, self._output_stride) for reduction in self._probe.reductions)

    @property
    def method(self) -> Method | None:
        """What the present output stride is reached by; None at the network's own."""
        return None if self._output_stride == self.native else self._method

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
        method = self._method if output_stride in (self._output_stride, self.native) else self._first(output_stride)
        self._apply(output_stride, method)

    def supported(self) -> tuple[int, ...]:
        """Which of 8, 16 and 32 can be set."""
        return tuple(stride for stride in (8, 16, 32) if stride <= self.native and self._passes(stride))

    def errors(self, *, dtype: torch.dtype = torch.float32) -> tuple[float, ...]:
        """How far each output is from the strided network's, on its grid, relative to its largest value.

        Measured on weights and statistics drawn at random (always the same ones), on the CPU.

        Args:
            dtype: In float64 rounding is out of the way: what is exact measures 1e-12 or less.
        """
        return self._measure(self._output_stride, self._method, dtype)

    def _first(self, output_stride: int) -> Method:
        """The first method that is exact as it runs."""
        reasons, cause = [], None
        for method in self._methods:
            try:
                self._prove(output_stride, method)
            except DilationError as error:
                reasons.append(f"by {method}: {error}")
                cause = error.__cause__
            else:
                return method
        raise DilationError(
            f"output stride {output_stride} is not exact for this network, {'; '.join(reasons)}; its own output stride "
            f"is {self.native}"
        ) from cause

    def _apply(self, output_stride: int, method: Method) -> None:
        # all is worked out before anything is set: a contradiction leaves the module alone
        native = output_stride == self.native
        changes: list[dict[str, Any]] = [{} for _ in self._probe.ops]
        covered: dict[nn.Module, Phases] = {}
        if method == "dilate" and not native:
            changes = [rewrite(op, output_stride) for op in self._probe.ops]
        elif not native:
            covered = cover(self._module, self._probe.stages, self._probe.ops, output_stride)
        for stage in self._probe.stages:
            vars(stage).pop("forward", None)
        for op, change in zip(self._probe.ops, changes, strict=True):
            vars(op.module).pop("forward", None)
            for name, value in (op.settings | change).items():
                setattr(op.module, name, value)
        for stage, phases in covered.items():
            stage.forward = phases
        self._output_stride, self._method = output_stride, method

    def _measure(self, output_stride: int, method: Method, dtype: torch.dtype) -> tuple[float, ...]:
        twin, image = self._twin(dtype)
        strided = channels_first(run(twin._module, image), twin._probe.channels_last)
        twin._apply(output_stride, method)
        dense = channels_first(run(twin._module, image), twin._probe.channels_last)
        steps = (native // now for native, now in zip(twin._probe.reductions, twin.reductions, strict=True))
        return tuple(relative_error(d[..., ::k, ::k], s) for d, s, k in zip(dense, strided, steps, strict=True))

    def _twin(self, dtype: torch.dtype) -> tuple[Dilation, Tensor]:
        """The strided network with drawn weights, always the same, and an image ``(1, C, H, W)`` for it."""
        generator = torch.Generator().manual_seed(0)
        twin = copy.deepcopy(self, drawn(self._module, generator, dtype))
        twin._apply(twin.native, twin._method)
        image = torch.empty(1, self._in_channels, *self._probe.size, dtype=dtype, device="cpu")
        image.uniform_(-2, 2, generator=generator)
        calibrate(twin._module, image, generator)
        return twin, image

    def _passes(self, output_stride: int) -> bool:
        try:
            self._first(output_stride)
        except DilationError:
            return False
        return True

    def _prove(self, output_stride: int, method: Method) -> None:
        try:
            error = max(self._measure(output_stride, method, torch.float32))
            if TOLERANCE < error < 100 * TOLERANCE:  # a deep network magnifies rounding, which float64 has not
                error = max(self._measure(output_stride, method, torch.float64))
            if error <= TOLERANCE:
                return
            what, cause = f"relative error {error:.1e}, where {TOLERANCE:.0e} is rounding", None
        except DilationError:  # it has said why
            raise
        except Exception as raised:  # whatever a foreign module raises on maps that it was not made for
            what, cause = f"{type(raised).__name__}: {raised}", raised
        twin, image = self._twin(torch.float32)
        strided = trace(twin._module, image)
        if method == "phases":  # nothing within is to be compared: its parts see other batches
            raise DilationError(what) from cause
        twin._apply(output_stride, method)
        raise DilationError(what + departure(strided, trace(twin._module, image))) from cause


def set_output_stride(
    module: nn.Module, output_stride: int, *, method: Literal["auto"] | Method = "auto", in_channels: int = 3
) -> Dilation:
    """Give a strided network another output stride, in place: a `Dilation`, and its ``output_stride`` set.

    Returns:
        What sets it again: ``dilation.output_stride = 32``.

    Raises:
        ValueError: No power of two up to the network's own output stride.
        DilationError: The network can't have it exactly.
    """
    dilation = Dilation(module, method=method, in_channels=in_channels)
    dilation.output_stride = output_stride
    return dilation
