"""Memory for time: what a block computes within is dropped, and computed again when the gradient comes back to it.

The numbers are those of the plain network: dropout and drop-path draw the same again, and a batch norm counts its batch
once. The known trap is the second: a repeated forward in training mode would move the running statistics twice.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["blocks_of", "recomputing"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The units of which a network is built: the innermost modules in lists that are made of several layers.

    A residual block of a stage, say, or a block of a transformer; not a convolution, and not a norm.
    """
    found: list[nn.Module] = []
    for parent in net.modules():
        if isinstance(parent, CONTAINERS):
            found += [child for child in parent.children() if _is_unit(child)]
    outer = {id(inner) for unit in found for inner in unit.modules() if inner is not unit}
    return [unit for unit in dict.fromkeys(found) if id(unit) not in outer]


def _is_unit(module: nn.Module) -> bool:
    """Several layers, in no list of units itself."""
    return _is_compound(module) and not any(
        _is_compound(child) for inner in module.modules() if isinstance(inner, CONTAINERS) for child in inner.children()
    )


def _is_compound(module: nn.Module) -> bool:
    layers = sum(bool(inner._parameters) for inner in module.modules())
    return layers > 1 and not isinstance(module, CONTAINERS)


@contextlib.contextmanager
def recomputing(blocks: list[nn.Module]) -> Iterator[None]:
    """Within this, the forward of each of these modules keeps what goes in, and nothing of what is in between."""
    before = {block: vars(block).get("forward") for block in blocks}
    for block in blocks:
        block.forward = functools.partial(_repeatable, block, block.forward)
    try:
        yield
    finally:
        for block, forward in before.items():
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _repeatable(block: nn.Module, forward: Any, *inputs: Any, **options: Any) -> Any:
    # a list may be longer by then: dense blocks append to theirs
    inputs = tuple(list(x) if isinstance(x, list) else x for x in inputs)
    versions = [x._version for x in inputs if isinstance(x, Tensor)]
    output = checkpoint(
        forward,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _uncounted(block)),
        **options,
    )
    if versions != [x._version for x in inputs if isinstance(x, Tensor)]:
        raise ValueError(
            f"gradient_checkpointing: {type(block).__name__} changes what it is given, so that it cannot be computed "
            f"again; train this backbone without"
        )
    return output


@contextlib.contextmanager
def _uncounted(block: nn.Module) -> Iterator[None]:
    """Batch norms write their running statistics, and the count of batches, to copies that are then forgotten."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.training]
    before = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        for name, buffer in norm._buffers.items():
            norm._buffers[name] = None if buffer is None else buffer.clone()
    try:
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers.update(buffers)
