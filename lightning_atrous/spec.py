"""A class with its options as plain values, ``{class_path, init_args}``, and back.

This is how a checkpoint says what it is made of: nothing in it is code, and nothing is imported on loading but what
the package, torch or an installed plug-in already stands for, unless the caller names more.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Collection
from typing import Any, TypedDict

from torch.optim import Optimizer

from lightning_atrous.registry import Registry

__all__ = ["Spec", "build", "describe"]

_OPTIMIZERS = ("torch.optim.", "timm.optim.")

_OWN = ("lightning_atrous.", *_OPTIMIZERS)


class Spec(TypedDict):
    """What describes an object in YAML and in a checkpoint alike."""

    class_path: str
    init_args: dict[str, Any]


def describe(factory: Callable[..., object]) -> Spec:
    """A class, or a `functools.partial` of one, as plain values.

    Args:
        factory: What will be called to build the object. Its options may be factories, or lists of them, in turn.

    Raises:
        ValueError: Anything else (a lambda, say), or an option that is no plain value: a checkpoint could not hold it.

    Example:
        >>> describe(functools.partial(dict, a=1))
        {'class_path': 'builtins.dict', 'init_args': {'a': 1}}
    """
    options: dict[str, Any] = {}
    target: object = factory
    while isinstance(target, functools.partial):
        options = {**target.keywords, **options}
        # jsonargparse makes partials of its own instantiating function, and the class is among the arguments
        target = next((part for part in (target.func, *target.args) if isinstance(part, type)), target.func)
    if not isinstance(target, type) or "<locals>" in target.__qualname__:
        raise ValueError(
            f"expected a class, or a functools.partial of one, that can be imported by name, got {factory!r}; "
            f"define the class at the top level of a module and give its options with functools.partial"
        )
    class_path = f"{target.__module__}.{target.__qualname__}"
    plain = {}
    for name, value in options.items():
        try:
            plain[name] = _plain(value)
        except TypeError:
            raise ValueError(
                f"option {name} of {class_path} is {value!r}; a checkpoint holds numbers, strings, booleans, None, "
                f"factories like this one, and lists, tuples and dictionaries of them"
            ) from None
    return {"class_path": class_path, "init_args": plain}


def build(spec: Spec, *, registry: Registry[Any] | None = None, trust: Collection[str] = ()) -> Callable[..., Any]:
    """The factory that a spec describes.

    Args:
        spec: As from `describe`.
        registry: Whose classes may be imported too, wherever they live.
        trust: Further class paths that the caller vouches for.

    Raises:
        ValueError: A class that may not be imported, or that is not there.
    """
    class_path = spec["class_path"]
    classes = [] if registry is None else [registry[name] for name in registry]
    registered: dict[str, Callable[..., Any]] = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in classes}
    target: Callable[..., Any]
    if class_path in registered:
        target = registered[class_path]
    elif not class_path.startswith(_OWN) and class_path not in trust:
        raise ValueError(
            f"the checkpoint asks for {class_path}, which no installed package registers; install the package that "
            f"brings it, or vouch for it: trust=['{class_path}'], or predict --trust {class_path}"
        )
    else:
        module, _, name = class_path.rpartition(".")
        try:
            target = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"the checkpoint asks for {class_path}, which cannot be imported: {error}") from error
        if class_path.startswith(_OPTIMIZERS) and not (isinstance(target, type) and issubclass(target, Optimizer)):
            raise ValueError(f"the checkpoint asks for {class_path} as an optimiser, which it is not")

    def built(value: Any) -> Any:
        """An option with the factories in it, by the same rules."""
        if isinstance(value, (list, tuple)):
            return type(value)(map(built, value))
        if isinstance(value, dict):
            if set(value) == {"class_path", "init_args"}:
                return build(
                    {"class_path": value["class_path"], "init_args": value["init_args"]}, registry=registry, trust=trust
                )
            return {key: built(item) for key, item in value.items()}
        return value

    return functools.partial(target, **{name: built(value) for name, value in spec["init_args"].items()})


def _plain(value: object) -> object:
    """An option as plain values.

    Raises:
        TypeError: It cannot be written so.
    """
    if isinstance(value, (type, functools.partial)):
        return describe(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(value)
