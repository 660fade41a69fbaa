"""What all imports share, and the verb: what it writes is a checkpoint like any other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from originals import drawn
from PIL import Image

import lightning_atrous
from lightning_atrous.cli import main
from lightning_atrous.data import Shapes
from lightning_atrous.interop.base import numbered, read_file, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread")


class Foreign:
    """What no file of weights should hold."""


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["import", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_what_is_imported_predicts_validates_and_trains_on(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = Shapes().classes.names
    torch.manual_seed(0)
    model = drawn(
        smp.DeepLabV3Plus("tu-test_efficientnet", encoder_weights=None, classes=len(names), decoder_channels=16)
    )
    model.save_pretrained("theirs")
    main(["import", "smp", "theirs", "--output", "run/checkpoints/ours.ckpt", "--classes", ",".join(names)])
    told = capsys.readouterr().out
    assert "test_efficientnet at output stride 16, DeepLabV3Plus, 7 classes (background" in told
    assert "squeeze-excite and the like see the denser map" in told

    task = lightning_atrous.load("run/checkpoints/ours.ckpt")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = model(task.model.normalize(image))
        torch.testing.assert_close(task(image), expected, rtol=1e-4, atol=1e-4)

    Image.fromarray(pixels).save("photo.png")
    main(["predict", "run/checkpoints/ours.ckpt", "photo.png", "--output", "seen", "--device", "cpu"])
    labels = np.asarray(Image.open("seen/index/photo.png"))
    assert (labels == expected.argmax(dim=1)[0].numpy()).mean() > 0.999

    data = ["--data", "Shapes", "--data.size", "48", "--data.train_length", "4", "--data.val_length", "2"]
    trainer = ["--data.batch_size", "2", "--data.num_workers", "0", "--trainer.accelerator", "cpu"]
    checkpoint = ["--ckpt_path", "run/checkpoints/ours.ckpt"]
    main(["validate", *checkpoint, *data, *trainer, "--eval_output_stride", "32"])
    assert "pixel accuracy" in capsys.readouterr().out
    main(
        [
            "fit",
            *checkpoint,
            *data,
            *trainer,
            "--trainer.max_steps",
            "1",
            "--trainer.log_every_n_steps",
            "1",
            "--model.optimizer.lr",
            "0.001",
        ]
    )
    trained = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert trained["global_step"] == 1
    before, after = task.state_dict(), trained["state_dict"]
    key = "model.head.classifier.weight"
    assert 0 < (before[key] - after[key]).abs().max() < 0.01


def test_what_was_typed_wrong_is_one_sentence(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"segmentation_head.0.weight": torch.zeros(3, 8, 1, 1), "segmentation_head.0.bias": torch.zeros(3)}, "w")
    Path("names.txt").write_text("a\nb\n\n")
    Path("there.ckpt").write_text("")
    new = ["--output", "new.ckpt"]
    named = ["smp", "w", "--model", "DeepLabV3", "--encoder", "resnet18", *new]
    assert "there.ckpt is there already" in refused(["smp", "w", "--output", "there.ckpt"], capsys)
    assert "there is no file nowhere.pth" in refused(["mmseg", "nowhere.pth", *new], capsys)
    assert "is no model of SMP" in refused(["smp", "w", *new], capsys)
    assert "do not say which encoder" in refused(["smp", "w", "--model", "Unet", "--classes", "a,b,c", *new], capsys)
    assert "nothing says what they are called" in refused(named, capsys)
    assert "given for 2 classes" in refused([*named, "--classes", "names.txt"], capsys)
    assert "neither names with commas" in refused([*named, "--classes", "nofile"], capsys)
    assert "--set rate has no value" in refused([*named, "--set", "rate"], capsys)
    assert "--set a=[ has no plain value" in refused([*named, "--set", "a=["], capsys)
    assert "--mean and --std go together" in refused([*named, "--mean", "0", "0", "0"], capsys)
    assert "invalid choice: 'unet'" in refused(["torchvision", "unet", "w", *new], capsys)
    assert not Path("new.ckpt").exists()


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "message_hub": Foreign()}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match=r"holds more than tensors and plain values.*torch\.save\("):
        read_file(tmp_path / "foreign.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "foreign.pth").read_bytes()[:100])
    with pytest.raises(ValueError, match="it is damaged, or"):
        read_file(tmp_path / "cut.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, expected a state dict"):
        read_file(tmp_path / "list.pth")


def test_a_state_dict_is_found_and_freed_of_wrappers() -> None:
    weight, bias = torch.zeros(2), torch.ones(2)
    plain = {"a.weight": weight, "a.bias": bias}
    for content in (
        plain,
        {"state_dict": plain, "epoch": 3},
        {"model": plain, "optimizer": {}},
        {f"_orig_mod.{key}": value for key, value in plain.items()},
        {"state_dict": {f"model._orig_mod.module.{key}": value for key, value in plain.items()}},
    ):
        assert tensors_of(content) == plain
    # a name that not all share is a part of the network's
    mixed = {"model.a": weight, "b": bias}
    assert tensors_of(mixed) == mixed
    with pytest.raises(ValueError, match=r"no weights in this file; it has 1 \(epoch\)"):
        tensors_of({"epoch": 3})
    assert numbered("a.{}.w", {"a.0.w": weight, "a.1.w": bias, "a.3.w": bias}) == 2
