"""The short way: a network, and the output stride that it should have."""

from __future__ import annotations

from typing import Literal

from torch import nn

from lightning_atrous.dilation.network import Dilation, Method
from lightning_atrous.dilation.ops import DilationError

__all__ = ["set_output_stride"]


def set_output_stride(
    module: nn.Module, output_stride: int, *, method: Literal["auto"] | Method = "auto", in_channels: int = 3
) -> Dilation:
    """Give a strided network another output stride, in place: a `Dilation`, and its ``output_stride`` set.

    A network that has a `Dilation` already keeps it.

    Returns:
        What sets it again: ``dilation.output_stride = 32``.

    Raises:
        ValueError: No power of two up to the network's own output stride; another method than it was given before.
        DilationError: The network can't have it exactly. It says which strides it can have.
    """
    dilation = Dilation.of(module, method) or Dilation(module, method=method, in_channels=in_channels)
    try:
        dilation.output_stride = output_stride
    except DilationError as error:
        strides = ", ".join(map(str, dilation.supported())) or "none"
        raise DilationError(f"{error}. Strides it supports: {strides}") from error.__cause__
    return dilation
