"""The few layers that heads are made of, and the only `resize` in the package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_atrous.types import Preprocess

__all__ = [
    "ConvNormAct",
    "ImagePool",
    "Normalize",
    "SeparableConv",
    "SingleValueNorm",
    "enlarge",
    "raised_rows",
    "resize",
    "rows_behind",
]


def resize(x: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Bilinear: ``(B, C, h, w)`` → ``(B, C, *size)``.

    Args:
        x: The map.
        size: Height and width that are wanted.
        align_corners: Puts the centres of the corner pixels upon each other, as other packages do; else the areas of
            the maps, which holds the content in place at every stride.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def rows_behind(first: int, last: int, height: int, raised: int) -> tuple[int, int]:
    """Of which rows of a map some rows of the raised one are made: the first, and the one behind the last.

    Args:
        first: Of the raised rows.
        last: The one behind them.
        height: Of the map.
        raised: Of the raised one.
    """
    at = _centres(first, last, height, raised)
    return int(at[0]), min(int(at[-1]) + 2, height)


def raised_rows(
    x: Tensor, first: int, last: int, size: Sequence[int], *, above: int = 0, height: int | None = None
) -> Tensor:
    """Some rows of a raised map without the others: ``resize(x, size)[..., first:last, :]``.

    Along the width first, where there are few rows yet, and then along the height.

    Args:
        x: ``(B, C, h, w)``: the map, or those of its rows that `rows_behind` names.
        first: Of the rows that are wanted.
        last: The one behind them.
        size: Height and width of the whole raised map.
        above: How many rows of the map are not in ``x``, for they stand above it.
        height: Of the whole map; that of ``x`` where not given.
    """
    height = height or x.shape[-2]
    if x.shape[-1] == size[1]:
        wide = x
    elif torch.are_deterministic_algorithms_enabled():  # of which torch has none on a GPU but in two dimensions
        wide = resize(x, (x.shape[-2], size[1]))
    else:  # each row of each channel a signal of its own: twice as fast
        wide = F.interpolate(x.flatten(0, 1), size=size[1], mode="linear", align_corners=False)
        wide = wide.unflatten(0, x.shape[:2])
    if height == size[0]:
        return wide[..., first - above : last - above, :]
    at = _centres(first, last, height, size[0])
    upper = at.long() - above
    lower = (upper + 1).clamp_(max=x.shape[-2] - 1)
    share = at.frac().to(x.dtype)[:, None]
    upper, lower, share = (index.to(x.device) for index in (upper, lower, share))
    return wide.index_select(2, upper).lerp(wide.index_select(2, lower), share)


def _centres(first: int, last: int, height: int, raised: int) -> Tensor:
    """Where the centres of raised rows lie among those of the map; on the CPU, in float64."""
    rows = torch.arange(first, last, dtype=torch.float64)
    return ((rows + 0.5) * (height / raised) - 0.5).clamp_(0, height - 1)


def enlarge(logits: Tensor, times: int) -> Tensor:
    """Logits raised by a whole factor with corners aligned, as some packages' models end: their weights want it so.

    ``(B, K, h, w)`` → ``(B, K, times·h, times·w)``.
    """
    height, width = logits.shape[-2:]
    return resize(logits, (times * height, times * width), align_corners=True)


class Normalize(nn.Module):
    """Image ``(B, C, H, W)`` as people store it → the backbone's input.

    Args:
        preprocess: Mean and deviation per channel.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.preprocess = preprocess
        mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
        # not persistent: they are in the checkpoint's own description, and weights stay the network's alone
        self.register_buffer("scale", (1 / std).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Normalise.

        Args:
            image: ``(B, C, H, W)``, uint8 in 0..255 or floating in 0..1.

        Raises:
            ValueError: Another number of dimensions or channels, or another integer type.
        """
        if image.ndim != 4 or image.shape[1] != self.preprocess.channels:
            raise ValueError(
                f"expected images of shape (B, {self.preprocess.channels}, H, W), got {tuple(image.shape)}"
            )
        if image.dtype == torch.uint8:
            # in the memory that the conversion took: new memory costs more than the arithmetic
            return image.to(self.scale.dtype).mul_(self.scale / 255).add_(self.shift)
        if not image.is_floating_point():
            raise ValueError(f"expected a uint8 image in 0..255 or a floating one in 0..1, got {image.dtype}")
        return torch.addcmul(self.shift, image.to(self.scale.dtype), self.scale)


class ConvNormAct(nn.Sequential):
    """Convolution, batch norm, ReLU: ``(B, C_in, h, w)`` → ``(B, C_out, h, w)``, same size at any rate.

    Args:
        in_channels: ``C_in``.
        out_channels: ``C_out``.
        kernel_size: Odd.
        dilation: The atrous rate.
        groups: Of the convolution.
        norm: Whether batch norm follows the convolution.
        act: Whether a ReLU ends it.
        bias: Of the convolution; where not given it has one if no norm follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        norm: bool = True,
        act: bool = True,
        bias: bool | None = None,
    ) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(
                in_channels,
                out_channels,
                kernel_size,
                padding=dilation * (kernel_size // 2),
                dilation=dilation,
                groups=groups,
                bias=not norm if bias is None else bias,
            )
        ]
        if norm:
            layers.append(nn.BatchNorm2d(out_channels))
        if act:
            layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)

    @property
    def rate(self) -> int:
        """The atrous rate, settable: the weights stay, the taps move."""
        conv = self[0]
        assert isinstance(conv, nn.Conv2d)
        return int(conv.dilation[0])

    @rate.setter
    def rate(self, rate: int) -> None:
        conv = self[0]
        assert isinstance(conv, nn.Conv2d)
        conv.dilation = (rate, rate)
        conv.padding = (rate * (conv.kernel_size[0] // 2), rate * (conv.kernel_size[1] // 2))


class SeparableConv(nn.Sequential):
    """Atrous separable convolution (DeepLabV3+, section 3.1): depthwise at a rate, then 1×1.

    ``(B, C_in, h, w)`` → ``(B, C_out, h, w)``, each part followed by batch norm and ReLU, as in the paper's code.

    Args:
        in_channels: ``C_in``.
        out_channels: ``C_out``.
        kernel_size: Of the depthwise part, odd.
        dilation: The atrous rate, carried by the depthwise part.
        norm: Batch norm; the convolutions have biases without it.
        inner_norm: Whether norm and ReLU stand between the two parts also, and not behind the second alone.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        dilation: int = 1,
        norm: bool = True,
        inner_norm: bool = True,
    ) -> None:
        super().__init__(
            ConvNormAct(
                in_channels,
                in_channels,
                kernel_size,
                dilation=dilation,
                groups=in_channels,
                norm=norm and inner_norm,
                act=inner_norm,
                bias=inner_norm and not norm,
            ),
            ConvNormAct(in_channels, out_channels, norm=norm),
        )

    @property
    def rate(self) -> int:
        """The atrous rate, settable."""
        depthwise = self[0]
        assert isinstance(depthwise, ConvNormAct)
        return depthwise.rate

    @rate.setter
    def rate(self, rate: int) -> None:
        depthwise = self[0]
        assert isinstance(depthwise, ConvNormAct)
        depthwise.rate = rate


class ImagePool(nn.Module):
    """What is in the image, or in each part of it (ParseNet; PSPNet): mean over the map, 1×1, spread out again.

    ``(B, C_in, h, w)`` → ``(B, C_out, h, w)``. With one image in a training batch the pooled map has a single
    value per channel: see `SingleValueNorm`.

    Args:
        in_channels: ``C_in``.
        out_channels: ``C_out``.
        norm: Batch norm after the 1×1, which has a bias without it.
        bins: Into how many parts each axis is divided.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm: bool = True, bins: int = 1) -> None:
        super().__init__()
        self.bins = bins
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=not norm)
        self.norm = SingleValueNorm(out_channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Pool, project, spread."""
        mean = x.mean(dim=(2, 3), keepdim=True) if self.bins == 1 else F.adaptive_avg_pool2d(x, self.bins)
        pooled = F.relu(self.norm(self.conv(mean)))
        return pooled.expand(-1, -1, *x.shape[-2:]) if self.bins == 1 else resize(pooled, x.shape[-2:])


class SingleValueNorm(nn.BatchNorm2d):
    """Batch norm behind a pooling that may leave one value per channel, of which no batch statistics exist.

    With one image in a training batch it uses its running statistics. (Over several processes, `nn.SyncBatchNorm` takes
    its place, and there always are several values.)
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C, h, w)`` → the same."""
        if not self.training or input.numel() > input.shape[1]:
            return super().forward(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )
