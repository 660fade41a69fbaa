"""What people get wrong: one sentence, what it is about, what to do; exit code 2 for what was typed, 1 for data."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, full_disk
from made import make_cityscapes
from PIL import Image

import lightning_atrous
from lightning_atrous.checkpoint import SPEC_KEY, read_checkpoint
from lightning_atrous.cli import main

FIT = ("fit", "--config", "tiny.yaml")

MISTYPED = {
    "verb": (("fti",), "no verb 'fti'; did you mean 'fit'?"),
    "section": ((*FIT, "--modle.head", "fcn"), "unknown option --modle.head; did you mean 'model'?"),
    "a head's word": (
        (*FIT, "--model.head", "unet", "--model.head.interpolation", "cubic"),
        "model.head.interpolation: expected 'nearest', 'bilinear', 'bicubic', 'area', 'nearest-exact', got cubic\n",
    ),
    "a head's word or none": (
        (*FIT, "--model.head", "unet", "--model.head.attention_type", "scsee"),
        "model.head.attention_type: expected one of 'scse', null, got scsee\n",
    ),
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
    "stride of a network": (
        (*FIT, "--model.backbone.name=mobilevit_xxs", "--model.backbone.method=dilate"),
        "Strides it supports: 32",
    ),
    "stride of evaluation": ((*FIT, "--eval_output_stride", "12"), "no output stride 12; choose one of [1, 2, 4, 8"),
    "rates of blocks": ((*FIT, "--model.backbone.multi_grid", "[1, 0]"), "whole numbers of at least 1"),
    "rates between pixels": (
        (*FIT, "--model.backbone.name=resnet18", "--model.backbone.hdc", "{32: [5]}"),
        "which are 2.5 pixels of a map of stride 16",
    ),
    "method": (
        (*FIT, "--model.backbone.method", "atrous"),
        "model.backbone.method: expected 'auto', 'dilate', 'phases', got atrous",
    ),
    "execution": (
        (*FIT, "--model.backbone.execution", "fast"),
        "model.backbone.execution: expected 'auto', 'dilated', 'split', got fast",
    ),
    "support of nothing": (("support", "zzz*"), "timm has no network like 'zzz*'"),
    "support of no method": (("support", "resnet18", "--method", "atrous"), "invalid choice: 'atrous'"),
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
        "model.backbone.output_stride: expected one of int, null, got big",
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
    "loss": ((*FIT, "--model.loss", "Dise"), "model.loss: no class is named 'Dise'; did you mean 'Dice'?"),
    "a seed below zero": (
        (*FIT, "--seed_everything", "-3"),
        "seed_everything must be a number in 0..4294967295, got -3",
    ),
    "the stride of the evaluation by the name that it has in Python": (
        (*FIT, "--model.eval_output_stride", "8"),
        "model.eval_output_stride has an option of its own; give --eval_output_stride instead",
    ),
    "boundaries by another name": (
        (*FIT, "--model.boundaries", "BoundryScore"),
        "model.boundaries: no class is named 'BoundryScore'; did you mean 'BoundaryScore'?",
    ),
    "no batch to accumulate": (
        (*FIT, "--trainer.accumulate_grad_batches", "0"),
        "trainer.accumulate_grad_batches must be at least 1, got 0",
    ),
    "clipping to less than nothing": (
        (*FIT, "--trainer.gradient_clip_val", "-1"),
        "trainer.gradient_clip_val must not be negative, got -1",
    ),
    "boundaries": (
        (*FIT, "--model.boundaries", "BoundaryScore", "--model.boundaries.bands", "[4, 2]"),
        "bands are whole numbers of pixels from 1 on, each greater than the last, got [4, 2]",
    ),
    "loss option": ((*FIT, "--model.loss", "OHEM", "--model.loss.treshold", "0.5"), "did you mean 'threshold'"),
    "loss in a sum": (
        (*FIT, "--model.loss", "WeightedSum", "--model.loss.losses", "[CrossEntropy, {class_path: Lovas}]"),
        "model.loss.losses: no class is named 'Lovas'; did you mean 'Lovasz'?",
    ),
    "option in a sum": (
        (*FIT, "--model.loss=WeightedSum", "--model.loss.losses=[{class_path: Dice, init_args: {smoth: 1}}]"),
        "model.loss.losses takes no option 'smoth'; did you mean 'smooth'?",
    ),
    "weights of a sum": (
        (*FIT, "--model.loss", "WeightedSum", "--model.loss.losses", "[Dice]", "--model.loss.weights", "[1, 2]"),
        "WeightedSum got 2 weights for 1 losses",
    ),
    "optimizer": (
        (*FIT, "--model.optimizer", "SDG"),
        "model.optimizer: no optimizer is named 'SDG'; did you mean 'SGD'",
    ),
    "an optimizer for matrices": (
        (*FIT, "--model.optimizer", "Muon"),
        "model.optimizer: Muon only supports 2D parameters",
    ),
    "parameters by name": (
        (*FIT, "--model.parameter_groups", "[{match: haed, lr_factor: 3}]"),
        "no parameter of the model has a name like 'haed', nor has a module; did you mean 'head'",
    ),
    "option of a group": (
        (*FIT, "--model.parameter_groups", "[{match: head, lr_facto: 3}]"),
        "model.parameter_groups takes no option 'lr_facto'; did you mean 'lr_factor'?",
    ),
    "stages": ((*FIT, "--model.freeze_stages", "9"), "freeze_stages: test_resnet gives 5 maps, got 9; give 0 to 5"),
    "average": (
        (*FIT, "--trainer.callbacks+=EMA", "--trainer.callbacks.decay=2"),
        "EMA: decay must be at least 0 and below 1, got 2.0",
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
    "share of a word": (
        (*FIT, "--data=Folder", "--data.root=.", "--data.augment.max_share", "most"),
        "data.augment.max_share: expected one of float, null, got most",
    ),
    "learning rate": ((*FIT, "--model.optimizer.lr", "-1"), "model.optimizer: Invalid learning rate: -1.0; correct"),
    "strategy": ((*FIT, "--trainer.strategy", "ddpp"), "Lightning has no strategy 'ddpp'; give auto, ddp"),
    "windows": (
        (*FIT, "--model.inference.window", "[40, 32]"),
        "windows of 40×32 pixels do not lie on the grid of output stride 16; give multiples of 16, such as 32 32",
    ),
    "overlap": ((*FIT, "--model.inference.overlap", "1"), "the overlap of windows is in 0..1 and less than 1, got 1"),
    "scales": (
        ("evaluate", "good.ckpt", "--scales", "1", "0"),
        "scales are positive, and at least one, got (1.0, 0.0)",
    ),
    "nothing to evaluate": (("evaluate", "no.ckpt", "--grid"), "there is no checkpoint at no.ckpt"),
    "checkpoint behind options": (("evaluate", "--grid", "good.ckpt"), "the checkpoint comes first, got --grid"),
    "stride of one evaluation": (
        ("evaluate", "good.ckpt", "--config", "data.yaml", "--output_stride", "12"),
        "no output stride 12; choose one of",
    ),
    "images of a grid": (
        ("evaluate", "good.ckpt", "--grid", "--per_image", "a.csv"),
        "--per_image is of one evaluation, not of several",
    ),
    "table of images": (
        ("validate", "--config", "data.yaml", "--ckpt_path", "good.ckpt", "--per_image", "a.txt"),
        "a table of images is a .csv or a .parquet file, got a.txt",
    ),
    "windows to predict": (
        ("predict", "good.ckpt", "good", "--window", "40", "32"),
        "do not lie on the grid of output",
    ),
    "list what": (("list", "haeds"), "invalid choice"),
    "list nothing": (("list",), "required"),
}


# --- data, checkpoints, places

DATA = ("fit", "--config", "data.yaml")
CITY = (*DATA, "--data", "Cityscapes", "--data.root", "city")
DDP = ("--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices")
PREDICT = ("predict", "good.ckpt", "good/images")


def keep(here: Path) -> None:
    """Nothing to spoil."""


def make_folder(here: Path) -> None:
    """``good/``: four images and their masks to train on, two to validate; three classes and some void."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            image, mask = here / f"good/images/{split}/{i}.png", here / f"good/masks/{split}/{i}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            mask.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(image)
            Image.fromarray(rng.choice(np.array([0, 1, 2, 255], np.uint8), (40, 50))).save(mask)
    (here / "good/classes.txt").write_text("one\ntwo\nthree\n")


def image(mode: str, **options: Any) -> Callable[[Path], None]:
    """The first training image in another mode."""

    def spoil(here: Path) -> None:
        pixels = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 30
        picture = Image.fromarray(pixels) if mode == "I;16" else Image.new(mode, (50, 40))
        picture.save(here / "good/images/train/0.png", **options)

    return spoil


def mask(change: Callable[[np.ndarray], np.ndarray], name: str = "good/masks/train/0.png") -> Callable[[Path], None]:
    """The first training mask, changed."""

    def spoil(here: Path) -> None:
        path = here / name
        Image.fromarray(change(np.array(Image.open(path)))).save(path)

    return spoil


def cut(name: str, size: int = 300) -> Callable[[Path], None]:
    """A file, of which the rest is missing."""

    def spoil(here: Path) -> None:
        (here / name).write_bytes((here / name).read_bytes()[:size])

    return spoil


def write(name: str, text: str) -> Callable[[Path], None]:
    return both(lambda here: (here / name).write_text(text))


def remove(pattern: str) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        for path in sorted(here.glob(pattern)):
            path.unlink()

    return spoil


def city(change: Callable[[np.ndarray], np.ndarray] | None = None, *, kind: str, other: str) -> Callable[[Path], None]:
    """A small Cityscapes whose masks of one kind hold what another kind should."""

    def spoil(here: Path) -> None:
        make_cityscapes(here / "city", kinds=[other])
        for path in sorted((here / "city/gtFine").rglob(f"*_{other}.png")):
            path.rename(path.with_name(path.name.replace(other, kind)))

    return spoil


def checkpoint(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """``other.ckpt``: the good one, changed."""

    def spoil(here: Path) -> None:
        content = torch.load(here / "good.ckpt")
        change(content)
        torch.save(content, here / "other.ckpt")

    return spoil


def both(*spoils: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        for each in spoils:
            each(here)

    return spoil


def to_rgb(labels: np.ndarray) -> np.ndarray:
    return np.stack([labels] * 3, axis=-1)


class Mistake(NamedTuple):
    """What is spoilt, what is typed, what is said, and how it ends."""

    spoil: Callable[[Path], None]
    arguments: tuple[str, ...]
    says: str
    code: int = 1


# a folder in which nobody may write: root may in any but those of the kernel
LOCKED = "/sys/atrous" if os.geteuid() == 0 else "locked/run"

MISTAKES = {
    "missing root": Mistake(keep, (*DATA, "--data.root", "nowhere"), "there is no folder nowhere; pass as root", 2),
    "no class names": Mistake(remove("good/classes.txt"), DATA, "nor a file good/classes.txt; give one name a line", 2),
    "negative crop": Mistake(
        keep, (*DATA, "--data.augment.crop", "[-5, 32]"), "crop must be a height and a width of at least 2", 2
    ),
    "crop of a word": Mistake(keep, (*DATA, "--data.augment.crop", "big"), "data.augment.crop: expected", 2),
    "share of everything": Mistake(
        keep, (*DATA, "--data.augment.max_share", "1.5"), "max_share must lie between 0 and 1, got 1.5; try 0.75", 2
    ),
    "empty split": Mistake(
        both(remove("good/images/val/*"), remove("good/masks/val/*")),
        DATA,
        "the val split is empty: good/images/val names no image; add some",
    ),
    "image without mask": Mistake(
        remove("good/masks/train/2.png"), DATA, "image good/images/train/2.png has no mask good/masks/train/2.png"
    ),
    "mask of another size": Mistake(
        mask(lambda labels: labels[:-3]),
        DATA,
        "mask good/masks/train/0.png is 50×37 pixels but its image is 50×40; make them the same size",
    ),
    "truncated image": Mistake(
        cut("good/images/train/0.png"), DATA, "good/images/train/0.png cannot be decoded (image file is truncated"
    ),
    "truncated mask": Mistake(cut("good/masks/val/1.png", 90), DATA, "good/masks/val/1.png cannot be decoded"),
    "empty image": Mistake(cut("good/images/val/1.png", 0), DATA, "good/images/val/1.png cannot be decoded"),
    "label out of range": Mistake(
        mask(lambda labels: np.where(labels == 1, 7, labels).astype(np.uint8)),
        DATA,
        "mask good/masks/train/0.png has labels 7, expected 0..2 or the ignore index 255",
    ),
    "labels from one": Mistake(
        mask(lambda labels: np.where(labels == 255, 255, labels + 1).astype(np.uint8)),
        DATA,
        "has labels 3, expected 0..2 or the ignore index 255; labels seem to count from 1; subtract 1",
    ),
    "RGB mask": Mistake(
        mask(to_rgb),
        DATA,
        "good/masks/train/0.png is a mask of mode RGB, expected class indices in one grey or palette",
    ),
    "labelIds under the name of trainIds": Mistake(
        city(kind="labelTrainIds", other="labelIds"), CITY, "it holds labelIds in spite of its name; rename it"
    ),
    "trainIds under the name of labelIds": Mistake(
        city(kind="labelIds", other="labelTrainIds"), CITY, "it holds trainIds in spite of its name; rename it"
    ),
    "images in the place of the root": Mistake(
        city(kind="labelIds", other="labelIds"),
        (*CITY, "--data.root", "city/leftImg8bit"),
        "has it, pass that as root",
        2,
    ),
    "Cityscapes without labels": Mistake(
        both(lambda here: make_cityscapes(here / "city"), remove("city/gtFine/val/*/*")),
        CITY,
        "has no mask city/gtFine/val/frankfurt/frankfurt_000000_000019_gtFine_labelIds.png",
    ),
    "list of unknown images": Mistake(
        write("good/train.txt", "train/0\ntrain/no\n"), DATA, "good/train.txt names 1 image that good/images lacks"
    ),
    "two images for one mask": Mistake(
        lambda here: Image.new("RGB", (50, 40)).save(here / "good/images/train/0.jpg"),
        DATA,
        "good/images/train/0.jpg and good/images/train/0.png would share one mask; rename or remove one",
    ),
    "CamVid's list": Mistake(
        write("good/train.txt", "one two three\n"),
        (*DATA, "--data", "CamVid", "--data.root", "good"),
        "good/train.txt has the line 'one two three', expected the paths of an image and a mask",
    ),
    "sizes that make no batch": Mistake(
        lambda here: image_of_size(here, 30),
        (*DATA, "--data.eval_batch_size", "2"),
        "images of different sizes make no batch, got (H, W) (30, 50), (40, 50); set",
    ),
    "grey image": Mistake(image("L"), DATA, "0.png is a picture of mode L, expected RGB of 8 bits; set reader.mode"),
    "image with alpha": Mistake(
        image("RGBA"), DATA, "mode RGBA, expected RGB of 8 bits; set reader.mode (--reader) to"
    ),
    "palette image": Mistake(image("P"), DATA, "mode P, expected RGB of 8 bits; set reader.mode (--reader) to convert"),
    "16-bit image": Mistake(
        image("I;16"), DATA, "mode I;16, expected RGB of 8 bits; set reader.mode (--reader) to grey"
    ),
    "channels": Mistake(
        keep,
        (*DATA, "--data.reader.mode", "grey"),
        "set model.backbone.in_channels: 1, or another data.reader",
        2,
    ),
    "reader mode": Mistake(keep, (*DATA, "--data.reader.mode", "gray"), "data.reader.mode: expected", 2),
    "array without channels": Mistake(
        keep, (*DATA, "--data.reader.mode", "array"), "reader mode array needs the number of channels", 2
    ),
    "config that is no YAML": Mistake(write("bad.yaml", "a: [1\nb: 2"), ("fit", "--config", "bad.yaml"), "bad.yaml", 2),
    "config that is a folder": Mistake(keep, ("fit", "--config", "good"), "good", 2),
    "weights of another network": Mistake(
        lambda here: torch.save({"fc.weight": torch.zeros(3, 3)}, here / "other.pth"),
        (*DATA, "--model.backbone.pretrained", "other.pth"),
        "other.pth does not fit test_resnet",
        2,
    ),
    "more devices than there are": Mistake(
        keep, (*DATA, "--trainer.accelerator", "gpu", "--trainer.devices", "64"), "GPU", 2
    ),
    "batch that devices cannot share": Mistake(
        keep, (*DATA, *DDP, "2", "--data.batch_size", "3"), "data.batch_size 3 is shared by 2 processes", 2
    ),
    "batch norm over CPUs": Mistake(
        keep, (*DATA, *DDP, "2", "--trainer.sync_batchnorm", "true"), "give --trainer.sync_batchnorm false", 2
    ),
    "what to stop on": Mistake(
        write("stop.yaml", "trainer: {callbacks: [{class_path: EarlyStopping, init_args: {monitor: val/mIoU}}]}"),
        (*DATA, "--config", "stop.yaml"),
        "the callback EarlyStopping has monitor val/mIoU, which this run does not log; give one of `",
    ),
    "no end": Mistake(
        keep, (*DATA, "--trainer.max_epochs", "-1"), "a training needs an end; give --trainer.max_epochs or", 2
    ),
    "checkpoint of another head": Mistake(
        keep,
        (*DATA, "--ckpt_path", "good.ckpt", "--model.head", "deeplabv3"),
        "the checkpoint's head is lightning_atrous.heads.fcn.FCN, but this run builds lightning_atrous.heads.deeplabv3",
        2,
    ),
    "checkpoint of another backbone": Mistake(
        keep,
        (*DATA, "--ckpt_path", "good.ckpt", "--model.backbone.name", "resnet18"),
        "the checkpoint's backbone is test_resnet, but this run builds resnet18",
        2,
    ),
    "checkpoint of another class count": Mistake(
        write("good/classes.txt", "one\ntwo\nthree\nfour\n"),
        ("validate", "--config", "data.yaml", "--ckpt_path", "good.ckpt"),
        "the checkpoint was trained on the classes one, two, three, but the data has one, two, three, four",
        2,
    ),
    "truncated checkpoint": Mistake(
        cut("good.ckpt", 5000), (*DATA, "--ckpt_path", "good.ckpt"), "good.ckpt cannot be read as a checkpoint", 2
    ),
    "checkpoint of somebody else": Mistake(
        lambda here: torch.save({"state_dict": {}}, here / "other.ckpt"),
        (*DATA, "--ckpt_path", "other.ckpt"),
        "other.ckpt was not written by lightning-atrous",
        2,
    ),
    "checkpoint that asks for a class": Mistake(
        checkpoint(lambda content: content[SPEC_KEY]["head"].update(class_path="os.system")),
        ("predict", "other.ckpt", "good/images"),
        "the checkpoint asks for os.system, which no installed package registers",
        2,
    ),
    "checkpoint that asks for a class, to train": Mistake(
        checkpoint(lambda content: content[SPEC_KEY]["head"].update(class_path="os.system")),
        (*DATA[:1], "--data", "Folder", "--data.root", "good", "--ckpt_path", "other.ckpt"),
        "os.system",
        2,
    ),
    "weights that do not fit their description": Mistake(
        checkpoint(lambda content: content["state_dict"].popitem()),
        ("predict", "other.ckpt", "good/images"),
        "other.ckpt does not hold the weights of the model that it describes",
        2,
    ),
    "folder without permission": Mistake(
        lambda here: (here / "locked").mkdir(mode=0o500), (*DATA, "--run_dir", LOCKED), f"{LOCKED}"
    ),
    "file in the place of a run": Mistake(keep, (*DATA, "--run_dir", "tiny.yaml/run"), "tiny.yaml"),
    "nothing to predict": Mistake(keep, ("predict", "good.ckpt", "no*.png"), "there is no image in 'no*.png'", 2),
    "one image of many": Mistake(cut("good/images/val/1.png"), PREDICT, "1 of 6 images could not be predicted"),
    "output that is a file": Mistake(
        keep, (*PREDICT, "--output", "tiny.yaml"), "tiny.yaml is a file, expected a folder", 2
    ),
    "output without permission": Mistake(
        lambda here: (here / "locked").mkdir(mode=0o500), (*PREDICT, "--output", LOCKED), "cannot be written"
    ),
    "device": Mistake(keep, (*PREDICT, "--device", "gpu:7"), "the device gpu:7 cannot be used", 2),
}


def image_of_size(here: Path, height: int) -> None:
    Image.new("RGB", (50, height)).save(here / "good/images/val/1.png")
    Image.new("L", (50, height)).save(here / "good/masks/val/1.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good data, good configs, and what a run on them has saved."""
    here = tmp_path_factory.mktemp("good")
    make_folder(here)
    config = yaml.safe_load(TINY)
    config["trainer"] |= {"max_epochs": 1, "accelerator": "cpu"}
    config["model"]["head"] = "fcn"
    augment = {"crop": [32, 32], "flip": 0.0}
    options = {"root": "good", "batch_size": 2, "num_workers": 0, "augment": augment}
    config["data"] = {"class_path": "Folder", "init_args": options}
    (here / "data.yaml").write_text(yaml.safe_dump(config))
    (here / "key.yaml").write_text("modle: {head: fcn}\n")
    (here / "option.yaml").write_text("model: {backbone: {name: resnet18, output_strid: 8}}\ndata: Shapes\n")
    (here / "head.yaml").write_text("model: {backbone: {name: resnet18}, head: {class_path: fcm}}\ndata: Shapes\n")
    with contextlib.chdir(here), warnings.catch_warnings(action="ignore"):
        main([*DATA, "--run_dir", "run"])
    shutil.move(here / "run/checkpoints/last.ckpt", here / "good.ckpt")
    shutil.rmtree(here / "run")
    return here


@pytest.fixture
def here(workdir: Path, trained: Path) -> Path:
    """A copy of it, to be spoilt."""
    shutil.copytree(trained, workdir, dirs_exist_ok=True)
    return workdir


@pytest.mark.parametrize("case", sorted({**MISTYPED, **MISTAKES}))
@pytest.mark.filterwarnings("default")  # Lightning's, of small data
def test_a_mistake_is_one_sentence(case: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, arguments, says, code = MISTAKES.get(case) or Mistake(keep, *MISTYPED[case], 2)
    spoil(here)
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == code, error
    assert says in error
    assert "Traceback" not in error
    assert "Namespace(" not in error
    sentence = [line for line in error.splitlines() if "error: " in line]
    assert len(sentence) == 1, error
    assert len(sentence[0]) < 700
    if code == 2:
        assert sorted(here.rglob("*")) == before
    no_half_files(here)


def no_half_files(here: Path) -> None:
    """Every checkpoint and every picture that a run has left is whole."""
    for path in (here / "runs").rglob("*.ckpt"):
        lightning_atrous.load(path)
    for path in (here / "predictions").rglob("*"):
        assert path.is_dir() or path.suffix == ".png"
        if path.is_file():
            Image.open(path).load()


def test_there_are_fifty() -> None:
    assert len(MISTYPED) + len(MISTAKES) >= 50
    assert not set(MISTYPED) & set(MISTAKES)


@pytest.mark.filterwarnings("default")
def test_what_is_spoilt_was_good(here: Path) -> None:
    """Else the cases above would prove nothing."""
    main([*DATA, "--trainer.log_every_n_steps", "1"])
    main(["validate", "--config", "data.yaml", "--ckpt_path", "good.ckpt"])
    main(PREDICT)
    make_cityscapes(here / "city")
    main([*CITY, "--run_dir", "runs/city", "--trainer.log_every_n_steps", "1"])
    assert {path.parent.parent.name for path in (here / "runs").rglob("last.ckpt")} == {"data", "city"}
    assert len(list((here / "predictions/index").rglob("*.png"))) == 6
    no_half_files(here)


@pytest.mark.parametrize("limit", [20_000, 200_000], ids=["before the first checkpoint", "in it"])
@pytest.mark.filterwarnings("default")
def test_a_full_disk_is_one_sentence(limit: int, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file may grow beyond a limit: the checkpoint of the run so far stays as good as it was."""
    main([*DATA, "--trainer.max_epochs", "1"])
    capsys.readouterr()
    with full_disk(limit), pytest.raises(SystemExit) as stop:
        main([*DATA, "--trainer.max_epochs", "2", "--ckpt_path", "last"])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert "cannot be written (File too large); make room" in error
    assert "Traceback" not in error
    assert read_checkpoint("runs/data/checkpoints/last.ckpt")["epoch"] == 0
    no_half_files(here)
