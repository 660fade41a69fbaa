"""The class map against torch's argmax on logits that are raised as a whole."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_atrous import argmax
from lightning_atrous.argmax import class_indices, class_map


@pytest.fixture(params=[1, 900, 10**6], ids=["rows", "strips", "one strip"])
def strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything a row at a time, some rows or images, and all in one."""
    monkeypatch.setattr(argmax, "_RAISED", request.param)
    monkeypatch.setattr(argmax, "_RAISED_ON_DEVICE", request.param)


def raised(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """As a whole; a map that has the size is left as it is, for 0 × inf is not a number."""
    return logits if logits.shape[2:] == size else F.interpolate(logits, size, mode="bilinear", align_corners=False)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


SIZES = [(5, 7), (20, 28), (23, 17), (3, 4), (1, 1), (5, 28)]
"""Of the class map of logits 5×7: the same, larger by a whole ratio and by another, smaller, one axis alone."""


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("k", [1, 19, 300])
def test_equals_the_argmax_of_the_raised_logits(size: tuple[int, int], k: int) -> None:
    logits = normal(3, k, 5, 7)
    found = class_indices(logits, size)
    assert torch.equal(found.long(), raised(logits, size).argmax(1))
    assert found.dtype == (torch.uint8 if k <= 256 else torch.int16)
    assert class_map(logits, size).dtype == torch.int64


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scores_are_compared_in_float32_or_better(dtype: torch.dtype) -> None:
    logits = normal(2, 9, 5, 7, dtype=dtype)
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    assert torch.equal(class_map(logits, (31, 29)), raised(wide, (31, 29)).argmax(1))


def test_of_any_layout_in_memory() -> None:
    logits = normal(2, 9, 10, 14)
    expected = raised(logits, (31, 29)).argmax(1)
    assert torch.equal(class_map(logits.contiguous(memory_format=torch.channels_last), (31, 29)), expected)
    assert torch.equal(class_map(logits.flip(1)[:, :4], (31, 29)), raised(logits.flip(1)[:, :4], (31, 29)).argmax(1))


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_of_equal_scores_the_first_class_wins(size: tuple[int, int]) -> None:
    """Each class four times over: where one of the four is best, all are."""
    logits = normal(2, 5, 5, 7)
    again = torch.tensor([4, 2, 0, 1, 3, 0, 1, 2, 3, 4, 4, 3, 2, 1, 0])
    found = class_map(torch.cat([logits, logits[:, again]], 1), size)
    assert torch.equal(found, raised(logits, size).argmax(1))
    assert not class_map(torch.zeros(2, 40, 5, 7), size).any()


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("size", [(5, 7), (20, 28), (3, 4)], ids=str)
@pytest.mark.parametrize("values", [(math.nan,), (-math.inf,), (math.inf,), (math.nan, math.inf, -math.inf)], ids=str)
def test_what_is_not_finite_wins_and_loses_as_in_argmax(size: tuple[int, int], values: tuple[float, ...]) -> None:
    logits = normal(2, 9, 5, 7)
    chosen = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1))
    for i, value in enumerate(values):
        logits[(chosen > i / 20) & (chosen < (i + 1) / 20)] = value
    logits[:, 3] = values[-1]
    assert torch.equal(class_map(logits, size), raised(logits, size).argmax(1))


def test_a_class_between_two_others_wins_where_no_pixel_behind_has_it() -> None:
    """Best at no pixel of the logits, second at all of them."""
    logits = torch.tensor([[[[0.0, 10]], [[10.0, 0]], [[7.0, 7]]]])
    assert class_map(logits, (1, 10)).tolist() == [[[1, 1, 1, 1, 2, 2, 0, 0, 0, 0]]]


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 4, 4)])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    size = (8, 8) if shape[0] == 0 else (0, 8)
    assert class_map(torch.zeros(shape), size).shape == (shape[0], *size)


def test_on_an_accelerator_the_same_by_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(argmax, "_first_best_on_cpu", argmax._first_best)
    logits = normal(2, 9, 5, 7)
    assert torch.equal(class_map(logits, (31, 29)), raised(logits, (31, 29)).argmax(1))
    logits[0, 4, 2, 2], logits[1, 5] = math.nan, -math.inf
    assert torch.equal(class_map(logits, (31, 29)), raised(logits, (31, 29)).argmax(1))


class Largest(TorchDispatchMode):
    """The most bytes of any tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.nbytes)
        return out


@pytest.mark.parametrize("shape", [(1, 19, 128, 64), (1, 19, 8, 16), (1, 19, 600, 300)], ids=str)
def test_the_scores_never_stand_in_memory_at_full_size(shape: tuple[int, ...]) -> None:
    logits = normal(*shape)
    with Largest() as largest:
        class_indices(logits, (512, 256))
    assert largest.bytes <= 4 * argmax._RAISED


def test_compiled_models_may_end_with_it() -> None:
    logits = normal(2, 9, 5, 7)
    compiled = torch.compile(lambda x: class_map(2 * x, (31, 29)), backend="eager")
    assert torch.equal(compiled(logits), class_map(logits, (31, 29)))


def test_runs_with_deterministic_algorithms() -> None:
    logits = normal(2, 9, 5, 7)
    torch.use_deterministic_algorithms(True)
    try:
        found = class_map(logits, (31, 29))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found, raised(logits, (31, 29)).argmax(1))
