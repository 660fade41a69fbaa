"""The sub-grids of a map: taken apart into the batch, and put together again.

Taken apart by ``k``, a map becomes ``k·k`` maps of every ``k``-th pixel, which stand before the batch: first that of
the first pixel. Powers of two are taken apart by two at a time, so that apart by 2 and by 2 again is apart by 4, and
the grids of a coarser network come first among those of a finer one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["join", "shifted", "split"]


def split(x: Tensor, k: int) -> Tensor:
    """``(B, C, h, w)`` → ``(k·k·B, C, ⌈h/k⌉, ⌈w/k⌉)``, in the same memory format; zeros where the map has ended."""
    if k == 1:
        return x
    below, right = (-n % k for n in x.shape[-2:])
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    digits = _digits(k)
    n = len(digits)
    # B C h (i…) w (j…), the most significant digit first
    x = x.unflatten(3, (-1, *digits)).unflatten(2, (-1, *digits))
    phases = [axis for i in range(n) for axis in (3 + i, 4 + n + i)]
    batch, channels, rows, columns = 0, 1, 2, 3 + n
    if _is_channels_last(x):
        apart = x.permute(*phases, batch, rows, columns, channels).flatten(0, 2 * n)
        return apart.permute(0, 3, 1, 2)
    return x.permute(*phases, batch, channels, rows, columns).flatten(0, 2 * n)


def join(x: Tensor, k: int) -> Tensor:
    """The inverse of `split`: ``(k·k·B, C, h, w)`` → ``(B, C, k·h, k·w)``, in the same memory format."""
    if k == 1:
        return x
    digits = _digits(k)
    n = len(digits)
    last = _is_channels_last(x)
    grids = x.unflatten(0, (*(digit for digit in digits for _ in "ij"), -1))  # i j i j … B C h w
    batch, channels, rows, columns = range(2 * n, 2 * n + 4)
    i, j = range(0, 2 * n, 2), range(1, 2 * n, 2)
    if last:
        whole = grids.permute(batch, rows, *i, columns, *j, channels).flatten(2 + n, 2 + 2 * n).flatten(1, 1 + n)
        return whole.permute(0, 3, 1, 2)
    return grids.permute(batch, channels, rows, *i, columns, *j).flatten(3 + n, 3 + 2 * n).flatten(2, 2 + n)


def shifted(x: Tensor, *, shift: int, k: int) -> Tensor:
    """The map as it is, shifted by ``shift`` pixels, and so on, ``k`` times in each axis, in the order of `split`.

    ``(B, C, h, w)`` → ``(k·k·B, C, h, w)``; where the map has ended stand zeros.
    """
    if k == 1:
        return x
    height, width = x.shape[-2:]
    last = _is_channels_last(x)
    x = F.pad(x, (0, (k - 1) * shift, 0, (k - 1) * shift))
    digits = _digits(k)
    n = len(digits)
    # B C (i…) (j…) h w
    x = x.unfold(2, height, shift).unfold(3, width, shift).unflatten(3, digits).unflatten(2, digits)
    phases = [axis for i in range(n) for axis in (2 + i, 2 + n + i)]
    rows, columns = 2 + 2 * n, 3 + 2 * n
    if last:
        return x.permute(*phases, 0, rows, columns, 1).flatten(0, 2 * n).permute(0, 3, 1, 2)
    return x.permute(*phases, 0, 1, rows, columns).flatten(0, 2 * n)


def _digits(k: int) -> tuple[int, ...]:
    """The bases of the digits in which an index below ``k`` is written, the most significant first."""
    return (k,) if k & (k - 1) else (2,) * (k.bit_length() - 1)


def _is_channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1
