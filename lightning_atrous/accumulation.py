"""Gradient accumulation that equals one large batch, whatever share of each small one is valid.

Lightning divides every batch's loss by their number, as if each counted the same. A loss that is a mean over valid
pixels then weighs the pixels of an emptier batch more than those of a full one; and the last steps of an epoch, which
accumulate fewer batches, come out too small. Here each batch is weighed by what its mean was divided by, and the sum
is set right before the step: ``Σ n_i ∇L_i / Σ n_i``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Accumulation"]


class Accumulation:
    """The batches since the last step of the optimiser."""

    def __init__(self) -> None:
        self._unit = 1
        self._factors: list[Tensor] = []

    def weigh(self, loss: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """The loss to take gradients of.

        Args:
            loss: Scalar, of this batch.
            target: ``(B, H, W)``; its size sets the scale, so that what is returned is about as large as the loss.
            weight: How much the batch counts; None where every one counts the same.
        """
        if not self._factors:
            self._unit = target.numel()
        factor = torch.ones_like(loss.detach()) if weight is None else (weight / self._unit).to(loss.dtype)
        self._factors.append(factor)
        return loss * factor

    @torch.no_grad()
    def settle(self, parameters: Iterable[torch.nn.Parameter], divided_by: int) -> None:
        """Turn the accumulated gradients into those of one batch, in place, and begin anew.

        Args:
            parameters: With the gradients of all losses that `weigh` has returned.
            divided_by: What whoever ran the backward passes has divided each loss by.
        """
        total = torch.stack(self._factors).sum()
        self._factors = []
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        # where nothing counted the gradients are zero, and stay so
        torch._foreach_mul_(gradients, torch.where(total > 0, divided_by / total, 1.0))
