"""Which networks take output stride 16 and 8, by which method, how exactly; and what timm and SMP give.

python benchmarks/support.py docs/support.md [NAME ...]

Every network of `architectures.txt` (one at least of each of timm's families with features at a stride beyond 16), in
float64, with weights, BN statistics and affine drawn at random. What is measured is the largest difference between
the dilated network's maps, on the grid of the strided network's, and those, over their largest value. SMP's own
encoders come after them.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn

from lightning_atrous import __version__
from lightning_atrous.dilation.probe import probe
from lightning_atrous.dilation.proof import calibrate, channels_first, drawn, relative_error, run
from lightning_atrous.support import EXACT, STRIDES, Support, support


@dataclass
class Row:
    """One network's."""

    ours: Support
    dense: Support
    """By `method="dilate"`, asked for by name."""
    timms: dict[int, str] = field(default_factory=dict)
    smps: dict[int, str] = field(default_factory=dict)


def measure(name: str) -> Row:
    """One network at both strides: ours, timm's own option, and SMP's encoder over it."""
    row = Row(support(name), Support(name))
    if any(method.startswith("phases") for method in row.ours.methods.values()):
        row.dense = support(name, method="dilate")
    try:
        net = timm.create_model(name, features_only=True, pretrained=False)
        strided, image, layouts = reference(net)
    except (ValueError, RuntimeError):  # a network that takes no size that it could be probed at
        return row
    for stride in STRIDES:
        options: dict[str, Any] = {"features_only": True, "pretrained": False, "output_stride": stride}
        row.timms[stride] = theirs(partial(timm.create_model, name, **options), strided, image, layouts, stride)
        row.smps[stride] = theirs(partial(TimmInSMP, name, stride), strided, image, layouts, stride)
    return row


class TimmInSMP(nn.Module):
    """SMP's encoder over a network of timm."""

    def __init__(self, name: str, output_stride: int) -> None:
        super().__init__()
        self.encoder = smp.encoders.get_encoder(f"tu-{name}", weights=None, output_stride=output_stride)

    def load_state_dict(self, state: Any, *args: Any, **options: Any) -> Any:
        """Into the network within."""
        return self.encoder.model.load_state_dict(state, *args, **options)

    def forward(self, image: Tensor) -> list[Tensor]:
        """The last map."""
        return [self.encoder(image)[-1]]


def reference(net: nn.Module) -> tuple[nn.Module, Tensor, tuple[bool, ...]]:
    """The strided network with drawn weights, an image for it, and the layouts of its maps."""
    seen = probe(net, 3)
    generator = torch.Generator().manual_seed(0)
    strided = copy.deepcopy(net, drawn(net, generator, torch.float64))
    image = torch.empty(1, 3, *seen.size, dtype=torch.float64).uniform_(-2, 2, generator=generator)
    calibrate(strided, image, generator)
    return strided, image, seen.channels_last


def theirs(build: Any, strided: nn.Module, image: Tensor, layouts: tuple[bool, ...], stride: int) -> str:
    """What another's option gives: exact, wrong (by how much), or why not."""
    try:
        own = build().double()
        own.load_state_dict(strided.state_dict())
        dense, expected = run(own, image), run(strided, image)
        dense, expected = channels_first(dense, layouts[-len(dense) :]), channels_first(expected, layouts)
    except Exception as error:  # whatever a network does with an option that it does not have
        return f"refused ({type(error).__name__})"
    reached = round(image.shape[-1] / dense[-1].shape[-1])
    if reached > stride:
        return f"ignored: stride {reached}"
    expected = expected[-len(dense) :]
    steps = [max(round(d.shape[-1] / s.shape[-1]), 1) for d, s in zip(dense, expected, strict=True)]
    worst = max(relative_error(d[..., ::k, ::k], s) for d, s, k in zip(dense, expected, steps, strict=True))
    return "exact" if worst <= EXACT else f"differs by {worst:.0e}"


def smps_own(name: str) -> dict[int, str]:
    """One of SMP's own encoders at both strides."""

    class Last(nn.Module):
        def __init__(self, stride: int) -> None:
            super().__init__()
            self.encoder = smp.encoders.get_encoder(name, weights=None, output_stride=stride)

        def forward(self, image: Tensor) -> Tensor:
            return self.encoder(image)[-1]

    try:
        strided, image, layouts = reference(Last(32))
    except (ValueError, RuntimeError) as error:
        return dict.fromkeys(STRIDES, f"refused ({type(error).__name__})")
    return {stride: theirs(partial(Last, stride), strided, image, layouts, stride) for stride in STRIDES}


INTRODUCTION = """\
# Which networks take which output stride

{count} networks of timm, one at least of each family that gives features at a stride beyond 16. Made by
`benchmarks/support.py` on {date} with lightning-atrous {ours}, timm {timm}, segmentation-models-pytorch {smp},
torch {torch}: float64, weights, BN statistics and affine drawn at random, for the forward that runs. Exact is what
differs by at most {exact:.0e} of the largest value at every position of the strided network's grid. For a network that
is not here: `lightning-atrous support NETWORK`.

*dilate* and *phases*, and the grids on which they take statistics, are told in [dilation.md](dilation.md). *Whole
network* is phases at their most expensive: it runs on shifted images as it is. *By name* is what `method: dilate` gives
where the default is phases: "dense statistics" is exact but for squeeze-excite, group norm and the like, which see the
denser map. timm's and SMP's own options take dense statistics without saying so, a part of what they differ by. A
network that takes images of *one size* alone can be dilated by itself, but is refused as a backbone.

| | exact at 16 | exact at 8 | at both |
|---|---|---|---|
"""


def counts(what: str, said: list[dict[int, bool]]) -> str:
    """A line of the summary."""
    at = [sum(row[stride] for row in said) for stride in STRIDES]
    return f"| {what} | {at[0]} | {at[1]} | {sum(all(row.values()) for row in said)} |"


def page(rows: list[Row], encoders: dict[str, dict[int, str]]) -> str:
    """The Markdown."""
    ours = [row.ours for row in rows]
    lines = []
    for method in ("dilate", "phases"):
        said = [{s: row.methods.get(s, "").partition(",")[0] == method for s in STRIDES} for row in ours]
        lines.append(counts(f"by {method}", said))
    exact = [{s: row.errors.get(s, 1) <= EXACT for s in STRIDES} for row in ours]
    lines.append(counts("**lightning-atrous**", exact))
    said = [{s: yes and 0 not in row.refusals for s, yes in at.items()} for row, at in zip(ours, exact, strict=True)]
    lines.append(counts("of those, backbones for images of any size", said))
    for who, theirs in (("timm's own", [row.timms for row in rows]), ("SMP over timm", [row.smps for row in rows])):
        lines.append(counts(who, [{s: own.get(s) == "exact" for s in STRIDES} for own in theirs]))
        said = [{s: "differs" in own.get(s, "") for s in STRIDES} for own in theirs]
        lines.append(counts(f"{who}, accepted, and differs", said))
    said = [{s: own[s] == "exact" for s in STRIDES} for own in encoders.values()]
    lines.append(counts(f"SMP's {len(encoders)} own encoders", said))
    inexact = [row.ours.name for row in rows for error in row.ours.errors.values() if error > EXACT]
    worst = max((error for row in rows for error in row.ours.errors.values()), default=0)
    lines += [
        "",
        f"Accepted here and not exact: {', '.join(inexact) or 'none'}. Largest error accepted: {worst:.0e}.",
        "",
        "| network | 16 | 8 | largest error | by name, 16 | by name, 8 | timm's 16 | timm's 8 | SMP's 16 | SMP's 8 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = f"{max(row.ours.errors.values()):.0e}" if row.ours.errors else ""
        named = [row.dense.word(s).removeprefix("dilate, ") if row.dense.native else "" for s in STRIDES]
        others = [kind.get(s, "–") for kind in (row.timms, row.smps) for s in STRIDES]
        cells = [row.ours.name, *map(row.ours.word, STRIDES), error, *named, *others]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Refusals", ""]
    lines += [f"- {refusal}" for row in rows for refusal in row.ours.refusals.values()]
    lines += ["", "## SMP's own encoders", "", "| encoder | 16 | 8 |", "|---|---|---|"]
    lines += [f"| {name} | {own[16]} | {own[8]} |" for name, own in encoders.items()]
    introduction = INTRODUCTION.format(
        count=len(rows),
        date=datetime.date.today(),
        ours=__version__,
        timm=timm.__version__,
        smp=smp.__version__,
        torch=torch.__version__,
        exact=EXACT,
    )
    return introduction + "\n".join(lines) + "\n"


SMPS_OWN = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "timm-resnest14d",
    "timm-res2net50_26w_4s",
    "timm-regnetx_002",
    "timm-regnety_002",
    "timm-gernet_s",
    "timm-skresnet18",
    "se_resnet50",
    "se_resnext50_32x4d",
    "senet154",
    "densenet121",
    "inceptionresnetv2",
    "inceptionv4",
    "efficientnet-b0",
    "timm-efficientnet-b0",
    "timm-mobilenetv3_small_075",
    "mobilenet_v2",
    "dpn68",
    "vgg11",
    "vgg11_bn",
    "xception",
    "mit_b0",
    "mobileone_s0",
)


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    names = options.names or (Path(__file__).parent / "architectures.txt").read_text().split()
    warnings.filterwarnings("ignore")
    encoders = {} if options.names else {name: smps_own(name) for name in SMPS_OWN}
    rows = []
    for name in names:
        rows.append(measure(name))
        ours, dense = ([kind.word(s) for s in STRIDES] for kind in (rows[-1].ours, rows[-1].dense))
        print(name, ours, rows[-1].ours.errors, dense, rows[-1].timms, rows[-1].smps, flush=True)
        options.output.write_text(page(rows, encoders), encoding="utf-8")


if __name__ == "__main__":
    main()
