"""Context modules: what gives every position of the last map a view of the whole image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_atrous.layers import ConvNormAct, ImagePool, SeparableConv

__all__ = [
    "ASPP",
    "DenseASPP",
    "FieldOfView",
    "Merge",
    "PyramidPooling",
    "ReceptiveFieldBlock",
    "rates_at_reduction",
]

Merge = Literal["concat", "sum"]


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
    if rates_at < 1:
        raise ValueError(f"rates_at is the output stride for which rates are given, at least 1; got {rates_at}")
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

    A 1×1, one 3×3 per rate and image pooling, side by side; concatenated and projected, or summed.

    Args:
        in_channels: ``C_in``.
        out_channels: ``C_out``, also the width of each branch.
        rates: Effective rates on this very map, any number of them.
        merge: ``concat`` the branches and project them by a convolution, as in DeepLabV3; or ``sum`` them as they
            are, as in DeepLabV2.
        norm: Batch norm in every branch and in the projection.
        separable: Atrous separable convolutions in the branches (DeepLabV3+).
        inner_norm: Norm and ReLU also between the two parts of a separable convolution.
        pointwise: Whether the 1×1 branch is there.
        image_pool: Whether the image-level branch is there.
        project_kernel: Of the projection: 1 in the paper, 3 in mmsegmentation.
        dropout: At the end.

    Raises:
        ValueError: No branch at all.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        *,
        rates: Sequence[int] = (6, 12, 18),
        merge: Merge = "concat",
        norm: bool = True,
        separable: bool = False,
        inner_norm: bool = True,
        pointwise: bool = True,
        image_pool: bool = True,
        project_kernel: int = 1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.pointwise = ConvNormAct(in_channels, out_channels, norm=norm) if pointwise else None
        self.atrous = nn.ModuleList(
            SeparableConv(in_channels, out_channels, dilation=rate, norm=norm, inner_norm=inner_norm)
            if separable
            else ConvNormAct(in_channels, out_channels, 3, dilation=rate, norm=norm)
            for rate in rates
        )
        self.pool = ImagePool(in_channels, out_channels, norm=norm) if image_pool else None
        branches = int(pointwise) + len(self.atrous) + int(image_pool)
        if not branches:
            raise ValueError("this pyramid has no branch; give rates, or keep pointwise or image_pool")
        self.project = None
        if merge == "concat":
            self.project = ConvNormAct(branches * out_channels, out_channels, project_kernel, norm=norm)
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
        views = [branch(x) for branch in (self.pointwise, *self.atrous, self.pool) if branch is not None]
        merged = sum(views[1:], start=views[0]) if self.project is None else self.project(torch.cat(views, dim=1))
        return self.dropout(merged)


class FieldOfView(nn.Sequential):
    """The classifier of VGG made convolutional, with a large field of view (DeepLab v1 and v2).

    A 3×3 at a rate, a 1×1, scores: ``(B, C_in, h, w)`` → ``(B, K, h, w)``, with ReLU and dropout between them and no
    norm.

    Args:
        in_channels: ``C_in``.
        channels: Width of the first two; with none the 3×3 scores at once, as on ResNet-101 in v2.
        num_classes: ``K``.
        rate: Effective, on this very map.
        dropout: Behind each of the first two.
    """

    def __init__(self, in_channels: int, channels: int | None, num_classes: int, *, rate: int, dropout: float) -> None:
        if channels is None:
            super().__init__(ConvNormAct(in_channels, num_classes, 3, dilation=rate, norm=False, act=False))
            return
        super().__init__(
            ConvNormAct(in_channels, channels, 3, dilation=rate, norm=False),
            nn.Dropout(dropout),
            ConvNormAct(channels, channels, norm=False),
            nn.Dropout(dropout),
            ConvNormAct(channels, num_classes, norm=False, act=False),
        )

    @property
    def rate(self) -> int:
        """The effective rate, settable."""
        return self._wide().rate

    @rate.setter
    def rate(self, rate: int) -> None:
        self._wide().rate = rate

    def _wide(self) -> ConvNormAct:
        first = self[0]
        assert isinstance(first, ConvNormAct)
        return first


class DenseASPP(nn.Module):
    """Densely connected atrous layers (DenseASPP, section 3.2): ``(B, C_in, h, w)`` → the same with more channels.

    Each layer, a 1×1 that narrows and a 3×3 at a rate, reads the map and all that the layers before it gave; the
    output is all of these together, `out_channels` wide.

    Args:
        in_channels: ``C_in``.
        channels: What each layer adds.
        bottleneck: Width of the 1×1.
        rates: Effective rates on this very map, ascending in the paper.
        dropout: Behind each layer.
    """

    def __init__(
        self, in_channels: int, channels: int, bottleneck: int, *, rates: Sequence[int], dropout: float
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                ConvNormAct(in_channels + i * channels, bottleneck),
                ConvNormAct(bottleneck, channels, 3, dilation=rate),
                nn.Dropout(dropout),
            )
            for i, rate in enumerate(rates)
        )
        self.out_channels = in_channels + len(rates) * channels

    @property
    def rates(self) -> tuple[int, ...]:
        """The effective rates, settable."""
        return tuple(conv.rate for conv in self._atrous())

    @rates.setter
    def rates(self, rates: Sequence[int]) -> None:
        for conv, rate in zip(self._atrous(), rates, strict=True):
            conv.rate = rate

    def _atrous(self) -> list[ConvNormAct]:
        return [layer[1] for layer in self.layers]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        """Layer upon layer."""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class PyramidPooling(nn.Module):
    """The means of an image's parts at several scales, beside the map itself (PSPNet, section 3.2).

    ``(B, C_in, h, w)`` → ``(B, C_in + len(bins) · C_branch, h, w)``.

    Args:
        in_channels: ``C_in``.
        branch_channels: ``C_branch``, to which a 1×1 brings each scale.
        bins: Parts along each axis, one number a scale.
    """

    def __init__(self, in_channels: int, branch_channels: int, *, bins: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ImagePool(in_channels, branch_channels, bins=n) for n in bins)
        self.out_channels = in_channels + len(bins) * branch_channels

    def forward(self, x: Tensor) -> Tensor:
        """The map, then each scale."""
        return torch.cat([x, *(branch(x) for branch in self.branches)], dim=1)


class ReceptiveFieldBlock(nn.Module):
    """Kernels of 1, 3 and 5, each followed by a 3×3 of that rate (RFBNet, section 3.2): as eccentricity in the retina.

    ``(B, C_in, h, w)`` → ``(B, C_out, h, w)``. The 5×5 is two 3×3, as in the paper; the branches are concatenated,
    brought together by a 1×1, scaled, and added to a shortcut.

    Args:
        in_channels: ``C_in``.
        out_channels: ``C_out``.
        branch_channels: Width of each branch.
        unit: The rate of a kernel without holes on this very map: the paper's rates are 1, 3, 5 times it.
        scale: Of the branches beside the shortcut.
    """

    def __init__(
        self, in_channels: int, out_channels: int, branch_channels: int, *, unit: int = 1, scale: float = 0.1
    ) -> None:
        super().__init__()
        c = branch_channels
        self.branches = nn.ModuleList(
            nn.Sequential(
                ConvNormAct(in_channels, c),
                *(ConvNormAct(c, c, 3) for _ in range(kernels)),
                ConvNormAct(c, c, 3, act=False),
            )
            for kernels in range(3)
        )
        self.project = ConvNormAct(3 * c, out_channels, act=False)
        self.shortcut = ConvNormAct(in_channels, out_channels, act=False)
        self.scale = scale
        self.unit = unit

    @property
    def unit(self) -> int:
        """Settable: the weights stay, the taps move."""
        return self._unit

    @unit.setter
    def unit(self, unit: int) -> None:
        self._unit = unit
        for rate, branch in zip((1, 3, 5), self.branches, strict=True):
            *kernels, last = (conv for conv in branch if conv[0].kernel_size == (3, 3))  # type: ignore[attr-defined]
            for conv in kernels:
                conv.rate = unit
            last.rate = rate * unit

    def forward(self, x: Tensor) -> Tensor:
        """Branches beside a shortcut."""
        seen = self.project(torch.cat([branch(x) for branch in self.branches], dim=1))
        return F.relu(self.shortcut(x) + self.scale * seen)
