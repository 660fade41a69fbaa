"""Who learns how fast: every trainable parameter in one group, with its learning rate and its weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.optim.patterns import matching

__all__ = ["Grouping", "ParameterGroup", "parameter_groups"]


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters by name, that learn at another rate or are decayed otherwise.

    Args:
        match: A shell pattern over the names of the model's parameters, such as ``head.*`` or ``*.gamma``; the name of
            a module (``backbone.net.layer4``) means all that is in it.
        lr_factor: Times the learning rate that they would have, positive.
        weight_decay: Theirs, in place of what they would have; as that where not given.

    Raises:
        ValueError: A number out of range.
    """

    match: str
    lr_factor: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.lr_factor < math.inf:
            raise ValueError(
                f"parameter_groups: lr_factor of '{self.match}' must be positive, got {self.lr_factor}; "
                f"to train those not at all name them in freeze"
            )
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"parameter_groups: weight_decay of '{self.match}' must not be negative, got {self.weight_decay}"
            )


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """The options of `parameter_groups`, under the names that they have in a task.

    Args:
        backbone_lr_factor: As there.
        layer_decay: As there.
        decay_norm_and_bias: As there.
        parameter_groups: The ``named`` of there.
    """

    backbone_lr_factor: float = 1.0
    layer_decay: float | None = None
    decay_norm_and_bias: bool = False
    parameter_groups: tuple[ParameterGroup, ...] = ()

    def __call__(self, model: nn.Module, backbone: TimmBackbone) -> list[dict[str, Any]]:
        """The groups of a model.

        Raises:
            ValueError: As `parameter_groups`, or ``layer_decay`` of a network whose layers are not known.
        """
        return parameter_groups(
            model,
            backbone,
            backbone_lr_factor=self.backbone_lr_factor,
            decay_norm_and_bias=self.decay_norm_and_bias,
            layer_decay=self.layer_decay,
            layers=None if self.layer_decay is None else backbone.layers_to_head(),
            named=self.parameter_groups,
        )


def parameter_groups(
    model: nn.Module,
    backbone: nn.Module,
    *,
    backbone_lr_factor: float = 1.0,
    decay_norm_and_bias: bool = False,
    layer_decay: float | None = None,
    layers: Mapping[str, int] | None = None,
    named: Sequence[ParameterGroup] = (),
) -> list[dict[str, Any]]:
    """Split the trainable parameters by learning rate and by weight decay, each into exactly one group.

    A parameter's ``lr_scale`` is a product: ``backbone_lr_factor`` if it is in the backbone, times ``layer_decay`` to
    the power of its layer there, times the ``lr_factor`` of the first of ``named`` that matches it. Its
    ``weight_decay`` is that of the same one of ``named``, if it has any; else 0 for biases, parameters of norms, and
    all others of fewer than two dimensions, such as layer scales; else none of its own, so that the optimiser's holds.

    Groups are named ``backbone`` and ``head`` (all that is not the backbone), followed by ``_x0.5`` where the rate is
    half of that part's, and by ``_no_decay`` or ``_decay0.1`` where the weight decay is their own. Rates that agree in
    six digits are one. Empty groups are left out.

    Args:
        model: All that is trained. Frozen parameters are left out, shared ones count once.
        backbone: A part of it.
        backbone_lr_factor: Positive; 0.1 is usual for fine-tuning.
        decay_norm_and_bias: Decay those as well, as an optimiser over ``model.parameters()`` does.
        layer_decay: Within 0..1, such as 0.75; 1 for none.
        layers: For every parameter of the backbone, by its name there, how many layers it is away from the head:
            `TimmBackbone.layers_to_head`. Wanted with ``layer_decay``.
        named: What is learnt otherwise, by name. Of several that match, the first counts.

    Returns:
        Groups with ``name``, ``params``, ``lr_scale`` and perhaps ``weight_decay``, for `build_optimizer`.

    Raises:
        ValueError: A backbone from elsewhere, a number out of range, a pattern that nothing is left for, or nothing to
            train.

    Example:
        >>> from torch import nn
        >>> from lightning_atrous.optim import ParameterGroup, parameter_groups
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1, bias=False))
        >>> slow = ParameterGroup(match="0.bias", lr_factor=0.5)
        >>> for group in parameter_groups(model, model[0], backbone_lr_factor=0.1, named=[slow]):
        ...     print(group["name"], group["lr_scale"], group.get("weight_decay"), len(group["params"]))
        backbone_x0.5_no_decay 0.05 0.0 1
        backbone 0.1 None 1
        head 1.0 None 1
    """
    if not math.isfinite(backbone_lr_factor) or backbone_lr_factor <= 0:
        raise ValueError(
            f"backbone_lr_factor must be positive, got {backbone_lr_factor}; "
            "to train the backbone not at all name it in freeze"
        )
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}; 0.75 is usual")
    assert layer_decay is None or layers is not None
    if all(module is not backbone for module in model.modules()):
        raise ValueError(f"{type(backbone).__name__}, given as the backbone, is no part of {type(model).__name__}")
    depth = {id(p): (layers or {}).get(name, 0) for name, p in backbone.named_parameters()}
    undecayed = set() if decay_norm_and_bias else _norms_and_biases(model)
    special = _by_name(model, named)
    groups: dict[str, dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        part, own_scale, scale = "head", 1.0, 1.0
        if id(parameter) in depth:
            part, own_scale = "backbone", backbone_lr_factor
            scale = 1.0 if layer_decay is None else layer_decay ** depth[id(parameter)]
        weight_decay = 0.0 if id(parameter) in undecayed else None
        if group := special.get(id(parameter)):
            scale *= group.lr_factor
            weight_decay = weight_decay if group.weight_decay is None else group.weight_decay
        name = part + ("" if scale == 1 else f"_x{scale:g}") + _decay_name(weight_decay)
        entry: dict[str, Any] = {"name": name, "params": [], "lr_scale": own_scale * scale}
        if weight_decay is not None:
            entry["weight_decay"] = weight_decay
        groups.setdefault(name, entry)["params"].append(parameter)
    if not groups:
        raise ValueError(f"no parameter of {type(model).__name__} is trainable; freeze less")
    return sorted(groups.values(), key=_place)


def _place(group: Mapping[str, Any]) -> tuple[bool, float, float]:
    """The backbone before the head, the slow before the fast, the optimiser's decay before one's own."""
    return group["name"].startswith("head"), group["lr_scale"], group.get("weight_decay", -1.0)


def _decay_name(weight_decay: float | None) -> str:
    if weight_decay is None:
        return ""
    return f"_decay{weight_decay:g}" if weight_decay else "_no_decay"


def _by_name(model: nn.Module, named: Sequence[ParameterGroup]) -> dict[int, ParameterGroup]:
    """By the id of each parameter the first of ``named`` that matches it, under any of its names."""
    ids = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    found: dict[int, ParameterGroup] = {}
    for group in named:
        members = {ids[name] for name in matching(group.match, ids, option="parameter_groups")}
        if not members & trained:
            raise ValueError(
                f"parameter_groups: all that matches '{group.match}' is frozen; leave it out, or freeze less"
            )
        if members <= found.keys():
            raise ValueError(
                f"parameter_groups: all that matches '{group.match}' has matched an earlier pattern, and the first "
                f"counts; put it further up, or leave it out"
            )
        found = {**dict.fromkeys(members, group), **found}
    return found


def _norms_and_biases(model: nn.Module) -> set[int]:
    """The ids of the parameters that are usually not decayed."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        # a norm's parameters have one dimension, but for these two when they span several
        if parameter.ndim < 2 or name == "bias" or isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    }
