"""The step at output stride 8: timm's own option and ours, side by side.

python benchmarks/output_stride.py docs/speed.md [--device cuda] [--rounds 15] [--names NAME ...]

Every round runs all contenders once, in an order that rotates, so that what else the machine does, and what the last
one has left of its caches, falls on all of them. For each network, precision and mode: the median time of every
contender, and the median of the rounds' ratios ours/timm with a 95 % interval (of the median, by order statistics).
Ours is what a user gets: `execution="auto"`, once `fastest` has measured. timm's network at its own stride of 32 is
there to compare with.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from lightning_atrous import __version__
from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.dilation.timing import fastest

NAMES = ("mobilenetv2_100", "mobilenetv3_large_100", "efficientnet_b0", "convnext_tiny", "resnet50", "regnety_008")
LIGHT = ("mobilenetv2_100", "efficientnet_b0", "convnext_tiny")
STRIDE = 8
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def timms_own(name: str) -> nn.Module | None:
    """timm's network with its own option, if it has one."""
    try:
        return timm.create_model(name, features_only=True, pretrained=False, output_stride=STRIDE)
    except (TypeError, AssertionError, NotImplementedError):
        return None


def once(net: nn.Module, image: Tensor, *, training: bool) -> float:
    """Seconds of one pass."""
    synchronize(image)
    begun = time.perf_counter()
    with torch.set_grad_enabled(training):
        last = net(image)[-1]
        if training:
            last.float().square().mean().backward()
            net.zero_grad()
    synchronize(image)
    return time.perf_counter() - begun


def synchronize(image: Tensor) -> None:
    """Wait for the accelerator."""
    if image.device.type != "cpu":
        torch.accelerator.synchronize(image.device)


def contenders(name: str) -> tuple[dict[str, nn.Module], TimmBackbone]:
    """By name; and ours, to be told which execution is the faster."""
    ours = TimmBackbone(name, output_stride=STRIDE, pretrained=False)
    strided = timm.create_model(name, features_only=True, pretrained=False)
    nets: dict[str, nn.Module] = {"timm": timms_own(name) or nn.Identity(), "ours": ours, "stride 32": strided}
    return {key: net for key, net in nets.items() if not isinstance(net, nn.Identity)}, ours


def measure(name: str, precision: str, *, training: bool, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds by contender, round by round."""
    nets, ours = contenders(name)
    size = (options.batch, 3, options.size, options.size)
    image = torch.randn(size, device=options.device).contiguous(memory_format=torch.channels_last)
    for net in nets.values():
        net.to(options.device, memory_format=torch.channels_last).train(training)
    enabled = precision != "fp32"
    with torch.autocast(torch.device(options.device).type, PRECISIONS[precision], enabled=enabled):
        for mode in ours.dilation.alternatives & {training}:
            ours.dilation.prefer(fastest(ours.dilation, image, training=mode) == "split", training=mode)
        taken: dict[str, list[float]] = {key: [] for key in nets}
        for i in range(options.rounds + 2):
            order = list(nets)[i % len(nets) :] + list(nets)[: i % len(nets)]  # who runs after whom makes a difference
            for key in order:
                seconds = once(nets[key], image, training=training)
                if i >= 2:
                    taken[key].append(seconds)
    execution = "split" if ours.dilation.prefers(training) and ours.dilation.alternatives else "dilated"
    taken[f"by {ours.dilation.method}" + (f", {execution}" if ours.dilation.method == "dilate" else "")] = []
    return taken


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """The median, and the order statistics that hold it in 95 of 100 cases."""
    ordered, n = sorted(ratios), len(ratios)
    low = max(round(n / 2 - 1.96 * math.sqrt(n) / 2), 1) - 1
    return statistics.median(ordered), ordered[low], ordered[n - 1 - low]


def section(precision: str, *, training: bool, options: argparse.Namespace) -> tuple[list[str], dict[str, float]]:
    """A table, and the median ratio of each network."""
    title = "training step" if training else "inference"
    lines = [f"## {precision}, {title}", "", "| network | how | timm's own | ours | stride 32 | ours / timm's own |"]
    lines += ["|---|---|---|---|---|---|"]
    found = {}
    for name in options.names:
        taken = measure(name, precision, training=training, options=options)
        *_, how = taken
        medians = {key: f"{1000 * statistics.median(values):.1f} ms" for key, values in taken.items() if values}
        ratio = "timm has none"
        if "timm" in taken:
            middle, low, high = interval([a / b for a, b in zip(taken["ours"], taken["timm"], strict=True)])
            ratio, found[name] = f"**{middle:.2f}** ({low:.2f} … {high:.2f})", middle
        row = [name, how, medians.get("timm", ""), medians["ours"], medians["stride 32"], ratio]
        lines.append(f"| {' | '.join(row)} |")
        print(precision, title, *row, flush=True)
    light = [found[name] for name in LIGHT if name in found]
    if light:
        times = 1 / statistics.geometric_mean(light)
        lines += ["", f"Geometric mean over {', '.join(LIGHT)}: **{times:.2f} times** as fast as timm's own."]
    return [*lines, ""], found


def processor() -> str:
    """What runs it."""
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return models[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def introduction(options: argparse.Namespace, where: str) -> str:
    """What was measured, where and when."""
    return (
        f"Made by `benchmarks/output_stride.py` on {datetime.date.today()} with lightning-atrous {__version__}, timm "
        f"{timm.__version__}, torch {torch.__version__}, on {where}: the backbone alone, images of {options.batch} × "
        f"3 × {options.size} × {options.size}, channels_last, {options.rounds} rounds of all in rotation. Medians, "
        "and of the ratios the median with its 95 % interval. *Ours* is `execution: auto`, *how* is what it chose; "
        "on networks with squeeze-excite timm's own takes dense statistics, ours those of the strided network."
    )


def main() -> None:
    """Run the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--names", nargs="*", default=list(NAMES))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads of {processor()}"
    lines = [f"# The speed of output stride {STRIDE}", "", introduction(options, where), ""]
    for precision in PRECISIONS:
        for training in (True, False):
            lines += section(precision, training=training, options=options)[0]
            options.output.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
