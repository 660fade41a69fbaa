"""Context modules: what gives every position of the last map a view of the whole image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_atrous.layers import ConvNormAct, ImagePool, SeparableConv

__all__ = ["ASPP", "rates_at_reduction"]


def rates_at_reduction(rates: Sequence[int], rates_at: int, reduction: int) -> tuple[int, ...]:
    """Atrous rates quoted for one output stride, at another: the same reach in image pixels.

    Args:
        rates: As the paper quotes them.
        rates_at: The output stride at which it quotes them.
        reduction: Of the map on which they will run.

    Raises:
        ValueError: A rate that would not be a whole number of at least 1.

    Example:
        >>> rates_at_reduction((6, 12, 18), 16, 8)
        (12, 24, 36)
    """
    effective = []
    for rate in rates:
        scaled, rest = divmod(rate * rates_at, reduction)
        if rest or scaled < 1:
            raise ValueError(
                f"atrous rate {rate}, quoted at output stride {rates_at}, would be {rate * rates_at / reduction:g} on "
                f"a map of stride {reduction}; choose rates that stay whole numbers of at least 1 there"
            )
        effective.append(scaled)
    return tuple(effective)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (DeepLabV3, section 3.3): ``(B, C_in, h, w)`` → ``(B, C_out, h, w)``.

    A 1×1, one 3×3 per rate and image pooling, side by side with batch norm, concatenated, projected by a 1×1.

    Args:
        in_channels: ``C_in``.
        out_channels: ``C_out``, also the width of each branch.
        rates: Effective rates on this very map, any number of them.
        separable: Atrous separable convolutions in the branches (DeepLabV3+).
        image_pool: Whether the image-level branch is there.
        dropout: After the projection.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        *,
        rates: Sequence[int] = (6, 12, 18),
        separable: bool = False,
        image_pool: bool = True,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        branch = SeparableConv if separable else ConvNormAct
        self.pointwise = ConvNormAct(in_channels, out_channels)
        self.atrous = nn.ModuleList(branch(in_channels, out_channels, 3, dilation=rate) for rate in rates)
        self.pool = ImagePool(in_channels, out_channels) if image_pool else None
        branches = 1 + len(self.atrous) + int(image_pool)
        self.project = ConvNormAct(branches * out_channels, out_channels)
        self.dropout = nn.Dropout(dropout)

    @property
    def rates(self) -> tuple[int, ...]:
        """The effective rates, settable: the weights stay, the taps move."""
        return tuple(branch.rate for branch in self._branches())

    @rates.setter
    def rates(self, rates: Sequence[int]) -> None:
        for branch, rate in zip(self._branches(), rates, strict=True):
            branch.rate = rate

    def _branches(self) -> list[ConvNormAct | SeparableConv]:
        return [branch for branch in self.atrous if isinstance(branch, (ConvNormAct, SeparableConv))]

    def forward(self, x: Tensor) -> Tensor:
        """All branches at one position see the same centre at different reaches."""
        views = [self.pointwise(x), *(branch(x) for branch in self.atrous)]
        if self.pool is not None:
            views.append(self.pool(x))
        return self.dropout(self.project(torch.cat(views, dim=1)))
