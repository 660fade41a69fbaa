"""What a chain of convolutions sees: receptive field, holes in it, taps that fall off the map. Plain arithmetic.

Along one axis; over two axes of a square kernel the counts multiply. The receptive field by recurrence is in Araujo,
Norris, Sim, "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019; gridding and the rule against
it in Wang et al., "Understanding Convolution for Semantic Segmentation", 2018, arXiv:1702.08502, section 3.2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

__all__ = [
    "Layer",
    "Usage",
    "better_rates",
    "coverage",
    "receptive_field",
    "unseen_gap",
    "usage",
    "valid_taps",
]


@dataclass(frozen=True)
class Layer:
    """A convolution or a pooling along one axis.

    Args:
        kernel: Taps.
        stride: Positions of the input from one output to the next; for a transposed one, of the output from one input.
        rate: Positions from one tap to the next (atrous rate, dilation).
        transposed: Refines by its stride instead.

    Raises:
        ValueError: A number below 1.
    """

    kernel: int
    stride: int = 1
    rate: int = 1
    transposed: bool = False

    def __post_init__(self) -> None:
        for name in ("kernel", "stride", "rate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def extent(self) -> int:
        """Positions from the first tap to the last: the effective kernel."""
        return (self.kernel - 1) * self.rate + 1


@dataclass(frozen=True)
class Usage:
    """How often one output reads each position of the input.

    Args:
        first: The position of the first count, where the output's own first tap is at 0 in every layer.
        counts: One for each position of the receptive field, from the first that is read to the last.
    """

    first: int
    counts: np.ndarray

    @property
    def field(self) -> int:
        """The receptive field: positions from the first that is read to the last."""
        return len(self.counts)

    @property
    def coverage(self) -> float:
        """The share of its positions that are read at all, in 0..1."""
        return float(np.count_nonzero(self.counts)) / len(self.counts)


def usage(layers: Sequence[Layer], position: int = 0) -> Usage:
    """Push a one back through a chain: how often the output at a position reads each position of the input.

    Behind a transposed layer not all outputs read alike; they repeat with the product of those layers' strides.

    Args:
        layers: From the input on.
        position: Of the output.

    Raises:
        ValueError: That output reads nothing, as one between the taps of a transposed layer.

    Example:
        >>> from lightning_atrous.analysis import Layer, usage
        >>> usage([Layer(3, rate=2)] * 2).counts.tolist()
        [1, 0, 2, 0, 3, 0, 2, 0, 1]
    """
    first, counts = position, np.ones(1, dtype=object)  # whole numbers of any size
    for layer in reversed(layers):
        taps = np.zeros(layer.extent, dtype=object)
        taps[:: layer.rate] = 1
        if layer.transposed:  # output p reads input q where p = s·q + r·t
            first, counts = first - layer.extent + 1, np.convolve(counts, taps[::-1])
            skipped = -first % layer.stride
            first, counts = (first + skipped) // layer.stride, counts[skipped :: layer.stride]
        else:  # output p reads inputs s·p + r·t
            spread = np.zeros((len(counts) - 1) * layer.stride + 1, dtype=object)
            spread[:: layer.stride] = counts
            first, counts = first * layer.stride, np.convolve(spread, taps)
        read = np.flatnonzero(counts)
        if not len(read):
            raise ValueError(f"the output at {position} reads nothing: it lies between the taps of a transposed layer")
        first, counts = first + int(read[0]), counts[read[0] : read[-1] + 1]
    return Usage(first, counts)


def receptive_field(layers: Sequence[Layer]) -> int:
    """Positions of the input from the first that an output reads to the last; the most over all outputs.

    Example:
        >>> from lightning_atrous.analysis import Layer, receptive_field
        >>> receptive_field([Layer(2, rate=2**i) for i in range(10)])  # WaveNet's doubling
        1024
    """
    if any(layer.transposed for layer in layers):
        return max(usage(layers, position).field for position in _outputs(layers))
    field, jump = 1, 1
    for layer in layers:
        field, jump = field + (layer.extent - 1) * jump, jump * layer.stride
    return field


def _outputs(layers: Sequence[Layer]) -> list[int]:
    """Positions of one period of the outputs that read anything."""
    period = math.prod(layer.stride for layer in layers if layer.transposed)
    reading = []
    for position in range(period):
        try:
            usage(layers, position)
        except ValueError:
            continue
        reading.append(position)
    return reading


def coverage(layers: Sequence[Layer], *, axes: int = 2) -> float:
    """The share of the positions inside the receptive field that an output reads at all, in 0..1.

    Args:
        layers: From the input on; the least over all outputs where they differ.
        axes: Along which the kernels are the same: over two, the shares multiply.

    Example:
        >>> from lightning_atrous.analysis import Layer, coverage
        >>> round(coverage([Layer(3, rate=2)] * 4), 3)
        0.28
        >>> coverage([Layer(3, rate=rate) for rate in (1, 2, 5)])
        1.0
    """
    return float(min(usage(layers, position).coverage for position in _outputs(layers)) ** axes)


def unseen_gap(rates: Sequence[int]) -> int:
    """The largest distance between two positions that a run of atrous layers reads: ``M_2`` of the HDC rule.

    A run of kernels ``k`` is free of holes if it is at most ``k``: ``M_i = max(M_{i+1} - 2·r_i, 2·r_i - M_{i+1}, r_i)``
    from ``M_n = r_n``. The rule is sufficient for layers in this order, and no more: `coverage` tells what is so.

    Raises:
        ValueError: No rate, or one below 1.

    Example:
        >>> from lightning_atrous.analysis import unseen_gap
        >>> unseen_gap([1, 2, 5]), unseen_gap([1, 2, 9])
        (2, 5)
    """
    if not rates or min(rates) < 1:
        raise ValueError(f"rates must be whole numbers of at least 1, got {list(rates)}")
    gap = rates[-1]
    for rate in reversed(rates[1:-1]):
        gap = max(gap - 2 * rate, 2 * rate - gap, rate)
    return gap


def better_rates(rates: Sequence[int], kernel: int = 3) -> tuple[int, ...] | None:
    """Rates without holes for a run that has some, of nearly the same receptive field and never a larger one.

    Saw-tooth: a rising pattern of up to four rates, repeated. Of the patterns without holes the one with the largest
    field; of those, the one with the smallest largest rate.

    Args:
        rates: Of layers behind each other.
        kernel: Of all.

    Returns:
        As many rates; None where the given ones leave no holes.

    Example:
        >>> from lightning_atrous.analysis import better_rates
        >>> better_rates([2, 2, 2])
        (1, 2, 3)
        >>> better_rates([1, 2, 5])
    """
    if _covers(rates, kernel):
        return None
    length, reach = len(rates), sum(rates)
    best: tuple[int, ...] = (1,) * length
    for period in range(1, min(length, 4) + 1):
        for pattern in itertools.combinations_with_replacement(range(1, 2 * max(rates) + 1), period):
            tried = tuple(itertools.islice(itertools.cycle(pattern), length))
            if sum(tried) > reach or (sum(tried), -max(tried)) <= (sum(best), -max(best)):
                continue
            if _covers(tried, kernel):
                best = tried
    return best


def _covers(rates: Sequence[int], kernel: int) -> bool:
    return usage([Layer(kernel, rate=rate) for rate in rates]).coverage == 1


def valid_taps(size: tuple[int, int], rate: int, kernel: int = 3) -> dict[int, Fraction]:
    """How many taps of a centred atrous kernel lie on the map: the share of positions for each number of taps.

    As the rate nears the map's sides a 3×3 becomes a 1×1 (Chen et al., arXiv:1706.05587, figure 4).

    Args:
        size: Height and width of the map.
        rate: Of the kernel.
        kernel: Taps along each axis, odd.

    Returns:
        Number of taps → share of the positions, the most taps first; the shares add up to 1.

    Raises:
        ValueError: An even kernel, or a number below 1.

    Example:
        >>> from lightning_atrous.analysis import valid_taps
        >>> {taps: str(share) for taps, share in valid_taps((33, 33), 36).items()}
        {1: '1'}
    """
    if kernel < 1 or kernel % 2 == 0 or rate < 1 or min(size) < 1:
        raise ValueError(f"expected an odd kernel, a rate and sides of at least 1, got {kernel}, {rate} and {size}")
    along = []
    for length in size:
        centres = np.arange(length)[:, None]
        taps = centres + rate * (np.arange(kernel) - kernel // 2)
        along.append(((taps >= 0) & (taps < length)).sum(1))
    numbers, times = np.unique(np.outer(*along), return_counts=True)
    total = size[0] * size[1]
    shares = {int(n): Fraction(int(count), total) for n, count in zip(numbers, times, strict=True)}
    return dict(sorted(shares.items(), reverse=True))
