"""The optimiser over parameter groups: torch's, timm's, or one's own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import timm.optim
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_atrous.registry import Registry

__all__ = [
    "OPTIMIZERS",
    "SGD_RECIPE",
    "OptimizerFactory",
    "build_optimizer",
    "check_optimizer",
    "check_resumed",
    "options_of",
    "take_options",
]

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
"""An optimiser class, or one with its options already given (`functools.partial`)."""

OPTIMIZERS: Registry[Optimizer] = Registry("optimizer", "lightning_atrous.optimizers")
"""torch's and timm's by their bare names; of two that share one, torch's. timm's goes by its import path then.

Lookahead is none of them: it is made of another optimiser, not of parameters.
"""

for _name, _class in {**vars(timm.optim), **vars(torch.optim)}.items():
    if isinstance(_class, type) and issubclass(_class, Optimizer) and _name not in ("Optimizer", "Lookahead"):
        OPTIMIZERS.register(_name)(_class)

SGD_RECIPE: OptimizerFactory = functools.partial(SGD, lr=0.01, momentum=0.9, weight_decay=5e-4)
"""What the published DeepLabV3+ results on Cityscapes are trained with."""


def check_optimizer(factory: OptimizerFactory) -> None:
    """Try a factory on parameters of no meaning, so that what cannot be is said before anything runs.

    Not every optimiser trains a segmentation network: some take matrices alone, or sparse gradients, or second
    derivatives, or no groups (LBFGS). One step tells.

    Raises:
        ValueError: What the optimiser says of its options or of a step, or that it has modes of its own: it would want
            to be told of every validation.
    """
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.zeros(shape))], "lr_scale": 1.0, "weight_decay": 0.0}
        for shape in ((2, 2, 1, 1), (2,))
    ]
    try:
        optimizer = build_optimizer(factory, groups)
    except AttributeError as error:  # of what takes another optimiser where parameters are expected
        name = getattr(factory, "func", factory).__name__
        raise ValueError(f"model.optimizer: {name} is not built over parameters ({error}); take another") from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"model.optimizer: {error}; correct its options, or take another") from error
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.Rprop):
        raise ValueError(
            "model.optimizer: Rprop takes its steps' sizes from the learning rate once, so that no schedule reaches "
            "it; take another"
        )
    if hasattr(optimizer, "eval"):
        raise ValueError(
            f"model.optimizer: {name} is free of a schedule, and has other weights in validation than in training; "
            f"take the optimiser that it is made from, and the callback EMA"
        )
    for group in groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    try:
        optimizer.step()
    except AssertionError as error:  # options for a device that these parameters are not on, such as `capturable`
        if torch.accelerator.is_available():
            return
        raise ValueError(f"model.optimizer: {error}; leave that option out on the CPU") from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"model.optimizer: {name} makes no step in this training: {error}; take another") from error


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What each group of an optimiser was built with, without what an optimiser keeps there for itself."""
    names = inspect.signature(type(optimizer)).parameters
    return [{key: group[key] for key in group if key in names and key != "params"} for group in optimizer.param_groups]


def take_options(scheduler: LambdaLR, options: Iterable[Mapping[str, Any]]) -> None:
    """Go on with other options than a checkpoint's: its state brings back those that it was saved with.

    Args:
        scheduler: With its optimiser; the rates of both are the peaks afterwards, for `realign`.
        options: As from `options_of` an optimiser of the same groups.
    """
    for group, own in zip(scheduler.optimizer.param_groups, options, strict=True):
        group.update(own, initial_lr=own["lr"])
    scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]


def check_resumed(optimizer: Optimizer, name: str, saved: Iterable[Mapping[str, Any]]) -> None:
    """Refuse to go on with an optimiser in which a checkpoint's state has no place.

    Args:
        optimizer: Of this run.
        name: The checkpoint's optimiser, by import path.
        saved: The groups in its state.

    Raises:
        ValueError: Another class, or other groups.
    """
    ours = type(optimizer).__name__
    if name.rpartition(".")[2] != ours:
        raise ValueError(
            f"the checkpoint's optimiser is {name}, but this run's is {ours}, which cannot go on from its state; give "
            f"the same model.optimizer, or leave it out"
        )
    counts = [{group["name"]: len(group["params"]) for group in groups} for groups in (saved, optimizer.param_groups)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"the checkpoint's optimiser has parameters in the groups {_listed(counts[0])}, but this run's in "
            f"{_listed(counts[1])}, and cannot go on from its state; give the same freeze, freeze_stages, freeze_norm, "
            f"layer_decay and parameter_groups, or leave them out"
        )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


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
        if group["lr"] is None:
            raise ValueError(f"{type(optimizer).__name__} sets its learning rates itself; give it an lr")
        group["lr"] = group["lr"] * group.pop("lr_scale")
    return optimizer
