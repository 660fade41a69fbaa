"""Parameters by shell patterns over their names."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator

from lightning_atrous.registry import close_matches

__all__ = ["matching"]


def matching(pattern: str, names: Collection[str], *, option: str) -> set[str]:
    """The names that a pattern takes in: those like it, and those of all that is in a module like it.

    Args:
        pattern: As in a shell: ``*`` is anything (dots too), ``?`` one character, ``[ab]`` one of those.
        names: Of parameters, dotted.
        option: By which the pattern came, for the message.

    Raises:
        ValueError: It takes in none, with those that are like it.

    Example:
        >>> names = ["backbone.net.conv1.weight", "head.norm.weight", "head.norm.bias"]
        >>> sorted(matching("head", names, option="freeze")), sorted(matching("*.bias", names, option="freeze"))
        (['head.norm.bias', 'head.norm.weight'], ['head.norm.bias'])
    """
    found = {name for name in names if any(fnmatch.fnmatchcase(part, pattern) for part in _upwards(name))}
    if found:
        return found
    known = sorted({part for name in names for part in _upwards(name)})
    like = close_matches(pattern.rstrip(".*?"), known)
    raise ValueError(f"{option}: no parameter of the model has a name like '{pattern}', nor has a module; {like}")


def _upwards(name: str) -> Iterator[str]:
    """A dotted name, and those of what it is in: ``a.b.c``, ``a.b``, ``a``."""
    while name:
        yield name
        name = name.rpartition(".")[0]
