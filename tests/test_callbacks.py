from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from rich.console import Console

from lightning_atrous.callbacks import AppendingCSVLogger, score_table
from lightning_atrous.types import ClassInfo


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


def test_the_table_says_what_the_matrix_says() -> None:
    confusion = torch.tensor([[6, 2, 0], [0, 2, 0], [0, 0, 0]])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(score_table(confusion, ClassInfo(("road", "car", "bus")), title="validation"))
    lines = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in console.export_text().splitlines()]
    assert ["road", "75.00", "75.00", "80.00"] in lines
    assert ["car", "50.00", "100.00", "20.00"] in lines
    assert ["bus", "–", "–", "0.00"] in lines
    assert ["mean over classes", "62.50", "87.50", ""] in lines or ["mean over classes", "62.50", "87.50"] in lines
    assert any(line[0] == "pixel accuracy 80.00" for line in lines)
