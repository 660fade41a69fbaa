"""``import``: others' checkpoints into ours, and what is to be known of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_atrous.complaints import Complaint
from lightning_atrous.interop.base import Imported, read_file
from lightning_atrous.interop.mmseg import from_mmseg
from lightning_atrous.interop.smp import SMP_MODELS, from_smp, read_smp
from lightning_atrous.interop.torchvision import TORCHVISION_MODELS, from_torchvision
from lightning_atrous.types import ClassInfo, Preprocess

__all__ = ["import_checkpoint"]


def import_checkpoint(arguments: Sequence[str]) -> None:
    """Run the verb.

    Args:
        arguments: After ``import``.

    Raises:
        Complaint: Exit code 2 for weights, names or options that cannot be imported; 1 for a failed write.
    """
    options = _parser().parse_args(list(arguments))
    output = Path(options.output).expanduser()
    try:
        if output.exists():
            raise ValueError(f"--output {output} is there already; give another name")
        imported = _import(options)
    except Exception as error:
        complaint = Complaint.of(error, exit_code=2)
        if complaint is None:
            raise
        raise complaint from error
    imported.save(output)
    print(_told(imported))
    print(f"→ {output}: lightning-atrous predict {output} IMAGES")


def _import(options: argparse.Namespace) -> Imported:
    classes = None if options.classes is None else _class_names(options.classes)
    if options.source == "torchvision":
        return from_torchvision(read_file(options.weights), options.model, classes=classes)
    if options.source == "mmseg":
        return from_mmseg(read_file(options.weights), classes=classes)
    weights, architecture, built_with = read_smp(options.weights)
    built_with |= dict(map(_setting, options.set))
    if options.encoder:
        built_with["encoder_name"] = options.encoder
    if (options.mean is None) != (options.std is None):
        raise ValueError("--mean and --std go together; give both or neither")
    preprocess = None if options.mean is None else Preprocess(tuple(options.mean), tuple(options.std))
    return from_smp(weights, options.model or architecture, built_with, classes=classes, preprocess=preprocess)


def _class_names(text: str) -> ClassInfo:
    """Names between commas, or the lines of a file.

    Raises:
        ValueError: Neither.
    """
    if "," in text:
        return ClassInfo(tuple(name.strip() for name in text.split(",")))
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--classes {text} is neither names with commas between them nor a text file with one a line"
        ) from error
    return ClassInfo(tuple(line.strip() for line in lines if line.strip()))


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text} has no value; give it as NAME=VALUE, such as encoder_output_stride=8")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(
            f"--set {text} has no plain value; give a number, a word, or a list such as [6, 12, 18]"
        ) from error


def _told(imported: Imported) -> str:
    task = imported.task
    names = list(task.classes.names)
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    head = type(task.model.head).__name__ + (" and an auxiliary head" if task.model.aux_head is not None else "")
    backbone = f"{task.model.backbone.name} at output stride {task.model.output_stride}"
    lines = [imported.origin, f"  {backbone}, {head}, {len(names)} classes ({shown})"]
    return "\n".join(lines + [f"  {remark}" for remark in imported.remarks])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-atrous import",
        description="Turn a checkpoint of another package into one of this package, which predicts, validates, trains "
        "on and changes its output stride like any other. Nothing in the file is executed.",
    )
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    torchvision = sources.add_parser("torchvision", help="segmentation models of torchvision")
    torchvision.add_argument("model", metavar="MODEL", choices=TORCHVISION_MODELS, help=", ".join(TORCHVISION_MODELS))
    torchvision.add_argument("weights", metavar="FILE", help="a state dict (.pth, .safetensors)")
    smp = sources.add_parser("smp", help="models of segmentation_models_pytorch, 0.5 and later")
    smp.add_argument("weights", metavar="DIR|FILE", help="what save_pretrained has written, or a state dict")
    smp.add_argument("--model", choices=tuple(SMP_MODELS), help="the model's class, where it is a state dict")
    smp.add_argument("--encoder", metavar="NAME", help="as SMP has it (resnet34, tu-NAME), where it is a state dict")
    smp.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another argument that the model was built with, by SMP's name, where it is a state dict",
    )
    for statistic in ("mean", "std"):
        smp.add_argument(
            f"--{statistic}",
            type=float,
            nargs=3,
            metavar=("R", "G", "B"),
            help="that images were normalised with, in units of 0..1; that of the encoder's own weights by default",
        )
    mmseg = sources.add_parser("mmseg", help="FCN, PSPNet, DeepLabV3 and V3+ of mmsegmentation on ResNets")
    mmseg.add_argument("weights", metavar="FILE", help="a checkpoint (.pth)")
    for source in (torchvision, smp, mmseg):
        source.add_argument("--output", metavar="FILE", required=True, help="the checkpoint to write")
        source.add_argument(
            "--classes", metavar="NAMES", help="a,b,c or a file with one a line; by default what the weights say"
        )
    return parser
