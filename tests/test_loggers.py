"""The loggers: what each writes into the run's directory, and that a resumed run goes on in it."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from wandb_file import read_run

from lightning_atrous.loggers import AppendingCSVLogger, has_wandb_account


def written(folder: Path) -> list[tuple[int, float]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def test_a_resumed_run_keeps_the_earlier_rows_and_drops_those_it_does_again(tmp_path: Path) -> None:
    first = AppendingCSVLogger(str(tmp_path))
    for step in range(5):
        first.log_metrics({"loss": torch.tensor(float(step))}, step)
    first.save()
    assert written(tmp_path) == [(i, float(i)) for i in range(5)]
    # the checkpoint was after step 2, the kill after step 4; a new column comes too
    second = AppendingCSVLogger(str(tmp_path), first_step=3)
    assert second.experiment is second.experiment
    # a kill before the first row loses nothing
    assert written(tmp_path) == [(0, 0.0), (1, 1.0), (2, 2.0)]
    for step in range(3, 7):
        second.log_metrics({"loss": 10.0 + step, "miou": 0.5}, step)
    second.save()
    assert written(tmp_path) == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0), (5, 15.0), (6, 16.0)]


def test_a_run_that_only_looks_leaves_the_file_alone(tmp_path: Path) -> None:
    first = AppendingCSVLogger(str(tmp_path))
    first.log_metrics({"loss": 1.0}, 0)
    first.save()
    AppendingCSVLogger(str(tmp_path)).finalize("success")
    assert written(tmp_path) == [(0, 1.0)]


def run_files(run: Path) -> list[dict[str, Any]]:
    """What every offline W&B run in a run's directory recorded, in the order of their making."""
    # by the clock: their names have seconds only
    files = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.parent.stat().st_ctime)
    return [read_run(path) for path in files]


def column(history: list[dict[str, Any]], key: str) -> dict[int, float]:
    return {row["trainer/global_step"]: row[key] for row in history if key in row}


def test_a_wandb_run_reads_back_goes_on_and_is_scored(
    command: Callable[..., subprocess.CompletedProcess[str]], workdir: Path
) -> None:
    """Without an account, without a terminal, without a question."""
    logger = ("--trainer.logger", "wandb", "--trainer.logger.project", "forms")
    fit = command("fit", "--config", "tiny.yaml", *logger)
    assert "no Weights & Biases account" in fit.stderr
    run = workdir / "runs" / "tiny"
    (first,) = run_files(run)
    assert (first["project"], first["name"]) == ("forms", "tiny")
    written = yaml.safe_load((run / "config.yaml").read_text())
    assert {key: value for key, value in first["config"].items() if key != "_wandb"} == written
    assert written["model"]["schedule"]["power"] == 0.9
    loss, rate, miou = (column(first["history"], key) for key in ("train/loss", "lr-SGD/head", "val/miou"))
    assert list(loss) == list(rate) == list(range(6))
    assert rate[0] == 0.01
    assert list(miou) == [2, 5]
    iou = {key: column(first["history"], key)[5] for key in first["history"][-1] if key.startswith("val/iou/")}
    assert {"val/iou/background", "val/iou/star"} < set(iou)
    known = [value for value in iou.values() if value == value and value != "NaN"]
    assert miou[5] == pytest.approx(sum(known) / len(known))

    # another length: its own curve from the first step on
    longer = ("--trainer.max_epochs", "3", "--ckpt_path", "last")
    # the project and the name need not be said again
    resumed = command("fit", "--config", "tiny.yaml", *logger[:2], *longer)
    assert "already exists" not in resumed.stderr
    second = run_files(run)[-1]
    assert (second["id"], second["project"], second["name"]) == (first["id"], "forms", "tiny")
    assert second["config"]["trainer"]["max_epochs"] == 3
    rate = column(second["history"], "lr-SGD/head")
    assert list(rate) == list(column(second["history"], "train/loss")) == [6, 7, 8]
    assert rate[6] == pytest.approx(0.01 * (3 / 9) ** 0.9)

    command("test", "--config", "tiny.yaml", *logger, "--ckpt_path", "best")
    third = run_files(run)[-1]
    assert third["id"] == first["id"]
    # at the step that was trained to, not at 0
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["global_step"]
    assert list(column(third["history"], "test/miou")) == [best]
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "config-2.yaml", "config.yaml", "wandb"]


def test_tensorboard_and_csv_side_by_side(
    command: Callable[..., subprocess.CompletedProcess[str]], workdir: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = yaml.safe_load((workdir / "tiny.yaml").read_text())
    config["trainer"] |= {"logger": ["csv", {"class_path": "tensorboard"}], "max_epochs": 1}
    (workdir / "both.yaml").write_text(yaml.safe_dump(config))
    command("fit", "--config", "both.yaml")
    command("fit", "--config", "both.yaml", "--trainer.max_epochs", "2", "--ckpt_path", "last")
    run = workdir / "runs" / "both"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(6))
    assert [event.step for event in events.Scalars("val/miou")] == [2, 5]
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(6))
    assert [int(row["step"]) for row in rows if row["val/iou/star"] or row["val/miou"]] == [2, 5]
    # an evaluation adds its scores, and takes nothing away
    command("test", "--config", "both.yaml", "--trainer.logger", "[csv]", "--ckpt_path", "best")
    with (run / "metrics.csv").open(newline="") as file:
        after = list(csv.DictReader(file))
    assert [row["train/loss"] for row in after if row["train/loss"]] == [
        row["train/loss"] for row in rows if row["train/loss"]
    ]
    assert sum(bool(row["test/miou"]) for row in after) == 1


@pytest.mark.parametrize(
    ("environment", "netrc", "known"),
    [
        ({}, "", False),
        ({}, "machine example.org login user password x\n", False),
        ({}, "machine api.wandb.ai login user password " + 40 * "a" + "\n", True),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine api.wandb.ai login user password x\n", False),
        ({"WANDB_BASE_URL": "https://wandb.example.org"}, "machine wandb.example.org login user password x\n", True),
        ({"WANDB_API_KEY": 40 * "a"}, "", True),
        ({"WANDB_MODE": "offline"}, "", True),
    ],
)
def test_an_account_is_looked_for_where_wandb_looks(
    environment: dict[str, str], netrc: str, known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert has_wandb_account() is known
