"""Names for classes: registered by decorator, or brought by other packages through entry points."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

__all__ = ["Registry", "close_matches", "subclass_names"]

T = TypeVar("T")


MANY = 40
"""Names that nobody reads in a sentence."""


def close_matches(word: str, known: list[str]) -> str:
    """What to say after an unknown word: the names like it, or else all of them, if they are not too many.

    >>> close_matches("deeplab3", ["deeplabv3", "fcn"])
    "did you mean 'deeplabv3'?"
    >>> close_matches("zzz", ["deeplabv3", "fcn"])
    'known are deeplabv3, fcn'
    """
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(repr(by_lower[name]) for name in close)}?"
    if len(known) > MANY:
        return f"none of the {len(known)} known is like it"
    return f"known are {', '.join(known)}" if known else "none is known"


def subclass_names(base: type) -> set[str]:
    """Names of the public classes that extend another, however deep, and that can be built.

    >>> {"IndexError", "KeyError"} <= subclass_names(LookupError)
    True
    """
    names: set[str] = set()
    children: list[type] = base.__subclasses__()
    for child in children:
        names |= subclass_names(child)
        if not inspect.isabstract(child) and not child.__name__.startswith("_"):
            names.add(child.__name__)
    return names


class Registry(Generic[T]):
    """Classes by name, open to other packages.

    Args:
        kind: The word for one entry in messages, such as ``"head"``.
        group: The entry-point group in which other packages name theirs.

    Example:
        >>> colours = Registry("colour", "example.colours")
        >>> @colours.register("red")
        ... class Red: ...
        >>> colours["red"].__name__, list(colours)
        ('Red', ['red'])
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self.broken: dict[str, str] = {}
        """Plug-ins that could not be imported: their name, and why."""
        self._classes: dict[str, type[T]] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: enter the class under ``name``.

        Raises:
            ValueError: Another class already has the name.
        """

        def decorate(cls: type[T]) -> type[T]:
            known = self._classes.setdefault(name, cls)
            if known is not cls:
                raise ValueError(
                    f"two {self.kind}s are named '{name}': {_path(known)} and {_path(cls)}; rename one of them"
                )
            return cls

        return decorate

    def load_plugins(self) -> None:
        """Import what installed packages name in the entry-point group, once.

        A plug-in that fails is kept in `broken` with its error, and the others go on.
        """
        if self._loaded:
            return
        self._loaded = True
        for entry in entry_points(group=self.group):
            try:
                self.register(entry.name)(entry.load())
            except Exception as error:  # whatever a foreign module raises when it is imported
                self.broken[entry.name] = f"{_origin(entry)}: {type(error).__name__}: {error}"

    def __getitem__(self, name: str) -> type[T]:
        self.load_plugins()
        if name in self._classes:
            return self._classes[name]
        if name in self.broken:
            raise ValueError(f"the {self.kind} '{name}' could not be imported from {self.broken[name]}")
        raise ValueError(f"no {self.kind} is named '{name}'; {close_matches(name, sorted(self._classes))}")

    def __contains__(self, name: object) -> bool:
        self.load_plugins()
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        self.load_plugins()
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        self.load_plugins()
        return len(self._classes)


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _origin(entry: EntryPoint) -> str:
    return f"{entry.dist.name} ({entry.value})" if entry.dist else entry.value
