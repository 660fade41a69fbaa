"""What is not trained: parameters without gradients, and the modules that stay in eval mode for it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.optim.patterns import matching

__all__ = ["Freezing", "feeding"]

SIDE = 256
"""Of an image that is large enough for every network."""


@dataclass(frozen=True, kw_only=True)
class Freezing:
    """Which parts of a model keep their weights.

    Args:
        freeze: Shell patterns over the names of the model's parameters; the name of a module means all that is in it.
        freeze_stages: How many of the backbone's maps, the finest first, keep all that they are computed with.
        freeze_norm: Whether the batch norms of the backbone keep their statistics and their weights.

    Raises:
        ValueError: A negative number of stages.
    """

    freeze: tuple[str, ...] = ()
    freeze_stages: int = 0
    freeze_norm: bool = False

    def __post_init__(self) -> None:
        if self.freeze_stages < 0:
            raise ValueError(f"freeze_stages must not be negative, got {self.freeze_stages}")
        if isinstance(self.freeze, str):
            raise ValueError(f"freeze must be a list of patterns, got '{self.freeze}'; write ['{self.freeze}']")
        object.__setattr__(self, "freeze", tuple(self.freeze))

    def __call__(self, model: nn.Module, backbone: TimmBackbone) -> tuple[str, ...]:
        """Take the gradients from the parameters.

        Args:
            model: All that could be trained.
            backbone: A part of it.

        Returns:
            The names of the modules that belong in eval mode while the rest is trained: those that hold parameters, all
            of them frozen. Their batch norms then keep their statistics, and nothing in them is random.

        Raises:
            ValueError: A pattern that nothing is like, more stages than the backbone has, or no batch norm in it.
        """
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        frozen = {name for pattern in self.freeze for name in matching(pattern, names, option="freeze")}
        parameters = [model.get_parameter(name) for name in frozen]
        norms = {name for name, module in backbone.named_modules() if isinstance(module, _BatchNorm)}
        if self.freeze_norm:
            if not norms:
                raise ValueError(f"freeze_norm: {backbone.name} has no batch norm; leave it out")
            parameters += [parameter for name in norms for parameter in backbone.get_submodule(name).parameters()]
        if self.freeze_stages:
            parameters += feeding(backbone, self.freeze_stages)
        for parameter in parameters:
            parameter.requires_grad_(False)
        whole = _whole(model, {id(parameter) for parameter in parameters})
        if self.freeze_norm:  # also those that have no weights
            prefix = next(name for name, module in model.named_modules() if module is backbone)
            whole += tuple(f"{prefix}.{name}".lstrip(".") for name in sorted(norms))
        return whole


def feeding(backbone: TimmBackbone, levels: int) -> list[nn.Parameter]:
    """The parameters that the first maps of a backbone depend on, as autograd finds them.

    Args:
        backbone: Left as it is.
        levels: How many maps, the finest first; all of the backbone is that of the last.

    Raises:
        ValueError: More than there are.
    """
    if not 1 <= levels <= len(backbone.info):
        raise ValueError(
            f"freeze_stages: {backbone.name} gives {len(backbone.info)} maps, got {levels}; "
            f"give 0 to {len(backbone.info)}"
        )
    parameters = list(backbone.parameters())
    if levels == len(backbone.info):
        return parameters
    modes = [(module, module.training) for module in backbone.modules()]
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            for parameter in parameters:
                parameter.requires_grad_(parameter.is_floating_point())
            like = parameters[0]
            image = torch.zeros(1, backbone.in_channels, SIDE, SIDE, dtype=like.dtype, device=like.device)
            maps = backbone.eval()(image)[:levels]
            gradients = torch.autograd.grad([x.sum() for x in maps], parameters, allow_unused=True)
    finally:
        for module, training in modes:
            module.training = training
        kept = {id(parameter) for parameter in trainable}
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in kept)
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def _whole(model: nn.Module, chosen: Collection[int]) -> tuple[str, ...]:
    """The outermost modules that hold parameters, all of which are among the chosen ids."""
    found: list[str] = []
    for name, module in model.named_modules():
        ids = {id(parameter) for parameter in module.parameters()}
        if ids and ids <= set(chosen) and not name.startswith(tuple(f"{outer}." for outer in found)):
            found.append(name)
    return tuple(found)
