from __future__ import annotations

import io

import torch
from rich.console import Console

from lightning_atrous.callbacks import score_table
from lightning_atrous.types import ClassInfo


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
