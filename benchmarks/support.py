"""Which timm networks take output stride 16 and 8, by which method, how exactly; and what timm's own option gives.

python benchmarks/support.py docs/support.md [NAME ...]

Every network of `architectures.txt` (one at least of each of timm's families with features at a stride beyond 16), in
float64, with weights, BN statistics and affine drawn at random. What is measured is the largest difference between
the dilated network's maps, on the grid of the strided network's, and those, over their largest value.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import warnings
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from lightning_atrous import __version__
from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.dilation.proof import calibrate, channels_first, drawn, relative_error, run

EXACT = 1e-8
STRIDES = (16, 8)


@dataclasses.dataclass
class Row:
    """One network's."""

    name: str
    ours: dict[int, str]
    errors: dict[int, float]
    timms: dict[int, str]
    refusals: list[str]


def measure(name: str) -> Row:
    """One network at both strides, ours and timm's own."""
    row = Row(name, {}, {}, {}, [])
    backbone = TimmBackbone(name, output_stride=_native(name), pretrained=False)
    probe = backbone.dilation._probe
    generator = torch.Generator().manual_seed(0)
    strided = copy.deepcopy(backbone.net, drawn(backbone.net, generator, torch.float64))
    image = torch.empty(1, 3, *probe.size, dtype=torch.float64).uniform_(-2, 2, generator=generator)
    calibrate(strided, image, generator)
    for stride in STRIDES:
        try:
            backbone.output_stride = stride
        except ValueError as error:
            row.ours[stride] = "refused"
            row.refusals.append(str(error))
        else:
            row.errors[stride] = max(backbone.dilation.errors(dtype=torch.float64))
            row.ours[stride] = f"{backbone.dilation.method}"
        row.timms[stride] = timms_own(name, stride, strided, image, probe.channels_last)
    return row


def timms_own(name: str, stride: int, strided: nn.Module, image: Tensor, layouts: tuple[bool, ...]) -> str:
    """What timm's own option gives: exact, wrong (by how much), or why not."""
    try:
        own = timm.create_model(name, features_only=True, pretrained=False, output_stride=stride).double()
        own.load_state_dict(strided.state_dict())
        dense, expected = (channels_first(run(net, image), layouts) for net in (own, strided))
    except Exception as error:  # whatever a network does with an option that it does not have
        return f"refused ({type(error).__name__})"
    reached = round(image.shape[-1] / dense[-1].shape[-1])
    if reached > stride:
        return f"ignored: stride {reached}"
    steps = [max(round(d.shape[-1] / s.shape[-1]), 1) for d, s in zip(dense, expected, strict=True)]
    worst = max(relative_error(d[..., ::k, ::k], s) for d, s, k in zip(dense, expected, steps, strict=True))
    return "exact" if worst <= EXACT else f"differs by {worst:.0e}"


def _native(name: str) -> int:
    """The network's own output stride, by timm's word for it."""
    return max(timm.create_model(name, features_only=True, pretrained=False).feature_info.reduction())


INTRODUCTION = """\
# Which networks take which output stride

{count} networks of timm, one at least of each family that gives features at a stride beyond 16. Made by
`benchmarks/support.py` on {date} with lightning-atrous {ours}, timm {timm}, torch {torch}: float64, weights, BN
statistics and affine drawn at random, for the forward that runs. Exact is what differs by at most {exact:.0e} of the
largest value at every position of the strided network's grid.

*dilate* rewrites convolutions into atrous ones; *phases* runs whole stages, as they are, on every sub-grid, so that
squeeze-excite, group norm and attention take in one sub-grid, as they did in the strided network. timm's own option
takes their statistics over the denser map, which is a part of what it differs by in such networks. A network that takes
images of one size alone is refused as a backbone, whatever its strides.

| | exact at 16 | exact at 8 |
|---|---|---|
"""


def page(rows: list[Row], failed: dict[str, str]) -> str:
    """The Markdown."""
    lines = []
    for method in ("dilate", "phases"):
        lines.append(_counts(f"by {method}", [sum(row.ours.get(s) == method for row in rows) for s in STRIDES]))
    both = [sum(row.errors.get(s, 1) <= EXACT for row in rows) for s in STRIDES]
    lines.append(_counts("**lightning-atrous**", both))
    lines.append(_counts("timm's own", [sum(row.timms[s] == "exact" for row in rows) for s in STRIDES]))
    wrong = [sum("differs" in row.timms[s] for row in rows) for s in STRIDES]
    lines.append(_counts("timm's own, accepted, and differs", wrong))
    inexact = [row.name for row in rows for error in row.errors.values() if error > EXACT]
    worst = max((error for row in rows for error in row.errors.values()), default=0)
    lines += [
        "",
        f"Accepted here and not exact: {', '.join(inexact) or 'none'}. Largest error accepted: {worst:.0e}.",
        "",
    ]
    lines += ["| network | 16 | 8 | largest error | timm's own 16 | timm's own 8 |", "|---|---|---|---|---|---|"]
    for row in rows:
        error = f"{max(row.errors.values()):.0e}" if row.errors else ""
        lines.append(f"| {row.name} | {row.ours[16]} | {row.ours[8]} | {error} | {row.timms[16]} | {row.timms[8]} |")
    lines += ["", "## Refusals", "", *(f"- {refusal}" for row in rows for refusal in row.refusals)]
    lines += [f"- {reason}" for reason in failed.values()]
    introduction = INTRODUCTION.format(
        count=len(rows) + len(failed),
        date=datetime.date.today(),
        ours=__version__,
        timm=timm.__version__,
        torch=torch.__version__,
        exact=EXACT,
    )
    return introduction + "\n".join(lines) + "\n"


def _counts(what: str, counts: list[int]) -> str:
    return f"| {what} | {counts[0]} | {counts[1]} |"


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    names = options.names or (Path(__file__).parent / "architectures.txt").read_text().split()
    warnings.filterwarnings("ignore")
    rows, failed = [], {}
    for name in names:
        try:
            rows.append(measure(name))
        except ValueError as error:
            failed[name] = str(error)
        print(name, rows[-1].ours if name not in failed else failed[name], flush=True)
        options.output.write_text(page(rows, failed), encoding="utf-8")


if __name__ == "__main__":
    main()
