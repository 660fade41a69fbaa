"""The learning rate's course: poly, with a warm-up and a floor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["POLY", "Poly", "realign"]


@dataclass(frozen=True, kw_only=True)
class Poly:
    """The poly schedule (Chen et al., "DeepLab", 2018, section 4.1.2) with a warm-up and a floor.

    A straight line from ``warmup_factor`` to 1 over the warm-up, then ``floor + (1 - floor) · (1 - t)^power``
    while ``t`` goes from 0 to 1 over what is left of the run, and ``floor`` ever after. A run that ends
    within the warm-up is cut off there. Each group's learning rate is multiplied by this, once per optimiser
    step.

    Args:
        power: Of the decay, positive.
        warmup_steps: Optimiser steps until the peak; 0 starts there.
        warmup_factor: The fraction of the peak at which the warm-up starts, in 0..1.
        floor: The fraction of the peak at which the run ends, in 0..1. Not a learning rate, so that groups
            keep their ratio to the last step: for a least rate of 1e-4 under a peak of 0.01 write 0.01.

    Raises:
        ValueError: A number out of range.

    Example:
        >>> import torch
        >>> from lightning_atrous.optim import Poly
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> scheduler = Poly(power=1.0, warmup_steps=2, warmup_factor=0.5).scheduler(optimizer, total_steps=4)
        >>> rates = []
        >>> for _ in range(5):
        ...     rates += scheduler.get_last_lr()
        ...     optimizer.step()
        ...     scheduler.step()
        >>> [round(rate, 3) for rate in rates]
        [0.05, 0.075, 0.1, 0.05, 0.0]
    """

    power: float = 0.9
    warmup_steps: int = 0
    warmup_factor: float = 0.1
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise ValueError(f"power must be positive, got {self.power}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        if not 0 <= self.warmup_factor <= 1:
            raise ValueError(f"warmup_factor is a fraction of the peak, in 0..1, got {self.warmup_factor}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor is a fraction of the peak, in 0..1, got {self.floor}")

    def factor(self, step: int, total_steps: float) -> float:
        """The learning rate of a step, as a fraction of the peak.

        Args:
            step: Optimiser steps done before it.
            total_steps: Of the run, its warm-up included; finite, at least 1.

        Raises:
            ValueError: A run without an end, or without a step.
        """
        if not 1 <= total_steps < math.inf:
            raise ValueError(f"poly needs a finite number of steps, at least 1, got {total_steps}")
        if step >= total_steps:
            return self.floor
        if step < self.warmup_steps:
            return self.warmup_factor + (1 - self.warmup_factor) * step / self.warmup_steps
        left = (total_steps - step) / (total_steps - self.warmup_steps)
        return self.floor + (1 - self.floor) * left**self.power

    def scheduler(self, optimizer: Optimizer, total_steps: float) -> LambdaLR:
        """For an optimiser whose learning rates are the peaks.

        The length of the run is not part of the scheduler's state: a longer run that takes the state over
        follows the longer curve from there.

        Raises:
            ValueError: As `factor`.
        """
        # a function: LambdaLR would save the attributes of any other callable
        return LambdaLR(optimizer, lambda step: self.factor(step, total_steps))


def realign(scheduler: LambdaLR) -> None:
    """Set the learning rates to what the schedule says of the step it stands at.

    A run that is resumed with another length has those of the old curve for its first step otherwise.
    """
    for group, peak, factor in zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    ):
        group["lr"] = peak * factor(scheduler.last_epoch)


POLY = Poly()
"""The plain schedule: power 0.9, no warm-up, down to 0."""
