"""What a run shows and keeps: the progress on the terminal, the table per class, the name of its W&B run."""

from __future__ import annotations

import os
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from torch import Tensor

from lightning_atrous.boundaries import BoundaryScores
from lightning_atrous.metrics import class_accuracy, class_iou, scores
from lightning_atrous.task import SegmentationTask
from lightning_atrous.types import ClassInfo

__all__ = ["FinalValidation", "LoggedStep", "RunProgress", "ScoreTable", "WandbRun", "score_table"]


class RunProgress(ProgressBar):
    """One bar for the whole run, with loss, learning rate, mIoU and the time left; one line for every validation.

    On anything but a terminal the bar is left out and the lines stay, so that a log file can be read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.console = Console()
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._enabled = True
        self._started = 0.0
        self._steps_before = 0

    def enable(self) -> None:
        """Show the bar; Lightning calls it on the first rank."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing; Lightning calls it on every rank but the first."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what is trained, and open the bar."""
        super().on_train_start(trainer, pl_module)
        self._started, self._steps_before = time.monotonic(), trainer.global_step
        self._announce(pl_module, f"writing to {os.path.relpath(trainer.default_root_dir)}")
        self._open(int(trainer.estimated_stepping_batches))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self._progress is not None:
            text = f"epoch {_epoch(trainer)}  {self._state(trainer)}"
            self._move(trainer.global_step, text)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Say how far the validation is; outside `fit` it has a bar of its own."""
        if self._progress is None:
            return
        total = int(sum(trainer.num_val_batches))
        if trainer.state.fn == "fit":
            self._move(trainer.global_step, f"validating {batch_idx + 1}/{total}")
        else:
            self._move(batch_idx + 1, "validating")

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar."""
        self._move(batch_idx + 1, "testing")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open a bar where `fit` has none open."""
        if trainer.state.fn == "validate":
            self._announce(pl_module, f"scoring {trainer.ckpt_path}")
            self._open(int(sum(trainer.num_val_batches)))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open a bar."""
        self._announce(pl_module, f"scoring {trainer.ckpt_path}")
        self._open(int(sum(trainer.num_test_batches)))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line of this validation."""
        if trainer.state.fn != "fit":
            self._close()
        elif self._enabled and not trainer.sanity_checking:
            line = f"epoch {_epoch(trainer, 3)}  step {trainer.global_step:>5}  "
            self.console.print(line + self._state(trainer), highlight=False, soft_wrap=True)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def _announce(self, pl_module: L.LightningModule, what: str) -> None:
        if self._enabled:
            assert isinstance(pl_module, SegmentationTask)
            self.console.print(f"{_headline(pl_module)}\n{what}", highlight=False, soft_wrap=True)

    def _open(self, total: int) -> None:
        if not (self._enabled and self.console.is_terminal):
            return
        columns = (
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(*columns, console=self.console, transient=True)
        self._bar = self._progress.add_task("", total=total)
        self._progress.start()

    def _move(self, completed: int, text: str) -> None:
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, completed=completed, description=text)

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._bar = None

    def _state(self, trainer: L.Trainer) -> str:
        """Loss, learning rate, mIoU and the time left, as far as they are known."""
        metrics = trainer.callback_metrics
        parts = []
        if "train/loss" in metrics:
            parts.append(f"loss {metrics['train/loss']:.3f}")
        if trainer.optimizers:
            parts.append(f"lr {max(group['lr'] for group in trainer.optimizers[0].param_groups):.2g}")
        if "val/miou" in metrics:
            parts.append(f"mIoU {metrics['val/miou']:.4f}")
        done = trainer.global_step - self._steps_before
        if done:
            left = (
                (trainer.estimated_stepping_batches - trainer.global_step) * (time.monotonic() - self._started) / done
            )
            parts.append(f"left {_clock(left)}")
        return "  ".join(parts)


class FinalValidation(Callback):
    """A run that ends by ``max_steps`` is validated there, wherever in an epoch or an interval that is."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ask to stop at the last step: Lightning validates on such a request, but not at the limit itself."""
        if 0 <= trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True


class LoggedStep(Callback):
    """The step that loggers see is the optimiser's, in a resumed run too.

    Lightning counts it apart, after the validation in which checkpoints are saved, and takes it up again one step early
    from some of those, and one late from others.
    """

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before anything of this batch is logged."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class ScoreTable(Callback):
    """The scores of every class, printed where an evaluation ends: after `fit`, `validate` and `test`."""

    def __init__(self) -> None:
        super().__init__()
        self.console = Console()

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the last validation, and where the best checkpoint is."""
        self._print(pl_module, "last validation")
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.best_model_score is not None:
                path = os.path.relpath(callback.best_model_path)
                self.console.print(f"best {callback.monitor} {callback.best_model_score:.4f} in {path}", soft_wrap=True)

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print, where this is not a validation within `fit`."""
        if trainer.state.fn == "validate":
            self._print(pl_module, "validation")

    @rank_zero_only
    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print."""
        self._print(pl_module, "test")

    def _print(self, pl_module: L.LightningModule, title: str) -> None:
        assert isinstance(pl_module, SegmentationTask)
        if pl_module.confusion is None:
            return
        near = pl_module.evaluation.boundary_scores
        self.console.print(score_table(pl_module.confusion, pl_module.classes, near, title=title))
        if near is not None:
            pairs = zip(near.bands, near.trimap_miou.reshape(-1), strict=True)
            curve = ", ".join(f"{_percent(miou)} within {band}" for band, miou in pairs)
            self.console.print(f"mIoU near boundaries: {curve} pixels", highlight=False, soft_wrap=True)


def score_table(confusion: Tensor, classes: ClassInfo, near: BoundaryScores | None = None, *, title: str) -> Table:
    """IoU, accuracy and share of the pixels for every class, and their means.

    Args:
        confusion: ``(K, K)`` counts, the target's class in rows.
        classes: Their names.
        near: Scores near the boundaries; their Boundary IoU gets a column.
        title: Above the table.
    """
    table = Table(title=title, title_justify="left", show_footer=True)
    summary = {name: _percent(value) for name, value in scores(confusion).items()}
    table.add_column("class", footer=f"mean over classes\npixel accuracy {summary['pixel_accuracy']}")
    table.add_column("IoU", justify="right", footer=summary["miou"])
    table.add_column("accuracy", justify="right", footer=summary["mean_accuracy"])
    columns = [class_iou(confusion), class_accuracy(confusion)]
    if near is not None:
        table.add_column("boundary IoU", justify="right", footer=_percent(near.boundary_miou))
        columns.append(near.boundary_iou.reshape(-1))
    table.add_column("pixels", justify="right")
    columns.append(confusion.sum(1) / confusion.sum().clamp(min=1))
    for name, *row in zip(classes.names, *columns, strict=True):
        table.add_row(name, *map(_percent, row))
    return table


class WandbRun(Callback):
    """Keeps the W&B run's id, project and name in the checkpoints: whoever goes on from one goes on in that run."""

    def __init__(self) -> None:
        self.run: dict[str, str] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask the logger, if there is one."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                run = logger.experiment
                known = {"id": run.id, "entity": run.entity, "project": run.project, "name": run.name}
                self.run = {key: value for key, value in known.items() if value}

    def state_dict(self) -> dict[str, Any]:
        """What goes into a checkpoint."""
        return dict(self.run)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Know the run also where this part of the training is not logged to W&B."""
        self.run = dict(state_dict)


def _headline(task: SegmentationTask) -> str:
    backbone = task.model.backbone
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    stride = f"{backbone.output_stride}"
    if "," in backbone.dilation.summary:  # what people should know: other statistics, or a price
        stride += f" ({backbone.dilation.summary})"
    if task.evaluation.output_stride not in (None, backbone.output_stride):
        stride += f", scored at {task.evaluation.output_stride}"
    if task.evaluation.inference.summary:
        stride += f", scored {task.evaluation.inference.summary}"
    return (
        f"{backbone.name} at output stride {stride} → {type(task.model.head).__name__} → "
        f"{len(task.classes)} classes, {parameters / 1e6:.1f} M parameters"
    )


def _epoch(trainer: L.Trainer, width: int = 0) -> str:
    """Which epoch, and of how many where they are limited."""
    number = f"{trainer.current_epoch + 1:>{width}}"
    return number if trainer.max_epochs in (None, -1) else f"{number}/{trainer.max_epochs}"


def _percent(value: Tensor) -> str:
    return "–" if torch.isnan(value) else f"{100 * value.item():.2f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
