"""When a class is replaced by another, what was said of the old one is not said of the new.

jsonargparse carries options over: whoever replaces one head by another, on the command line or in a second config, gets
the old head's options wherever the new one has some of the same names, defaults included. One step before parsing finds
those and puts the new class's own defaults in their place.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from lightning_atrous.names import Slots, translate_yaml

__all__ = ["class_paths", "reset_replaced"]


def reset_replaced(
    arguments: Sequence[str], bases: Mapping[str, type], defaults: Mapping[str, type], slots: Slots
) -> list[str]:
    """What to add to the arguments, so that no option of a class that was replaced lives on.

    Args:
        arguments: As typed, with registered names translated; configs by ``--config`` as files or as text.
        bases: For each option that takes a class, by its dotted key, what all of them extend.
        defaults: The class that stands there before anything is given.
        slots: Those of the options that take registered names.

    Raises:
        ValueError: A config that is no YAML, or a name in one that nobody has registered.
    """
    events = [event for argument in _pairs(arguments) for event in _events(*argument, bases, slots)]
    added: list[str] = []
    for key, base in bases.items():
        current, given, before = defaults.get(key), set[str](), set[str]()
        for name, cls_name, options in events:
            if name != key:
                continue
            cls = _find(cls_name, base) if cls_name else current
            if cls is not current:
                before |= set(_own_options(current))
                current, given = cls, set()
            given |= options
        for option, default in _own_options(current).items():
            if option in before - given and default is not inspect.Parameter.empty:
                # a word as it is: quotes would be taken for a part of it
                written = default if isinstance(default, str) else json.dumps(default)
                added.append(f"--{key}.{option}={written}")
    return added


def class_paths(arguments: Sequence[str]) -> set[str]:
    """Every dotted path that the arguments, and the configs among them, spell out."""
    texts = [*arguments, *(_text(value) for option, value in _pairs(arguments) if option == "config")]
    return {path for text in texts for path in re.findall(r"[A-Za-z_]\w*(?:\.\w+)+", text)}


Event = tuple[str, str | None, set[str]]
"""At which key, which class was named if any, and which of its options were given."""


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """``--option value`` and ``--option=value``, without the dashes."""
    pairs = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--"):
            option, equals, value = argument[2:].partition("=")
            pairs.append((option, value if equals else following))
        elif argument == "-c":
            pairs.append(("config", following))
    return pairs


def _events(option: str, value: str, bases: Mapping[str, type], slots: Slots) -> list[Event]:
    if option == "config":
        config = yaml.safe_load(translate_yaml(_text(value), slots))
        return [event for key in bases for event in _said(key, _at(config, key.split(".")))]
    for key in bases:
        if option in (key, f"{key}.class_path"):
            return _said(key, _parsed(value))
        if option.startswith(f"{key}."):
            name = option.removeprefix(f"{key}.").removeprefix("init_args.").partition(".")[0]
            return [(key, None, {name})]
    return []


def _text(config: str) -> str:
    """The YAML that a ``--config`` means."""
    try:
        text = Path(config).read_text(encoding="utf-8") if Path(config[:255]).is_file() else config
        yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {config[:255]} is no YAML ({' '.join(str(error).split())}); correct it") from error
    return text


def _said(key: str, value: object) -> list[Event]:
    """What a value says of the class at a key: its name, or its name and options, or options alone."""
    if isinstance(value, str):
        return [(key, value, set())]
    if not isinstance(value, dict):
        return []
    options = value.get("init_args") or {} if "class_path" in value else value
    return [(key, value.get("class_path"), set(options) if isinstance(options, dict) else set())]


def _at(config: object, keys: Sequence[str]) -> object:
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config


def _parsed(value: str) -> object:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _find(name: str, base: type) -> type | None:
    """A class by import path, or by its bare name among those that extend another."""
    module, _, attribute = name.rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            return None
        return found if isinstance(found, type) else None
    children = [base]
    while children:
        child = children.pop()
        if child.__name__ == attribute:
            return child
        children += child.__subclasses__()
    return None


def _own_options(cls: type | None) -> dict[str, object]:
    """The options of a class, with their defaults as far as they can be written down."""
    if cls is None:
        return {}
    options: dict[str, object] = {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.default is None or isinstance(parameter.default, (bool, int, float, str, list, tuple)):
            options[name] = parameter.default
        else:
            options[name] = inspect.Parameter.empty
    return options
