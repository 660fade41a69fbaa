"""The best class of every pixel, from logits at any resolution, without their scores at full size.

The logits are raised a strip of rows at a time, of such a size that the scores of a strip stay in a processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_atrous.layers import raised_rows, resize, rows_behind

__all__ = ["class_indices", "class_map"]


def class_map(logits: Tensor, size: Sequence[int]) -> Tensor:
    """`class_indices` in int64: ``(B, K, h, w)`` → ``(B, *size)``."""
    return class_indices(logits, size).long()


@torch.compiler.disable  # which would unroll the strips
@torch.no_grad()
def class_indices(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The best class of every pixel once logits are raised to a size, in the smallest integer type that holds all.

    The argmax of `layers.resize`: of equal scores the first class wins, and what is not a number wins over every
    number. Scores are compared in float32 or better, for rounding makes ties between pixels; two classes that differ
    in its last digits may change places, as they do between any two ways to raise a map.

    Args:
        logits: ``(B, K, h, w)`` at any resolution; faster where all of them are finite.
        size: Height and width that are wanted.

    Returns:
        ``(B, *size)``: uint8 for at most 256 classes, else int16, or int32.
    """
    k = logits.shape[1]
    dtype = torch.uint8 if k <= 2**8 else torch.int16 if k <= 2**15 else torch.int32
    found = torch.empty((len(logits), *size), dtype=dtype, device=logits.device)
    first_best = _first_best_on_cpu if logits.device.type == "cpu" else _first_best
    doubtful = []
    for strip in _strips(logits, size):
        winner, doubt = first_best(strip.scores(logits, size))
        found[strip.images, strip.first : strip.last] = winner
        doubtful.append(doubt)
    # at the end: an accelerator is waited for once
    if doubtful and torch.stack(doubtful).any():
        return _class_by_class(logits, size).to(dtype)
    return found


def _first_best(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The first class of the best score, and whether any is not a number: ``(b, K, r, W)`` → ``(b, r, W)``, ``()``."""
    best, winner = scores.max(1)
    return winner, best.isnan().any()


def _first_best_on_cpu(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The same, several times faster there: passes over whole rows that all are of one type."""
    k = scores.shape[1]
    best = torch.eq(scores, scores.amax(1, keepdim=True), out=torch.empty_like(scores))  # 1 or 0
    # the sooner a class comes, the more
    first = best.mul_(torch.arange(k, 0, -1, dtype=scores.dtype).view(-1, 1, 1)).amax(1)
    # a best that is not a number equals nothing
    return k - first, (first == 0).any()


def _class_by_class(logits: Tensor, size: Sequence[int]) -> Tensor:
    """The same of any logits, int64: a few classes of one image at a time.

    Between infinite rows, `layers.raised_rows` finds what is not a number, where `layers.resize` does not always.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    at_once = max(1, _RAISED_ON_DEVICE // math.prod(size))
    winners = []
    for image in logits.split(1):
        best, winner = resize(image[:, :at_once], size).max(dim=1)
        for first in range(at_once, image.shape[1], at_once):
            value, index = resize(image[:, first : first + at_once], size).max(dim=1)
            better = (value > best) | (value.isnan() & ~best.isnan())
            winner = torch.where(better, index + first, winner)
            best = torch.maximum(best, value)
        winners.append(winner)
    return torch.cat(winners)


class _Strip(NamedTuple):
    """Rows ``first`` to ``last`` of some raised images."""

    images: slice
    first: int
    last: int

    def scores(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        """The raised strip ``(b, K, r, W)`` of logits ``(B, K, h, w)``."""
        height = logits.shape[-2]
        top, bottom = rows_behind(self.first, self.last, height, size[0])
        behind = logits[self.images, :, top:bottom].contiguous()
        behind = behind.to(torch.promote_types(behind.dtype, torch.float32))
        return raised_rows(behind, self.first, self.last, size, above=top, height=height)


def _strips(logits: Tensor, size: Sequence[int]) -> Iterator[_Strip]:
    """All of them: several images where these are small, else a part of one."""
    images, k, height, width = logits.shape
    if not images or not math.prod(size):
        return
    # of a map that is lowered, more rows and longer ones stand behind a strip than in it
    per_row = k * max(size[1], size[1] * height // size[0], width * height // size[0])
    budget = _RAISED if logits.device.type == "cpu" else _RAISED_ON_DEVICE
    rows = max(1, min(size[0], budget // per_row))
    rows = -(-size[0] // -(-size[0] // rows))  # as many in each
    at_once = max(1, budget // (per_row * rows)) if rows == size[0] else 1
    for image in range(0, images, at_once):
        for first in range(0, size[0], rows):
            yield _Strip(slice(image, image + at_once), first, min(first + rows, size[0]))


_RAISED = 2**19
"""Scores raised at one time: 2 MiB in float32, which fit a processor's cache."""

_RAISED_ON_DEVICE = 2**25
"""The same on an accelerator, where every strip costs the start of some ten kernels: 128 MiB."""
