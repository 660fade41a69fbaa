"""Which files the arguments of a command mean, and the name under which each one's results are written."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Selected", "select"]


class Selected(NamedTuple):
    """A file, and its name without suffix: relative to the folder it was found in."""

    path: Path
    name: str


def select(arguments: Sequence[str], suffixes: Collection[str], *, leave_out: Sequence[Path] = ()) -> list[Selected]:
    """Files, all that lie in folders, and all that patterns match, each file once.

    A file goes by its own name, one of a folder by its path in it, one of a pattern by its path below what stands
    before the first wildcard; without the suffix, unless that alone tells it from another.

    Args:
        arguments: Paths and patterns (``*``, ``?``, ``[…]``, and ``**`` for folders within folders).
        suffixes: In lower case; other files in folders, or that patterns match, are passed over. So is what is hidden.
        leave_out: Folders of which nothing is taken.

    Raises:
        ValueError: An argument that gives no file, or two files of one name.
    """
    barred = tuple(folder.resolve() for folder in leave_out)
    found: dict[Path, Selected] = {}
    for argument in arguments:
        before = len(found)
        known = False
        for selected in _files(os.path.expanduser(argument), suffixes):
            place = selected.path.resolve()
            if not any(place.is_relative_to(folder) for folder in barred):
                known |= place in found
                found.setdefault(place, selected)
        if len(found) == before and not known:
            raise ValueError(
                f"there is no image in '{argument}'; give pictures, folders or patterns ({_list(suffixes)})"
            )
    names = Counter(selected.name for selected in found.values())
    chosen = [
        selected._replace(name=selected.name + selected.path.suffix) if names[selected.name] > 1 else selected
        for selected in found.values()
    ]
    by_name: dict[str, Path] = {}
    for path, name in chosen:
        if by_name.setdefault(name, path) != path:
            raise ValueError(
                f"{by_name[name]} and {path} would both be written as {name}.png; "
                "give the folder that holds both, or one after the other with an --output of its own"
            )
    return chosen


def _files(argument: str, suffixes: Collection[str]) -> Iterator[Selected]:
    path = Path(argument)
    if path.is_file():
        yield Selected(path, path.stem)
        return
    if path.is_dir():
        base, places = path, _walk(path)
    elif wildcard := re.search(r"[*?[]", argument):
        base = Path(os.path.dirname(argument[: wildcard.start()]))
        places = (Path(place) for place in sorted(glob.iglob(argument, recursive=True)))
    else:
        raise ValueError(f"there is no image, folder or pattern '{argument}'; give the path of one")
    for place in places:
        # a link to nowhere is taken along, to be named among what could not be read
        if place.suffix.lower() in suffixes and (place.is_file() or not place.exists()):
            yield Selected(place, place.relative_to(base).with_suffix("").as_posix())


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder in the order of names, but hidden ones."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))


def _list(suffixes: Collection[str]) -> str:
    return ", ".join(sorted(suffixes))
