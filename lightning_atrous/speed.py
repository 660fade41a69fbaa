"""The faster of the equal ways to compute a dilated backbone: measured once, decided by the first process for all."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lightning_atrous.dilation.timing import fastest
from lightning_atrous.task import Batch, SegmentationTask

__all__ = ["FasterExecution"]

IMAGES = 2
"""How many of a batch are measured with."""


class FasterExecution(Callback):
    """Choose, before the first batch, between dilated kernels and plain ones on sub-grids (`Dilation.execution`).

    Both give the same numbers up to rounding. Of a training both modes are measured on its first crops; the choice is
    in its checkpoints, so that a resumed run computes as before. An evaluation on one device measures on its first
    image, on several it takes sub-grids. Nothing is measured where a model is pinned to one execution, where the
    trainer is told to be deterministic, and where weights are spread over devices.
    """

    def __init__(self) -> None:
        self._split: dict[str, bool] = {}

    def state_dict(self) -> dict[str, Any]:
        """What was chosen."""
        return {"split": dict(self._split)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep to what was chosen."""
        self._split = dict(state_dict["split"])

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Measure both modes, or keep to what a checkpoint says."""
        self._choose(trainer, pl_module, batch, (True, False))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure, where one process is alone."""
        if trainer.state.fn != "fit" and trainer.world_size == 1:
            self._choose(trainer, pl_module, batch, (False,))

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure, where one process is alone."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx)

    def _choose(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, modes: tuple[bool, ...]) -> None:
        assert isinstance(pl_module, SegmentationTask)
        dilation = pl_module.model.backbone.dilation
        for training in modes:
            key = "train" if training else "eval"
            if training not in dilation.alternatives:
                continue
            if key not in self._split:
                self._split[key] = self._measure(trainer, pl_module, batch["image"], training)
            if dilation.prefers(training) != self._split[key]:
                dilation.prefer(self._split[key], training=training)

    def _measure(self, trainer: L.Trainer, task: SegmentationTask, image: Tensor, training: bool) -> bool:
        """Whether to run on sub-grids."""
        dilation = task.model.backbone.dilation
        if not training and task.evaluation.inference.window is not None:  # what the network is going to see
            height, width = task.evaluation.inference.window
            image = image[..., :height, :width]
        spread = not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        if spread or torch.are_deterministic_algorithms_enabled():
            return True
        if any(n % dilation.native for n in image.shape[-2:]):
            return True
        with trainer.precision_plugin.forward_context():
            pixels = task.model.normalize(task.in_memory_format(image[:IMAGES]))
            # by all processes: batch norm over them waits for each
            split = fastest(dilation, pixels, training=training) == "split"
        return bool(trainer.strategy.broadcast(split))
