"""One process and many give the same numbers: the matrix, the loss, the gradients."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ddp_worker
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, environment
from torch import Tensor

import lightning_atrous
from lightning_atrous.optim import Poly


def run(out: Path, devices: int, batch_size: int, accumulate: int, *backbone: object) -> dict[str, Any]:
    names = ("--devices", "--batch_size", "--accumulate", "--network", "--output_stride", "--method")
    pairs = zip(names, (devices, batch_size, accumulate, *backbone), strict=False)
    arguments = [str(part) for pair in pairs for part in pair]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ddp_worker.py"), str(out), *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], dict[str, Any]]:
    """For each number of processes, batch size and accumulation: what came out."""
    folder = tmp_path_factory.mktemp("ddp")
    settings = [(1, 8, 1), (1, 4, 2), (2, 8, 1), (2, 4, 2), (3, 6, 1)]
    return {setting: run(folder / f"{i}.pt", *setting) for i, setting in enumerate(settings)}


def by_hand(windows: list[range], *backbone: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Training on whole windows of the epoch's order with torch alone: losses, and weights after the last."""
    task = ddp_worker.task(*backbone).train()
    data = ddp_worker.Uneven(ddp_worker.TRAIN, 1)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(7)).tolist()
    weight = torch.tensor(ddp_worker.CLASS_WEIGHTS, dtype=torch.float64)
    losses = []
    for step, window in enumerate(windows):
        samples = [data[order[i]] for i in window]
        image = torch.stack([sample["image"].as_subclass(Tensor) for sample in samples])
        target = torch.stack([sample["mask"].as_subclass(Tensor) for sample in samples]).long()
        loss = torch.zeros((), dtype=torch.float64)
        for logits, share in zip(task.model.forward_train(image), (1.0, task.aux_weight), strict=True):
            logits = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=False)
            loss = loss + share * F.cross_entropy(logits, target, weight=weight, ignore_index=255)
        task.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for name, parameter in task.named_parameters():
                lr = 0.1 * Poly().factor(step, len(windows))
                parameter -= lr * parameter.grad if parameter.grad is not None else 0
                assert parameter.grad is not None, name
    return losses, {name: value.detach() for name, value in task.named_parameters()}


WHOLE = [range(8), range(8, 16)]
"""Batches of eight: the last four images do not fill one."""

WITH_REST = [*WHOLE, range(16, 20)]
"""Two batches of four, twice, and a last step that accumulates a single one."""


@pytest.mark.timeout(900)
def test_the_matrix_is_the_same_on_one_two_and_three_processes(runs: dict) -> None:
    one = runs[1, 8, 1]["confusion"]
    assert ddp_worker.VAL % 2
    assert ddp_worker.VAL % 3
    valid = sum(min(ddp_worker.SIZE, i**2) * ddp_worker.SIZE for i in range(ddp_worker.VAL))
    assert one.sum() == valid  # every image once
    assert (one > 0).all()
    for setting in ((2, 8, 1), (3, 6, 1)):
        assert torch.equal(runs[setting]["confusion"], one), setting


def test_the_loss_and_the_images_are_the_same_on_one_two_and_three_processes(runs: dict) -> None:
    """The loss is that of all images in one batch, though each has another number of valid pixels."""
    task, data = ddp_worker.task().eval(), ddp_worker.Uneven(ddp_worker.VAL, 2)
    image = torch.stack([data[i]["image"].as_subclass(Tensor) for i in range(len(data))])
    target = torch.stack([data[i]["mask"].as_subclass(Tensor) for i in range(len(data))]).long()
    logits = F.interpolate(task.model.logits(image), target.shape[-2:], mode="bilinear", align_corners=False)
    weight = torch.tensor(ddp_worker.CLASS_WEIGHTS, dtype=torch.float64)
    expected = F.cross_entropy(logits, target, weight=weight, ignore_index=255).item()
    images = [(str(i), min(ddp_worker.SIZE, i**2) * ddp_worker.SIZE) for i in range(ddp_worker.VAL)]
    for setting in ((1, 8, 1), (2, 8, 1), (3, 6, 1)):
        assert runs[setting]["val_loss"] == pytest.approx(expected, rel=1e-6), setting
        assert runs[setting]["images"] == images, setting


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_and_gradients_are_those_of_the_global_batch(devices: int, accumulate: int, runs: dict) -> None:
    """After steps of plain descent, equal weights mean equal gradients."""
    result = runs[devices, 8 // accumulate, accumulate]
    losses, weights = by_hand(WHOLE if accumulate == 1 else WITH_REST)
    for name, value in result["weights"].items():
        torch.testing.assert_close(value, weights[name], rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")
    if accumulate == 1:
        assert result["losses"] == pytest.approx(losses, rel=1e-12)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "backbone",
    [
        ("test_efficientnet_gn", 8, "phases"),  # group norm and squeeze-excite, each sub-grid for itself
        ("test_efficientnet_gn", 8, "dilate"),  # over the dense map
        ("test_convnext", 8, "dilate"),  # computed on sub-grids
    ],
    ids=lambda backbone: f"{backbone[0]} by {backbone[2]}",
)
def test_every_method_trains_on_several_processes(backbone: tuple[Any, ...], tmp_path: Path) -> None:
    result = run(tmp_path / "out.pt", 2, 8, 1, *backbone)
    losses, weights = by_hand(WHOLE, *backbone)
    assert result["losses"] == pytest.approx(losses, rel=1e-12)
    for name, value in result["weights"].items():
        torch.testing.assert_close(value, weights[name], rtol=1e-8, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")
    # what the first process has measured is done by all
    preferred = [json.loads((tmp_path / f"out.{rank}.json").read_text()) for rank in range(2)]
    assert preferred[0] == preferred[1] == ({} if "gn" in backbone[0] else {"true": False, "false": True})


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the second process in /proc")
@pytest.mark.parametrize("victim", ["the first", "another"])
def test_when_a_process_dies_the_others_end_and_the_checkpoint_is_good(victim: str, workdir: Path) -> None:
    ddp = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    with (workdir / "out").open("w") as out:
        first = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "lightning_atrous",
                "fit",
                "--config",
                "tiny.yaml",
                *ddp,
                "--trainer.max_epochs=999",
            ],
            cwd=workdir,
            env=environment(),
            stdout=out,
            stderr=out,
        )
    checkpoint = workdir / "runs" / "tiny" / "checkpoints" / "last.ckpt"
    try:
        wait_for(lambda: checkpoint.is_file() or first.poll() is not None, 120)
        assert first.poll() is None, (workdir / "out").read_text()
        second = next(
            pid for pid in children(first.pid) if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes()
        )
        dies = first.pid if victim == "the first" else second
        started = time.monotonic()
        os.kill(dies, signal.SIGKILL)
        wait_for(lambda: first.poll() is not None and not alive(second), 60)
        assert time.monotonic() - started < 60
        assert first.returncode != 0
    finally:
        first.kill()
    output = (workdir / "out").read_text()
    assert "another process of this run has ended" in output
    assert "Traceback" not in output
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == ["best.ckpt", "last.ckpt"]
    lightning_atrous.load(checkpoint)
    # all processes write into one run
    assert [path.name for path in (workdir / "runs").iterdir()] == ["tiny"]


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    """Whether a process runs: one that has ended and waits to be asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_command_on_two_processes_scores_as_on_one(command: Callable[..., Any], workdir: Path) -> None:
    """Five images on two processes, two at a time; what is printed and logged is that of one process."""
    fit = ("fit", "--config", "tiny.yaml", "--trainer.max_epochs", "1", "--data.val_length", "5")
    command(*fit)
    score = ("--data.eval_batch_size", "2", "--run_dir", "runs/tiny", "--data.val_length", "5")
    one = command("validate", "--config", "tiny.yaml", "--ckpt_path", "last", *score)
    ddp = ("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp")
    two = command("validate", "--config", "tiny.yaml", "--ckpt_path", "last", *score, *ddp)
    tables = [[line for line in done.stdout.splitlines() if "│" in line] for done in (one, two)]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 9
