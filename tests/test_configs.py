"""Every YAML that is shipped parses, with every option it resolves to; every command in the README too."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image

from lightning_atrous.checkpoint import SPEC_KEY
from lightning_atrous.cli import main
from lightning_atrous.heads import HEADS

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"lightning-atrous (?:fit|validate|test) --config [^\n`]*", README)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_parses_to_what_it_says(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(config), "--print_config"])
    assert stop.value.code == 0
    resolved, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(config.read_text())
    assert resolved["model"]["backbone"]["init_args"]["name"] == written["model"]["backbone"]["name"]
    for option, value in written["trainer"].items():
        assert resolved["trainer"][option] == value or option == "logger"
    assert {"max_epochs", "max_steps"} & set(written["trainer"])  # the schedule needs an end
    assert len(config.read_text().splitlines()) <= 40


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_says_its_own_command(config: Path) -> None:
    comments = [line for line in config.read_text().splitlines() if line.startswith("#")]
    assert f"lightning-atrous fit --config {config.relative_to(ROOT)}" in comments[1]
    assert max(map(len, config.read_text().splitlines())) <= 130


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("line", sorted(set(COMMANDS)))
def test_readme_command_parses(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(line, comments=True)[1:]
    if "--ckpt_path" in arguments:  # of a run that is not there in a test
        at = arguments.index("--ckpt_path")
        assert arguments[at + 1] in ("last", "best")
        del arguments[at : at + 2]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    assert "backbone" in capsys.readouterr().out


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prediction, *blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 3
    head: dict[str, object] = {"__name__": "readme"}
    try:
        for block in blocks:
            names = head if "Linear" in block else {"__name__": "readme"}
            exec(compile(block, "README.md", "exec"), names)
            if "task" in names:
                task = names["task"]
                assert task.model.output_stride == 8
                assert task.model.predict(torch.zeros(1, 3, 40, 56, dtype=torch.uint8)).shape == (1, 40, 56)
                monkeypatch.chdir(tmp_path)
                (checkpoint := Path("runs/quickstart/checkpoints/best.ckpt")).parent.mkdir(parents=True)
                torch.save({"state_dict": task.state_dict(), SPEC_KEY: task.spec}, checkpoint)
                Image.new("RGB", (57, 41)).save("photo.jpg")
                exec(compile(prediction, "README.md", "exec"), names)
                assert names["index"].shape == (41, 57)
        assert "linear" in HEADS
        head["test_linear"]()
        head_lines = [line for line in blocks[0].splitlines() if line.strip()]
        assert len(head_lines) <= 15
    finally:
        HEADS._classes.pop("linear", None)
