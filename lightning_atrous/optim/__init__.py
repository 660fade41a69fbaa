"""Who learns how fast: what is frozen, parameter groups, the optimiser over them, and the schedule."""

from lightning_atrous.optim.build import (
    OPTIMIZERS,
    SGD_RECIPE,
    OptimizerFactory,
    build_optimizer,
    check_optimizer,
    check_resumed,
    options_of,
    take_options,
)
from lightning_atrous.optim.freezing import Freezing
from lightning_atrous.optim.groups import Grouping, ParameterGroup, parameter_groups
from lightning_atrous.optim.schedule import POLY, Poly, realign

__all__ = [
    "OPTIMIZERS",
    "POLY",
    "SGD_RECIPE",
    "Freezing",
    "Grouping",
    "OptimizerFactory",
    "ParameterGroup",
    "Poly",
    "build_optimizer",
    "check_optimizer",
    "check_resumed",
    "options_of",
    "parameter_groups",
    "realign",
    "take_options",
]
