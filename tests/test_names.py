from __future__ import annotations

import pytest
import yaml

from lightning_atrous.heads import HEADS, Head
from lightning_atrous.names import translate_arguments, translate_yaml

SLOTS = {"model.head": (HEADS, Head), "model.aux_head": (HEADS, Head)}
FCN = "lightning_atrous.heads.fcn.FCN"


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["--model.head", "fcn"], ["--model.head", FCN]),
        (["--model.head=fcn"], [f"--model.head={FCN}"]),
        (["--model.aux_head.class_path", "fcn"], ["--model.aux_head.class_path", FCN]),
        (["--model.head.help", "fcn"], ["--model.head.help", FCN]),
        (["--model.head", "FCN"], ["--model.head", "FCN"]),
        (["--model.aux_head", "null"], ["--model.aux_head", "null"]),
        (["--model.head", "my.module.Head"], ["--model.head", "my.module.Head"]),
        (["--model.head.rates", "fcn"], ["--model.head.rates", "fcn"]),
        (["--model.head", "{class_path: fcn}"], ["--model.head", f"{{class_path: {FCN}}}"]),
        (["--model.head=[fcn, x.Y]"], [f"--model.head=[{FCN}, x.Y]"]),
        (["--other", "fcn", "fcn"], ["--other", "fcn", "fcn"]),
    ],
)
def test_arguments(typed: list[str], read: list[str]) -> None:
    assert translate_arguments(typed, SLOTS) == read


def test_yaml_changes_nothing_but_the_names() -> None:
    text = """\
# fcn is named in a comment
model:
  head: fcn   # short
  aux_head: {class_path: "fcn", init_args: {level: -2}}
  note: fcn
other: {model: {head: fcn}}
lr: 1e-3
"""
    changed = translate_yaml(text, SLOTS)
    assert changed == text.replace("head: fcn   #", f"head: {FCN}   #").replace('"fcn"', FCN)
    assert yaml.safe_load(changed)["model"]["aux_head"] == {"class_path": FCN, "init_args": {"level": -2}}


@pytest.mark.parametrize(
    "text", ["model: {head: null}", "model: [1, 2]", "just text", "", "a: [unclosed", "model: {head: 3}"]
)
def test_yaml_without_names_stays_as_it_is(text: str) -> None:
    assert translate_yaml(text, SLOTS) == text


def test_an_unknown_name_is_refused_where_it_stands() -> None:
    with pytest.raises(ValueError, match=r"model\.aux_head: no head is named 'fcm'; did you mean 'fcn'"):
        translate_yaml("model: {aux_head: fcm}", SLOTS)
    with pytest.raises(ValueError, match="did you mean 'deeplabv3'"):
        translate_arguments(["--model.head", "deeplab3"], SLOTS)
