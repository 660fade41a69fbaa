"""The command as people use it: a run from YAML, its checkpoints, its files, a kill, a plug-in."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, environment

from lightning_atrous.cli import main

Command = Callable[..., subprocess.CompletedProcess[str]]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(path: Path, name: str) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in rows(path) if row.get(name)}


def overall(output: str) -> float:
    """The mean IoU in the printed table."""
    match = re.search(r"mean over classes\s*│\s*([\d.]+)", output)
    assert match, output
    return float(match[1])


def test_fit_validate_and_test_agree(command: Command, workdir: Path) -> None:
    fit = command("fit", "--config", "tiny.yaml", "--model.optimizer.lr", "0.05")
    run = workdir / "runs" / "tiny"
    # what is typed beats the file, and the file says all that was resolved
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["optimizer"]["init_args"]["lr"] == 0.05
    assert config["model"]["head"]["init_args"]["rates"] == [6, 12, 18]
    assert config["model"]["schedule"]["power"] == 0.9
    miou = column(run / "metrics.csv", "val/miou")
    assert len(miou) == 2
    assert {"train/loss", "val/loss", "val/pixel_accuracy", "val/iou/star", "lr-SGD/head"} <= set(
        rows(run / "metrics.csv")[0]
    )
    assert overall(fit.stdout) == pytest.approx(100 * list(miou.values())[-1], abs=0.006)
    assert re.search(r"epoch +2/2 +step +6 +loss [\d.]+ +lr \S+ +mIoU [\d.]+ +left 0:00", fit.stdout)
    assert "best val/miou" in fit.stdout
    assert (run / "checkpoints" / "best.ckpt").is_file()

    # the checkpoint alone brings the model; the same images give the same number
    arguments = ("--ckpt_path", "last", "--run_dir", "runs/tiny", "--data", "Shapes", "--data.size", "48")
    validate = command("validate", *arguments, "--data.val_length", "6")
    assert overall(validate.stdout) == overall(fit.stdout)
    assert "test_resnet at output stride 16 → DeepLabV3Plus" in validate.stdout
    assert "Warning" not in validate.stderr
    assert "Be aware" not in validate.stderr
    test = command("test", "--config", "tiny.yaml", "--ckpt_path", "runs/tiny/checkpoints/last.ckpt")
    assert overall(test.stdout) > 0
    assert "test/miou" not in test.stdout  # Lightning's own table of the same numbers
    # evaluation leaves no run behind
    assert sorted(path.name for path in (workdir / "runs").iterdir()) == ["tiny"]

    # another stride for the scores alone
    finer = command("validate", *arguments, "--data.val_length", "6", "--eval_output_stride", "8")
    assert "test_resnet at output stride 16, scored at 8 → DeepLabV3Plus" in finer.stdout
    assert overall(finer.stdout) != overall(fit.stdout)

    # what is typed wins over the checkpoint, which wins over the defaults
    printed = command(
        "validate",
        *arguments,
        "--model.backbone.output_stride",
        "8",
        "--model.channels_last=false",
        "--print_config",
    )
    model = yaml.safe_load(printed.stdout)["model"]
    assert model["backbone"]["init_args"]["output_stride"] == 8
    assert model["backbone"]["init_args"]["name"] == "test_resnet"
    assert model["head"]["init_args"]["channels"] == 16
    assert model["optimizer"]["init_args"]["lr"] == 0.05
    assert model["channels_last"] is False

    # a second run takes the next directory
    command("fit", "--config", "tiny.yaml", "--trainer.max_epochs", "1")
    assert (workdir / "runs" / "tiny-2" / "checkpoints" / "last.ckpt").is_file()


def test_a_killed_run_goes_on_as_if_it_had_not_been(command: Command, workdir: Path) -> None:
    """SIGKILL in mid-epoch: steps, losses and learning rates then equal those of a run that was left alone."""
    arguments = ("fit", "--config", "tiny.yaml", "--trainer.max_epochs", "4")
    command(*arguments, "--run_dir", "runs/whole")
    # every step of the killed one takes long enough to be hit
    data = ("--data.train_length", "12", "--data.num_workers", "0")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_STEPS, *arguments, *data, "--run_dir", "runs/cut"],
        cwd=workdir,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    steps = workdir / "steps"
    deadline = time.monotonic() + 240
    # the second epoch has three steps, 4 to 6: strike after 5
    while not (steps.is_file() and len(steps.read_text()) >= 5):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    checkpoint = torch.load(workdir / "runs" / "cut" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3

    command(*arguments, "--run_dir", "runs/cut", "--ckpt_path", "last")
    whole, cut = workdir / "runs" / "whole" / "metrics.csv", workdir / "runs" / "cut" / "metrics.csv"
    for name in ("lr-SGD/head", "train/loss", "val/miou"):
        assert column(cut, name) == column(whole, name), name
    assert len(column(cut, "lr-SGD/head")) == 12
    assert sorted(path.name for path in (workdir / "runs" / "cut").glob("config*.yaml")) == [
        "config-2.yaml",
        "config.yaml",
    ]
    assert not (workdir / "runs" / "cut-2").exists()


SLOW_STEPS = """
import time
from lightning_atrous.cli import main
from lightning_atrous.task import SegmentationTask
class Slow(SegmentationTask):
    pass
step = SegmentationTask.training_step
def slow(self, batch, batch_idx):
    with open("steps", "a") as file:
        file.write(".")
    if self.trainer.global_step >= 4:
        time.sleep(3)
    return step(self, batch, batch_idx)
SegmentationTask.training_step = slow
main()
"""


def test_an_interrupted_run_says_so(workdir: Path) -> None:
    with (workdir / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_atrous", "fit", "--config", "tiny.yaml", "--trainer.max_epochs", "999"],
            cwd=workdir,
            env=environment(),
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    deadline = time.monotonic() + 120
    while not (workdir / "runs/tiny/checkpoints/last.ckpt").is_file():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to those too that read the images
    assert process.wait(60) == 130
    output = (workdir / "out").read_text()
    assert "lightning-atrous fit: stopped by SIGINT after step " in output
    assert "is saved in runs/tiny/checkpoints/last.ckpt; --ckpt_path last goes on from there" in output
    assert "Traceback" not in output


def test_a_resumed_run_takes_the_options_that_are_typed(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = ("--data.num_workers", "0", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs", "2")
    main(["fit", "--config", "tiny.yaml", *fast])
    typed = ("--model.optimizer.lr", "0.5", "--model.optimizer.momentum", "0.3", "--model.backbone_lr_factor", "0.1")
    main(["fit", "--config", "tiny.yaml", *fast[:-1], "3", "--ckpt_path", "last", *typed])
    state = torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=True)
    groups = {group["name"]: group for group in state["optimizer_states"][0]["param_groups"]}
    assert groups["head"]["initial_lr"] == 0.5
    assert groups["backbone"]["initial_lr"] == 0.5 * 0.1
    assert {group["momentum"] for group in groups.values()} == {0.3}
    capsys.readouterr()
    main(["fit", "--config", "tiny.yaml", *fast[:-1], "3", "--ckpt_path", "last"])
    assert "the checkpoint is at step 9 already, at or past the end" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "tiny.yaml", *fast[:-1], "4", "--trainer.val_check_interval", "100"])
    assert stop.value.code == 1
    assert "trainer.val_check_interval 100 is more than an epoch's 3 batches; give at most 3" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "tiny.yaml", *fast[:-1], "4", "--ckpt_path", "last", "--model.head.channels", "8"])
    assert stop.value.code == 1
    assert "do not fit the model that this run builds: model.head" in capsys.readouterr().err


@pytest.mark.slow
def test_a_preempted_run_goes_on_to_the_bit(command: Command, workdir: Path) -> None:
    """SIGTERM to the process alone, as from a queue; the same command then goes on."""
    fit = ("fit", "--config", "tiny.yaml", "--trainer.max_epochs", "25")
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_atrous", *fit],
        cwd=workdir,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (workdir / "runs/tiny/checkpoints/best.ckpt").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)  # to some step of a later epoch
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM after step " in output
    command(*fit, "--ckpt_path", "last")
    command(*fit, "--run_dir", "runs/whole")

    def losses(run: str) -> list[tuple[str, str]]:
        with (workdir / "runs" / run / "metrics.csv").open(newline="") as file:
            return [(row["step"], row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]

    assert len(losses("whole")) == 75
    assert losses("tiny") == losses("whole")


def test_a_plugin_is_installed_listed_and_trained(command: Command, workdir: Path) -> None:
    site = workdir / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            str(site),
            str(ROOT / "tests" / "plugin"),
        ],
        check=True,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    listed = command("list", "heads", pythonpath=site)
    assert re.search(r"linear +│ A 1×1 on the last map", listed.stdout)
    assert "deeplabv3plus" in listed.stdout
    assert "plug-in 'broken' could not be imported: atrous-plugin" in listed.stderr
    assert "atrous_plugin_that_is_not_there" in listed.stderr

    config = yaml.safe_load((workdir / "tiny.yaml").read_text())
    config["model"]["head"] = {"class_path": "linear", "init_args": {"dropout": 0.2}}
    config["trainer"]["max_epochs"] = 1
    (workdir / "plugin.yaml").write_text(yaml.safe_dump(config))
    command("fit", "--config", "plugin.yaml", pythonpath=site)
    checkpoint = torch.load(workdir / "runs/plugin/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["lightning_atrous"]["head"] == {
        "class_path": "atrous_plugin.Linear",
        "init_args": {"dropout": 0.2},
    }
    # by class name, from the command line
    command(
        "fit",
        "--config",
        "tiny.yaml",
        "--model.head",
        "Linear",
        "--trainer.fast_dev_run",
        "1",
        pythonpath=site,
    )
    # its options are checked
    wrong = command("fit", "--config", "plugin.yaml", "--model.head.dropuot", "0.1", code=2, pythonpath=site)
    assert "did you mean 'dropout'" in wrong.stderr
    # the broken one says why
    broken = command("fit", "--config", "tiny.yaml", "--model.head", "broken", code=2, pythonpath=site)
    assert "the head 'broken' could not be imported from atrous-plugin" in broken.stderr
    assert "Traceback" not in broken.stderr
    # without the package its checkpoint is refused, not guessed at
    gone = command("validate", "--ckpt_path", "runs/plugin/checkpoints/last.ckpt", "--data", "Shapes", code=2)
    assert "atrous_plugin.Linear" in gone.stderr
    assert "Traceback" not in gone.stderr


def test_help_shows_every_verb(command: Command) -> None:
    shown = command("--help").stdout
    for verb in ("fit", "validate", "test", "predict", "list"):
        assert re.search(rf"^  {verb} ", shown, re.M)


def test_list_backbones_by_pattern(command: Command) -> None:
    assert "mobilenetv2_100" in command("list", "backbones", "mobilenetv2_1?0").stdout.split()
    assert "no network like 'nonet'" in command("list", "backbones", "nonet", code=1).stderr
