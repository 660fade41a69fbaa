"""Cross-entropy on raised logits: all scores at once, and ours strip by strip, side by side.

python benchmarks/loss.py OUT.md [--rounds 7] [--threads N]

For each shape the value and the gradient with respect to the logits, in float32 on the CPU. Time: every round runs both
forms once, in an order that rotates; the medians, and the median of the rounds' ratios ours/plain. Memory: by how much
one call raises the largest resident size of a fresh process that already holds logits and target.
"""

from __future__ import annotations

import argparse
import datetime
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_atrous import __version__
from lightning_atrous.layers import resize
from lightning_atrous.losses import raised_cross_entropy

SHAPES = ((8, 19, 128, 512), (4, 150, 128, 512))
"""Batch, classes, and the sides of logits and labels: Cityscapes' classes and ADE20K's, from stride 4."""


def plain(logits: Tensor, target: Tensor) -> Tensor:
    """All scores at once."""
    return F.cross_entropy(resize(logits, target.shape[-2:]), target, ignore_index=255, reduction="sum")


def ours(logits: Tensor, target: Tensor) -> Tensor:
    """A strip of rows at a time."""
    return raised_cross_entropy(logits, target, class_weights=None, ignore_index=255, label_smoothing=0.0)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"plain": plain, "ours": ours}


def pair(batch: int, classes: int, small: int, large: int) -> tuple[Tensor, Tensor]:
    """Random logits and labels, a tenth of them ignored."""
    torch.manual_seed(0)
    target = torch.randint(classes, (batch, large, large))
    target[torch.rand(target.shape) < 0.1] = 255
    return torch.randn(batch, classes, small, small, requires_grad=True), target


def once(form: str, logits: Tensor, target: Tensor) -> float:
    """Seconds of one value and gradient."""
    begun = time.perf_counter()
    torch.autograd.grad(FORMS[form](logits, target), logits)
    return time.perf_counter() - begun


def extra_memory(form: str, shape: tuple[int, ...]) -> float:
    """MiB by which a call raises the peak of this process, which has done nothing else."""
    once(form, *pair(1, 2, 4, 8))  # whatever the first call of all sets up
    logits, target = pair(*shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once(form, logits, target)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def in_fresh_processes(shape: tuple[int, ...], threads: int) -> dict[str, float]:
    """Extra MiB of each form. A process begins with its parent's peak, which therefore must be small as yet."""
    command = [sys.executable, __file__, "-", "--threads", str(threads), "--shape", *map(str, shape)]
    return {form: float(subprocess.check_output([*command, "--form", form], text=True)) for form in FORMS}


def row(shape: tuple[int, ...], memory: dict[str, float], rounds: int) -> str:
    """One line of the table."""
    logits, target = pair(*shape)
    forms = list(FORMS)
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(rounds + 1):
        for form in forms[number % 2 :] + forms[: number % 2]:
            taken = once(form, logits, target)
            if number:  # the first round warms up
                seconds[form].append(taken)
    ratio = statistics.median(b / a for a, b in zip(seconds["plain"], seconds["ours"], strict=True))
    times = [f"{1000 * statistics.median(seconds[form]):.0f} ms" for form in forms]
    sizes = [f"{memory[form]:.0f} MiB" for form in forms]
    batch, classes, small, large = shape
    what = f"{batch} × {classes} × {small}² → {large}²"
    return (
        f"| {what} | {' | '.join((*times, f'**{ratio:.2f}**', *sizes))} | **{memory['ours'] / memory['plain']:.2f}** |"
    )


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--form", choices=FORMS, help="print the extra MiB of this form alone, for --shape")
    parser.add_argument("--shape", type=int, nargs=4)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.form:
        print(extra_memory(options.form, options.shape))
        return
    memory = [in_fresh_processes(shape, options.threads) for shape in SHAPES]
    made = (
        f"Made by `benchmarks/loss.py` on {datetime.date.today()} with lightning-atrous {__version__}, torch "
        f"{torch.__version__}, {options.threads} threads, {options.rounds} rounds of both in rotation; medians."
    )
    lines = [
        "# The loss on raised logits",
        "",
        made,
        "",
        "| logits → labels | plain | ours | ours / plain | plain, extra peak | ours, extra peak | ours / plain |",
        "|---|---|---|---|---|---|---|",
        *(row(shape, extra, options.rounds) for shape, extra in zip(SHAPES, memory, strict=True)),
    ]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
