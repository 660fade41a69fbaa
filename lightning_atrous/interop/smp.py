"""segmentation_models_pytorch's models, 0.5 and later: their configuration into our options, their names into ours.

All of SMP's decoders but the two DeepLabs are heads here that keep the names of their weights. Its ``tu-`` encoders are
timm's networks as they are. Its own residual encoders, dilated, give every kernel of a stage the stage's rate, also
the one that gives up its stride; `TimmBackbone` is told so by ``hdc``.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from segmentation_models_pytorch.encoders import get_encoder
from torch import Tensor, nn

from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.dilation.proof import relative_error
from lightning_atrous.heads import HEADS, DeepLabV3, DeepLabV3Plus
from lightning_atrous.interop.base import (
    HeadPlan,
    Imported,
    Tensors,
    aspp_moves,
    choose_classes,
    fill,
    read_file,
    separable_moves,
    tensors_of,
)
from lightning_atrous.registry import close_matches
from lightning_atrous.task import SegmentationTask
from lightning_atrous.types import ClassInfo, Preprocess

__all__ = ["SMP_MODELS", "from_smp", "read_smp"]

SMP_MODELS: dict[str, dict[str, Any]] = {
    "DeepLabV3": {
        "encoder_output_stride": 8,
        "decoder_channels": 256,
        "decoder_atrous_rates": (12, 24, 36),
        "decoder_aspp_separable": False,
        "decoder_aspp_dropout": 0.5,
        "upsampling": None,
    },
    "DeepLabV3Plus": {
        "encoder_output_stride": 16,
        "decoder_channels": 256,
        "decoder_atrous_rates": (12, 24, 36),
        "decoder_aspp_separable": True,
        "decoder_aspp_dropout": 0.5,
        "upsampling": 4,
    },
    "Unet": {},
    "UnetPlusPlus": {},
    "Linknet": {},
    "MAnet": {},
    "FPN": {"upsampling": 4},
    "PAN": {"encoder_output_stride": 16, "upsampling": 4},
    "UPerNet": {"upsampling": 4},
    "Segformer": {"upsampling": 4},
}
"""The models that can be imported, and what SMP takes where its configuration does not say; the heads know the rest."""

RESNETS = (
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"resnext{kind}" for kind in ("50_32x4d", "101_32x4d", "101_32x8d", "101_32x16d")),
)
"""Those of SMP's own encoders whose weights have timm's names."""

_COMMON = ("encoder_name", "encoder_depth", "encoder_weights", "in_channels", "classes", "activation", "aux_params")

AGREEMENT = 1e-6
"""The relative error, in float64, up to which two encoders are one."""

TWO_CLASSES = ClassInfo(("background", "foreground"))


def read_smp(path: str | Path) -> tuple[dict[str, Tensor], str | None, dict[str, Any]]:
    """The weights, the model's class and its configuration, as far as a file or folder says them.

    Args:
        path: A folder that ``save_pretrained`` has written, or a file of weights.

    Raises:
        ValueError: Something is missing or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        return tensors_of(read_file(path)), None, {}
    try:
        options = json.loads((path / "config.json").read_text(encoding="utf-8"))
        architecture = str(options.pop("_model_class"))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path}/config.json cannot be read ({type(error).__name__}); give a folder that SMP's save_pretrained has "
            f"written, or the file of the weights with the model's class and encoder"
        ) from error
    return tensors_of(read_file(path / "model.safetensors")), architecture, options


def from_smp(
    weights: nn.Module | Mapping[str, Any],
    architecture: str | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    classes: ClassInfo | None = None,
    preprocess: Preprocess | None = None,
) -> Imported:
    """A model of segmentation_models_pytorch as ours, with the same logits at the image sizes that it takes.

    A model of one class becomes one of two: the score of the background is 0, so that the foreground's probability is
    the sigmoid it was.

    Args:
        weights: The model, which says all of the rest by itself; or its state dict.
        architecture: The model's class, such as ``DeepLabV3Plus``.
        options: What it was built with, by SMP's names; ``encoder_name`` at least, and all that is not SMP's default.
        classes: Their names.
        preprocess: Mean and deviation with which it was trained; where not given, those of the encoder's own
            pretrained weights, which SMP recommends but does not apply.

    Raises:
        ValueError: A model, encoder or option that has no counterpart here; weights that do not fit.
    """
    if isinstance(weights, nn.Module):
        architecture, options = type(weights).__name__, {**getattr(weights, "config", {}), **(options or {})}
        weights = weights.state_dict()
    architecture, options = _checked(architecture, options or {})
    tensors = tensors_of(weights)
    remarks = []
    if options.get("activation"):
        remarks.append(f"SMP's activation '{options['activation']}' is left out: the model gives logits")
    if options.get("aux_params"):
        remarks.append("the classifier of whole images is left out")
        tensors = {key: value for key, value in tensors.items() if not key.startswith("classification_head.")}
    tensors, classes = _classes(tensors, classes, remarks)
    head = _head(architecture, options)
    backbone, moves = _backbone(options, remarks)
    task = SegmentationTask(backbone, head.factory, classes=classes, preprocess=preprocess or _preprocess(options))
    if preprocess is None:
        remarks.append("images are normalised as for the encoder's own pretrained weights (SMP leaves it to the user)")
    name = options["encoder_name"]
    origin = f"SMP's {architecture} on {name}"
    moves |= head.moves | {"segmentation_head.0": "head.classifier"}
    fill(task, tensors, moves, origin)
    if name.startswith("tu-"):
        remarks.append(_compare(task.model.backbone, name, options.get("encoder_output_stride", 32), tensors))
    return Imported(task, f"smp {architecture} {name}", tuple(remarks))


def _checked(architecture: str | None, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if architecture not in SMP_MODELS:
        raise ValueError(
            f"'{architecture}' is no model of SMP that can be imported; "
            f"{close_matches(str(architecture), list(SMP_MODELS))}"
        )
    if not options.get("encoder_name"):
        raise ValueError(
            "the weights do not say which encoder they are of; give its name as SMP has it, such as resnet34"
        )
    whole = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    if whole.get("encoder_depth", 5) != 5:
        raise ValueError(
            f"this model was built with encoder_depth {whole['encoder_depth']}, and heads here read every level of a "
            f"backbone; only models of encoder_depth 5 can be imported"
        )
    if whole.get("in_channels", 3) != 3:
        raise ValueError(f"this model takes images of {whole['in_channels']} channels; only RGB can be imported")
    return architecture, SMP_MODELS[architecture] | whole


def _classes(
    tensors: dict[str, Tensor], classes: ClassInfo | None, remarks: list[str]
) -> tuple[dict[str, Tensor], ClassInfo]:
    scores = ("segmentation_head.0.weight", "segmentation_head.0.bias")
    if any(key not in tensors for key in scores):
        raise ValueError(f"there is no {scores[0]} in these weights; give those of a whole model of SMP")
    if len(tensors[scores[0]]) > 1:
        return tensors, choose_classes(len(tensors[scores[0]]), classes)
    remarks.append("one class became two: background, of score 0, and foreground, whose probability is the sigmoid's")
    background = {key: torch.cat([torch.zeros_like(tensors[key]), tensors[key]]) for key in scores}
    return tensors | background, choose_classes(2, classes, [TWO_CLASSES])


def _backbone(options: Mapping[str, Any], remarks: list[str]) -> tuple[TimmBackbone, dict[str, str]]:
    name, stride = options["encoder_name"], options.get("encoder_output_stride", 32)
    if name.startswith("tu-"):
        name = name.removeprefix("tu-")
        if stride == 32:  # that of SMP's encoders by themselves, which it does not set
            backbone = TimmBackbone(name, output_stride=None, pretrained=False)
        else:
            backbone = TimmBackbone(name, output_stride=stride, method="dilate", pretrained=False)
        if backbone.dilation.dense_statistics:
            remarks.append("squeeze-excite and the like see the denser map, as in SMP")
        return backbone, {"encoder.model": "backbone.net"}
    if name not in RESNETS:
        raise ValueError(
            f"SMP's encoder '{name}' has names of its own for its weights; those that can be imported are "
            f"{', '.join(RESNETS)} and, as tu-NAME, every network of timm"
        )
    hdc: dict[int, tuple[int, ...]] = {reach: (reach // stride,) for reach in (16, 32) if reach > stride}
    if hdc:
        remarks.append(
            "the kernel that gives up its stride is dilated itself, as SMP has it: this is what the weights were "
            "trained with, not the exact dilation"
        )
    backbone = TimmBackbone(name, output_stride=stride, pretrained=False, hdc=hdc or None, hdc_at=stride)
    return backbone, {"encoder": "backbone.net"}


def _compare(backbone: TimmBackbone, name: str, stride: int, tensors: Tensors) -> str:
    """Run SMP's encoder beside ours, on an image drawn at random; what came of it.

    timm dilates some of its networks in ways of its own: pools in shortcuts, padding that depends on the size.

    Raises:
        ValueError: They give other maps.
    """
    encoder = get_encoder(name, weights=None, output_stride=stride).double().eval()
    of_encoder = {key: value for key, value in tensors.items() if key.startswith("encoder.")}
    encoder.load_state_dict({key.removeprefix("encoder."): value for key, value in of_encoder.items()})
    twin = copy.deepcopy(backbone).double().eval()
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for size in ((4 * stride, 6 * stride), (5 * stride, 7 * stride), encoder.model.pretrained_cfg["input_size"][1:]):
        image = torch.randn(1, 3, *size, dtype=torch.float64, generator=generator)
        try:
            with torch.no_grad():
                theirs = [pixels for pixels in encoder(image) if pixels is not image and pixels.shape[1]]
        except (AssertionError, RuntimeError, ValueError):  # not a size that it takes
            continue
        with torch.no_grad():
            ours = twin(image)[-len(theirs) :]
        error = max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))
        if error > AGREEMENT:
            raise ValueError(
                f"{name} at output stride {stride} cannot be imported: the maps of SMP's encoder, for which the "
                f"weights were trained, differ from this backbone's by {error:.0e} of the largest value; timm dilates "
                f"some networks in ways of its own"
            )
        compared += 1
        if compared == 2:
            return f"compared on these weights: {name} gives the maps that SMP's encoder gives"
    return f"unverified: SMP's {name} could be run beside ours at {compared or 'no'} size of image"


def _preprocess(options: Mapping[str, Any]) -> Preprocess | None:
    """For SMP's own encoders that of ImageNet; for timm's what timm says, which the backbone has."""
    return None if options["encoder_name"].startswith("tu-") else Preprocess()


def _head(architecture: str, options: Mapping[str, Any]) -> HeadPlan:
    known = {**dict.fromkeys(_COMMON), **SMP_MODELS[architecture]}
    if architecture in ("DeepLabV3", "DeepLabV3Plus"):
        _refuse_unknown(set(options) - set(known), architecture)
        return (_deeplabv3 if architecture == "DeepLabV3" else _deeplabv3plus)(options)
    head = HEADS[architecture.lower()]
    own = {key.removeprefix("decoder_"): value for key, value in options.items() if key.startswith("decoder_")}
    if "upsampling" in options:
        own["upsampling"] = options["upsampling"]
    if "use_batchnorm" in own:  # its name before 0.5
        own["use_norm"] = own.pop("use_batchnorm")
    if isinstance(own.get("use_norm"), bool):
        own["use_norm"] = "batchnorm" if own["use_norm"] else "identity"
    taken = set(inspect.signature(head).parameters)
    unknown = {key for key in options if key not in known and not key.startswith("decoder_")}
    _refuse_unknown(unknown | {f"decoder_{key}" for key in own if key not in taken}, architecture)
    return HeadPlan(head, own, {"decoder": "head.decoder"})


def _refuse_unknown(options: set[str], architecture: str) -> None:
    if options:
        raise ValueError(
            f"this model was built with {', '.join(sorted(options))}, for which {architecture} has no counterpart here"
        )


def _deeplabv3(options: Mapping[str, Any]) -> HeadPlan:
    stride, separable = options["encoder_output_stride"], options["decoder_aspp_separable"]
    own = {
        "rates": options["decoder_atrous_rates"],
        "rates_at": stride,
        "channels": options["decoder_channels"],
        "separable": separable,
        "inner_norm": False,
        "refine_convs": 1,
        "dropout": options["decoder_aspp_dropout"],
        "upsampling": options["upsampling"] or stride,
    }
    moves = aspp_moves("decoder.aspp", separable=separable) | {
        "decoder.conv": "head.refine.0.0",
        "decoder.bn": "head.refine.0.1",
    }
    return HeadPlan(DeepLabV3, own, moves)


def _deeplabv3plus(options: Mapping[str, Any]) -> HeadPlan:
    if not options["decoder_aspp_separable"]:
        raise ValueError(
            "this DeepLabV3Plus was built with decoder_aspp_separable=False, where SMP's decoder stays separable; "
            "the head here has one word for both"
        )
    own = {
        "rates": options["decoder_atrous_rates"],
        "rates_at": options["encoder_output_stride"],
        "channels": options["decoder_channels"],
        "decoder_convs": 1,
        "separable": True,
        "inner_norm": False,
        "aspp_convs": 1,
        "dropout": options["decoder_aspp_dropout"],
        "align_corners": True,
        "upsampling": options["upsampling"],
    }
    moves = {
        **aspp_moves("decoder.aspp.0", separable=True),
        **separable_moves("decoder.aspp", 1, "head.refine_aspp.0"),
        "decoder.block1": "head.reduce.0",
        **separable_moves("decoder.block2", 0, "head.refine.0.0"),
    }
    return HeadPlan(DeepLabV3Plus, own, moves)
