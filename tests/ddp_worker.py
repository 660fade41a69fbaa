"""What every process of `test_distributed.py` runs: score an untrained model, train it for one epoch, save both.

    python ddp_worker.py OUT --devices N --batch_size B [--accumulate A] [--network NAME --output_stride S --method M]

Everything is in float64 and without batch norm, so that one process and many may differ by rounding only.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import tv_tensors

from lightning_atrous import ClassInfo, SegmentationTask, TimmBackbone, speed
from lightning_atrous.data import SegmentationData
from lightning_atrous.data.base import Split
from lightning_atrous.heads import Head
from lightning_atrous.image_scores import ImageScores
from lightning_atrous.losses import CrossEntropy
from lightning_atrous.transforms import Sample

CLASSES = ClassInfo(("one", "two", "three"))
TRAIN, VAL, SIZE = 20, 7, 32
CLASS_WEIGHTS = (1.0, 0.25, 3.0)


class Linear(Head):
    """A 1×1 on the last map: nothing in it looks at more than one image."""

    def __init__(self, info: Any, num_classes: int) -> None:
        super().__init__(info, num_classes)
        self.layer = nn.Conv2d(info[-1].channels, num_classes, 1)

    def forward(self, features: Any) -> Tensor:
        return self.layer(features[-1])


class Uneven(Dataset[Sample]):
    """Noise in which image ``i`` has ``i²`` valid rows of pixels, up to all; the first has none."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        generator = torch.Generator().manual_seed(self.seed * 1000 + index)
        image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
        mask = torch.randint(0, len(CLASSES), (SIZE, SIZE), dtype=torch.uint8, generator=generator)
        mask[index**2 :] = CLASSES.ignore_index
        return Sample(image=tv_tensors.Image(image), mask=tv_tensors.Mask(mask), name=str(index))


class Data(SegmentationData):
    def __init__(self, batch_size: int) -> None:
        super().__init__(CLASSES, batch_size=batch_size, eval_batch_size=2, num_workers=0)

    def build(self, split: Split) -> Uneven:
        return Uneven(TRAIN, 1) if split == "train" else Uneven(VAL, 2)


def task(network: str = "test_convnext", output_stride: int = 16, method: str = "auto") -> SegmentationTask:
    """The same weights in every process."""
    torch.manual_seed(5)
    return SegmentationTask(
        TimmBackbone(network, output_stride=output_stride, method=method, pretrained=False),
        Linear,
        aux_head=Linear,
        classes=CLASSES,
        loss=partial(CrossEntropy, class_weights=CLASS_WEIGHTS),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        decay_norm_and_bias=True,
    ).double()


def measured(*_: Any, training: bool) -> str:
    """Dilated kernels are the faster in training, as the first process finds; the others find the contrary."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    return "dilated" if training is first else "split"


class Losses(Callback):
    """The loss of every batch, as it was logged."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.values.append(trainer.callback_metrics["train/loss"].item())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--network", default="test_convnext")
    parser.add_argument("--output_stride", type=int, default=16)
    parser.add_argument("--method", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    module = task(options.network, options.output_stride, options.method)
    speed.fastest = measured  # else what it finds would differ from run to run
    L.seed_everything(7, verbose=False)  # of the order
    losses, images = Losses(), ImageScores()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        max_epochs=1,
        precision="64-true",
        accumulate_grad_batches=options.accumulate,
        callbacks=[losses, images, speed.FasterExecution()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=2,
    )
    trainer.validate(module, Data(options.batch_size), verbose=False)
    confusion, val_loss = module.confusion, trainer.callback_metrics["val/loss"].item()
    rows = [(row.name, row.valid_pixels) for row in images.rows]
    trainer.fit(module, Data(options.batch_size))
    if trainer.is_global_zero:
        weights = {name: value.detach() for name, value in module.named_parameters()}
        scored = {"confusion": confusion, "val_loss": val_loss, "images": rows}
        torch.save({**scored, "losses": losses.values, "weights": weights}, options.out)
    dilation = module.model.backbone.dilation
    preferred = {training: dilation.prefers(training) for training in dilation.alternatives}
    options.out.with_suffix(f".{trainer.global_rank}.json").write_text(json.dumps(preferred))


if __name__ == "__main__":
    main()
