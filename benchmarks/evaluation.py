"""Evaluation of an image of Cityscapes' size: as it is commonly done, and ours, side by side.

python benchmarks/evaluation.py OUT.md [--rounds 15] [--threads 2]

Two tables, in float32 on the CPU, of one image of 1024×2048 and 19 classes. *Update*: torchmetrics'
`MulticlassJaccardIndex` with its defaults, and `SegmentationScore`, given the same logits of full size or the same
class map. *Evaluation*: from logits as a head gives them; `F.interpolate`, argmax and torchmetrics' metric, and
`SegmentationScore`.

Random logits are normal and independent, and so are the labels, a tenth of them ignored. Smooth ones stand for those
of a trained network. Segments are the nearest of 400 random points, and the classes of these are drawn by rank, the
r-th as often as 1/r; a class has 8 in its segments and 0 elsewhere, averaged over 5×5 pixels of the logits, to which
normal noise is added, averaged over 9×9, with a deviation of 1. Labels are those segments at full size; the last tenth
of the rows is ignored.

Time: every round runs both once, in an order that rotates; the medians, and the median of the rounds' ratios
theirs/ours with its 95 % interval by order statistics. Memory: by how much one call raises the largest resident size of
a fresh process that already holds logits and target; on Linux, and with an allocator that gives back what is freed, so
that nothing is taken from what the making of the inputs has left.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_atrous import __version__
from lightning_atrous.metrics import SegmentationScore
from lightning_atrous.types import ClassInfo

SIZE = (1024, 2048)
K = 19
CLASSES = ClassInfo(tuple(f"class{i}" for i in range(K)))


class Case(NamedTuple):
    """One line of a table: what is given, and whether its logits are smooth."""

    given: str
    stride: int
    smooth: bool

    @property
    def name(self) -> str:
        """In the table."""
        return f"{self.given}, {'smooth' if self.smooth else 'random'}"


UPDATES = [Case(given, 1, smooth) for given in ("logits of full size", "class map") for smooth in (False, True)]
EVALUATIONS = [
    Case(f"logits 1×19×{SIZE[0] // stride}×{SIZE[1] // stride}", stride, smooth)
    for stride in (4, 16)
    for smooth in (False, True)
]
CASES = {case.name: case for case in UPDATES + EVALUATIONS}


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Prediction and target."""
    torch.manual_seed(0)
    small = (SIZE[0] // case.stride, SIZE[1] // case.stride)
    if case.smooth:
        points, kinds = torch.rand(400, 2), torch.multinomial(1 / torch.arange(1.0, K + 1), 400, replacement=True)
        labels = nearest(points, kinds, small)
        logits = 8 * blurred(F.one_hot(labels, K).permute(2, 0, 1)[None].float(), 5)
        logits += 9 * blurred(torch.randn_like(logits), 9)
        target = nearest(points, kinds, SIZE)[None]
        target[:, -SIZE[0] // 10 :] = 255
    else:
        logits, target = torch.randn(1, K, *small), torch.randint(K, (1, *SIZE))
        target[torch.rand(target.shape) < 0.1] = 255
    return (logits.argmax(1) if case.given == "class map" else logits), target


def nearest(points: Tensor, kinds: Tensor, size: tuple[int, int]) -> Tensor:
    """Of every pixel the kind of the point that is nearest to it: ``(H, W)``."""
    columns = (torch.arange(size[1]) + 0.5) / size[1] * 2
    rows = []
    for y in (torch.arange(size[0]) + 0.5) / size[0]:
        distance = (points[:, :1] - y) ** 2 + (2 * points[:, 1:] - columns) ** 2
        rows.append(kinds[distance.argmin(0)])
    return torch.stack(rows)


def blurred(x: Tensor, width: int) -> Tensor:
    """The mean of a square of pixels."""
    return F.avg_pool2d(x, width, stride=1, padding=width // 2, count_include_pad=False)


def theirs() -> Callable[[Tensor, Tensor], None]:
    """Scores at full size, argmax, torchmetrics; what has the size already goes to torchmetrics as it is."""
    metric = MulticlassJaccardIndex(num_classes=K, ignore_index=255)

    def evaluate(prediction: Tensor, target: Tensor) -> None:
        if prediction.shape[-2:] != target.shape[-2:]:
            prediction = F.interpolate(prediction, SIZE, mode="bilinear", align_corners=False).argmax(1)
        metric.update(prediction, target)

    return evaluate


def ours() -> Callable[[Tensor, Tensor], None]:
    """All of it."""
    return SegmentationScore(CLASSES).update


FORMS = {"theirs": theirs, "ours": ours}


def once(form: Callable[[Tensor, Tensor], None], prediction: Tensor, target: Tensor) -> float:
    """Seconds of one image."""
    begun = time.perf_counter()
    form(prediction, target)
    return time.perf_counter() - begun


def extra_memory(form: str, case: Case) -> float:
    """MiB by which a call raises the peak of this process."""
    prediction, target = inputs(case)
    call = FORMS[form]()
    call(prediction[..., :8, :8].contiguous(), target[:, :8, :8].contiguous())  # what a first call sets up
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak becomes what is resident now
    before = peak()
    call(prediction, target)
    return peak() - before


def peak() -> float:
    """The largest resident size in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def in_fresh_process(form: str, case: Case, threads: int) -> float:
    """Extra MiB."""
    command = [sys.executable, __file__, "-", "--threads", str(threads), "--form", form, "--case", case.name]
    giving_back = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    return float(subprocess.check_output(command, text=True, env=os.environ | giving_back))


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The median, and the order statistics that hold it in 95 of 100 cases."""
    ordered, n = sorted(ratios), len(ratios)
    low = max(round(n / 2 - 1.96 * math.sqrt(n) / 2), 1) - 1
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


def row(case: Case, options: argparse.Namespace) -> str:
    """One line of a table."""
    memory = {form: in_fresh_process(form, case, options.threads) for form in FORMS}
    prediction, target = inputs(case)
    calls = {form: make() for form, make in FORMS.items()}
    taken: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(options.rounds + 2):
        for form in list(FORMS)[:: 1 if number % 2 else -1]:  # who runs after whom makes a difference
            seconds = once(calls[form], prediction, target)
            if number >= 2:  # the first ones warm up
                taken[form].append(seconds)
    middle, low, high = interval([a / b for a, b in zip(taken["theirs"], taken["ours"], strict=True)])
    cells = [
        *(f"{1000 * statistics.median(taken[form]):.1f} ms" for form in FORMS),
        f"**{middle:.1f}** ({low:.1f}–{high:.1f})",
        *(f"{memory[form]:.0f} MiB" for form in FORMS),
        f"{memory['ours'] / memory['theirs']:.2f}",
    ]
    line = f"| {' | '.join((case.name, *cells))} |"
    print(line, flush=True)
    return line


def table(title: str, cases: list[Case], options: argparse.Namespace) -> list[str]:
    """A section of the page."""
    head = "| given | theirs | ours | theirs / ours | theirs, extra peak | ours, extra peak | ours / theirs |"
    return [f"## {title}", "", head, "|---|---|---|---|---|---|---|", *(row(case, options) for case in cases), ""]


def main() -> None:
    """Run the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--form", choices=FORMS, help="print the extra MiB of this form alone, for --case")
    parser.add_argument("--case", choices=CASES)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.form:
        print(extra_memory(options.form, CASES[options.case]))
        return
    made = (
        f"Made by `benchmarks/evaluation.py` on {datetime.date.today()} with lightning-atrous {__version__}, torch "
        f"{torch.__version__}, torchmetrics {torchmetrics.__version__}, {options.threads} threads, {options.rounds} "
        f"rounds of both in rotation: one image of {SIZE[0]}×{SIZE[1]} and {K} classes, float32, on the CPU. Medians, "
        f"and of the ratios the median with its 95 % interval. The script says what *random* and *smooth* are."
    )
    update = table("Update: MulticlassJaccardIndex, and SegmentationScore", UPDATES, options)
    evaluation = table("Evaluation: interpolate, argmax, MulticlassJaccardIndex, and ours", EVALUATIONS, options)
    options.output.write_text("\n".join(["# Evaluation", "", made, "", *update, *evaluation]), encoding="utf-8")


if __name__ == "__main__":
    main()
