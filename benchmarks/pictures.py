"""The pictures in `docs/`: predictions on the shapes, and the learning curve of a run.

python benchmarks/pictures.py predictions runs/quickstart/checkpoints/best.ckpt docs/quickstart.png
python benchmarks/pictures.py curve runs/camvid/metrics.csv docs/camvid.svg
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import lightning_atrous
from lightning_atrous.data.shapes import ShapesDataset


def predictions(checkpoint: Path, output: Path, *, columns: int = 8, scale: int = 2) -> None:
    """Validation images, their masks, and what the network says, one below the other."""
    task = lightning_atrous.load(checkpoint)
    dataset = ShapesDataset("val", columns)
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(task.classes)] = task.classes.palette
    colours[task.classes.ignore_index] = 255
    stacks = []
    for index in range(columns):
        sample = dataset[index]
        image = torch.as_tensor(sample["image"])
        predicted = task.model.predict(image[None])[0]
        tiles = (image.permute(1, 2, 0).numpy(), colours[sample["mask"].numpy()], colours[predicted.numpy()])
        stacks.append(np.vstack([np.pad(tile, ((0, 2), (0, 2), (0, 0)), constant_values=255) for tile in tiles]))
    grid = Image.fromarray(np.hstack(stacks))
    grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST).save(output, optimize=True)


def curve(metrics: Path, output: Path, *, width: int = 640, height: int = 320) -> None:
    """Validation mIoU and training loss over the steps, as an SVG that needs nothing."""
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    series = {
        "val/miou": ("#0072b2", "validation mIoU"),
        "train/loss": ("#d55e00", "training loss"),
    }
    last = max(int(row["step"]) for row in rows)
    left, right, top, bottom = 44, 12, 28, 34
    across, down = width - left - right, height - top - bottom
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    high = max(1.0, *(float(row["train/loss"]) for row in rows if row.get("train/loss")))
    for i in range(6):
        y = top + down * (1 - i / 5)
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{high * i / 5:.1f}</text>')
        x = left + across * i / 5
        parts.append(f'<text x="{x:.1f}" y="{height - 14}" text-anchor="middle">{round(last * i / 5)}</text>')
    for number, (name, (colour, label)) in enumerate(series.items()):
        points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
        line = " ".join(f"{left + across * s / last:.1f},{top + down * (1 - v / high):.1f}" for s, v in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{left + 8 + 150 * number}" y="18" fill="{colour}">{label}</text>')
    parts.append(f'<text x="{width - right}" y="{height - 2}" text-anchor="end" fill="#666">steps</text></svg>')
    output.write_text("\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("predictions", "curve"))
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    {"predictions": predictions, "curve": curve}[options.what](options.source, options.output)


if __name__ == "__main__":
    main()
