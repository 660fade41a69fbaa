"""The sub-grids of a map: taken apart, and put together again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["join", "shifted", "split"]


def split(x: Tensor, phases: int) -> Tensor:
    """``(B, C, h, w)`` → its sub-grids ``(r·r·B, C, ⌈h/r⌉, ⌈w/r⌉)``, that of the first pixel first."""
    return shifted(x, step=phases, shift=1, count=phases)


def shifted(x: Tensor, *, step: int, shift: int, count: int) -> Tensor:
    """Every ``step``-th pixel, counted from the first, the ``shift``-th after it, and so on, ``count`` in each axis.

    ``(B, C, h, w)`` → ``(count·count·B, C, ⌈h/step⌉, ⌈w/step⌉)``; where the map has ended stand zeros.
    """
    if step == count == 1:
        return x
    rows, columns = (-(-n // step) for n in x.shape[-2:])
    last = (count - 1) * shift + 1
    right, below = ((n - 1) * step + last - m for n, m in zip((columns, rows), x.shape[:-3:-1], strict=True))
    x = F.pad(x, (0, max(right, 0), 0, max(below, 0)))
    starts = [shift * i for i in range(count)]
    ends = [(rows - 1) * step + 1, (columns - 1) * step + 1]
    return torch.cat([x[..., i : i + ends[0] : step, j : j + ends[1] : step] for i in starts for j in starts])


def join(x: Tensor, phases: int) -> Tensor:
    """The inverse of `split`: ``(r·r·B, C, h, w)`` → ``(B, C, r·h, r·w)``, in the same memory format."""
    if phases == 1:
        return x
    contiguous = x.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if contiguous else torch.contiguous_format
    grids = x.unflatten(0, (phases, phases, -1)).permute(2, 3, 4, 0, 5, 1)  # B C h r w r
    return grids.flatten(4).flatten(2, 3).contiguous(memory_format=layout)
