"""An image through a network: whole or in windows, at one scale or several, mirrored too.

Works on any callable from images to logits, at whatever stride these are. Windows are blended on the logits' own grid,
and several scales are averaged a few rows at a time, so that the scores of all classes never stand in memory at the
size of the image: those of 19 classes at 4096×4096 are 1.2 GiB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lightning_atrous.argmax import class_map
from lightning_atrous.layers import raised_rows, rows_behind

__all__ = ["WHOLE", "Inference", "LogitsOf", "average", "slide", "winners"]

LogitsOf = Callable[[Tensor], Tensor]
"""Image ``(B, C, H, W)``, uint8 or floating in 0..1 → logits ``(B, K, h, w)`` that cover it, at any stride."""

_RAISED = 2**23
"""Scores of all classes raised at one time: 32 MiB in float32, which stay in the cache."""


@dataclass(frozen=True)
class Inference:
    """How an image goes through the network when it is scored or predicted; as it is, once, by default.

    Args:
        window: Height and width of the windows that the network sees, multiples of its output stride. They overlap and
            are blended without seams; an image that fits into one is taken whole, as all are where it is not given.
        overlap: What neighbouring windows share, at least, of their height and of their width, in 0..1.
        scales: Sizes of the image, in units of its own, at which it is seen; the probabilities are averaged.
        flip: Whether the mirrored image is seen too, at every scale.
        windows_at_once: Through the network, of one size; more are faster, and take more memory.

    Raises:
        ValueError: Options out of range.
    """

    window: tuple[int, int] | None = None
    overlap: float = 0.5
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    windows_at_once: int = 1

    def __post_init__(self) -> None:
        if self.window is not None:
            if len(self.window) != 2 or min(self.window) < 1:
                raise ValueError(f"a window has a height and a width of at least 1, got {tuple(self.window)}")
            object.__setattr__(self, "window", tuple(int(side) for side in self.window))
        if not 0 <= self.overlap < 1:
            raise ValueError(f"the overlap of windows is in 0..1 and less than 1, got {self.overlap}")
        if not self.scales or not all(math.isfinite(scale) and scale > 0 for scale in self.scales):
            raise ValueError(f"scales are positive, and at least one, got {tuple(self.scales)}")
        object.__setattr__(self, "scales", tuple(float(scale) for scale in self.scales))
        if self.windows_at_once < 1:
            raise ValueError(f"windows_at_once must be at least 1, got {self.windows_at_once}")

    @property
    def summary(self) -> str:
        """In a few words; none where the image is seen as it is, once."""
        parts = [] if self.window is None else [f"in windows of {self.window[0]}×{self.window[1]}"]
        if self.scales != (1.0,):
            parts.append(f"at {'sizes' if len(self.scales) > 1 else 'size'} {', '.join(f'{s:g}' for s in self.scales)}")
        return " and ".join([", ".join(parts)] * bool(parts) + ["flipped"] * self.flip)

    def check(self, grid: int) -> None:
        """Refuse windows that a network cannot take.

        Args:
            grid: Its output stride.

        Raises:
            ValueError: They are no multiples of it.
        """
        if self.window is not None and any(side % grid for side in self.window):
            height, width = (max(1, side // grid) * grid for side in self.window)
            raise ValueError(
                f"windows of {self.window[0]}×{self.window[1]} pixels do not lie on the grid of output stride {grid}; "
                f"give multiples of {grid}, such as {height} {width}"
            )

    def views(self, logits_of: LogitsOf, image: Tensor, *, grid: int) -> tuple[Tensor, ...]:
        """Everything that is seen of an image.

        Args:
            logits_of: The network.
            image: ``(B, C, H, W)``, uint8 or floating in 0..1.
            grid: The network's output stride, on whose multiples windows lie.

        Returns:
            Logits ``(B, K, h, w)`` that cover the image, each in its own size, mirrored ones mirrored back.

        Raises:
            ValueError: Windows that the network cannot take.
        """
        found = []
        for scale in self.scales:
            seen = _rescaled(image, scale)
            for mirrored in (False, True)[: 1 + self.flip]:
                logits = self._logits(logits_of, seen.flip(-1) if mirrored else seen, grid)
                found.append(logits.flip(-1) if mirrored else logits)
        return tuple(found)

    def predict(self, logits_of: LogitsOf, image: Tensor, *, grid: int) -> Tensor:
        """The class of every pixel, int64 ``(B, H, W)``; arguments and errors as of `views`."""
        return winners(self.views(logits_of, image, grid=grid), image.shape[-2:])

    def _logits(self, logits_of: LogitsOf, image: Tensor, grid: int) -> Tensor:
        if self.window is None:
            return logits_of(image)
        self.check(grid)
        return slide(
            logits_of, image, window=self.window, overlap=self.overlap, grid=grid, at_once=self.windows_at_once
        )


WHOLE = Inference()
"""The image as it is, once."""


def slide(
    logits_of: LogitsOf,
    image: Tensor,
    *,
    window: tuple[int, int],
    overlap: float = 0.5,
    grid: int = 32,
    at_once: int = 1,
) -> Tensor:
    """Logits of an image from windows that overlap, on the grid on which those of the whole image would lie.

    Windows begin at multiples of ``grid``. The last one of a row or column is shifted back to the far border, and takes
    along what is left there of a cell: up to ``grid - 1`` pixels. Each is weighted by Hann's window, without a fall
    towards the borders of the image, and the weights of all windows sum to 1 in every place. For a network without
    context the result is that of the whole image.

    Args:
        logits_of: The network; its logits have a cell for every so many pixels, a divisor of ``grid``.
        image: ``(B, C, H, W)``.
        window: Height and width, multiples of ``grid``.
        overlap: What neighbours share at least, in 0..1.
        grid: The network's output stride, or a multiple of it.
        at_once: How many windows are stacked for one call.

    Returns:
        ``(B, K, h, w)``, in float32 or better; as they came where the image fits into one window.

    Raises:
        ValueError: Logits that do not tile.
    """
    rows, columns = (_starts(n, side, overlap, grid) for n, side in zip(image.shape[-2:], window, strict=True))
    if len(rows) == len(columns) == 1:
        return logits_of(image)
    blend: tuple[_Axis, _Axis] | None = None
    merged = image.new_empty(0)
    for places in _batches(rows, columns, at_once):
        ends = [(rows[i + 1 :], columns[j + 1 :]) for i, j in places]
        crops = [
            image[
                ...,
                rows[i] : rows[i] + window[0] if below else None,
                columns[j] : columns[j] + window[1] if beside else None,
            ]
            for (i, j), (below, beside) in zip(places, ends, strict=True)
        ]
        logits = logits_of(torch.cat(crops) if len(crops) > 1 else crops[0])
        if blend is None:  # the first window ends where windows do, and tells the stride of the logits
            dtype = torch.promote_types(logits.dtype, torch.float32)
            blend = tuple(  # type: ignore[assignment]
                _Axis(starts, side, cells, grid, dtype, logits.device)
                for starts, side, cells in zip((rows, columns), window, logits.shape[-2:], strict=True)
            )
            assert blend is not None
            merged = logits.new_zeros(*image.shape[:1], logits.shape[1], blend[0].cells, blend[1].cells, dtype=dtype)
        for (i, j), part in zip(places, logits.split(image.shape[0]), strict=True):
            (top, down), (left, across) = blend[0].share(i, part.shape[-2]), blend[1].share(j, part.shape[-1])
            place = merged[..., top : top + part.shape[-2], left : left + part.shape[-1]]
            place += part * (down[:, None] * across)
    assert blend is not None
    return merged[..., : blend[0].end, : blend[1].end]


def winners(views: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """The class of every pixel by the average of several views: logits ``(B, K, h_i, w_i)`` → int64 ``(B, *size)``.

    Raised to full size, turned into probabilities and averaged, in this order, as do the authors of DeepLab and
    mmsegmentation. One view is taken as it is, by `class_map`.
    """
    if len(views) == 1:
        return class_map(views[0], size)
    height, at_once = size[0], max(1, _RAISED // (views[0].shape[1] * size[1]))
    found = torch.empty(views[0].shape[0], *size, dtype=torch.int64, device=views[0].device)
    for i in range(len(found)):
        image = [view[i : i + 1] for view in views]
        for first in range(0, height, at_once):
            last = min(first + at_once, height)
            found[i, first:last] = average(image, size, first, last)[0].argmax(0)
    return found


def average(views: Sequence[Tensor], size: Sequence[int], first: int = 0, last: int | None = None) -> Tensor:
    """The mean of the probabilities in several views, in some rows of the image.

    Args:
        views: Logits ``(B, K, h_i, w_i)`` that cover the image.
        size: Height and width of the image.
        first: Of the rows.
        last: The one behind them; to the end where not given.

    Returns:
        ``(B, K, last - first, W)`` in 0..1, in float32 or better.
    """
    last = size[0] if last is None else last
    total: Tensor | None = None
    for view in views:
        above, below = rows_behind(first, last, view.shape[-2], size[0])
        behind = view[..., above:below, :].to(torch.promote_types(view.dtype, torch.float32))
        seen = raised_rows(behind, first, last, size, above=above, height=view.shape[-2]).softmax(dim=1)
        total = seen if total is None else total.add_(seen)
    assert total is not None, "no view"
    return total.div_(len(views))


class _Axis:
    """Where the windows of one axis lie among the cells of the logits, and what each counts there."""

    def __init__(
        self, starts: Sequence[int], side: int, cells: int, grid: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if len(starts) == 1:
            self.firsts, self.cells = [0], cells
            shares = torch.ones(1, cells, dtype=torch.float64)
        else:
            stride, rest = divmod(side, cells)
            if rest or grid % stride:
                raise ValueError(
                    f"a window of {side} pixels gives {cells} logits, which do not tile the image in steps of {grid} "
                    f"pixels; give another window"
                )
            self.firsts = [start // stride for start in starts]
            # the last window reaches less than one step of the grid beyond its side
            self.cells = self.firsts[-1] + cells + grid // stride
            at = (
                torch.arange(self.cells, dtype=torch.float64)[None] + 0.5 - torch.tensor(self.firsts)[:, None]
            ) / cells
            weights = torch.sin(math.pi * at).square().where((at > 0) & (at < 1), 0)
            weights[0, : cells // 2] = 1
            weights[-1, self.firsts[-1] + cells // 2 :] = 1
            shares = weights / weights.sum(0)
        self.shares = shares.to(device=device, dtype=dtype)
        self.end = 0
        """Of the cells that windows have filled."""

    def share(self, i: int, cells: int) -> tuple[int, Tensor]:
        """The first cell of window ``i``, and its weights there."""
        first = self.firsts[i]
        if first + cells > self.cells:
            raise ValueError(
                f"the last window gives {cells} logits where at most {self.cells - first} have room; the network's "
                f"logits do not tile: score images whole"
            )
        self.end = max(self.end, first + cells)
        return first, self.shares[i, first : first + cells]


def _starts(length: int, side: int, overlap: float, grid: int) -> list[int]:
    """Where the windows of one axis begin: multiples of the grid."""
    if length <= side:
        return [0]
    last = (length - side) // grid * grid
    step = max(grid, math.floor(side * (1 - overlap) / grid + 1e-6) * grid)
    return sorted({*range(0, last, step), last})


def _batches(rows: Sequence[int], columns: Sequence[int], at_once: int) -> Iterator[list[tuple[int, int]]]:
    """All windows, by row and column, in lists of those that have one size."""
    groups: dict[tuple[bool, bool], list[tuple[int, int]]] = {}
    for i in range(len(rows)):
        for j in range(len(columns)):
            groups.setdefault((i == len(rows) - 1, j == len(columns) - 1), []).append((i, j))
    for places in groups.values():
        for k in range(0, len(places), at_once):
            yield places[k : k + at_once]


def _rescaled(image: Tensor, scale: float) -> Tensor:
    """An image at another size, uint8 as floating in 0..1: its values are not rounded."""
    size = [max(1, round(side * scale)) for side in image.shape[-2:]]
    if size == list(image.shape[-2:]):
        return image
    pixels = image if image.is_floating_point() else image.to(torch.float32) / 255
    return F.resize(pixels, size, antialias=True)
