"""What the trainer does our way: batch norm over all processes, and checkpoints that are whole or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import nn

from lightning_atrous.backbone import convert_sync_batchnorm
from lightning_atrous.files import whole_file
from lightning_atrous.layers import SingleValueNorm

__all__ = ["SyncBatchNorm", "WholeCheckpointIO"]


class SyncBatchNorm(TorchSyncBatchNorm):
    """Batch norm over all processes of a training, in timm's networks too.

    torch's own conversion, which Lightning's ``sync_batchnorm`` runs, puts a bare norm in the place of timm's norms
    with an activation inside: the network then trains without those activations. From Python, give
    ``Trainer(plugins=[SyncBatchNorm()])``; the command does so for ``--trainer.sync_batchnorm true``.
    """

    def __init__(self) -> None:
        self._originals: list[tuple[nn.Module, str, nn.Module]] = []

    def apply(self, model: nn.Module) -> nn.Module:
        """Put synchronised norms in the places of all others, with the same tensors."""
        alone = not (dist.is_initialized() and dist.get_world_size() > 1)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if alone and isinstance(child, SingleValueNorm):
                    continue  # which can do with one value, where torch's synchronised norm cannot
                if isinstance(child, nn.modules.batchnorm._BatchNorm):
                    self._originals.append((parent, name, child))
                    setattr(parent, name, convert_sync_batchnorm(child))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Put the original norms back, with the tensors that have been trained, wherever they are by now."""
        for parent, name, original in self._originals:
            trained = getattr(parent, name)
            for key, tensor in (*trained.named_parameters(), *trained.named_buffers()):
                setattr(original, key, tensor)
            original.train(trained.training)
            setattr(parent, name, original)
        self._originals = []
        return model


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint files, moved into place in one step.

    Lightning writes them into the system's temporary folder first. From there to another disk they are copied, and a
    kill or a full disk in the middle of that leaves half a checkpoint in place of the last good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint.

        Raises:
            ValueError: The place cannot be written.
        """
        if "://" in str(path) or storage_options is not None:  # Lightning's remote places
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with whole_file(path) as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch's writer has its own words for a write that fails
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
