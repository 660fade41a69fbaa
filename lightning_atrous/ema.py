"""The average of the weights along a training, which is what is scored and kept."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

__all__ = ["EMA"]

CURRENT = "ema_current_weights"
"""Where in a checkpoint the weights stand that the training goes on from."""


class EMA(Callback):
    """An exponential moving average of the weights: scored in every validation, and kept in checkpoints.

    After every step of the optimiser the average moves towards the weights by ``1 - decay``. Batch norms' statistics
    are averaged as weights are; what counts is copied. A checkpoint holds the average where its weights are, so that
    `predict` and whoever else loads it takes that; beside it are the weights that a resumed training goes on from. A
    training that is over leaves the average in the model.

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
        self.decay, self.warmup = decay, warmup
        self._average: dict[str, Tensor] = {}
        self._steps = 0
        self._updates = 0
        self._in_model = False  # whether the model holds the average, and `_average` the weights

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin anew."""
        if stage != "fit":
            return
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"the callback EMA needs all weights on every device, which {type(trainer.strategy).__name__} does not "
                f"give; take --trainer.strategy ddp, or leave EMA out"
            )
        self._average, self._steps, self._updates, self._in_model = {}, 0, 0, False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the first weights, where no checkpoint has brought an average."""
        weights = pl_module.state_dict()
        average = self._average or weights
        self._average = {
            name: average[name].detach().to(device=weight.device, dtype=weight.dtype, copy=True)
            for name, weight in weights.items()
        }
        self._steps = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the average, where this batch ended a step."""
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        self._updates += 1
        decay = min(self.decay, (1 + self._updates) / (10 + self._updates)) if self.warmup else self.decay
        weights = pl_module.state_dict()
        floating = [name for name, weight in weights.items() if weight.is_floating_point()]
        torch._foreach_lerp_(
            [self._average[name] for name in floating], [weights[name] for name in floating], 1 - decay
        )
        for name in weights.keys() - set(floating):
            self._average[name].copy_(weights[name])

    @torch.no_grad()
    def _exchange(self, pl_module: L.LightningModule) -> None:
        self._in_model = not self._in_model
        for name, weight in pl_module.state_dict().items():
            kept = self._average[name].clone()
            self._average[name].copy_(weight)
            weight.copy_(kept)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average into the model, within `fit`."""
        if self._average and trainer.state.fn == "fit":
            self._exchange(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the weights back."""
        if self._in_model and trainer.state.fn == "fit":
            self._exchange(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the model."""
        self._exchange(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """How often the average has moved."""
        return {"updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._updates = state_dict["updates"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the average where the weights are, and those beside it."""
        if not self._average:
            return
        others = dict(self._average)
        weights = checkpoint["state_dict"]
        average, current = (weights, others) if self._in_model else (others, weights)
        checkpoint["state_dict"], checkpoint[CURRENT] = average, current

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Of a training that goes on: the average from where the weights are, and the weights from beside it."""
        if trainer.state.fn == "fit" and CURRENT in checkpoint:
            self._average = dict(checkpoint["state_dict"])
            pl_module.load_state_dict(checkpoint[CURRENT])
