"""Heads and their ablations on CamVid, trained alike: same backbone, images, crops, epochs and seed.

python benchmarks/camvid.py path/to/camvid docs/camvid-heads.md --weights path/to/mobilenetv2_100 [--only NAME ...]

`configs/camvid.yaml` at half resolution (images and labels are shrunk once, into a temporary folder), with another head
in every row; the last row is SMP's own DeepLabV3+ on the same weights, in the same loop. Each training is a run in
``--runs``, and one that is there is not done again.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from PIL import Image

from lightning_atrous import __version__

CONFIG = Path(__file__).parent.parent / "configs" / "camvid.yaml"
SMALL = {"bicyclist", "pedestrian", "pole", "sign"}
SCORES = "scores.json"


class Row(NamedTuple):
    """One training."""

    what: str
    options: tuple[str, ...] = ()
    also_at_8: bool = False


def head(name: str, **options: object) -> tuple[str, ...]:
    """The head, as on the command line."""
    return ("--model.head", name, *(f"--model.head.{key}={value}" for key, value in options.items()))


ROWS = {
    "v2": Row("DeepLab v2", head("deeplabv2")),
    "v3": Row("DeepLabV3 (no decoder)", head("deeplabv3"), also_at_8=True),
    "v3plus": Row("DeepLabV3+", head("deeplabv3plus"), also_at_8=True),
    "duc": Row("DUC, to stride 4", head("duc", stride=4)),
    "unet": Row("U-Net (SMP's decoder), stride 32", (*head("unet"), "--model.backbone.output_stride", "32")),
    "psp": Row("PSP", head("psp")),
    "v3plus-shrunk": Row(
        "DeepLabV3+, labels shrunk to the logits",
        (*head("deeplabv3plus"), "--model.loss", "CrossEntropy", "--model.loss.shrink_labels=true"),
    ),
    "v3-shrunk": Row(
        "DeepLabV3, labels shrunk to the logits",
        (*head("deeplabv3"), "--model.loss", "CrossEntropy", "--model.loss.shrink_labels=true"),
    ),
    "v3plus-16": Row("DeepLabV3+, 16 low-level channels", head("deeplabv3plus", low_level_channels=16)),
    "v3-unet": Row("V3 encoder, U-Net-like decoder (strides 8, 4, 2)", head("deeplabv3plus", low_levels="[2,4,8]")),
    "v3-segnet": Row("V3 encoder, SegNet-like decoder (strides 8, 4, 2)", head("segnet", rates="[6,12,18]")),
    "v3plus-as-smp": Row(
        "DeepLabV3+ with the options that SMP's has",
        head(
            "deeplabv3plus",
            rates="[12,24,36]",
            separable="true",
            inner_norm="false",
            aspp_convs=1,
            decoder_convs=1,
            dropout=0.5,
            align_corners="true",
            upsampling=4,
        ),
    ),
    "smp": Row("SMP's own DeepLabV3+ in the same loop"),
}


def halve(source: Path, target: Path) -> None:
    """Every image at half its size, its labels by the nearest pixel."""
    for split in ("train", "val"):
        lines = []
        for line in (source / f"{split}.txt").read_text().split("\n"):
            paths = [Path(*Path(part).parts[-2:]) for part in line.split()]
            for path, filter_ in zip(paths, (Image.Resampling.BOX, Image.Resampling.NEAREST), strict=False):
                picture = Image.open(source / path)
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                picture.resize((picture.width // 2, picture.height // 2), filter_).save(target / path)
            lines.append(" ".join(map(str, paths)))
        (target / f"{split}.txt").write_text("\n".join(lines))


def arguments(root: Path, options: argparse.Namespace) -> list[str]:
    """What all trainings have in common."""
    augment = {"crop": [options.crop, options.crop], "scale": [0.75, 2.0]}
    return [
        *("--config", str(CONFIG), "--data.root", str(root), "--model.backbone.pretrained", str(options.weights)),
        *(
            "--trainer.max_epochs",
            str(options.epochs),
            "--data.augment",
            yaml.safe_dump(augment, default_flow_style=True),
        ),
        *("--trainer.enable_progress_bar", "false"),
    ]


def run(*words: str, threads: int, check: bool = True) -> int:
    """Python, on so many threads; its exit code."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    return subprocess.run([sys.executable, *words], check=check, env=environment).returncode


def last_scores(folder: Path) -> dict[str, float]:
    """Of the last validation of a run."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/miou")]
    return {key: float(value) for key, value in rows[-1].items() if key.startswith("val/") and value}


def table(found: dict[str, dict[str, float]]) -> Iterator[str]:
    """The rows that are there."""
    yield f"| | mIoU | mean IoU of {', '.join(sorted(SMALL))} | pixel accuracy |"
    yield "|---|---:|---:|---:|"
    for what, scores in found.items():
        small = sum(scores[f"val/iou/{name}"] for name in SMALL) / len(SMALL)
        cells = [f"{100 * x:.1f}" for x in (scores["val/miou"], small, scores["val/pixel_accuracy"])]
        yield f"| {what} | {' | '.join(cells)} |"


def introduction(options: argparse.Namespace) -> str:
    """What was measured, and when."""
    return (
        f"# Heads on CamVid, trained alike\n\nMade by `benchmarks/camvid.py` on {datetime.date.today()} with "
        f"lightning-atrous {__version__}: `configs/camvid.yaml` (MobileNetV2 from ImageNet weights, output stride 16, "
        f"bf16) at half resolution (240×180), crops of {options.crop}×{options.crop}, {options.epochs} epochs of batch "
        f"8, seed 1, one training a row. Validation on 101 images of 240×180 after the last epoch: the scores compare "
        "rows, and are far from what the heads can do.\n"
    )


def main() -> None:
    """Train what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--weights", type=Path, required=True, help="a timm state dict of mobilenetv2_100")
    parser.add_argument("--runs", type=Path, default=Path("runs/camvid-heads"))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--crop", type=int, default=160)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        halve(options.root, Path(folder))
        for name in options.only:
            if not (options.runs / name / SCORES).exists():
                train(name, Path(folder), options)
    write(options)


def train(name: str, root: Path, options: argparse.Namespace) -> None:
    """One row, or two where it is scored at stride 8 too."""
    place, row = options.runs / name, ROWS[name]
    given = [*arguments(root, options), *row.options, "--run_dir", str(place)]
    if name == "smp":
        run(str(Path(__file__).with_name("smp_deeplabv3plus.py")), "fit", *given, threads=options.threads)
    else:
        run("-m", "lightning_atrous", "fit", *given, threads=options.threads)
    found = {row.what: last_scores(place)}
    if row.also_at_8:
        checkpoint = str(place / "checkpoints" / "last.ckpt")
        scored = ("--ckpt_path", checkpoint, "--eval_output_stride", "8", "--trainer.logger", "csv")
        run("-m", "lightning_atrous", "validate", *given, *scored, threads=options.threads)
        found[f"{row.what}, scored at stride 8"] = last_scores(place)
    (place / SCORES).write_text(json.dumps(found, indent=1))


def write(options: argparse.Namespace) -> None:
    """The table of all runs that are there."""
    found: dict[str, dict[str, float]] = {}
    for name in ROWS:
        path = options.runs / name / SCORES
        if path.exists():
            found |= json.loads(path.read_text())
    options.output.write_text("\n".join([introduction(options), *table(found), ""]), encoding="utf-8")
    print(options.output.read_text())


if __name__ == "__main__":
    main()
