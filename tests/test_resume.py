"""A resumed training computes what it would have computed without the stop, bit for bit."""

from __future__ import annotations

import functools
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_atrous import SegmentationTask, TimmBackbone
from lightning_atrous.callbacks import FinalValidation, LoggedStep
from lightning_atrous.data import Shapes
from lightning_atrous.heads import DeepLabV3Plus
from lightning_atrous.optim import Poly
from lightning_atrous.preemption import Preemption, Stopped
from lightning_atrous.resume import ExactResume
from lightning_atrous.transforms import Augment

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
]

SIZE = 32


class Record(Callback):
    """What was computed, by the step it belongs to; and checkpoints by number of batches and occasion, or all."""

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        self.folder, self.names = folder, names
        self.losses: list[tuple[int, float, float]] = []
        self.scores: list[tuple[int, float, float]] = []
        self.epochs: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.save(trainer, "before")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.losses.append((trainer.global_step, trainer.callback_metrics["train/loss"].item(), rate))
        self.save(trainer, "after")

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.save(trainer, "validating")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        metrics = trainer.callback_metrics
        self.scores.append((trainer.global_step, metrics["val/miou"].item(), metrics["val/loss"].item()))
        self.save(trainer, "validated")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.epochs.append(trainer.current_epoch)
        self.save(trainer, "epoch")

    def save(self, trainer: L.Trainer, occasion: str) -> None:
        name = f"{trainer.fit_loop.epoch_loop.batch_progress.total.processed}-{occasion}"
        if name in self.names or "all" in self.names:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")


def shapes(**options: Any) -> Shapes:
    settings = {
        "size": SIZE,
        "train_length": 15,
        "val_length": 3,
        "batch_size": 3,
        "eval_batch_size": 1,
        "num_workers": 0,
    }
    return Shapes(**{**settings, "augment": Augment((SIZE, SIZE)), **options})


def fit(folder: Path, *, ckpt: Path | None = None, save: Collection[str] = (), seed: int = 4, **options: Any) -> Any:
    """A run with all that draws random numbers and remembers something: record, task and trainer."""
    L.seed_everything(seed, verbose=False)
    data = options.pop("data", {})
    data = data if isinstance(data, Shapes) else shapes(**data)
    callbacks = [
        *options.pop("callbacks", []),
        *([EMAWeightAveraging(decay=0.8)] if options.pop("average", False) else []),
    ]
    task = SegmentationTask(
        TimmBackbone("test_resnet", pretrained=False, output_stride=16),
        functools.partial(DeepLabV3Plus, channels=8, dropout=0.5),
        classes=data.classes,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3),
        schedule=Poly(warmup_steps=3),
    )
    record = Record(folder, save)
    trainer = L.Trainer(
        logger=False,
        default_root_dir=folder,
        callbacks=[*callbacks, record, LoggedStep(), FinalValidation(), ExactResume()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 2, "accelerator": "cpu", **options},
    )
    trainer.fit(task, data, ckpt_path=ckpt)
    return record, task, trainer


def state(task: SegmentationTask, trainer: L.Trainer) -> dict[str, torch.Tensor]:
    """Every tensor of weights, statistics and optimiser."""
    slots = trainer.optimizers[0].state_dict()["state"]
    moments = {f"{i}.{name}": value for i, slot in slots.items() for name, value in slot.items()}
    return {**task.state_dict(), **moments}


RUNS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "epochs": ({}, ["2-after", "5-validating", "5-epoch"]),
    "workers": ({"data": {"num_workers": 2}}, ["7-before"]),
    "validation within epochs": ({"val_check_interval": 2}, ["2-after", "4-validated"]),
    "validation across epochs": (
        {"val_check_interval": 3, "check_val_every_n_epoch": None},
        ["6-validated"],
    ),
    "an end within an epoch": (
        {"max_epochs": -1, "max_steps": 8, "check_val_every_n_epoch": 2},
        ["6-after"],
    ),
    "accumulation": ({"accumulate_grad_batches": 2}, ["2-after", "7-before"]),
    "averaged weights": ({"average": True}, ["3-before"]),
}
"""How a training runs, and the checkpoints that are always tried: the number of batches, and the occasion."""


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("run", RUNS)
def test_from_any_checkpoint(run: str, every: bool, tmp_path: Path) -> None:
    """Saved before and after steps, within validations, after them, at the end of epochs."""
    options, names = RUNS[run]
    whole, task, trainer = fit(tmp_path, save=["all"] if every else names, **options)
    expected = state(task, trainer)
    if every:
        names = sorted(path.stem for path in tmp_path.glob("*.ckpt"))
    for name in names:
        path, done, occasion = tmp_path / f"{name}.ckpt", int(name.partition("-")[0]), name.partition("-")[2]
        step = torch.load(path, weights_only=True)["global_step"]
        within = done % 5 % options.get("accumulate_grad_batches", 1)
        over = step == options.get("max_steps") and occasion in ("after", "validating")
        averaged = "average" in options and (occasion == "validating" or name == "10-epoch")
        if every and (within or over or averaged):
            continue  # no whole steps; nothing left to do; weights that are, or were about to be, the averaged ones
        # another seed: neither it nor what was drawn since may matter
        resumed, again, other = fit(tmp_path, ckpt=path, seed=99, **options)
        due = step if occasion in ("after", "validating") else step + 1
        assert resumed.losses == whole.losses[done:], name
        assert resumed.scores == [score for score in whole.scores if score[0] >= due], name
        for key, tensor in state(again, other).items():
            assert torch.equal(tensor, expected[key]), (name, key)


def test_a_checkpoint_between_the_batches_of_one_step_goes_on_from_the_last_step(tmp_path: Path) -> None:
    """Nothing is left out and no gradient is lost; statistics and dropout may differ."""
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "val_check_interval": 3}
    whole, _, _ = fit(tmp_path, save=["3-validated"], **options)
    resumed, _, trainer = fit(tmp_path, ckpt=tmp_path / "3-validated.ckpt", **options)
    assert [step for step, _, _ in resumed.losses] == [step for step, _, _ in whole.losses[2:]]
    assert trainer.fit_loop.epoch_loop.batch_progress.total.processed == 10


class Late(SingleDeviceStrategy):
    """Restores when the loaders are made already, as Lightning's strategies with sharded weights do."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True


def test_a_strategy_that_restores_late(tmp_path: Path) -> None:
    whole, _, _ = fit(tmp_path, save=["7-after"])
    resumed, _, _ = fit(tmp_path, ckpt=tmp_path / "7-after.ckpt", seed=99, strategy=Late("cpu"), accelerator="auto")
    assert resumed.losses == whole.losses[7:]


class Seen(Callback):
    """The names of the images, in the order of the training."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.names += batch["name"]


def test_another_batch_size_goes_on_at_the_same_images(tmp_path: Path) -> None:
    before, after = Seen(), Seen()
    fit(tmp_path, save=["4-after"], max_epochs=1, callbacks=[before])  # of 5 batches of 3
    fit(tmp_path, ckpt=tmp_path / "4-after.ckpt", max_epochs=1, data={"batch_size": 5}, callbacks=[after])
    assert after.names == before.names[10:]  # 12 are done, of which two batches of 5 are whole


def test_another_number_of_images_begins_the_epoch_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = Seen()
    fit(tmp_path, save=["7-after"])
    fit(tmp_path, ckpt=tmp_path / "7-after.ckpt", data={"train_length": 18}, callbacks=[after])
    assert sorted(after.names) == [f"train_{i:06d}" for i in range(18)]
    said = capsys.readouterr().err
    assert "training split has 18 images, and had 15 when the checkpoint was saved: epoch 2 begins anew" in said


def test_a_second_training_with_the_same_data_begins_at_the_beginning(tmp_path: Path) -> None:
    data, seen = shapes(), Seen()
    fit(tmp_path, save=["4-after"], max_epochs=1, data=data)
    fit(tmp_path, ckpt=tmp_path / "4-after.ckpt", max_epochs=1, data=data)
    fit(tmp_path, max_epochs=1, data=data, callbacks=[seen])
    assert len(seen.names) == 15


class Tell(Callback):
    """Sends this process a signal at a batch of the training, or of the validation after it."""

    def __init__(self, number: signal.Signals, *, step: int, validating: bool = False) -> None:
        self.number, self.step, self.validating = number, step, validating

    def tell(self, trainer: L.Trainer) -> None:
        if trainer.global_step == self.step and trainer.validating == self.validating:
            signal.raise_signal(self.number)

    def on_before_zero_grad(self, trainer: L.Trainer, *_: Any) -> None:
        self.tell(trainer)  # within a step

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.tell(trainer)


@pytest.mark.parametrize(
    ("tell", "options", "saved"),
    [
        (Tell(signal.SIGTERM, step=2), {}, 3),
        (Tell(signal.SIGINT, step=4), {}, 5),
        (Tell(signal.SIGUSR1, step=5, validating=True), {"average": True}, 5),
        (Tell(signal.SIGTERM, step=1), {"accumulate_grad_batches": 2}, 2),
    ],
)
def test_a_run_that_is_told_to_end_goes_on_to_the_bit(
    tell: Tell, options: dict[str, Any], saved: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, task, trainer = fit(tmp_path, **options)
    path = tmp_path / "last.ckpt"
    before = signal.getsignal(tell.number)
    with pytest.raises(Stopped) as stop:
        fit(tmp_path, callbacks=[tell, Preemption(path)], **options)
    assert stop.value.code == 128 + tell.number
    assert signal.getsignal(tell.number) == before
    assert torch.load(path, weights_only=True)["global_step"] == saved
    assert f"stopped by {tell.number.name} after step {saved}, which is saved in" in capsys.readouterr().err
    resumed, again, other = fit(tmp_path, ckpt=path, seed=99, **options)
    assert resumed.losses == whole.losses[-len(resumed.losses) :]
    # a validation that was cut short is done from its beginning
    assert resumed.scores == whole.scores[-len(resumed.scores) :]
    assert len(resumed.scores) == sum(score[0] >= saved for score in whole.scores)
    expected = state(task, trainer)
    for key, tensor in state(again, other).items():
        assert torch.equal(tensor, expected[key]), key


def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step; what comes within a second is the first one, sent twice."""
    clock = iter([10.0, 10.5, 11.5])
    monkeypatch.setattr("lightning_atrous.preemption.time.monotonic", lambda: next(clock))
    callback = Preemption(tmp_path / "last.ckpt")
    handler = signal.getsignal(signal.SIGINT)
    try:
        for _ in range(2):
            callback._note(signal.SIGINT, None)
        with pytest.raises(KeyboardInterrupt):
            callback._note(signal.SIGINT, None)
    finally:
        signal.signal(signal.SIGINT, handler)
