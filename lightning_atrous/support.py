"""``support``: which output strides a network takes, by which method, how exactly; and why not others."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from rich.console import Console
from rich.table import Column, Table

from lightning_atrous.backbone import OneSizeError, TimmBackbone, create_features, list_backbones
from lightning_atrous.complaints import Complaint
from lightning_atrous.dilation import Dilation, Method

__all__ = ["EXACT", "Support", "support", "tell_support"]

EXACT = 1e-8
"""The relative error, in float64, up to which a network is called exact."""

STRIDES = (16, 8)


@dataclass
class Support:
    """What one network takes."""

    name: str
    native: int = 0
    """Its own output stride."""
    methods: dict[int, str] = field(default_factory=dict)
    """By output stride: how it is reached."""
    errors: dict[int, float] = field(default_factory=dict)
    """By output stride: the largest relative error, in float64."""
    refusals: dict[int, str] = field(default_factory=dict)
    """By output stride: why not. At 0: why it is no backbone, though it may still be dilated by itself (one size)."""

    def word(self, output_stride: int) -> str:
        """What to write into a table."""
        if output_stride in self.methods:
            return self.methods[output_stride]
        if 0 in self.refusals or output_stride in self.refusals:
            return "refused"
        return "its own" if output_stride == self.native else "–"


def support(
    name: str, output_strides: Sequence[int] = STRIDES, *, method: Literal["auto"] | Method = "auto"
) -> Support:
    """Try a network at some output strides, on weights and statistics drawn at random, in float64.

    Args:
        name: As timm names it.
        output_strides: Those to try; that of the network itself, and coarser ones, are passed over.
        method: As of `TimmBackbone`.
    """
    found = Support(name)
    remark = ""
    try:
        dilation = TimmBackbone(name, output_stride=None, method=method, pretrained=False).dilation
    except OneSizeError as error:
        found.refusals[0] = str(error)
        dilation, remark = Dilation(create_features(name), method=method), ", one size"
    except ValueError as error:
        found.refusals[0] = str(error)
        return found
    found.native = dilation.native
    for output_stride in output_strides:
        if output_stride >= found.native:
            continue
        try:
            dilation.output_stride = output_stride
        except ValueError as error:
            found.refusals[output_stride] = f"{name}: {error}"
        else:
            found.errors[output_stride] = max(dilation.errors(dtype=torch.float64))
            found.methods[output_stride] = dilation.summary + remark
    return found


def tell_support(arguments: Sequence[str]) -> None:
    """Run the verb.

    Args:
        arguments: After ``support``.

    Raises:
        Complaint: Exit code 2 for what was typed wrong; 1 where no network took any of the strides.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-atrous support",
        description="Which output strides networks of timm take, by which method, how exactly (the largest relative "
        "error in float64, on weights and statistics drawn at random), and why not others.",
    )
    parser.add_argument("networks", metavar="NETWORK", nargs="+", help="as timm names it, or a pattern in quotes")
    parser.add_argument("--method", choices=("auto", *get_args(Method)), default="auto", help="%(default)s by default")
    parser.add_argument(
        "--output_stride", type=int, nargs="+", default=list(STRIDES), metavar="N", help="those to try; 16 8 by default"
    )
    options = parser.parse_args(list(arguments))
    strides = options.output_stride
    table = Table(Column("network", overflow="fold"), *map(str, strides), "largest error")
    refusals: list[str] = []
    rows = [support(name, strides, method=options.method) for name in _named(options.networks)]
    for row in rows:
        error = f"{max(row.errors.values()):.0e}" if row.errors else ""
        table.add_row(row.name, *map(row.word, strides), error)
        refusals += row.refusals.values()
    console = Console()
    console.print(table)
    for refusal in refusals:
        console.print(f"- {refusal}", markup=False, highlight=False, soft_wrap=True)
    if not any(row.methods for row in rows):
        raise Complaint("none of these networks takes any of these output strides", exit_code=1)


def _named(patterns: Sequence[str]) -> list[str]:
    names = []
    for pattern in patterns:
        if not any(mark in pattern for mark in "*?["):
            names.append(pattern)
            continue
        matching = fnmatch.filter(list_backbones(), pattern)
        if not matching:
            raise Complaint(f"timm has no network like '{pattern}'", exit_code=2)
        names += matching
    return names
