"""What both processes of `test_preemption.py` run: a training without a stop, and one that is stopped twice.

python ddp_resume.py FOLDER
"""

from __future__ import annotations

import functools
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_atrous import SegmentationTask, TimmBackbone
from lightning_atrous.callbacks import LoggedStep
from lightning_atrous.data import Shapes
from lightning_atrous.heads import DeepLabV3Plus
from lightning_atrous.preemption import Preemption, Stopped
from lightning_atrous.resume import ExactResume
from lightning_atrous.transforms import Augment


class Record(Callback):
    """The losses of this process's own images; and a signal to the second process alone."""

    def __init__(self, step: int | None = None, *, validating: bool = False) -> None:
        self.step, self.validating = step, validating
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())
        self.tell(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.tell(trainer)

    def tell(self, trainer: L.Trainer) -> None:
        if trainer.global_step == self.step and trainer.validating == self.validating and trainer.global_rank == 1:
            signal.raise_signal(signal.SIGTERM)


def fit(folder: Path, record: Record, *, ckpt: Path | None = None, seed: int = 1) -> SegmentationTask:
    """Four steps an epoch, five images of validation: three for the first process and two for the second."""
    L.seed_everything(seed, verbose=False)
    sizes = {"size": 32, "train_length": 16, "val_length": 5, "batch_size": 4, "num_workers": 0}
    data = Shapes(**sizes, augment=Augment((32, 32)))  # type: ignore[arg-type]
    task = SegmentationTask(
        TimmBackbone("test_resnet", pretrained=False),
        functools.partial(DeepLabV3Plus, channels=8, dropout=0.5),
        classes=data.classes,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        callbacks=[record, LoggedStep(), ExactResume(), Preemption(folder / "last.ckpt")],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(task, data, ckpt_path=ckpt)
    return task


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    whole = Record()
    expected = fit(folder, whole).state_dict()
    first, second, third = Record(3), Record(4, validating=True), Record()
    with pytest.raises(Stopped, match="143"):
        fit(folder, first)
    with pytest.raises(Stopped, match="143"):
        fit(folder, second, ckpt=folder / "last.ckpt", seed=2)
    weights = fit(folder, third, ckpt=folder / "last.ckpt", seed=3).state_dict()
    assert first.losses + second.losses + third.losses == whole.losses
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


if __name__ == "__main__":
    main()
