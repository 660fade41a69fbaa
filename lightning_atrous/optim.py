"""Who learns how fast: parameter groups, the optimiser over them, and the poly schedule with a warm-up."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = [
    "POLY",
    "SGD_RECIPE",
    "OptimizerFactory",
    "Poly",
    "build_optimizer",
    "check_optimizer",
    "parameter_groups",
    "realign",
]

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
"""An optimiser class, or one with its options already given (`functools.partial`)."""

SGD_RECIPE: OptimizerFactory = functools.partial(SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
"""What the published DeepLabV3+ results on Cityscapes are trained with."""


def parameter_groups(
    model: nn.Module,
    backbone: nn.Module,
    *,
    backbone_lr_factor: float = 1.0,
    decay_norm_and_bias: bool = False,
) -> list[dict[str, Any]]:
    """Split the trainable parameters by learning rate and by weight decay, each into exactly one group.

    Groups are named ``backbone`` and ``head`` (all that is not the backbone). Those ending in ``_no_decay``
    have a ``weight_decay`` of 0 and hold biases, parameters of norms, and all others of fewer than two
    dimensions, such as layer scales. The rest have none of their own, so the optimiser's holds. Empty groups
    are left out.

    Args:
        model: All that is trained. Frozen parameters are left out, shared ones count once.
        backbone: A part of it.
        backbone_lr_factor: ``lr_scale`` of the backbone's groups, positive; 0.1 is usual for fine-tuning.
        decay_norm_and_bias: Decay those as well, as an optimiser over ``model.parameters()`` does.

    Returns:
        Groups with ``name``, ``params``, ``lr_scale`` and perhaps ``weight_decay``, for `build_optimizer`.

    Raises:
        ValueError: A backbone from elsewhere, a factor that is not positive, or nothing to train.

    Example:
        >>> from torch import nn
        >>> from lightning_atrous.optim import parameter_groups
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1, bias=False))
        >>> for group in parameter_groups(model, model[0], backbone_lr_factor=0.1):
        ...     print(group["name"], group["lr_scale"], group.get("weight_decay"), len(group["params"]))
        backbone 0.1 None 1
        backbone_no_decay 0.1 0.0 1
        head 1.0 None 1
    """
    if not math.isfinite(backbone_lr_factor) or backbone_lr_factor <= 0:
        raise ValueError(
            f"backbone_lr_factor must be positive, got {backbone_lr_factor}; "
            "to freeze the backbone use backbone.requires_grad_(False)"
        )
    if all(module is not backbone for module in model.modules()):
        raise ValueError(f"{type(backbone).__name__}, given as the backbone, is no part of {type(model).__name__}")
    in_backbone = {id(parameter) for parameter in backbone.parameters()}
    undecayed = set() if decay_norm_and_bias else _norms_and_biases(model)
    groups: dict[str, dict[str, Any]] = {}
    for part, lr_scale in (("backbone", backbone_lr_factor), ("head", 1.0)):
        groups[part] = {"name": part, "params": [], "lr_scale": lr_scale}
        groups[f"{part}_no_decay"] = {
            "name": f"{part}_no_decay",
            "params": [],
            "lr_scale": lr_scale,
            "weight_decay": 0.0,
        }
    for parameter in model.parameters():
        if parameter.requires_grad:
            part = "backbone" if id(parameter) in in_backbone else "head"
            groups[f"{part}_no_decay" if id(parameter) in undecayed else part]["params"].append(parameter)
    filled = [group for group in groups.values() if group["params"]]
    if not filled:
        raise ValueError(f"no parameter of {type(model).__name__} is trainable; unfreeze some")
    return filled


def _norms_and_biases(model: nn.Module) -> set[int]:
    """The ids of the parameters that are usually not decayed."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        # a norm's parameters have one dimension, but for these two when they span several
        if parameter.ndim < 2 or name == "bias" or isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    }


def check_optimizer(factory: OptimizerFactory) -> None:
    """Try a factory on a parameter of no meaning, so that options out of range are said before anything runs.

    Raises:
        ValueError: What the optimiser says of its options.
    """
    try:
        factory([nn.Parameter(torch.zeros(2, 2))])
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.optimizer: {error}; correct its options") from error


def build_optimizer(factory: OptimizerFactory, groups: Iterable[dict[str, Any]]) -> Optimizer:
    """An optimiser in which every group's learning rate is the factory's times the group's ``lr_scale``.

    Args:
        factory: Everything about the optimiser but the parameters, such as ``partial(SGD, lr=0.01)``.
        groups: From `parameter_groups`; they stay as they are, and ``lr_scale`` is not kept in the optimiser.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from torch.optim import SGD
        >>> from lightning_atrous.optim import build_optimizer, parameter_groups
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> groups = parameter_groups(model, model[0], backbone_lr_factor=0.5)
        >>> [group["lr"] for group in build_optimizer(partial(SGD, lr=0.01), groups).param_groups]
        [0.005, 0.01]
    """
    # copies: an optimiser writes its defaults into the dicts that it is given
    optimizer = factory([dict(group) for group in groups])
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * group.pop("lr_scale")
    return optimizer


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
