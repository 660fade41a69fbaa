"""Training samples a second on one core: torchvision's transforms as people write them, and ours, side by side.

python benchmarks/data.py OUT.md [--root CITYSCAPES] [--rounds 15] [--threads 1]

Pairs of PNG files of 2048 × 1024 pixels: those of Cityscapes' training split or else drawn ones, smooth shapes with
the noise of a sensor, which compress as its photographs do. Both pipelines read a pair, scale it by 0.5 to 2, cut
512 × 1024 out of it, flip it and change its colours, make a batch of 8 and normalise it: theirs every sample, ours the
batch, as the model does. Every round runs both over the same 8 pairs, one after the other, in an order that alternates.
Time is what the process spends on its core, whoever else is at work on the machine; medians over the rounds, and the
median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import default_collate
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_atrous import __version__
from lightning_atrous.data import Cityscapes
from lightning_atrous.data.base import FileDataset, FilePair, collate
from lightning_atrous.data.cityscapes import CITYSCAPES, LABEL_IDS
from lightning_atrous.images import RGB, read_mask, write_png
from lightning_atrous.layers import Normalize
from lightning_atrous.transforms import GREY, Augment, distort
from lightning_atrous.types import Preprocess

HEIGHT, WIDTH, CROP, BATCH = 1024, 2048, (512, 1024), 8
PREPROCESS = Preprocess()

THEIRS = {
    "scale": v2.ScaleJitter((HEIGHT, WIDTH), scale_range=(0.5, 2.0)),
    "crop": v2.RandomCrop(CROP, pad_if_needed=True, fill={tv_tensors.Image: GREY, tv_tensors.Mask: 255}),
    "flip": v2.RandomHorizontalFlip(),
    "colours": v2.RandomPhotometricDistort(),
    "normalise": v2.Compose(
        [
            v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
            v2.Normalize(list(PREPROCESS.mean), list(PREPROCESS.std)),
        ]
    ),
}
ROWS = ("image", "mask", "scale", "crop", "flip", "colours", "collate", "normalise")


class Clock(Counter[str]):
    """Seconds of this process in each stage."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        self[name] += time.process_time() - begun


def theirs(pairs: list[FilePair]) -> Clock:
    """One batch by PIL and torchvision."""
    clock, samples = Clock(), []
    table = np.zeros(256, np.uint8)
    table[[label % 256 for label in LABEL_IDS]] = list(LABEL_IDS.values())
    for pair in pairs:
        with clock.stage("image"):
            image = v2.functional.to_image(Image.open(pair.image).convert("RGB"))
        with clock.stage("mask"):
            mask = tv_tensors.Mask(torch.from_numpy(table[np.array(Image.open(pair.mask))]))
        for name, transform in THEIRS.items():
            with clock.stage(name):
                image, mask = transform(image, mask)
        samples.append((image.as_subclass(torch.Tensor), mask.as_subclass(torch.Tensor)))
    with clock.stage("collate"):
        default_collate(samples)
    return clock


def ours(pairs: list[FilePair]) -> Clock:
    """One batch by the parts of the data module, and the model's own normalisation."""
    clock, samples, normalize = Clock(), [], Normalize(PREPROCESS)
    augment, table = Augment(CROP, distort=0), FileDataset(pairs, CITYSCAPES, label_map=LABEL_IDS).table
    for pair in pairs:
        with clock.stage("mask"):
            mask = torch.from_numpy(table(read_mask(pair.mask), pair.name))

        def read(rows: slice, columns: slice, path: Path = pair.image) -> torch.Tensor:
            with clock.stage("image"):
                return RGB.window(path, rows, columns)[0].as_subclass(torch.Tensor)

        before = clock["image"]
        with clock.stage("crop"):  # scales and flips too
            sample = augment.reading(mask, read, name=pair.name)
        clock["crop"] -= clock["image"] - before
        with clock.stage("colours"):
            sample["image"] = tv_tensors.Image(distort(sample["image"].as_subclass(torch.Tensor), 0.5))
        samples.append(sample)
    with clock.stage("collate"):
        batch = collate(samples)
    with clock.stage("normalise"):
        normalize(batch["image"])
        batch["mask"].long()
    return clock


def drawn(folder: Path, number: int) -> list[FilePair]:
    """Pairs of a picture and its labels, drawn by their number alone."""
    pairs = []
    for index in range(number):
        rng = np.random.default_rng(index)
        pair = FilePair(str(index), folder / f"{index}.png", folder / f"{index}_labels.png")
        labels = rng.integers(-1, 34, (16, 32)).astype(np.uint8).repeat(HEIGHT // 16, 0).repeat(WIDTH // 32, 1)
        write_png(pair.mask, np.where(labels == 255, np.uint8(0), labels))
        coarse = Image.fromarray(rng.integers(0, 256, (32, 64, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.float32)
        noise = rng.normal(0, 1.2, (HEIGHT, WIDTH, 1)) + rng.normal(0, 0.7, (HEIGHT, WIDTH, 3))
        Image.fromarray((smooth + noise).clip(0, 255).round().astype(np.uint8)).save(pair.image)
        pairs.append(pair)
    return pairs


def table(rounds: list[dict[str, Clock]]) -> list[str]:
    """Milliseconds a sample, stage by stage, and samples a second."""

    def per_sample(seconds: list[float]) -> float:
        return statistics.median(seconds) / BATCH

    lines = ["| ms a sample | torchvision | ours |", "|---|---|---|"]
    for stage in ROWS:
        taken = [per_sample([clocks[name][stage] for clocks in rounds]) for name in ("theirs", "ours")]
        lines.append(f"| {stage} | {' | '.join(f'{1000 * each:.1f}' if each else '' for each in taken)} |")
    theirs_, ours_, loading = (
        [sum(clocks[name].values()) - (clocks[name]["normalise"] if rest else 0) for clocks in rounds]
        for name, rest in (("theirs", False), ("ours", False), ("ours", True))
    )
    lines.append(f"| all | {1000 * per_sample(theirs_):.1f} | {1000 * per_sample(ours_):.1f} |")
    lines.append(f"| samples a second | {1 / per_sample(theirs_):.1f} | {1 / per_sample(ours_):.1f} |")
    ratio, ratio_of_loading = (
        statistics.median(a / b for a, b in zip(theirs_, each, strict=True)) for each in (ours_, loading)
    )
    verdict = (
        f"Ours takes **{ratio:.2f} times** as many samples a second; **{ratio_of_loading:.2f} times** where an "
        "accelerator normalises them, which is no work of the loader's."
    )
    return [*lines, "", verdict]


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--root", type=Path, help="the folder with leftImg8bit and gtFine")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    forms = {"theirs": theirs, "ours": ours}
    rounds: list[dict[str, Clock]] = []
    with tempfile.TemporaryDirectory() as folder:
        if options.root:
            pairs = list(Cityscapes(options.root).build("train").pairs[:BATCH])
        else:
            pairs = drawn(Path(folder), BATCH)
        for number in range(options.rounds + 1):
            names = list(forms)[:: 1 if number % 2 else -1]
            rounds.append({name: forms[name](pairs) for name in names})
        size = statistics.mean(pair.image.stat().st_size for pair in pairs) / 1e6
    pictures = "photographs" if options.root else "drawn pictures"
    made = (
        f"Made by `benchmarks/data.py` on {datetime.date.today()} with lightning-atrous {__version__}, torchvision "
        f"{torchvision.__version__}, Pillow {PIL.__version__} and torch {torch.__version__} on "
        f"{platform.processor() or platform.machine()}, --threads {options.threads}: {BATCH} {pictures} of "
        f"{size:.1f} MB, {options.rounds} rounds of both in turn; medians."
    )
    lines = ["# Training samples a second and core", "", made, "", *table(rounds[1:])]  # the first round warms up
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
