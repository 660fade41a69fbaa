"""The arithmetic of chains against brute force: gradients through kernels of ones, and counting."""

from __future__ import annotations

import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lightning_atrous.analysis import Layer, better_rates, coverage, receptive_field, unseen_gap, usage, valid_taps

CHAINS = {
    "one": [Layer(3)],
    "none": [],
    "doubling": [Layer(2, rate=2**i) for i in range(6)],
    "gridding": [Layer(3, rate=2)] * 4,
    "hdc": [Layer(3, rate=r) for r in (1, 2, 5)],
    "strides": [Layer(7, stride=2), Layer(3, stride=2), Layer(3), Layer(1, stride=2), Layer(3, rate=4)],
    "sparse": [Layer(1, stride=4), Layer(3, rate=2)],
    "up": [Layer(3, stride=2), Layer(4, stride=2, transposed=True)],
    "up, holes": [Layer(3, rate=2), Layer(2, stride=3, transposed=True)],
    "up twice": [Layer(3, stride=2), Layer(3, stride=2, transposed=True), Layer(5, stride=2, rate=2, transposed=True)],
    "down behind up": [Layer(4, stride=2, transposed=True), Layer(3, stride=2, rate=3)],
}


def pushed(layers: list[Layer], position: int) -> dict[int, int]:
    """Counts by position, from the gradient of one output through kernels of ones."""
    margin = 200  # so that nothing of interest lies at an edge; a multiple of all strides
    x = torch.ones(1, 1, 601, dtype=torch.float64, requires_grad=True)
    y, at = x, margin
    for layer in layers:
        kernel = torch.ones(1, 1, layer.kernel, dtype=torch.float64)
        if layer.transposed:
            y, at = F.conv_transpose1d(y, kernel, stride=layer.stride, dilation=layer.rate), at * layer.stride
        else:
            assert at % layer.stride == 0
            y, at = F.conv1d(y, kernel, stride=layer.stride, dilation=layer.rate), at // layer.stride
    y[0, 0, at + position].backward()
    assert x.grad is not None
    return {i - margin: int(n) for i, n in enumerate(x.grad[0, 0].tolist()) if n}


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("position", [0, 1, 2, 5, -3])
def test_usage_is_the_gradient_through_ones(chain: str, position: int) -> None:
    layers = CHAINS[chain]
    expected = pushed(layers, position)
    if not expected:
        with pytest.raises(ValueError, match="reads nothing"):
            usage(layers, position)
        return
    found = usage(layers, position)
    assert {found.first + i: n for i, n in enumerate(found.counts) if n} == expected
    assert found.field == max(expected) - min(expected) + 1
    assert found.coverage == len(expected) / found.field


@pytest.mark.parametrize("seed", range(12))
def test_random_chains(seed: int) -> None:
    draw = random.Random(seed)
    layers = [
        Layer(draw.choice([1, 2, 3, 5]), draw.choice([1, 1, 2]), draw.choice([1, 2, 3]), draw.random() < 0.3)
        for _ in range(4)
    ]
    fields = []
    for position in range(math.prod(layer.stride for layer in layers if layer.transposed)):
        expected = pushed(layers, position)
        if expected:
            found = usage(layers, position)
            assert {found.first + i: n for i, n in enumerate(found.counts) if n} == expected
            fields.append(found.field)
    assert receptive_field(layers) == max(fields)


def test_published_fields() -> None:
    vgg16 = [*([Layer(3)] * 2 + [Layer(2, 2)]) * 2, *([Layer(3)] * 3 + [Layer(2, 2)]) * 3]
    assert receptive_field(vgg16) == 212
    assert receptive_field(vgg16[:-1]) == 196
    assert receptive_field([Layer(3, rate=r) for r in (1, 2, 4)]) == 15
    assert receptive_field([Layer(3)] * 3) == 7


def test_gridding_is_seen_and_hdc_has_none() -> None:
    holes = usage(CHAINS["gridding"])
    assert not holes.counts[1::2].any()
    assert coverage(CHAINS["gridding"]) == (9 / 17) ** 2
    assert coverage(CHAINS["gridding"], axes=1) == 9 / 17
    assert coverage(CHAINS["hdc"]) == 1


RATES = [(1, 2, 5), (1, 2, 9), (2, 4, 8), (1, 1, 1), (1, 2, 5, 1, 2, 5), (3, 4, 5), (1, 3, 9)]


@pytest.mark.parametrize("rates", RATES)
def test_the_rule_promises_no_more_than_is_so(rates: tuple[int, ...]) -> None:
    if unseen_gap(rates) <= 3 and rates[0] == 1:
        assert coverage([Layer(3, rate=r) for r in rates]) == 1


def test_the_rules_own_examples() -> None:
    assert unseen_gap((1, 2, 5)) == 2
    assert unseen_gap((1, 2, 9)) == 5
    for rates in ((), (0, 1)):
        with pytest.raises(ValueError, match="at least 1"):
            unseen_gap(rates)


@pytest.mark.parametrize("rates", [(2, 2), (2, 2, 2, 2), (4, 4, 4), (2, 4, 8), (2, 2, 2, 4, 4, 4), (6, 12, 18)])
def test_better_rates_leave_no_hole_and_reach_no_farther(rates: tuple[int, ...]) -> None:
    better = better_rates(rates)
    assert better is not None
    assert len(better) == len(rates)
    assert coverage([Layer(3, rate=r) for r in better]) == 1
    assert receptive_field([Layer(3, rate=r) for r in better]) <= receptive_field([Layer(3, rate=r) for r in rates])


def test_rates_without_holes_stay() -> None:
    assert better_rates((1, 2, 5)) is None
    assert better_rates((1,)) is None


@pytest.mark.parametrize(
    ("size", "rate", "kernel"), [((33, 33), 6, 3), ((33, 65), 18, 3), ((5, 1), 2, 3), ((9, 7), 1, 5), ((3, 3), 40, 3)]
)
def test_valid_taps_are_counted(size: tuple[int, int], rate: int, kernel: int) -> None:
    ones = torch.ones(1, 1, *size)
    padding = rate * (kernel // 2)
    taps = F.conv2d(ones, torch.ones(1, 1, kernel, kernel), padding=padding, dilation=rate).flatten().int().tolist()
    counted = {n: Fraction(times, len(taps)) for n, times in Counter(taps).items()}
    assert valid_taps(size, rate, kernel) == counted
    assert sum(valid_taps(size, rate, kernel).values()) == 1


def test_bad_numbers() -> None:
    for wrong in (lambda: Layer(0), lambda: Layer(3, rate=0), lambda: Layer(3, stride=-1)):
        with pytest.raises(ValueError, match="must be at least 1"):
            wrong()
    with pytest.raises(ValueError, match="odd kernel"):
        valid_taps((3, 3), 1, 2)


def test_counts_grow_past_any_float() -> None:
    counts = usage([Layer(3)] * 60).counts
    assert sum(counts) == 3**60
    assert isinstance(np.max(counts), int)
