"""What people mistype: exit code 2, one sentence, the close matches, no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_atrous.cli import main

FIT = ("fit", "--config", "tiny.yaml")

MISTYPED = {
    "verb": (("fti",), "no verb 'fti'; did you mean 'fit'?"),
    "section": ((*FIT, "--modle.head", "fcn"), "unknown option --modle.head; did you mean 'model'?"),
    "key": ((*FIT, "--model.hed", "fcn"), "unknown option --model.hed; did you mean 'model.head'"),
    "trainer key": ((*FIT, "--trainer.max_epoch", "3"), "did you mean 'trainer.max_epochs'"),
    "key in the file": (("fit", "--config", "key.yaml"), "unknown key 'modle.head'; did you mean 'model'?"),
    "option in the file": (
        ("fit", "--config", "option.yaml"),
        "model.backbone takes no option 'output_strid'; did you mean 'output_stride'",
    ),
    "head": (
        (*FIT, "--model.head", "deeplab3plus"),
        "no head is named 'deeplab3plus'; did you mean 'deeplabv3plus'",
    ),
    "head in the file": (("fit", "--config", "head.yaml"), "no head is named 'fcm'; did you mean 'fcn'?"),
    "head option": (
        (*FIT, "--model.head.rats", "[1]"),
        "model.head takes no option 'rats'; did you mean 'rates'",
    ),
    "backbone": (
        (*FIT, "--model.backbone.name", "resnt18"),
        "timm has no network 'resnt18'; did you mean 'resnet18'",
    ),
    "backbone option": ((*FIT, "--model.backbone.timm_options", "{padtype: 1}"), "takes no option 'padtype'"),
    "reserved option": (
        (*FIT, "--model.backbone.timm_options", "{output_stride: 8}"),
        "may not have 'output_stride'",
    ),
    "stride": ((*FIT, "--model.backbone.output_stride", "12"), "cannot run at output stride 12"),
    "stride of squeeze-excite": (
        (*FIT, "--model.backbone.name", "efficientnet_b0", "--model.backbone.output_stride", "8"),
        "Strides it supports: 32",
    ),
    "weights": ((*FIT, "--model.backbone.pretrained", "no.pth"), "there is no file no.pth"),
    "damaged weights": (
        (*FIT, "--model.backbone.pretrained", "tiny.yaml"),
        "tiny.yaml cannot be read as a state dict",
    ),
    "type": (
        (*FIT, "--trainer.max_epochs", "three"),
        "trainer.max_epochs: expected one of int, null, got three",
    ),
    "nested type": (
        (*FIT, "--model.backbone.output_stride", "big"),
        "model.backbone.output_stride: expected int, got big",
    ),
    "precision": ((*FIT, "--trainer.precision", "bf61"), "'bf16-mixed'"),
    "data class": (
        ("fit", "--config", "tiny.yaml", "--data", "Shaeps"),
        "data: no class is named 'Shaeps'; did you mean 'Shapes'?",
    ),
    "data option": ((*FIT, "--data.bath_size", "3"), "did you mean 'batch_size'"),
    "batch size": ((*FIT, "--data.batch_size", "0"), "batch_size must be at least 1, got 0"),
    "config": (("fit", "--config", "tyni.yaml"), "tyni.yaml"),
    "no model": (
        ("fit", "--data", "Shapes"),
        "model.backbone is required; give it in --config or on the command line",
    ),
    "checkpoint": ((*FIT, "--ckpt_path", "no.ckpt"), "there is no checkpoint at no.ckpt"),
    "no run yet": ((*FIT, "--ckpt_path", "last"), "has a checkpoint last.ckpt yet"),
    "damaged checkpoint": ((*FIT, "--ckpt_path", "tiny.yaml"), "tiny.yaml cannot be read as a checkpoint"),
    "package not installed": (
        (*FIT, "--trainer.logger", "lightning.pytorch.loggers.MLFlowLogger"),
        "mlflow",
    ),
    "nothing to score": (("validate", "--config", "tiny.yaml"), "validate needs a checkpoint; give --ckpt_path"),
    "power": ((*FIT, "--model.schedule.power", "-1"), "power must be positive, got -1"),
    "class weights": (
        (*FIT, "--model.loss", "CrossEntropy", "--model.loss.class_weights", "[1, 2]"),
        "2 class_weights for 7 classes",
    ),
    "optimizer": (
        (*FIT, "--model.optimizer", "SDG"),
        "model.optimizer: no class is named 'SDG'; did you mean",
    ),
    "reader": (
        (*FIT, "--data=Folder", "--data.root=.", "--data.reader.mode", "gray"),
        "data.reader.mode: expected 'rgb', 'convert', 'grey', 'array', got gray",
    ),
    "reader's range": (
        (*FIT, "--data=Folder", "--data.root=.", "--data.reader.value_range", "3"),
        "data.reader.value_range: expected one of tuple[float, float], null, got 3",
    ),
    "crop": (
        (*FIT, "--data=Folder", "--data.root=.", "--data.augment.flip", "x"),
        "data.augment.flip: expected float, got x",
    ),
    "list what": (("list", "haeds"), "invalid choice"),
    "list nothing": (("list",), "required"),
}


@pytest.mark.parametrize("case", sorted(MISTYPED))
def test_a_mistake_is_one_sentence(case: str, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workdir / "key.yaml").write_text("modle: {head: fcn}\n")
    (workdir / "option.yaml").write_text("model: {backbone: {name: resnet18, output_strid: 8}}\ndata: Shapes\n")
    (workdir / "head.yaml").write_text("model: {backbone: {name: resnet18}, head: {class_path: fcm}}\ndata: Shapes\n")
    arguments, says = MISTYPED[case]
    before = sorted(workdir.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2, error
    assert says in error
    assert "Traceback" not in error
    assert "Namespace(" not in error
    sentence = [line for line in error.splitlines() if "error: " in line]
    assert len(sentence) == 1, error
    assert len(sentence[0]) < 700
    assert sorted(workdir.rglob("*")) == before
