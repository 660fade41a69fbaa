"""The average is that of the textbook, it is what is scored and kept, and a training goes on from the weights."""

from __future__ import annotations

import functools
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

import lightning_atrous
from lightning_atrous import SegmentationTask, TimmBackbone
from lightning_atrous.cli import main
from lightning_atrous.data import Shapes
from lightning_atrous.ema import EMA
from lightning_atrous.heads import FCN

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = functools.partial(Shapes, size=32, train_length=8, val_length=4, batch_size=4, num_workers=0)


def task() -> SegmentationTask:
    torch.manual_seed(0)
    backbone = TimmBackbone("test_resnet", pretrained=False, output_stride=16)
    head = functools.partial(FCN, channels=8, dropout=0.0)
    return SegmentationTask(backbone, head, classes=DATA().classes, eval_output_stride=8)


class Weights(Callback):
    """Those after every step of the optimiser, as plain copies."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if len(self.seen) < trainer.global_step:
            self.seen.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def fit(folder: Path, *callbacks: Callback, epochs: int = 3, accumulate: int = 1, ckpt: Path | None = None):
    this = task()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=[*callbacks, ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(this, DATA(), ckpt_path=ckpt)
    return this, trainer


def averages(seen: list[dict[str, Tensor]], decay: float, warmup: bool) -> dict[str, Tensor]:
    """By the definition: what counts is as it is."""
    average = {name: value.clone() for name, value in seen[0].items()}
    for n, weights in enumerate(seen[1:], 1):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        for name, value in weights.items():
            average[name] = d * average[name] + (1 - d) * value if value.is_floating_point() else value
    return average


@pytest.mark.parametrize(("decay", "warmup", "accumulate"), [(0.8, False, 1), (0.3, True, 2)])
def test_the_average_is_the_definition_and_is_what_is_kept(
    decay: float, warmup: bool, accumulate: int, tmp_path: Path
) -> None:
    weights = Weights()
    this, trainer = fit(tmp_path, weights, EMA(decay, warmup=warmup), accumulate=accumulate)
    assert len(weights.seen) == 6 // accumulate
    expected = averages(weights.seen, decay, warmup)
    loaded = lightning_atrous.load(tmp_path / "epoch=2.ckpt")
    for state in (loaded.state_dict(), this.state_dict()):  # in the file, and in the model when all is over
        torch.testing.assert_close(state, expected)
    assert not torch.equal(weights.seen[-1]["model.head.classifier.weight"], expected["model.head.classifier.weight"])
    # the last validation scored those, at its own stride
    confusion = this.confusion
    loaded.eval_output_stride = 8
    trainer.validate(loaded, DATA(), verbose=False)
    assert torch.equal(loaded.confusion, confusion)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_resumed_training_equals_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole, cut = Weights(), Weights()
    expected, _ = fit(tmp_path, whole, EMA(0.5))
    resumed, _ = fit(tmp_path, cut, EMA(0.5), ckpt=tmp_path / "epoch=0.ckpt")
    torch.testing.assert_close(cut.seen, whole.seen[2:], rtol=0, atol=0)
    torch.testing.assert_close(resumed.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_an_average_that_begins_late_begins_with_what_is_there(tmp_path: Path) -> None:
    more = Weights()
    fit(tmp_path / "late", ckpt=None, epochs=1)
    fit(tmp_path / "late", more, EMA(0.5), epochs=2, ckpt=tmp_path / "late" / "epoch=0.ckpt")
    second = lightning_atrous.load(tmp_path / "late" / "epoch=1.ckpt").state_dict()
    torch.testing.assert_close(second, averages(more.seen, 0.5, True))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_by_its_bare_name_on_the_command_line(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = ("--data.num_workers", "0", "--trainer.enable_progress_bar", "false")
    average = ("--trainer.callbacks+=EMA", "--trainer.callbacks.decay=0.5")
    main(["fit", "--config", "tiny.yaml", *average, *fast])
    content = torch.load("runs/tiny/checkpoints/best.ckpt", weights_only=True)
    pairs = [(content["state_dict"][key], value) for key, value in content["current_model_state"].items()]
    assert any(not torch.equal(*pair) for pair in pairs)
    main(["validate", "--config", "tiny.yaml", "--ckpt_path", "last", *average, *fast])
    main(["fit", "--config", "tiny.yaml", "--ckpt_path=last", "--trainer.max_epochs=3", *average, *fast])
    content = torch.load("runs/tiny/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 9
    with pytest.raises(SystemExit):
        main(["fit", "--config", "tiny.yaml", "--ckpt_path=last", "--trainer.max_epochs=4", *fast])
    assert "the checkpoint's weights are averages" in capsys.readouterr().err
    assert content["averaging_state"]["n_averaged"] == 9
    capsys.readouterr()


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_has_a_range(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        EMA(decay)
