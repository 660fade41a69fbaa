"""Losses: logits at any resolution and a mask in, a scalar out."""

from __future__ import annotations

from lightning_atrous.losses.base import Loss, LossFactory, mean_over_ranks
from lightning_atrous.losses.cross_entropy import CrossEntropy
from lightning_atrous.losses.ohem import OHEM
from lightning_atrous.losses.pixel_mean import PixelMean
from lightning_atrous.losses.raised import raised_cross_entropy
from lightning_atrous.losses.smp import Dice, Focal, Jaccard, Lovasz, Tversky
from lightning_atrous.losses.weighted import WeightedSum

__all__ = [
    "OHEM",
    "CrossEntropy",
    "Dice",
    "Focal",
    "Jaccard",
    "Loss",
    "LossFactory",
    "Lovasz",
    "PixelMean",
    "Tversky",
    "WeightedSum",
    "mean_over_ranks",
    "raised_cross_entropy",
]
