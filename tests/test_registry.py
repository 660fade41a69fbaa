from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from lightning_atrous import registry
from lightning_atrous.registry import Registry, close_matches


def test_unknown_name_names_the_close_ones() -> None:
    things: Registry[object] = Registry("thing", "tests.things")
    things.register("deeplabv3plus")(int)
    with pytest.raises(ValueError, match="no thing is named 'deeplab3plus'; did you mean 'deeplabv3plus'"):
        things["deeplab3plus"]
    with pytest.raises(ValueError, match="known are deeplabv3plus"):
        things["unet"]


def test_two_classes_cannot_share_a_name_but_one_may_come_twice() -> None:
    things: Registry[object] = Registry("thing", "tests.things")
    things.register("a")(int)
    things.register("a")(int)
    with pytest.raises(ValueError, match=r"two things are named 'a': builtins\.int and builtins\.str"):
        things.register("a")(str)


def test_plugins_load_once_and_a_broken_one_hurts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        EntryPoint("good", "collections:OrderedDict", "tests.things"),
        EntryPoint("bad", "no_such_module:Thing", "tests.things"),
        EntryPoint("twin", "collections:Counter", "tests.things"),
    ]
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or entries)
    things: Registry[dict] = Registry("thing", "tests.things")
    things.register("twin")(dict)
    assert list(things) == ["good", "twin"]
    assert "good" in things
    assert len(things) == 2
    assert asked == ["tests.things"]
    assert "no_such_module" in things.broken["bad"]
    assert "two things are named 'twin'" in things.broken["twin"]
    with pytest.raises(ValueError, match="the thing 'bad' could not be imported from no_such_module:Thing"):
        things["bad"]


def test_close_matches_of_nothing() -> None:
    assert close_matches("a", []) == "none is known"
