"""mmsegmentation's checkpoints (1.x, and 0.x where the names are the same): FCN, PSPNet, DeepLabV3 and V3+ on ResNets.

What is built is read off the names and shapes of the weights; rates, normalisation and class names off the config and
the data set's description that the checkpoint carries. The config is parsed, never run. mmsegmentation itself is not
needed.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.data.cityscapes import CITYSCAPES
from lightning_atrous.heads import FCN, PSP, DeepLabV3, DeepLabV3Plus
from lightning_atrous.interop.base import (
    HeadPlan,
    Imported,
    Tensors,
    choose_classes,
    fill,
    numbered,
    tensors_of,
    width,
)
from lightning_atrous.task import SegmentationTask
from lightning_atrous.types import ClassInfo, Preprocess

__all__ = ["from_mmseg", "parse_config"]

DEPTHS = {6: 50, 23: 101, 36: 152}
"""Of residual networks, by the blocks of their third stage."""

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
"""Of mmsegmentation's configs, RGB in 0..255."""

EPS = 1e-5

LEVELS = {2048: -1, 1024: -2, 512: -3, 256: -4}
"""Of a residual network of bottlenecks, by their channels."""

BACKBONE_MOVES = {
    "backbone": "backbone.net",
    **{f"backbone.stem.{i}": f"backbone.net.conv1.{i}" for i in (0, 1, 3, 4, 6)},
    "backbone.stem.7": "backbone.net.bn1",
}

USUAL: dict[str, Any] = {
    "backbone": {"strides": (1, 2, 1, 1), "dilations": (1, 1, 2, 4), "contract_dilation": True},
    "decode_head": {"dilations": (1, 12, 24, 36)},
    "data_preprocessor": {"mean": MEAN, "std": STD, "bgr_to_rgb": True},
}
"""What its configs at output stride 8 say and weights do not; where a config says nothing, its constructors' defaults
hold, which are others."""


def from_mmseg(
    weights: nn.Module | Mapping[str, Any],
    *,
    meta: Mapping[str, Any] | None = None,
    classes: ClassInfo | None = None,
) -> Imported:
    """A model of mmsegmentation as ours, with the same logits.

    Args:
        weights: A checkpoint's content (``state_dict`` and ``meta``), a state dict, or the model.
        meta: The ``meta`` of a checkpoint, where it does not stand in ``weights``: the config's text as ``cfg``, the
            data set's classes and palette as ``dataset_meta``.
        classes: Their names; by default those of the data set, or of Cityscapes where there are 19.

    Raises:
        ValueError: A network, head or option that has no counterpart here; weights that do not fit.
    """
    content = weights.state_dict() if isinstance(weights, nn.Module) else weights
    meta = meta or content.get("meta") or {}
    config = parse_config(str(meta.get("cfg") or meta.get("config") or ""))
    tensors, remarks = tensors_of(content), []
    if "model" not in config:
        remarks.append(
            "unverified: the checkpoint has no config, so output stride 8, the rates 12, 24 and 36 and the mean and "
            "deviation of ImageNet on RGB are taken, as in most of mmsegmentation's configs"
        )
    elif "CLASSES" in meta:
        remarks.append("unverified: the checkpoint is of mmsegmentation 0.x, with which this was never compared")
    classes = choose_classes(width("decode_head.conv_seg.weight", tensors), classes or _classes(meta), [CITYSCAPES])
    model = {**config, **(config.get("model") or USUAL)}
    network = _network(tensors, _said(model, "backbone"))
    stride = network["output_stride"]
    tensors, preprocess = _preprocess(
        tensors, _said(model, "data_preprocessor") or _said(model, "img_norm_cfg"), remarks
    )
    head = _head("decode_head", "head", tensors, _said(model, "decode_head"), stride)
    moves = BACKBONE_MOVES | head.moves
    aux_head = None
    if any(key.startswith("auxiliary_head.") for key in tensors):
        aux_head = _head("auxiliary_head", "aux_head", tensors, _said(model, "auxiliary_head"), stride)
        moves |= aux_head.moves
    task = SegmentationTask(
        TimmBackbone(**network, pretrained=False),
        head.factory,
        aux_head=None if aux_head is None else aux_head.factory,
        classes=classes,
        preprocess=preprocess,
    )
    if _said(model, "test_cfg").get("mode") == "slide":
        remarks.append("mmsegmentation tests this model in a sliding window; here it sees whole images")
    fill(task, _pool_last(tensors), moves, f"mmsegmentation's {head.head.__name__} on {network['name']}")
    return Imported(task, f"mmseg {head.head.__name__} {network['name']}", tuple(remarks))


def parse_config(text: str) -> dict[str, Any]:
    """The assignments in the text of a config, as far as they are plain values; nothing is run.

    Args:
        text: Python, with plain values and ``dict(...)`` of them. What is neither becomes None.

    Example:
        >>> parse_config("model = dict(head=dict(rates=[1, 12], norm=BN))")
        {'model': {'head': {'rates': [1, 12], 'norm': None}}}
    """
    try:
        body = ast.parse(text).body
    except SyntaxError:
        return {}
    return {
        target.id: _value(statement.value)
        for statement in body
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {word.arg: _value(word.value) for word in node.keywords if word.arg is not None}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_value(key): _value(value) for key, value in pairs if isinstance(key, ast.Constant)}
    if isinstance(node, ast.List):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_value(item) for item in node.elts)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _said(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What a config says of a part.

    Raises:
        ValueError: Something of it that nothing here can do.
    """
    said = config.get(part) or {}
    if not isinstance(said, dict):
        raise ValueError(f"the config has several of {part}; models of one can be imported")
    if (said.get("norm_cfg") or {}).get("eps", EPS) != EPS:
        raise ValueError(f"the norms of {part} have an eps of {said['norm_cfg']['eps']}; here it is {EPS}")
    return said


def _classes(meta: Mapping[str, Any]) -> ClassInfo | None:
    described = meta.get("dataset_meta") or {}
    names = described.get("classes") or meta.get("CLASSES")
    palette = described.get("palette") or meta.get("PALETTE") or ()
    return ClassInfo(tuple(names), tuple(tuple(colour) for colour in palette)) if names else None


def _preprocess(
    tensors: dict[str, Tensor], said: Mapping[str, Any], remarks: list[str]
) -> tuple[dict[str, Tensor], Preprocess]:
    """Mean and deviation of RGB images in 0..1, and weights that take RGB."""
    mean, std = tuple(said.get("mean") or (0, 0, 0)), tuple(said.get("std") or (1, 1, 1))
    turned = said.get("to_rgb", said.get("bgr_to_rgb", False))  # of 0.x, of 1.x
    if not turned:
        remarks.append(
            "the network was fed BGR: the input channels of its first convolution are put in the order of RGB"
        )
        first = "backbone.stem.0.weight" if "backbone.stem.0.weight" in tensors else "backbone.conv1.weight"
        tensors, mean, std = tensors | {first: tensors[first].flip(1)}, mean[::-1], std[::-1]
    return tensors, Preprocess(tuple(m / 255 for m in mean), tuple(s / 255 for s in std))


def _network(tensors: Tensors, said: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the backbone."""
    blocks = numbered("backbone.layer3.{}.conv3.weight", tensors)
    if blocks not in DEPTHS:
        raise ValueError(
            "the weights are not those of mmsegmentation's ResNet-50, -101 or -152, plain or V1c, which are the "
            "backbones that can be imported (ResNet-18 and -34 leave the second kernel of each block undilated, which "
            "no backbone here does)"
        )
    strides, dilations = tuple(said.get("strides") or (1, 2, 2, 2)), tuple(said.get("dilations") or (1, 1, 1, 1))
    reached = [4 * math.prod(strides[: i + 1]) for i in range(4)]
    made_up = tuple(own // now for own, now in zip((4, 8, 16, 32), reached, strict=True))
    if dilations != made_up or said.get("multi_grid"):
        raise ValueError(
            f"this backbone has strides {strides}, dilations {dilations} and multi_grid {said.get('multi_grid')}; "
            f"those that can be imported have dilations that make up for their strides, such as (1, 2, 1, 1) and "
            f"(1, 1, 2, 4), and no multi_grid"
        )
    stride = reached[-1]
    # where it is not contracted, the kernel that gives up its stride is dilated itself
    told = not said.get("contract_dilation", False) and stride < 32
    return {
        "name": f"resnet{DEPTHS[blocks]}{'c' if 'backbone.stem.0.weight' in tensors else ''}",
        "output_stride": stride,
        "hdc": {own: (own // stride,) for own in (16, 32) if own > stride} if told else None,
        "hdc_at": stride,
    }


def _head(theirs: str, ours: str, tensors: Tensors, said: Mapping[str, Any], stride: int) -> HeadPlan:
    if said.get("align_corners"):
        raise ValueError(
            f"the {theirs} was trained with align_corners=True, under which logits are raised to the image on other "
            f"points than here; only models with align_corners=False can be imported"
        )
    if width(f"{theirs}.conv_seg.weight", tensors) < 2:
        raise ValueError(
            f"{theirs}.conv_seg does not score two classes or more; models of one score cannot be imported"
        )
    for mark, plan in PLANS.items():
        if f"{theirs}.{mark}.weight" in tensors:
            return plan(theirs, ours, tensors, said, stride)
    raise ValueError(
        f"the weights of {theirs} are not those of an FCN, PSPNet, DeepLabV3 or DeepLabV3+, which are the heads of "
        f"mmsegmentation that can be imported"
    )


def _fcn(theirs: str, ours: str, tensors: Tensors, said: Mapping[str, Any], stride: int) -> HeadPlan:
    if said.get("dilation", 1) != 1:
        raise ValueError(f"the {theirs} has a dilation of {said['dilation']}, and fcn here has none")
    convs = numbered(f"{theirs}.convs.{{}}.conv.weight", tensors)
    channels, seen = tensors[f"{theirs}.convs.0.conv.weight"].shape[:2]
    concat = f"{theirs}.conv_cat.conv.weight" in tensors
    moves = _scores(theirs, ours) | _conv(f"{theirs}.conv_cat", f"{ours}.fuse")
    for i in range(convs):
        moves |= _conv(f"{theirs}.convs.{i}", f"{ours}.convs.{i}")
    options = {"level": LEVELS.get(seen, -1), "channels": channels, "convs": convs, "concat_input": concat}
    return HeadPlan(FCN, options | _dropout(said), moves)


def _psp(theirs: str, ours: str, tensors: Tensors, said: Mapping[str, Any], stride: int) -> HeadPlan:
    channels = width(f"{theirs}.bottleneck.conv.weight", tensors)
    moves = _scores(theirs, ours) | _conv(f"{theirs}.bottleneck", f"{ours}.project")
    for i in range(numbered(f"{theirs}.psp_modules.{{}}.1.conv.weight", tensors)):
        moves |= _pool(f"{theirs}.psp_modules.{i}.1", f"{ours}.pyramid.branches.{i}")
    bins = tuple(said.get("pool_scales") or (1, 2, 3, 6))
    options = {"bins": bins, "branch_channels": channels, "channels": channels}
    return HeadPlan(PSP, options | _dropout(said), moves)


def _deeplabv3(theirs: str, ours: str, tensors: Tensors, said: Mapping[str, Any], stride: int) -> HeadPlan:
    options, moves = _aspp(theirs, ours, tensors, said, stride)
    return HeadPlan(DeepLabV3, options, moves)


def _deeplabv3plus(theirs: str, ours: str, tensors: Tensors, said: Mapping[str, Any], stride: int) -> HeadPlan:
    options, moves = _aspp(theirs, ours, tensors, said, stride)
    low = width(f"{theirs}.c1_bottleneck.conv.weight", tensors)
    convs = numbered(f"{theirs}.sep_bottleneck.{{}}.depthwise_conv.conv.weight", tensors)
    moves |= _conv(f"{theirs}.c1_bottleneck", f"{ours}.reduce.0")
    for i in range(convs):
        moves |= _separable(f"{theirs}.sep_bottleneck.{i}", f"{ours}.refine.0.{i}")
    return HeadPlan(DeepLabV3Plus, options | {"low_level_channels": low, "decoder_convs": convs}, moves)


def _aspp(
    theirs: str, ours: str, tensors: Tensors, said: Mapping[str, Any], stride: int
) -> tuple[dict[str, Any], dict[str, str]]:
    separable = f"{theirs}.aspp_modules.1.depthwise_conv.conv.weight" in tensors
    first, *rates = said.get("dilations") or (1, 6, 12, 18)
    if first != 1:
        raise ValueError(f"the pyramid of {theirs} has dilations {(first, *rates)}; here the first branch is a 1×1")
    moves = _scores(theirs, ours) | _conv(f"{theirs}.aspp_modules.0", f"{ours}.aspp.pointwise")
    for i in range(len(rates)):
        branch = _separable if separable else _conv
        moves |= branch(f"{theirs}.aspp_modules.{i + 1}", f"{ours}.aspp.atrous.{i}")
    moves |= _pool(f"{theirs}.image_pool.1", f"{ours}.aspp.pool")
    moves |= _conv(f"{theirs}.bottleneck", f"{ours}.aspp.project")
    return {
        "rates": tuple(rates),
        "rates_at": stride,
        "channels": width(f"{theirs}.bottleneck.conv.weight", tensors),
        "separable": separable,
        "project_kernel": 3,
        **_dropout(said),
    }, moves


PLANS: dict[str, Callable[[str, str, Tensors, Mapping[str, Any], int], HeadPlan]] = {
    "psp_modules.0.1.conv": _psp,
    "sep_bottleneck.0.depthwise_conv.conv": _deeplabv3plus,
    "aspp_modules.0.conv": _deeplabv3,
    "convs.0.conv": _fcn,
}
"""A convolution that a head has, and those above it in this list have not; and what to build."""


def _dropout(said: Mapping[str, Any]) -> dict[str, Any]:
    return {"dropout": said.get("dropout_ratio", 0.1)}


def _scores(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.conv_seg": f"{ours}.classifier"}


def _conv(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.conv": f"{ours}.0", f"{theirs}.bn": f"{ours}.1"}


def _separable(theirs: str, ours: str) -> dict[str, str]:
    return _conv(f"{theirs}.depthwise_conv", f"{ours}.0") | _conv(f"{theirs}.pointwise_conv", f"{ours}.1")


def _pool(theirs: str, ours: str) -> dict[str, str]:
    return {f"{theirs}.conv": f"{ours}.conv", f"{theirs}.bn": f"{ours}.norm"}


def _pool_last(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pyramid's projection with its input in our order: theirs has the image pool before the other branches."""
    key = "decode_head.bottleneck.conv.weight"
    if "decode_head.image_pool.1.conv.weight" not in tensors:
        return tensors
    pooled = len(tensors["decode_head.image_pool.1.conv.weight"])
    return tensors | {key: torch.cat([tensors[key][:, pooled:], tensors[key][:, :pooled]], dim=1)}
