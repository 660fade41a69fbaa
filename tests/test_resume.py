"""A resumed training computes what it would have computed without the stop, bit for bit."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_atrous import SegmentationTask, TimmBackbone
from lightning_atrous.callbacks import FinalValidation, LoggedStep
from lightning_atrous.data import Shapes
from lightning_atrous.heads import DeepLabV3Plus
from lightning_atrous.optim import Poly
from lightning_atrous.resume import ExactResume
from lightning_atrous.transforms import Augment

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 32


class Record(Callback):
    """What was computed, by the step it belongs to; and, where asked, a checkpoint at every occasion there is."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.losses: list[tuple[int, float, float]] = []
        self.scores: list[tuple[int, float, float]] = []
        self.epochs: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.save(trainer, "before")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.losses.append((trainer.global_step, trainer.callback_metrics["train/loss"].item(), rate))
        self.save(trainer, "after")

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.save(trainer, "validating")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        metrics = trainer.callback_metrics
        self.scores.append((trainer.global_step, metrics["val/miou"].item(), metrics["val/loss"].item()))
        self.save(trainer, "validated")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.epochs.append(trainer.current_epoch)
        self.save(trainer, "epoch")

    def save(self, trainer: L.Trainer, occasion: str) -> None:
        if self.folder is not None:
            done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
            trainer.save_checkpoint(self.folder / f"{done}-{occasion}.ckpt")


def shapes(**options: Any) -> Shapes:
    settings = {"size": SIZE, "train_length": 15, "val_length": 3, "batch_size": 3, "num_workers": 0}
    return Shapes(**{**settings, "augment": Augment((SIZE, SIZE)), **options})


def fit(folder: Path, *, ckpt: Path | None = None, save: bool = False, seed: int = 4, **options: Any) -> Any:
    """A run with all that draws random numbers and remembers something: record, task and trainer."""
    L.seed_everything(seed, verbose=False)
    data = shapes(**options.pop("data", {}))
    task = SegmentationTask(
        TimmBackbone("test_resnet", pretrained=False, output_stride=16),
        functools.partial(DeepLabV3Plus, channels=8, dropout=0.5),
        classes=data.classes,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        schedule=Poly(warmup_steps=3),
    )
    record = Record(folder if save else None)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        callbacks=[record, LoggedStep(), FinalValidation(), ExactResume()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 2, **options},
    )
    trainer.fit(task, data, ckpt_path=ckpt)
    return record, task, trainer


def state(task: SegmentationTask, trainer: L.Trainer) -> dict[str, torch.Tensor]:
    """Every tensor of weights, statistics and optimiser."""
    slots = trainer.optimizers[0].state_dict()["state"]
    moments = {f"{i}.{name}": value for i, slot in slots.items() for name, value in slot.items()}
    return {**task.state_dict(), **moments}


RUNS = {
    "epochs": {},
    "workers": {"data": {"num_workers": 2}},
    "validation within epochs": {"val_check_interval": 2},
    "validation across epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "every second epoch, and an end within one": {"max_epochs": -1, "max_steps": 8, "check_val_every_n_epoch": 2},
    "accumulation": {"accumulate_grad_batches": 2},
}


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("run", RUNS)
def test_from_every_checkpoint_there_is(run: str, tmp_path: Path) -> None:
    """Saved before and after steps, within validations, after them, at the end of epochs."""
    options = RUNS[run]
    whole, task, trainer = fit(tmp_path, save=True, **options)
    expected = state(task, trainer)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    if run == "workers":
        checkpoints = [path for path in checkpoints if path.name in ("2-after.ckpt", "7-before.ckpt", "5-epoch.ckpt")]
    accumulates = options.get("accumulate_grad_batches", 1)
    for path in checkpoints:
        step = torch.load(path, weights_only=True)["global_step"]
        done = int(path.name.partition("-")[0])
        if done % 5 % accumulates:
            continue
        # not the seed, and not even what was drawn since
        resumed, again, other = fit(tmp_path, ckpt=path, seed=99, **options)
        assert resumed.losses == whole.losses[done:], path.name
        assert resumed.scores == whole.scores[len(whole.scores) - len(resumed.scores) :], path.name
        later = [score for score in whole.scores if score[0] > step]
        assert len(resumed.scores) >= len(later)
        for name, tensor in state(again, other).items():
            assert torch.equal(tensor, expected[name]), (path.name, name)
