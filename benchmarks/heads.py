"""Every head in docs/heads.md: what it is, what its options mean, what it costs.

python benchmarks/heads.py docs/heads.md [--rounds 3] [--device cuda] [--names NAME ...]

Words, types and defaults are those of the docstrings and signatures. The costs are on resnet50 at output stride 16, or
at 8 or 32 where a head refuses 16. Times are of a training step, backbone included, in units of fcn's at the same
stride: every round runs all heads once, in an order that rotates, and the median of the rounds' ratios is shown.
`--rounds 0` leaves them out.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from output_stride import processor, synchronize
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_atrous import __version__
from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.heads import HEADS, Head
from lightning_atrous.signatures import options_of, summary_of
from lightning_atrous.types import FeatureInfo

BACKBONE = "resnet50"
STRIDES = (16, 8, 32)
CLASSES = 19
BASELINE = "fcn"

PREFACE = """\
# Heads

A head turns a backbone's feature maps into a score for every class, at its own stride. It owns no loss, no metric and
no resizing to the image. It knows each level's channels and reduction. When the backbone's output stride changes it
follows, or says why it cannot: its weights stay, and its atrous rates keep their reach in the image.

In a config `head: {class_path: NAME, init_args: {OPTION: VALUE}}`, typed `--model.head NAME --model.head.OPTION VALUE`,
in Python `create_head(NAME, backbone.info, classes, OPTION=VALUE)`. `lightning-atrous list heads` tells the same as
this page.

## Choosing one

- `deeplabv3plus` is the default: context from the last map, edges from the one of stride 4.
- `fcn` is what to compare with, and with `level: -2` the usual auxiliary head.
- Most heads that *read* the last level alone take any backbone. One that needs a level which the backbone does not
  give says so: plain vision transformers have levels of one stride alone, networks that begin with patches none of 2.
- Logits of a small stride keep what is thin, and cost what large maps cost. Behind a light backbone a heavy head is
  most of the step: look at the multiply-adds beside those of the backbone.
"""

OWN = '''\
## A head of your own

Subclass `Head`, take `(info, num_classes, *, options)`, give logits. The command line checks options by their types,
and `lightning-atrous list heads NAME` shows what stands of them under `Args`:

```python
# my_package.py
from torch import nn

from lightning_atrous.heads import Head


class Linear(Head):
    """A 1×1 on the last map.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        dropout: Before the scores.
    """

    def __init__(self, info, num_classes: int, *, dropout: float = 0.1):
        super().__init__(info, num_classes)
        self.layers = nn.Sequential(nn.Dropout(dropout), nn.Conv2d(info[-1].channels, num_classes, 1))

    def forward(self, features):
        return self.layers(features[-1])
```

What depends on the stride, such as atrous rates, is to follow in `retarget(info)`, or a ValueError there says why it
cannot. Name the class in your package's `pyproject.toml`; once that is installed, `linear` is a head like the others:

```toml
[project.entry-points."lightning_atrous.heads"]
linear = "my_package:Linear"
```

`check_head` tries it on networks of five kinds, at output strides of 8 to 32, at odd sizes, on batches of one, in
float32 and bfloat16, in training and evaluation, and raises an AssertionError that names what is wrong and where. It
returns the refusals, by case:

```python
# test_my_package.py
from lightning_atrous.testing import check_head
from my_package import Linear


def test_linear():
    assert check_head(Linear) == {}
```
'''


@dataclass
class Cost:
    """What one head takes, at the stride at which it was built."""

    head: Head
    output_stride: int
    reads: str
    logits: str
    parameters: int
    multiply_adds: int
    step: str = ""


def build(name: str, backbones: dict[int, TimmBackbone]) -> tuple[Head, int]:
    """The head, at the first stride that it takes."""
    refusals = []
    for output_stride, backbone in backbones.items():
        try:
            return HEADS[name](backbone.info, CLASSES), output_stride
        except ValueError as error:
            refusals.append(str(error))
    raise SystemExit(f"{name} takes no stride of {BACKBONE}: {'; '.join(refusals)}")


def cost(name: str, backbones: dict[int, TimmBackbone], options: argparse.Namespace) -> Cost:
    """Count in a forward pass without numbers; see what is read by where gradients arrive."""
    head, output_stride = build(name, backbones)
    info = backbones[output_stride].info
    counted = copy.deepcopy(head).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits = counted(maps(info, options.size))
    features = maps(info, options.size)
    for level in features:
        level.requires_grad_()
    counted(features).sum().backward()
    native = backbones[max(STRIDES)].info
    strides = [level.reduction for level, x in zip(native, features, strict=True) if x.grad is not None]
    return Cost(
        head,
        output_stride,
        ", ".join(map(str, strides)),
        f"{options.size / logits.shape[-1]:g}",
        sum(parameter.numel() for parameter in head.parameters()),
        counter.get_total_flops() // 2,
    )


def maps(info: tuple[FeatureInfo, ...], size: int) -> tuple[Tensor, ...]:
    """Features of an image of that size, without numbers."""
    shapes = [(1, level.channels, size // level.reduction, size // level.reduction) for level in info]
    return tuple(torch.empty(shape, device="meta") for shape in shapes)


def step(backbone: TimmBackbone, head: Head, image: Tensor) -> float:
    """Seconds of a forward and a backward pass."""
    synchronize(image)
    begun = time.perf_counter()
    head(backbone(image)).square().mean().backward()
    synchronize(image)
    taken = time.perf_counter() - begun
    backbone.zero_grad()
    head.zero_grad()
    return taken


def measure(costs: dict[str, Cost], backbones: dict[int, TimmBackbone], options: argparse.Namespace) -> None:
    """Fill in the time of a step, in units of the baseline's at the same stride."""
    contenders = {(name, c.output_stride): c.head.train() for name, c in costs.items()}
    for stride in {c.output_stride for c in costs.values()}:
        if (BASELINE, stride) not in contenders:
            contenders[BASELINE, stride] = HEADS[BASELINE](backbones[stride].info, CLASSES).train()
    for net in (*backbones.values(), *contenders.values()):
        net.to(options.device, memory_format=torch.channels_last).train()
    image = torch.randn(options.batch, 3, options.size, options.size, device=options.device)
    image = image.contiguous(memory_format=torch.channels_last)
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in contenders}
    for i in range(options.rounds + 1):
        order = list(contenders)[i % len(contenders) :] + list(contenders)[: i % len(contenders)]
        for name, stride in order:
            seconds = step(backbones[stride], contenders[name, stride], image)
            if i:  # the first round warms up
                taken[name, stride].append(seconds)
        print(f"round {i} of {options.rounds}", flush=True)
    for name, c in costs.items():
        pairs = zip(taken[name, c.output_stride], taken[BASELINE, c.output_stride], strict=True)
        c.step = f"{statistics.median(a / b for a, b in pairs):.2f}"


def table(costs: dict[str, Cost], backbones: dict[int, TimmBackbone], options: argparse.Namespace) -> list[str]:
    """The costs of all."""
    columns = ["head", "output stride", "reads", "logits at", "parameters", "multiply-adds"]
    columns += ["training step"] if options.rounds else []
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, c in costs.items():
        row = [f"[{name}](#{name})", str(c.output_stride), c.reads, c.logits]
        row += [f"{c.parameters / 1e6:.2f} M", f"{c.multiply_adds / 1e9:.2f} G", *([c.step] if options.rounds else [])]
        lines.append(f"| {' | '.join(row)} |")
    backbone = copy.deepcopy(backbones[STRIDES[0]]).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(torch.empty(1, 3, options.size, options.size, device="meta"))
    own = f"{BACKBONE} itself has {sum(p.numel() for p in backbone.parameters()) / 1e6:.2f} M parameters"
    return [*lines, "", f"{own} and, at output stride {STRIDES[0]}, {counter.get_total_flops() / 2e9:.2f} G."]


def introduction(options: argparse.Namespace) -> str:
    """What was counted and measured, where and when."""
    made = (
        f"Made by `benchmarks/heads.py` on {datetime.date.today()} with lightning-atrous {__version__}, timm "
        f"{timm.__version__}, torch {torch.__version__}: {BACKBONE}, one image of {options.size}×{options.size}, "
        f"{CLASSES} classes, options as they are by default. Parameters and multiply-adds are those of the head alone. "
        "*Reads* are the levels whose values go in, by their strides in the network as it comes; *logits at* a stride."
    )
    if not options.rounds:
        return made
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads of {processor()}"
    return (
        f"{made} *Training step* is the time of a forward and a backward pass of backbone and head together, in units "
        f"of {BASELINE}'s at the same output stride: the median over {options.rounds} rounds of all in rotation, batch "
        f"{options.batch}, float32, channels_last, on {where}."
    )


def section(name: str) -> list[str]:
    """One head in words."""
    cls = HEADS[name]
    lines = [f"### {name}", "", summary_of(cls), "", *([f"*{cls.paper}*", ""] if cls.paper else [])]
    options = options_of(cls)
    if not options:
        return lines
    lines += ["| option | type | default | |", "|---|---|---|---|"]
    for option in options:
        default = "required" if option.default is None else f"`{option.default}`"
        cells = (f"`{option.name}`", f"`{option.type}`", default, option.words)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return [*lines, ""]


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--names", nargs="*", default=list(HEADS))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    backbones = {
        stride: TimmBackbone(BACKBONE, output_stride=stride, pretrained=False).to(options.device) for stride in STRIDES
    }
    costs = {name: cost(name, backbones, options) for name in options.names}
    if options.rounds:
        measure(costs, backbones, options)
    lines = [PREFACE, "## What they cost", "", introduction(options), "", *table(costs, backbones, options), ""]
    lines += ["## The heads", ""]
    for name in options.names:
        lines += section(name)
    options.output.write_text("\n".join([*lines, OWN]), encoding="utf-8")


if __name__ == "__main__":
    main()
