"""A class's options as people read them: types and defaults from its signature, words from its docstring."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import docstring_parser

__all__ = ["Option", "options_of", "summary_of"]


@dataclass(frozen=True)
class Option:
    """One keyword of a constructor.

    Args:
        name: As it is given.
        type: As it is annotated, aliases resolved; empty where it is not.
        default: As Python writes it; None where one must be given.
        words: From the docstring; empty where it has none.
    """

    name: str
    type: str
    default: str | None
    words: str

    def __str__(self) -> str:
        return self.name if self.default is None else f"{self.name}={self.default}"


def options_of(cls: type) -> tuple[Option, ...]:
    """The keyword-only options of a constructor, in its order.

    Args:
        cls: With a docstring in Google's style, of its own, of its ``__init__`` or of the class that it extends.

    Example:
        >>> class Paint:
        ...     '''A wall's.
        ...
        ...     Args:
        ...         coats: One dries before the next.
        ...     '''
        ...     def __init__(self, colour: str, *, coats: int = 2): ...
        >>> options_of(Paint)
        (Option(name='coats', type='int', default='2', words='One dries before the next.'),)
    """
    words = _words(cls)
    return tuple(
        Option(
            parameter.name,
            "" if parameter.annotation is parameter.empty else _written(parameter.annotation),
            None if parameter.default is parameter.empty else repr(parameter.default),
            words.get(parameter.name, ""),
        )
        for parameter in _signature(cls).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    )


def summary_of(cls: type) -> str:
    """The first paragraph of a class's own docstring, in one line; empty where it has none."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())


def _words(cls: type) -> dict[str, str]:
    """By parameter: what the docstrings say of it; those of the class itself win over those of what it extends."""
    words: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for doc in (base.__doc__, getattr(vars(base).get("__init__"), "__doc__", None)):
            for parameter in _parameters(doc or ""):
                words[parameter.arg_name] = " ".join((parameter.description or "").split())
    return words


def _parameters(doc: str) -> list[docstring_parser.DocstringParam]:
    try:
        return docstring_parser.google.parse(doc).params
    except docstring_parser.ParseError:  # another style, in a class of others: it has no words that we could show
        return []


def _signature(cls: type) -> inspect.Signature:
    """With what stands behind an alias, such as the words of a Literal, in place of its name."""
    try:
        return inspect.signature(cls, eval_str=True)
    except NameError:  # imported for type checkers alone: as it is written, then
        return inspect.signature(cls)


def _written(annotation: object) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
