"""torchvision's segmentation models: the names of their weights, and the arithmetic that these were trained with."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from torch import nn

from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.heads import FCN, LRASPP, DeepLabV3
from lightning_atrous.interop.base import HeadPlan, Imported, aspp_moves, choose_classes, fill, tensors_of, width
from lightning_atrous.registry import close_matches
from lightning_atrous.task import SegmentationTask
from lightning_atrous.types import ClassInfo, Preprocess

__all__ = ["TORCHVISION_MODELS", "VOC", "from_torchvision"]

TORCHVISION_MODELS = (
    "fcn_resnet50",
    "fcn_resnet101",
    "deeplabv3_resnet50",
    "deeplabv3_resnet101",
    "deeplabv3_mobilenet_v3_large",
    "lraspp_mobilenet_v3_large",
)


def _bits(index: int, channel: int) -> int:
    """VOC's palette: every third bit of a class's index, the lowest first, as the highest bits of a channel."""
    return sum(((index >> (3 * i + channel)) & 1) << (7 - i) for i in range(3))


VOC = ClassInfo(
    names=(
        "__background__",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
    palette=tuple((_bits(i, 0), _bits(i, 1), _bits(i, 2)) for i in range(21)),
)
"""PASCAL VOC's classes, by the names that torchvision's weights carry."""

MOBILENET_STAGES = (1, 2, 3, 4, 2, 3)
"""Blocks in each stage of MobileNetV3-Large: torchvision numbers them through from 1 on, timm by stage."""

MOBILENET_SQUEEZES = (4, 5, 6, 11, 12, 13, 14, 15)
"""Those with squeeze-excite."""


def from_torchvision(
    weights: nn.Module | Mapping[str, Any], name: str, *, classes: ClassInfo | None = None
) -> Imported:
    """A segmentation model of torchvision as ours, with the same logits.

    Args:
        weights: The model, its state dict, or a checkpoint that has one as ``model``.
        name: As torchvision calls it, such as ``deeplabv3_resnet50``.
        classes: Their names; PASCAL VOC's where not given and there are 21.

    Raises:
        ValueError: An unknown name, weights of another network, or classes without names.
    """
    if name not in TORCHVISION_MODELS:
        raise ValueError(
            f"'{name}' is no model of torchvision that can be imported; {close_matches(name, list(TORCHVISION_MODELS))}"
        )
    tensors = tensors_of(weights.state_dict() if isinstance(weights, nn.Module) else weights)
    family, _, network = name.partition("_")
    scores = "classifier.low_classifier" if family == "lraspp" else "classifier.4"
    classes = choose_classes(width(f"{scores}.weight", tensors), classes, [VOC])
    mobile = network.startswith("mobilenet")
    backbone, moves, remark = _mobilenet() if mobile else _resnet(network)
    if family == "deeplabv3":
        head = _deeplabv3(backbone.output_stride)
    else:
        head = _lraspp() if family == "lraspp" else _fcn("classifier", "head")
    aux_head = None
    if any(key.startswith("aux_classifier.") for key in tensors):
        aux_head = _fcn("aux_classifier", "aux_head", level=2 if mobile else -2)
        moves |= aux_head.moves
    task = SegmentationTask(
        backbone,
        head.factory,
        aux_head=None if aux_head is None else aux_head.factory,
        aux_weight=0.5,
        classes=classes,
        preprocess=Preprocess(),
    )
    return Imported(fill(task, tensors, moves | head.moves, f"torchvision's {name}"), f"torchvision {name}", (remark,))


def _resnet(network: str) -> tuple[TimmBackbone, dict[str, str], str]:
    backbone = TimmBackbone(network, output_stride=8, pretrained=False)
    return backbone, {"backbone": "backbone.net"}, "the dilation is exact, as torchvision's is"


def _mobilenet() -> tuple[TimmBackbone, dict[str, str], str]:
    backbone = TimmBackbone(
        "mobilenetv3_large_100",
        output_stride=16,
        method="dilate",
        pretrained=False,
        timm_options={"bn_eps": 1e-3},
        hdc={32: (2,)},
        hdc_at=16,
        read_at={2: "blocks.2.0"},
    )
    remark = (
        "the kernel that gives up its stride is dilated itself, and squeeze-excite sees the denser map, as torchvision "
        "has it: this is what the weights were trained with, not the exact dilation"
    )
    return backbone, _mobilenet_moves("backbone", "backbone.net"), remark


def _mobilenet_moves(theirs: str, ours: str) -> dict[str, str]:
    moves = {f"{theirs}.0.0": f"{ours}.conv_stem", f"{theirs}.0.1": f"{ours}.bn1"}
    ends = list(accumulate(MOBILENET_STAGES))
    for stage, (end, length) in enumerate(zip(ends, MOBILENET_STAGES, strict=True)):
        for block in range(length):
            number = 1 + end - length + block
            moves |= _mobilenet_block(f"{theirs}.{number}.block", f"{ours}.blocks.{stage}.{block}", number)
    last, stage = ends[-1] + 1, len(MOBILENET_STAGES)
    return moves | {
        f"{theirs}.{last}.0": f"{ours}.blocks.{stage}.0.conv",
        f"{theirs}.{last}.1": f"{ours}.blocks.{stage}.0.bn1",
    }


def _mobilenet_block(theirs: str, ours: str, number: int) -> dict[str, str]:
    if number == 1:  # the first has nothing to widen
        convs = ["conv_dw", "conv_pw"]
    elif number in MOBILENET_SQUEEZES:
        convs = ["conv_pw", "conv_dw", "se", "conv_pwl"]
    else:
        convs = ["conv_pw", "conv_dw", "conv_pwl"]
    moves: dict[str, str] = {}
    norms = 0
    for i, conv in enumerate(convs):
        if conv == "se":
            moves |= {f"{theirs}.{i}.fc1": f"{ours}.se.conv_reduce", f"{theirs}.{i}.fc2": f"{ours}.se.conv_expand"}
            continue
        norms += 1
        moves |= {f"{theirs}.{i}.0": f"{ours}.{conv}", f"{theirs}.{i}.1": f"{ours}.bn{norms}"}
    return moves


def _fcn(theirs: str, ours: str, **options: int) -> HeadPlan:
    moves = {
        f"{theirs}.0": f"{ours}.convs.0.0",
        f"{theirs}.1": f"{ours}.convs.0.1",
        f"{theirs}.4": f"{ours}.classifier",
    }
    return HeadPlan(FCN, options, moves)


def _deeplabv3(output_stride: int) -> HeadPlan:
    # the same rates on a map of stride 8 and on one of 16
    options = {"rates": (12, 24, 36), "rates_at": output_stride, "refine_convs": 1, "dropout": 0.5}
    moves = aspp_moves("classifier.0") | {
        "classifier.1": "head.refine.0.0",
        "classifier.2": "head.refine.0.1",
        "classifier.4": "head.classifier",
    }
    return HeadPlan(DeepLabV3, options, moves)


def _lraspp() -> HeadPlan:
    moves = {
        "classifier.cbr": "head.project",
        "classifier.scale.1": "head.gate",
        "classifier.low_classifier": "head.low_classifier",
        "classifier.high_classifier": "head.high_classifier",
    }
    return HeadPlan(LRASPP, {}, moves)
