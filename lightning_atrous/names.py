"""Registered names on the command line and in YAML: ``head: deeplabv3plus`` becomes the class's import path.

jsonargparse knows class names and import paths. One step before it reads a value puts the path in the name's place
and leaves every other character as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from lightning_atrous.registry import Registry, subclass_names

__all__ = ["translate_arguments", "translate_yaml"]

Slots = Mapping[str, tuple[Registry[Any], type]]
"""For each option that takes a registered name: where the names are, and the class that all of them extend."""


def translate_arguments(arguments: Sequence[str], slots: Slots) -> list[str]:
    """Replace registered names in command-line arguments.

    Args:
        arguments: As typed.
        slots: Options by dotted key.

    Raises:
        ValueError: A name that nobody knows.
    """
    translated: list[str] = []
    expects: str | None = None
    for argument in arguments:
        if expects is not None:
            argument, expects = _value(argument, expects, slots), None
        elif argument.startswith("--"):
            option, equals, value = argument[2:].partition("=")
            key = option.removesuffix(".class_path").removesuffix(".help")
            if key in slots:
                if equals:
                    argument = f"--{option}={_value(value, key, slots)}"
                else:
                    expects = key
        translated.append(argument)
    return translated


def translate_yaml(text: str, slots: Slots) -> str:
    """Replace registered names in the text of a YAML file, at ``key: name`` and at ``key: {class_path: name}``.

    Args:
        text: The file's text. What is not YAML stays as it is, for whoever reads it next to complain about.
        slots: Options by dotted key.

    Raises:
        ValueError: A name that nobody knows.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    return _replace(text, [(node, key) for key in slots for node in _scalars_at(root, key.split("."))], slots)


def _value(text: str, key: str, slots: Slots) -> str:
    """Replace the names in what was typed for an option: a name, or YAML in one line."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return text
    if isinstance(root, (yaml.MappingNode, yaml.SequenceNode)):
        return _replace(text, [(node, key) for node in _scalars_at(root, [])], slots)
    return _class_path(text, key, slots)


def _replace(text: str, spots: Sequence[tuple[yaml.ScalarNode, str]], slots: Slots) -> str:
    for node, key in sorted(spots, key=lambda spot: spot[0].start_mark.index, reverse=True):
        path = _class_path(node.value, key, slots)
        if path != node.value:
            text = text[: node.start_mark.index] + path + text[node.end_mark.index :]
    return text


def _scalars_at(node: yaml.Node | None, keys: Sequence[str]) -> Iterator[yaml.ScalarNode]:
    if isinstance(node, yaml.MappingNode):
        wanted = keys[0] if keys else "class_path"
        for name, value in node.value:
            if name.value == wanted:
                yield from _scalars_at(value, keys[1:])
    elif isinstance(node, yaml.SequenceNode) and not keys:
        for item in node.value:
            yield from _scalars_at(item, keys)
    elif isinstance(node, yaml.ScalarNode) and not keys and node.tag == "tag:yaml.org,2002:str":
        yield node


def _class_path(value: str, key: str, slots: Slots) -> str:
    registry, base = slots[key]
    if value in registry:
        cls = registry[value]
        return f"{cls.__module__}.{cls.__qualname__}"
    is_name = re.fullmatch(r"[A-Za-z_]\w*", value) and value.lower() not in ("null", "none", "true", "false")
    if not is_name or value in subclass_names(base):
        return value
    try:
        registry[value]
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    raise AssertionError("a name is registered or it is not")
