"""Every head on the shapes: `configs/quickstart.yaml`, about two minutes a head on two CPU cores.

python benchmarks/shapes.py docs/shapes.md [--only NAME ...]

The images are of 64×64 and the config's backbone has 96 channels at its end, so some heads are told smaller rates and
widths than their papers', as the table says. Each training is a run in ``--runs``; one that is there is not done again.
"""

from __future__ import annotations

import argparse
import datetime
import os
import time
from pathlib import Path

from camvid import last_scores, run

from lightning_atrous import __version__
from lightning_atrous.heads import HEADS

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
TOLD = {
    "deeplabv1": {"rate": 2, "channels": 64, "dropout": 0.1},
    "deeplabv3": {"rates": "[1,2,3]", "channels": 64},
    "deeplabv3plus": {"rates": "[1,2,3]", "channels": 64},
    "denseaspp": {"rates": "[1,2,3,4,5]"},
    "linknet": {"trainer.max_epochs": 10},
    "fpn": {"pyramid_channels": 64, "segmentation_channels": 64},
    "manet": {"channels": "[64,48,32,16,16]"},
    "psp": {"channels": 64},
    "rfb": {"channels": 64},
    "segformer": {"segmentation_channels": 64},
    "unetplusplus": {"channels": "[64,48,32,16,16]", "trainer.max_epochs": 3},
    "upernet": {"channels": 64},
}
"""Papers' rates reach beyond a map of 8×8 altogether, and their widths are for backbones ten times as wide."""
STRIDES = (8, 16, 32)
"""Taken in turn until a head accepts one."""
FINER = {"deeplabv1": 4}
"""Without norm and without anything finer than its one map, it needs that to be finer."""


def train(name: str, place: Path, threads: int) -> int:
    """Train at the first stride that the head takes, and return that."""
    head = [f"--{key if '.' in key else f'model.head.{key}'}={value}" for key, value in TOLD.get(name, {}).items()]
    for stride in [FINER[name]] if name in FINER else STRIDES:
        words = ["--config", str(CONFIG), "--model.head", name, *head, "--model.backbone.output_stride", str(stride)]
        words += ["--run_dir", str(place), "--trainer.enable_progress_bar", "false"]
        if run("-m", "lightning_atrous", "fit", *words, threads=threads, check=False) == 0:
            return stride
    raise SystemExit(f"{name} was trained at none of the strides that were tried")


def main() -> None:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/shapes"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=list(HEADS), choices=list(HEADS))
    options = parser.parse_args()
    for name in options.only:
        row = options.runs / f"{name}.txt"
        if not row.exists():
            begun = time.perf_counter()
            stride = train(name, options.runs / name, options.threads)
            minutes = (time.perf_counter() - begun) / 60
            miou = last_scores(options.runs / name)["val/miou"]
            told = ", ".join(f"`{key}: {value}`" for key, value in TOLD.get(name, {}).items())
            row.write_text(f"| {name} | {told} | {stride} | {100 * miou:.1f} | {minutes:.1f} |")
    rows = [path.read_text() for path in sorted(options.runs.glob("*.txt"))]
    made = (
        f"Made by `benchmarks/shapes.py` on {datetime.date.today()} with lightning-atrous {__version__}: "
        "`configs/quickstart.yaml` (timm's `test_resnet` from nothing, 4 epochs of 4400 images of 64×64) with another "
        "head in every row, mostly at the first of the output strides 8, 16 and 32 that it takes. The two cores did "
        "other things beside, so the minutes tell little."
    )
    columns = ["| head | told | output stride | mIoU | minutes |", "|---|---|---:|---:|---:|"]
    lines = ["# Every head on the shapes", "", made, "", *columns, *rows, ""]
    options.output.write_text("\n".join(lines), encoding="utf-8")
    print(options.output.read_text())


if __name__ == "__main__":
    main()
