"""Scores image by image: the worst by name on the terminal, all of them in a table."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor

from lightning_atrous.evaluation import Evaluated
from lightning_atrous.files import whole_file
from lightning_atrous.metrics import class_iou, mean_iou, pixel_accuracy
from lightning_atrous.task import Batch, SegmentationTask

__all__ = ["ImageScore", "ImageScores", "check_table", "image_scores", "write_table"]


class ImageScore(NamedTuple):
    """The scores of one image, in 0..1; nan where there is nothing to score."""

    name: str
    miou: float
    """Over the classes that occur in its mask or in its prediction."""
    pixel_accuracy: float
    valid_pixels: int
    iou: tuple[float, ...]
    """Of each class."""


def image_scores(names: Sequence[str], confusion: Tensor) -> list[ImageScore]:
    """Confusion matrices ``(B, K, K)`` of images, the target's class in rows → their scores."""
    return [
        ImageScore(
            name,
            mean_iou(counts).item(),
            pixel_accuracy(counts).item(),
            int(counts.sum()),
            tuple(class_iou(counts).tolist()),
        )
        for name, counts in zip(names, confusion.cpu().double(), strict=True)
    ]


def check_table(path: Path) -> None:
    """Refuse a file that `write_table` would not write.

    Raises:
        ValueError: A name that ends otherwise, or a format for which a package is missing.
    """
    if path.suffix not in (".csv", ".parquet"):
        raise ValueError(f"a table of images is a .csv or a .parquet file, got {path}; give --per_image another name")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path} needs the package pyarrow, which is not installed; install it, or give a .csv file")


def write_table(path: Path, rows: Sequence[ImageScore], classes: Sequence[str]) -> None:
    """Write a row for every image; what is nan stays empty.

    Args:
        path: A ``.csv`` or a ``.parquet`` file.
        rows: In the order in which they are written.
        classes: The names of the classes, for the columns ``iou/NAME``.

    Raises:
        ValueError: As of `check_table`, or a place that cannot be written.
    """
    check_table(path)
    columns: dict[str, list[Any]] = {
        "name": [row.name for row in rows],
        "miou": [_known(row.miou) for row in rows],
        "pixel_accuracy": [_known(row.pixel_accuracy) for row in rows],
        "valid_pixels": [row.valid_pixels for row in rows],
    }
    columns |= {f"iou/{name}": [_known(row.iou[k]) for row in rows] for k, name in enumerate(classes)}
    with whole_file(path) as file:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table(columns), file)
            return
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        file.write(text.getvalue().encode("utf-8"))


class ImageScores(Callback):
    """Scores every image of a ``validate`` or a ``test``; names the worst, and writes all of them if asked to.

    The table has the images in the order of the data set, each once on however many ranks.

    Args:
        path: The table, a ``.csv`` or a ``.parquet`` file.
        worst: How many images are named, where there are more.

    Raises:
        ValueError: As of `check_table`.
    """

    def __init__(self, path: Path | None = None, *, worst: int = 5) -> None:
        super().__init__()
        if path is not None:
            check_table(path)
        self.path, self.worst = path, worst
        self.rows: list[ImageScore] = []
        """Of the last evaluation, on the first rank; while it runs, of every rank its own."""
        self.console = Console()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last."""
        self.rows = []

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the last."""
        self.rows = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the images of a batch, where this is not a validation within `fit`."""
        if trainer.state.fn != "fit":
            self._score(outputs, batch)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the images of a batch."""
        self._score(outputs, batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell, where this is not a validation within `fit`."""
        if trainer.state.fn != "fit":
            self._tell(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell."""
        self._tell(trainer, pl_module)

    def _score(self, outputs: Any, batch: Batch) -> None:
        evaluated: Evaluated = outputs
        self.rows += image_scores(batch["name"], evaluated["confusion"])

    def _tell(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, SegmentationTask)
        self.rows = _gathered(self.rows)
        if not trainer.is_global_zero:
            return
        scored = sorted((row for row in self.rows if not math.isnan(row.miou)), key=lambda row: row.miou)
        if len(scored) > self.worst:
            names = ", ".join(f"{row.name} {100 * row.miou:.2f}" for row in scored[: self.worst])
            self.console.print(f"lowest mIoU: {names}", highlight=False, markup=False, soft_wrap=True)
        if self.path is not None:
            write_table(self.path, self.rows, pl_module.classes.names)
            told = f"scores of {len(self.rows)} images in {self.path}"
            self.console.print(told, highlight=False, markup=False, soft_wrap=True)


def _gathered(rows: list[ImageScore]) -> list[ImageScore]:
    """Those of all ranks in the order of the data set, on the first one; ranks take images in turn."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    first = dist.get_rank() == 0
    parts: list[list[ImageScore]] | None = [[] for _ in range(dist.get_world_size())] if first else None
    dist.gather_object(rows, parts)
    if parts is None:
        return rows
    return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
