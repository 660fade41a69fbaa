"""``list``: what can be put into a config, and with which options."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from lightning_atrous.backbone import list_backbones
from lightning_atrous.complaints import Complaint
from lightning_atrous.heads import HEADS
from lightning_atrous.registry import close_matches
from lightning_atrous.signatures import options_of, summary_of

__all__ = ["tell_list"]


def tell_list(arguments: Sequence[str]) -> None:
    """Run the verb.

    Args:
        arguments: After ``list``.

    Raises:
        Complaint: Nothing is named so; exit code 2 for a head, 1 for a network.
    """
    parser = argparse.ArgumentParser(prog="lightning-atrous list", description="What can be put into a config.")
    parser.add_argument("what", choices=("heads", "backbones"))
    parser.add_argument(
        "pattern",
        nargs="?",
        default="*",
        help="shell pattern, or a part of the name; a head's whole name tells all of its options",
    )
    options = parser.parse_args(list(arguments))
    if options.what == "heads":
        _tell_heads(options.pattern)
        return
    names = list_backbones(options.pattern)
    print("\n".join(names))
    if not names:
        raise Complaint(f"timm has no network like '{options.pattern}'", exit_code=1)


def _tell_heads(pattern: str) -> None:
    console = Console()
    if pattern in HEADS:
        console.print(_detail(pattern))
        return
    names = fnmatch.filter(HEADS, pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*")
    if not names and pattern in HEADS.broken:
        raise Complaint(f"the head '{pattern}' could not be imported from {HEADS.broken[pattern]}", exit_code=2)
    if not names:
        raise Complaint(f"no head is named '{pattern}'; {close_matches(pattern, list(HEADS))}", exit_code=2)
    table = Table(Column("name", no_wrap=True), "what it is, where it is from, its options", show_lines=True)
    for name in names:
        table.add_row(name, _overview(name))
    console.print(table)
    console.print("`lightning-atrous list heads NAME` tells what the options of one mean.", highlight=False)
    for name, reason in HEADS.broken.items():
        print(f"plug-in '{name}' could not be imported: {reason}", file=sys.stderr)


def _overview(name: str) -> RenderableType:
    """A head in a few lines."""
    cls = HEADS[name]
    # without spaces an option stays in one piece where lines are broken
    options = "  ".join(str(option).replace(", ", ",") for option in options_of(cls))
    lines = (_plain(summary_of(cls)), Text(cls.paper, style="italic"), Text(options, style="cyan"))
    return Group(*(line for line in lines if line))


def _detail(name: str) -> RenderableType:
    """A head with all that its docstring says of its options."""
    cls = HEADS[name]
    lines: list[RenderableType] = [
        Text.assemble((name, "bold"), f"  {cls.__module__}.{cls.__qualname__}"),
        _plain(summary_of(cls)),
    ]
    if cls.paper:
        lines.append(Text(cls.paper, style="italic"))
    for option in options_of(cls):
        lines.append(Text.assemble("\n", (str(option), "cyan"), f"  {option.type}"))
        lines.append(Padding(_plain(option.words), (0, 0, 0, 4), expand=False))
    lines.append(Text(f"\nin a config  head: {{class_path: {name}, init_args: {{OPTION: VALUE}}}}"))
    lines.append(Text(f"typed        --model.head {name} --model.head.OPTION VALUE"))
    return Group(*lines)


def _plain(words: str) -> Text:
    """A docstring's words without the marks of code."""
    return Text(words.replace("`", ""))
