"""The faster of equal executions: measured once, kept, and left alone where it is pinned."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_atrous import SegmentationTask, TimmBackbone, speed
from lightning_atrous.data import Shapes
from lightning_atrous.dilation import Dilation, Execution, set_output_stride
from lightning_atrous.dilation.timing import fastest, seconds
from lightning_atrous.heads import FCN
from lightning_atrous.inference import Inference

Asked = list[tuple[bool, tuple[int, ...], torch.dtype]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What was measured; in training, dilated kernels turn out to be the faster."""
    measured: Asked = []

    def measure(dilation: Dilation, image: Tensor, *, training: bool, rounds: int = 3) -> Execution:
        weight = next(dilation.network.parameters())
        precision = torch.nn.functional.conv2d(image, torch.ones(1, 3, 1, 1, dtype=weight.dtype)).dtype
        measured.append((training, tuple(image.shape), precision))
        return "dilated" if training else "split"

    monkeypatch.setattr(speed, "fastest", measure)
    return measured


def task(**options: str) -> SegmentationTask:
    return SegmentationTask(
        TimmBackbone("test_resnet", output_stride=8, pretrained=False, **options),
        partial(FCN, channels=8),
        classes=Shapes().classes,
    )


def trainer(folder: Path, **options: object) -> L.Trainer:
    settings = {"max_epochs": 1, "limit_val_batches": 1, "logger": False, "enable_progress_bar": False}
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[speed.FasterExecution()],
        enable_model_summary=False,
        **{**settings, **options},
    )


def shapes(size: int = 64) -> Shapes:
    return Shapes(size=size, train_length=8, val_length=4, test_length=4, batch_size=4, num_workers=0)


def test_a_training_measures_once_and_a_resumed_one_not_at_all(asked: Asked, tmp_path: Path) -> None:
    model = task()
    first = trainer(tmp_path, precision="bf16-mixed", enable_checkpointing=False)
    first.fit(model, shapes())
    assert asked == [(True, (2, 3, 64, 64), torch.bfloat16), (False, (2, 3, 64, 64), torch.bfloat16)]
    dilation = model.model.backbone.dilation
    assert not dilation.prefers(training=True)
    assert dilation.prefers(training=False)
    first.save_checkpoint(tmp_path / "a.ckpt")
    again = task()
    trainer(tmp_path, max_epochs=2).fit(again, shapes(), ckpt_path=tmp_path / "a.ckpt")
    assert len(asked) == 2
    assert not again.model.backbone.dilation.prefers(training=True)


def test_an_evaluation_measures_its_own_mode(asked: Asked, tmp_path: Path) -> None:
    trainer(tmp_path).validate(task(), shapes(), verbose=False)
    assert [training for training, *_ in asked] == [False]


@pytest.mark.parametrize(
    ("model", "size", "options"),
    [
        ({"execution": "dilated"}, 64, {}),
        ({"execution": "split"}, 64, {}),
        ({"method": "phases"}, 64, {}),
        ({}, 72, {}),  # maps that do not divide are dilated anyway
        ({}, 64, {"deterministic": True}),
    ],
)
def test_what_has_no_choice_is_not_measured(
    asked: Asked, tmp_path: Path, model: dict, size: int, options: dict
) -> None:
    try:
        trainer(tmp_path, **options).fit(task(**model), shapes(size))
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == []


def test_measuring_leaves_everything_as_it_was() -> None:
    backbone = TimmBackbone("test_resnet", output_stride=8, pretrained=False).train()
    state = {key: value.clone() for key, value in backbone.state_dict().items()}
    x, random = torch.randn(2, 3, 64, 64), torch.get_rng_state()
    for training in (True, False):
        assert fastest(backbone.dilation, x, training=training, rounds=1) in ("dilated", "split")
    taken = seconds(backbone.dilation, x, training=True, rounds=3)
    assert {key: len(values) for key, values in taken.items()} == {"dilated": 3, "split": 3}
    assert min(min(values) for values in taken.values()) > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert backbone.training
    assert backbone.dilation.execution == "auto"


def test_the_faster_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    dilation = set_output_stride(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 2, 1)), 1)
    for slower, expected in (("dilated", "split"), ("split", "dilated")):
        times = {"dilated": [1.0], "split": [1.0], slower: [1.1]}
        monkeypatch.setattr("lightning_atrous.dilation.timing.seconds", lambda *_, times=times, **__: times)
        assert fastest(dilation, torch.zeros(1, 3, 8, 8), training=False) == expected


def test_an_evaluation_in_windows_measures_on_one(asked: Asked, tmp_path: Path) -> None:
    model = task()
    model.evaluation.inference = Inference(window=(32, 64))
    trainer(tmp_path).validate(model, shapes(), verbose=False)
    assert [(training, size) for training, size, _ in asked] == [(False, (2, 3, 32, 64))]
