"""The average of the weights along a training, which is what is scored and kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

__all__ = ["EMA"]


class EMA(WeightAveraging):
    """An exponential moving average of the weights: scored in every validation, and kept in checkpoints.

    Lightning's callback, with the average that is usual for segmentation. After every step of the optimiser it moves
    towards the weights by ``1 - decay``, from those of the first step on. Batch norms' statistics are averaged as
    weights are; what counts is copied. A checkpoint holds the average where its weights are, so that `predict` and
    whoever else loads it takes that; beside it are the weights that a resumed training goes on from. A training that is
    over leaves the average in the model. A checkpoint of weights alone (``save_weights_only``) is not averaged.

    Args:
        decay: Of the average, per step, within 0..1. 0.9998 averages over the last five thousand steps or so; for a
            training of few steps take less.
        warmup: Let the first averages be shorter: after n steps the decay is at most (1 + n) / (10 + n).

    Raises:
        ValueError: A decay out of range; in `fit`, a strategy that spreads the weights over devices.
    """

    def __init__(self, decay: float = 0.9998, *, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA: decay must be at least 0 and below 1, got {decay}; 0.9998 is usual")
        super().__init__(multi_avg_fn=self._move)
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def _move(self, average: Sequence[Tensor], weights: Sequence[Tensor], updates: Tensor | int) -> None:
        """Tensors of one type on one device, by as many updates as there were before."""
        if not average[0].is_floating_point():
            torch._foreach_copy_(list(average), list(weights))
            return
        n = int(updates)
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        torch._foreach_lerp_(list(average), list(weights), 1 - decay)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin an average."""
        if stage == "fit" and not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"the callback EMA needs all weights on every device, which {type(trainer.strategy).__name__} does not "
                f"give; take --trainer.strategy ddp, or leave EMA out"
            )
        super().setup(trainer, pl_module, stage)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Of a training that goes on: the average and the weights. An evaluation has got the average already."""
        if trainer.state.fn != "fit":
            return
        if "averaging_state" in checkpoint:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
        else:  # of a training without: its weights are where the average begins
            assert self._average_model is not None
            self._average_model.module.load_state_dict(checkpoint["state_dict"])
