"""The output stride of a network, as a property that can be set."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_atrous.dilation.blocks import spread
from lightning_atrous.dilation.forms import Changes, apart, dilated, either, strided
from lightning_atrous.dilation.layout import Layout
from lightning_atrous.dilation.ops import DilationError
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
from lightning_atrous.dilation.statistics import per_grid

__all__ = ["Dilation", "Execution", "Method"]

Method = Literal["dilate", "phases"]
METHODS: tuple[Method, ...] = ("dilate", "phases")

Execution = Literal["auto", "dilated", "split"]
EXECUTIONS: tuple[Execution, ...] = ("auto", "dilated", "split")

_OWN = "_lightning_atrous_dilation"
"""The attribute of a network that holds its `Dilation`."""

DEPTHS = (8, 3, 2, 1, 0)
"""How deep to look for what gives up its stride, the cheapest first."""


class _Way(NamedTuple):
    """How an output stride is reached."""

    method: Method
    depth: int = DEPTHS[0]
    """Of phases."""
    dense: bool = False
    """Whether statistics are taken over denser maps than in the strided network."""
    split: frozenset[bool] = frozenset()
    """In which modes (of training) the dilated network is the same on sub-grids."""


class Dilation:
    """The output stride of one network: image ``(B, C, H, W)`` → one map ``(B, C_i, h_i, w_i)``, or several.

    A copy of the network that has drawn weights is run once, in eval mode, to see which op stands at which
    stride, and again to prove each new output stride: the network itself is touched by what is proved alone.
    At every output stride its weights keep names, shapes and values. As an attribute of its module, a
    `Dilation` is copied and pickled along with it.

    Args:
        module: The network as it comes, not dilated yet, and such that `copy.deepcopy` takes it.
        method: How a new output stride is reached: *dilate* dilates the kernels, *phases* runs what follows a lost
            stride on every sub-grid of its map; *auto* takes the first of the two that is exact. Asked for by name,
            *dilate* may also take statistics over denser maps (see `dense_statistics`).
        in_channels: ``C``.
        multi_grid: Factors to the rates of the blocks of the last stage, in turn (DeepLabv3, section 3.2.1).
        hdc: Rates of the blocks of whole stages, in turn, in place of their own, by the stride that the stage has in
            the strided network: ``{16: (1, 2, 5, 9), 32: (5, 9, 17)}`` (Wang et al. 2018, arXiv:1702.08502).
        hdc_at: The output stride at which ``hdc`` is quoted; at others the taps stay where they are in the image.

    Raises:
        DilationError: The network runs on none of the probe's images, its outputs are no maps, or it has no blocks
            that could be given other rates.

    With ``hdc``, the network is as it came until an output stride is set.

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

    def __init__(
        self,
        module: nn.Module,
        *,
        method: Literal["auto"] | Method = "auto",
        in_channels: int = 3,
        multi_grid: Sequence[int] = (1,),
        hdc: Mapping[int, Sequence[int]] | None = None,
        hdc_at: int = 8,
    ) -> None:
        if method not in ("auto", *METHODS):
            raise ValueError(f"there is no method '{method}'; give one of auto, {', '.join(METHODS)}")
        _check_undilated(module)
        self._module = module
        self._methods: tuple[Method, ...] = METHODS if method == "auto" else (method,)
        self._in_channels = in_channels
        self._probe = probe(module, in_channels)
        self.native = max(self._probe.reductions)
        spread(self._probe, self.native, multi_grid=multi_grid, hdc=hdc or {}, hdc_at=hdc_at)
        self._layout = Layout([False])
        self._execution: Execution = "auto"
        self._preferred = {True: True, False: True}
        self._ways: dict[int, _Way] = {}
        self._refused: dict[int, str] = {}
        self._way = _Way(self._methods[0])
        self._output_stride = self.native
        if not hdc:
            self._apply(self.native, self._way)
        vars(module)[_OWN] = self  # whoever dilates it again is told of this one

    @property
    def network(self) -> nn.Module:
        """What it is about."""
        return self._module

    @property
    def reductions(self) -> tuple[int, ...]:
        """Image pixels per map pixel of each output, at the present output stride."""
        return tuple(min(reduction, self._output_stride) for reduction in self._probe.reductions)

    @property
    def method(self) -> Method | None:
        """What the present output stride is reached by; None at the network's own."""
        return None if self._output_stride == self.native else self._way.method

    @property
    def dense_statistics(self) -> bool:
        """Whether squeeze-excite, group norm and the like take in denser maps than in the strided network.

        Then the network is another function, on its grid too: all else in it is exact.
        """
        return self.method == "dilate" and self._way.dense

    @property
    def runs_whole(self) -> bool:
        """Whether the whole network runs on shifted images, for want of a part that could: exact, and slow."""
        return self.method == "phases" and self._way.depth == 0

    @classmethod
    def of(cls, module: nn.Module, method: Literal["auto"] | Method) -> Dilation | None:
        """The one that a network has already, if it goes by that method."""
        before = vars(module).get(_OWN) if isinstance(module, nn.Module) else None
        return before if before and before._methods == (METHODS if method == "auto" else (method,)) else None

    @property
    def summary(self) -> str:
        """By what the present output stride is reached, and what is remarkable about that; empty at its own."""
        remarks = ["dense statistics"] * self.dense_statistics + ["whole network"] * self.runs_whole
        return ", ".join([self.method, *remarks]) if self.method else ""

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
        choices = self.choices
        if type(output_stride) is not int or output_stride not in choices:
            raise ValueError(f"this network has no output stride {output_stride!r}; choose one of {choices}")
        self._apply(output_stride, self._way_to(output_stride))

    @property
    def choices(self) -> list[int]:
        """The output strides that can be tried."""
        halvings = [self.native]
        while halvings[0] % 2 == 0:
            halvings.insert(0, halvings[0] // 2)
        return halvings

    @property
    def execution(self) -> Execution:
        """How *dilate* is computed, settable; the numbers are the same.

        *dilated*: by dilated kernels, always. *split*: by plain kernels on sub-grids, wherever that is proved to be the
        same: images whose sides `native` divides, no statistics over maps, in training no drop-path. *auto*: as
        *split*, but for what `prefer` was told. The method *phases* knows one way only.
        """
        return self._execution

    @execution.setter
    def execution(self, execution: Execution) -> None:
        if execution not in EXECUTIONS:
            raise ValueError(f"there is no execution '{execution}'; give one of {', '.join(EXECUTIONS)}")
        self._execution = execution
        self._apply_again()

    @property
    def alternatives(self) -> frozenset[bool]:
        """The modes, by whether they are of training, that *auto* has a choice of executions for."""
        has = self._execution == "auto" and self.method == "dilate"
        return self._way.split if has else frozenset()

    def prefers(self, training: bool) -> bool:
        """Whether *auto* runs on sub-grids, in training or out of it."""
        return self._preferred[training]

    def prefer(self, split: bool, *, training: bool) -> None:
        """Let *auto* run on sub-grids, or not, in training or out of it."""
        self._preferred[training] = split
        self._apply_again()

    def supported(self) -> tuple[int, ...]:
        """Which of the usual output strides can be set: 8, 16, 32, its own, and the half of that."""
        usual = {8, 16, 32, self.native, self.native // 2}
        return tuple(stride for stride in self.choices if stride in usual and self._passes(stride))

    def errors(self, *, dtype: torch.dtype = torch.float32) -> tuple[float, ...]:
        """How far each output is from the strided network's, on its grid, relative to its largest value.

        Measured on weights and statistics drawn at random (always the same ones), on the CPU, for the forward that
        runs; without ``hdc``, with whose rates there need be no strided network.

        Args:
            dtype: In float64 rounding is out of the way: what is exact measures 1e-12 or less.
        """
        return self._measure(self._output_stride, self._way._replace(dense=False), dtype)

    def _way_to(self, output_stride: int) -> _Way:
        """The first way that is exact as it runs, proved once."""
        if output_stride == self.native:
            return self._way
        if output_stride in self._refused:
            raise DilationError(self._refused[output_stride])
        if output_stride not in self._ways:
            try:
                self._ways[output_stride] = self._first(output_stride)
            except DilationError as error:
                self._refused[output_stride] = str(error)
                raise
        return self._ways[output_stride]

    def _first(self, output_stride: int) -> _Way:
        reasons: dict[Method, str] = {}
        cause = None
        for way in self._candidates():
            try:
                self._prove(output_stride, way)
            except DilationError as error:
                # of one method in several ways, the last reason is that of the way that asks for least
                reasons[way.method] = f"by {way.method}: {error}" if not way.dense else reasons[way.method]
                cause = error.__cause__
            else:
                return way._replace(split=frozenset(self._alike(output_stride, way)))
        raise DilationError(
            f"output stride {output_stride} is not exact for this network, {'; '.join(reasons.values())}; "
            f"its own output stride is {self.native}"
        ) from cause

    def _candidates(self) -> Iterator[_Way]:
        if "dilate" in self._methods:
            yield _Way("dilate")
        if self._methods == ("dilate",):
            yield _Way("dilate", dense=True)
        if "phases" in self._methods:
            yield from (_Way("phases", depth) for depth in DEPTHS)

    def _apply(self, output_stride: int, way: _Way) -> None:
        # all is worked out before anything is set: a contradiction leaves the module alone
        changes = self._form(output_stride, way)
        for module in (self._module, *self._probe.stages, *(op.module for op in self._probe.ops)):
            vars(module).pop("forward", None)
        for op in self._probe.ops:
            for name, value in op.settings.items():
                setattr(op.module, name, value)
        for module, change in changes.items():
            for name, value in change.items():
                setattr(module, name, value)
        self._output_stride, self._way = output_stride, way

    def _apply_again(self) -> None:
        if self.method == "dilate":
            self._apply(self._output_stride, self._way)

    def _form(self, output_stride: int, way: _Way) -> Changes:
        root, probe = self._module, self._probe
        if output_stride == self.native:
            return strided(probe)
        if way.method == "phases":
            return apart(root, probe, output_stride, way.depth)
        modes = frozenset(training for training in way.split if self._runs_split(training))
        if not modes:
            return dilated(probe, output_stride)
        return either(root, probe, output_stride, way.depth, self._layout, modes)

    def _runs_split(self, training: bool) -> bool:
        return self._execution == "split" or (self._execution == "auto" and self._preferred[training])

    def _measure(self, output_stride: int, way: _Way, dtype: torch.dtype) -> tuple[float, ...]:
        twin, image = self._twin(dtype)
        before = twin._run(image)
        twin._apply(output_stride, way)
        if way.dense:
            grids = per_grid(twin._module, twin._probe.stages, twin._probe.ops, output_stride)
            for module, forward in grids.items():
                module.forward = forward
        steps = (native // now for native, now in zip(twin._probe.reductions, twin.reductions, strict=True))
        pairs = zip(twin._run(image), before, steps, strict=True)
        return tuple(relative_error(d[..., ::k, ::k], s) for d, s, k in pairs)

    def _run(self, image: Tensor, *, training: bool = False) -> tuple[Tensor, ...]:
        return channels_first(run(self._module, image, training=training), self._probe.channels_last)

    def _twin(self, dtype: torch.dtype) -> tuple[Dilation, Tensor]:
        """The strided network with drawn weights, always the same, and an image ``(1, C, H, W)`` for it."""
        generator = torch.Generator().manual_seed(0)
        twin = copy.deepcopy(self, drawn(self._module, generator, dtype))
        for op in twin._probe.ops:
            op.reach = None
        twin._apply(twin.native, twin._way)
        image = torch.empty(1, self._in_channels, *self._probe.size, dtype=dtype, device="cpu")
        image.uniform_(-2, 2, generator=generator)
        calibrate(twin._module, image, generator)
        return twin, image

    def _passes(self, output_stride: int) -> bool:
        try:
            self._form(output_stride, self._way_to(output_stride))
        except DilationError:
            return False
        return True

    def _prove(self, output_stride: int, way: _Way) -> None:
        try:
            error = max(self._measure(output_stride, way, torch.float32))
            if TOLERANCE < error < 100 * TOLERANCE:  # a deep network magnifies rounding, which float64 has not
                error = max(self._measure(output_stride, way, torch.float64))
            if error <= TOLERANCE:
                return
            what, cause = f"relative error {error:.1e}, where {TOLERANCE:.0e} is rounding", None
        except DilationError:  # it has said why
            raise
        except Exception as raised:  # whatever a foreign module raises on maps that it was not made for
            what, cause = f"{type(raised).__name__}: {raised}", raised
        if way.method == "phases":  # nothing within is to be compared: its parts see other batches
            raise DilationError(what) from cause
        twin, image = self._twin(torch.float32)
        before = trace(twin._module, image)
        twin._apply(output_stride, way)
        raise DilationError(what + departure(before, trace(twin._module, image))) from cause

    def _alike(self, output_stride: int, way: _Way) -> Iterator[bool]:
        """The modes, of training or not, in which a dilated network is the same on maps taken apart."""
        if way.method != "dilate" or way.dense or any(n % self.native for n in self._probe.size):
            return
        try:
            either(self._module, self._probe, output_stride, way.depth, self._layout, frozenset())
        except DilationError:  # there is no such form
            return
        for training in (False, True):
            twin, image = self._twin(torch.float32)
            before = copy.deepcopy(twin._module.state_dict())
            outcomes = []
            for execution in EXECUTIONS[1:]:
                twin._module.load_state_dict(before)
                twin._execution = execution
                twin._apply(output_stride, way._replace(split=frozenset({training})))
                try:
                    maps = twin._run(image, training=training)
                except Exception:  # whatever a foreign module raises on a batch that it was not made for
                    return
                outcomes.append([*maps, *copy.deepcopy(twin._module.state_dict()).values()])
            if all(relative_error(b.float(), a.float()) <= TOLERANCE for a, b in zip(*outcomes, strict=True)):
                yield training


def _check_undilated(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise ValueError(f"expected a network (nn.Module), got {type(module).__name__}")
    before = vars(module).get(_OWN)
    if before is not None and (before.output_stride != before.native or any(op.is_told for op in before._probe.ops)):
        raise ValueError(
            f"this network has been brought to output stride {before.output_stride} already; set the output_stride of "
            f"the Dilation that did it, or have it set to {before.native} first"
        )
    if before is None and "forward" in vars(module):
        raise ValueError(
            "this network's forward was replaced on the instance, where no copy of it can be run; dilate it before that"
        )
