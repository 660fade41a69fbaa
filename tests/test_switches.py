"""A class that replaces another starts from its own defaults, wherever the replacing happens."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_atrous.cli import main
from lightning_atrous.heads import FCN, HEADS, DeepLabV3

HEAD_OF_ANOTHER = """\
model:
  backbone: {name: test_resnet, pretrained: false}
  head: {class_path: deeplabv3plus, init_args: {channels: 16, dropout: 0.5}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.5, weight_decay: 0.25}}
data: {class_path: Shapes, init_args: {batch_size: 3}}
"""


@pytest.fixture
def resolve(workdir: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """The config that arguments resolve to."""
    (workdir / "other.yaml").write_text(HEAD_OF_ANOTHER)

    def run(*arguments: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as stop:
            main([*arguments, "--print_config"])
        printed = capsys.readouterr()
        assert stop.value.code == 0, printed.err
        return yaml.safe_load(printed.out)

    return run


def defaults(cls: type) -> dict[str, Any]:
    options = {name: p.default for name, p in inspect.signature(cls).parameters.items() if p.default is not p.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


@pytest.mark.parametrize(
    ("head", "where"),
    [
        *((head, "over a config") for head in sorted(set(HEADS) - {"deeplabv3plus"})),
        *((head, "over the default") for head in ("fcn", "deeplabv3", "unet")),
        *((head, "in a second config") for head in ("fcn", "deeplabv3", "unet")),
    ],
)
def test_a_heads_options_are_its_own(head: str, where: str, resolve: Any, workdir: Path) -> None:
    (workdir / "head.yaml").write_text(f"model:\n  head: {head}\n")
    (workdir / "plain.yaml").write_text("model: {backbone: {name: test_resnet, pretrained: false}}\ndata: Shapes\n")
    arguments = {
        "over the default": ("--config", "plain.yaml", "--model.head", head),
        "over a config": ("--config", "other.yaml", f"--model.head={HEADS[head].__name__}"),
        "in a second config": ("--config", "other.yaml", "--config", "head.yaml"),
    }[where]
    config = resolve("fit", *arguments)
    assert config["model"]["head"]["init_args"] == defaults(HEADS[head])


def test_what_is_said_of_the_new_class_stays(resolve: Any, workdir: Path) -> None:
    (workdir / "head.yaml").write_text("model:\n  head: {class_path: fcn, init_args: {dropout: 0.3}}\n")
    both = ("--config", "other.yaml", "--config", "head.yaml", "--model.head.level", "-2")
    assert resolve("fit", *both)["model"]["head"]["init_args"] == {**defaults(FCN), "dropout": 0.3, "level": -2}
    # there and back again: the options of the first time are gone
    again = resolve(
        "fit", *both, "--model.head", "deeplabv3plus", "--model.head", "deeplabv3", "--model.head.rates=[2]"
    )
    assert again["model"]["head"]["init_args"] == {**defaults(DeepLabV3), "rates": [2]}


def test_options_that_are_words_are_reset_to_words(resolve: Any) -> None:
    words = ("--model.head", "fpn", "--model.head.interpolation", "area", "--model.head", "unet")
    options = resolve("fit", "--config", "other.yaml", *words)["model"]["head"]["init_args"]
    assert options == defaults(HEADS["unet"])
    assert options["interpolation"] == "nearest"


def test_the_same_class_named_again_keeps_its_options(resolve: Any) -> None:
    config = resolve("fit", "--config", "other.yaml", "--model.head", "DeepLabV3Plus", "--model.head.separable", "true")
    options = config["model"]["head"]["init_args"]
    assert (options["channels"], options["dropout"], options["separable"]) == (16, 0.5, True)


def test_the_datas_options_mean_the_same_to_all_and_stay(resolve: Any, tmp_path: Path) -> None:
    (tmp_path / "leftImg8bit").mkdir()
    (tmp_path / "gtFine").mkdir()
    config = resolve("fit", "--config", "other.yaml", "--data", "Cityscapes", "--data.root", str(tmp_path))
    assert config["data"]["init_args"]["batch_size"] == 3


@pytest.mark.parametrize(
    "name", ["AdamW", "Adam", "RMSprop", "NAdam", "RAdam", "Adagrad", "Adadelta", "Adamax", "ASGD"]
)
def test_an_optimisers_options_are_its_own(name: str, resolve: Any, workdir: Path) -> None:
    (workdir / "plain.yaml").write_text("model: {backbone: {name: test_resnet, pretrained: false}}\ndata: Shapes\n")
    options = resolve("fit", "--config", "plain.yaml", "--model.optimizer", name)["model"]["optimizer"]["init_args"]
    assert options == defaults(getattr(torch.optim, name))
    typed = resolve("fit", "--config", "other.yaml", "--model.optimizer", "SGD", "--model.optimizer.lr", "0.25")
    assert typed["model"]["optimizer"]["init_args"]["weight_decay"] == 0
    assert typed["model"]["optimizer"]["init_args"]["lr"] == 0.25
