"""Cross-entropy at the labels' size that never holds the scores of all classes at that size.

The logits are raised a strip of rows at a time. The gradient of a strip's loss is known together with the loss, and
goes back to the logits' own size at once: what is kept for the backward pass is as large as the logits, not as the
raised ones. No strip is raised a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_atrous.layers import raised_rows, rows_behind

__all__ = ["raised_cross_entropy", "true_log_probability"]


@torch.compiler.disable  # which would unroll the strips
def raised_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weights: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    """The sum over pixels of ``F.cross_entropy`` on raised logits, in float32 or better.

    It can be differentiated once.

    Args:
        logits: ``(B, K, h, w)`` at any resolution.
        target: ``(B, H, W)`` int64 in ``0..K-1``, or the ignore index.
        class_weights: ``(K,)``, none negative.
        ignore_index: Of the pixels that count nothing.
        label_smoothing: The share of each target spread evenly over the classes, in ``[0, 1)``.
        pixel_weights: ``(B, H, W)``, none negative: by what the loss of each pixel is multiplied.

    Returns:
        A scalar.
    """
    keep = torch.is_grad_enabled() and logits.requires_grad
    total: Tensor = _Raised.apply(logits, target, class_weights, pixel_weights, ignore_index, label_smoothing, keep)
    return total


@torch.compiler.disable
@torch.no_grad()
def true_log_probability(logits: Tensor, target: Tensor, *, ignore_index: int) -> Tensor:
    """Log-probability of each pixel's own class, from raised logits, in float32 or better; it has no gradient.

    Args:
        logits: ``(B, K, h, w)`` at any resolution.
        target: ``(B, H, W)`` int64 in ``0..K-1``, or the ignore index.
        ignore_index: Of the pixels that have no class.

    Returns:
        ``(B, H, W)``, 0 where the target is ignored.
    """
    size = target.shape[-2:]
    found = torch.empty(target.shape, dtype=_wide(logits), device=logits.device)
    for strip in _strips(logits, size):
        own, valid = strip.labels(target, ignore_index)
        log_p = strip.scores(strip.behind(logits), size).log_softmax(1)
        found[strip.images, strip.first : strip.last] = log_p.gather(1, own).masked_fill(~valid, 0)[:, 0]
    return found


class _Strip(NamedTuple):
    """Rows ``first`` to ``last`` of some raised images, made of the rows ``top`` to ``bottom`` of their maps."""

    images: slice
    first: int
    last: int
    top: int
    bottom: int
    height: int

    def of(self, x: Tensor) -> Tensor:
        """The strip of something with one value per pixel: ``(B, H, W)`` → ``(b, 1, r, W)``."""
        return x[self.images, None, self.first : self.last]

    def labels(self, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """The class of every pixel, 0 where it is ignored; and whether it is valid. Both ``(b, 1, r, W)``."""
        labels = self.of(target)
        valid = labels != ignore_index
        return labels.masked_fill(~valid, 0), valid

    def behind(self, logits: Tensor) -> Tensor:
        """The rows ``(b, K, bottom - top, w)`` of the logits of which it is made, apart from their graph."""
        return logits.detach()[self.images, :, self.top : self.bottom].to(_wide(logits)).contiguous()

    def scores(self, behind: Tensor, size: torch.Size) -> Tensor:
        """The raised strip ``(b, K, r, W)``."""
        return raised_rows(behind, self.first, self.last, size, above=self.top, height=self.height)


def _strips(logits: Tensor, size: torch.Size) -> Iterator[_Strip]:
    """All of them: several images where these are small, else a part of one."""
    images, classes, height = logits.shape[:3]
    budget = _RAISED if logits.device.type == "cpu" else _RAISED_ON_DEVICE
    rows = max(1, min(size[0], budget // max(1, classes * size[1])))
    rows = -(-size[0] // -(-size[0] // rows))  # as many in each
    at_once = max(1, budget // max(1, classes * rows * size[1])) if rows == size[0] else 1
    for image in range(0, images, at_once):
        for first in range(0, size[0], rows):
            last = min(first + rows, size[0])
            top, bottom = rows_behind(first, last, height, size[0])
            yield _Strip(slice(image, image + at_once), first, last, top, bottom, height)


_RAISED = 2**20
"""Scores raised at one time: 4 MiB in float32, which about fit a processor's cache."""

_RAISED_ON_DEVICE = 2**23
"""The same on an accelerator, where every strip costs the start of some twenty kernels."""


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


class _Raised(torch.autograd.Function):
    """The loss and, where it is wanted, its gradient, in one pass over the strips."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        class_weights: Tensor | None,
        pixel_weights: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        keep: bool,
    ) -> Tensor:
        size, wide = target.shape[-2:], _wide(logits)
        slope = torch.zeros_like(logits, dtype=wide) if keep else None
        totals = [torch.zeros((), dtype=wide, device=logits.device)]
        for strip in _strips(logits, size):
            own, valid = strip.labels(target, ignore_index)
            counted = valid.to(wide) if pixel_weights is None else valid * strip.of(pixel_weights).to(wide)
            behind = strip.behind(logits).requires_grad_(keep)
            with torch.set_grad_enabled(keep):
                scores = strip.scores(behind, size)
            log_p = scores.detach().log_softmax(1)
            total, strip_slope = _sum_and_slope(log_p, own, counted, class_weights, label_smoothing, keep)
            totals.append(total)
            if slope is not None:
                (down,) = torch.autograd.grad(scores, behind, strip_slope)
                slope[strip.images, :, strip.top : strip.bottom] += down
        if slope is not None:
            ctx.save_for_backward(slope)
            ctx.dtype = logits.dtype
        return torch.stack(totals).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * above).to(ctx.dtype), None, None, None, None, None, None


def _sum_and_slope(
    log_p: Tensor, own: Tensor, counted: Tensor, class_weights: Tensor | None, smoothing: float, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of a strip and its gradient with respect to the scores.

    A pixel of class ``y`` that counts ``c`` has the loss ``-c·((1-ε)·w_y·log p_y + ε/K·Σ_k w_k·log p_k)``.

    Args:
        log_p: ``(b, K, r, W)``; overwritten with the gradient.
        own: Classes ``(b, 1, r, W)``.
        counted: ``(b, 1, r, W)``, 0 where the class is ignored.
        class_weights: ``(K,)``.
        smoothing: The share ``ε``.
        keep: Whether the gradient is wanted.
    """
    k = log_p.shape[1]
    weights = None if class_weights is None else class_weights.to(log_p.dtype)
    true = (1 - smoothing) * (counted if weights is None else counted * weights[own])
    total = -_weighted(log_p.gather(1, own), true)
    mass = true
    if smoothing:
        weights = log_p.new_ones(k) if weights is None else weights
        spread = smoothing / k * weights.view(-1, 1, 1)
        total = total - _weighted((log_p * spread).sum(1, keepdim=True), counted)
        mass = true + counted * spread.sum()
    if not keep:
        return total, None
    slope = log_p.exp_().mul_(mass)
    if smoothing:
        slope.addcmul_(counted, spread, value=-1)
    # every pixel has one class: what is written is written once, and the same in every run
    slope.scatter_(1, own, slope.gather(1, own) - true)
    return total, slope


def _weighted(log_p: Tensor, by: Tensor) -> Tensor:
    # what counts nothing adds nothing, even where its probability is 0
    return (log_p * by).masked_fill_(by == 0, 0).sum()
