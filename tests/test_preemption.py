"""The command told to end: by a signal, by Slurm, with all its processes; and going on from there."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from lightning_atrous.cli import main
from lightning_atrous.runs import claim, find_requeued
from lightning_atrous.task import SegmentationTask

FIT = ("fit", "--config", "tiny.yaml", "--trainer.accelerator", "cpu", "--data.num_workers", "0")
DROPOUT = ("--model.head.dropout", "0.5")


def rows(run: str) -> list[dict[str, str]]:
    with Path("runs", run, "metrics.csv").open(newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: int(row["step"]))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[int, signal.Signals]:
    """By the optimiser's step, the signal that is sent within it."""
    signals: dict[int, signal.Signals] = {}
    step = SegmentationTask.training_step

    def tell(self: SegmentationTask, batch, batch_idx: int):
        if number := signals.pop(self.trainer.global_step, None):
            signal.raise_signal(number)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SegmentationTask, "training_step", tell)
    return signals


@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_job_that_slurm_queues_again_goes_on_in_its_run(
    told: dict[int, signal.Signals], workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command line three times, and the numbers of a run that was never stopped."""
    main([*FIT, *DROPOUT, "--run_dir", "runs/whole"])
    scontrol = workdir / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(
        f'#!/bin/sh\necho "$@" >> {workdir}/asked\n[ ! -e {workdir}/down ] || {{ echo down >&2; exit 1; }}'
    )
    scontrol.chmod(0o755)
    job = {"JOB_ID": "1234", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in {**job, "STEP_ID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}")
    command = [*FIT, *DROPOUT, "--run_dir", "runs/job"]

    told[1] = signal.SIGUSR1
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 128 + signal.SIGUSR1
    said = "after step 2, which is saved in runs/job/checkpoints/last.ckpt; Slurm has queued job 1234 again"
    assert said in capsys.readouterr().err
    assert (workdir / "asked").read_text() == "requeue 1234\n"

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    told[3] = signal.SIGUSR1
    (workdir / "down").touch()
    with pytest.raises(SystemExit):
        main(command)
    said = (
        "Slurm could not queue job 1234 again (scontrol requeue: down): submit it anew, --ckpt_path last goes on from"
    )
    assert said in capsys.readouterr().err

    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    main(command)
    assert rows("job") == rows("whole")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["job", "whole"]
    assert not list(Path("runs").rglob("hpc_ckpt*"))


def test_only_the_job_that_was_queued_again_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, elsewhere = tmp_path / "runs" / "a", tmp_path / "other" / "checkpoints" / "best.ckpt"
    for directory in (base, base.with_name("a-2"), elsewhere.parent.parent):
        (directory / "checkpoints").mkdir(parents=True)
        (directory / "checkpoints" / "last.ckpt").touch()
    elsewhere.touch()
    claim(base)  # outside of Slurm
    assert not (base / "slurm_job").exists()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    claim(base)
    assert find_requeued(base, None) is None  # its first life
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert find_requeued(base, None) == base / "checkpoints" / "last.ckpt"
    assert find_requeued(base, str(elsewhere)) == base / "checkpoints" / "last.ckpt"
    monkeypatch.setenv("SLURM_STEP_ID", "1")  # another command of the same job
    assert find_requeued(base, None) is None
    claim(elsewhere.parent.parent)
    assert find_requeued(base, str(elsewhere)) == elsewhere.with_name("last.ckpt")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "6")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert find_requeued(base, str(elsewhere)) is None
    claim(base)
    assert (base / "slurm_job").read_text() == "6_2.1\n"


def test_all_processes_end_after_one_step_whichever_was_told(tmp_path: Path) -> None:
    """And go on to the bit: within an epoch, and within a validation of which they have unequal shares."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ddp_resume.py"), str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stopped by SIGTERM after step 3, which is saved") == 1
    assert done.stderr.count("stopped by SIGTERM after step 4, which is saved") == 1
