"""Any timm network as a pyramid of features at the output stride that was asked for.

The only file that knows timm's networks. timm builds the network and fills its weights; `Dilation` changes strides
into atrous rates; this file joins the two and checks what goes in.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from lightning_atrous.depths import layers_to_head
from lightning_atrous.dilation import Dilation, Execution
from lightning_atrous.recompute import blocks_of, recomputing
from lightning_atrous.registry import close_matches
from lightning_atrous.types import FeatureInfo, Features, Preprocess

__all__ = ["OneSizeError", "TimmBackbone", "convert_sync_batchnorm", "create_features", "list_backbones"]

GRIDS = (
    (1, 65, 131),
    (1, 321, 387),
    (32, 96, 160),
    (64, 192, 320),
    (128, 384, 640),
    (256, 256, 768),
    (14, 98, 210),
)
"""Multiples that networks want of an image's sides, with sides that are such and no larger ones; tried in turn."""

_OURS = {
    "features_only": "it is always on",
    "pretrained": "give it beside timm_options",
    "in_chans": "give in_channels beside timm_options",
    "output_stride": "give it beside timm_options; ours is exact where timm's own is not",
    "out_indices": "every level is always given; a head takes those it needs",
    "num_classes": "the head owns the classes",
}


def list_backbones(pattern: str = "*") -> list[str]:
    """Names of the networks that timm has, by shell pattern; a plain word matches anywhere in the name."""
    glob = pattern if any(mark in pattern for mark in "*?[") else f"*{pattern}*"
    return [name for name in timm.list_models() if fnmatch.fnmatch(name, glob)]


class OneSizeError(ValueError):
    """The network takes images of one size alone, and so is no backbone."""


class TimmBackbone(nn.Module):
    """A timm network that gives feature maps, dilated to an output stride.

    Args:
        name: As timm names it, with a weight tag if wanted (``resnet50.a1_in1k``).
        output_stride: Image pixels per pixel of the last map: what the network has by itself (mostly 32; ``null`` for
            that), or a smaller power of two, by atrous convolution. Can be changed at any time, with the same weights.
        method: How a stride is given up: ``dilate`` makes convolutions atrous, ``phases`` runs what follows as it is on
            every sub-grid of the denser map; ``auto`` takes the first of the two that is exact for this network. By
            name, ``dilate`` may also take statistics over denser maps. A checkpoint keeps by which it was trained.
        pretrained: ``true`` for timm's weights from its hub, ``false`` for none, or the path of a timm state dict
            (``.safetensors``, ``.pth``) of the very network. Loaded strictly.
        in_channels: Of the image. timm adapts pretrained weights to other numbers than 3.
        timm_options: Further options of the network's own constructor in timm, such as ``{pad_type: same}``.
        multi_grid: Factors to the atrous rates of the last stage's blocks, in turn; (1, 2, 4) in DeepLabV3.
        hdc: Atrous rates in place of their own for the blocks of whole stages, in turn, by the stride that the stage
            has in the network as it comes; ``{16: [1, 2, 5, 9], 32: [5, 9, 17]}`` in the HDC paper. Not by ``phases``.
        hdc_at: The output stride for which ``hdc`` is given; at a finer one the taps stay where they are in the image.
        execution: How ``dilate`` is computed: by ``dilated`` kernels, by plain ones on maps ``split`` into their
            sub-grids, or, by ``auto``, by whichever is faster. The numbers are the same.
        read_at: Levels that are read before timm's end of them: by index, the module of timm's network whose output it
            is, of the same shape; ``{2: blocks.2.0}`` where another package's decoder reads the first block of a stage.
        gradient_checkpointing: Less memory in training, for more time: every block is computed again when its gradient
            is due. The numbers are the same.

    Raises:
        ValueError: An unknown network or option; weights that do not fit or cannot be had; a stride that this
            network cannot take exactly, with the reason and the strides it can.
    """

    def __init__(
        self,
        name: str,
        *,
        output_stride: int | None = 16,
        method: Literal["auto", "dilate", "phases"] = "auto",
        pretrained: bool | str | os.PathLike[str] = True,
        in_channels: int = 3,
        timm_options: dict[str, Any] | None = None,
        multi_grid: tuple[int, ...] = (1,),
        hdc: dict[int, tuple[int, ...]] | None = None,
        hdc_at: int = 8,
        execution: Execution = "auto",
        read_at: dict[int, str] | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.in_channels, self.timm_options = name, in_channels, dict(timm_options or {})
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        _check_options(self.timm_options)
        self.net = create_features(name, in_channels, self.timm_options)
        if pretrained is not False:
            _load_strictly(self.net, name, in_channels, self.timm_options, pretrained)
        self.preprocess = _preprocess(self.net.pretrained_cfg, in_channels)
        self._channels = tuple(self.net.feature_info.channels())
        # asked of the class of the format, not of timm: `Format.NHWC` is a string enumeration
        self._channels_first = str(getattr(self.net, "output_fmt", None) or "NCHW").endswith("NCHW")
        self.read_at = _checked_places(self.net, dict(read_at or {}), len(self._channels))
        self.method = method
        self.multi_grid, self.hdc, self.hdc_at = multi_grid, hdc, hdc_at
        self._grid = self._smallest_grid()
        self.dilation = self._probe()
        self.dilation.execution = execution
        if output_stride is not None or self.hdc:  # whose rates are there from then on
            self.output_stride = output_stride or self.dilation.native
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing and not blocks_of(self.net):
            raise ValueError(f"gradient_checkpointing: {name} is not made of blocks; train it without")

    def _probe(self) -> Dilation:
        try:
            return Dilation(
                self.net,
                method=self.method,
                in_channels=self.in_channels,
                multi_grid=self.multi_grid,
                hdc=self.hdc,
                hdc_at=self.hdc_at,
            )
        except ValueError as error:
            raise ValueError(f"{self.name} cannot be used as a backbone: {error}") from error

    def _smallest_grid(self) -> int:
        """What the sides of an image must be multiples of: 1 for convolutions, more for windows and patches."""
        training, failure = self.net.training, None
        for grid, *sides in GRIDS:
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=[]):
                    self.net.eval()(torch.zeros(1, self.in_channels, *sides))
            except (AssertionError, RuntimeError, ValueError) as error:  # each network has its own
                failure = error
            else:
                self.net.train(training)
                return grid
        raise OneSizeError(
            f"{self.name} cannot be used as a backbone: it takes images of one size alone ({_first_line(failure)}); "
            "take a network of convolutions or windows"
        ) from failure

    @property
    def info(self) -> tuple[FeatureInfo, ...]:
        """Channels and reduction of every level at the present output stride, the finest first."""
        return tuple(
            FeatureInfo(channels, reduction)
            for channels, reduction in zip(self._channels, self.dilation.reductions, strict=True)
        )

    @property
    def output_stride(self) -> int:
        """Image pixels per pixel of the last map; settable, also after training."""
        return self.dilation.output_stride

    @output_stride.setter
    def output_stride(self, output_stride: int) -> None:
        try:
            self.dilation.output_stride = output_stride
        except ValueError as error:
            strides = ", ".join(str(stride) for stride in self.dilation.supported()) or "none"
            raise ValueError(
                f"{self.name} cannot run at output stride {output_stride}: {error}. Strides it supports: {strides}"
            ) from error

    def options(self) -> dict[str, Any]:
        """The arguments that build this backbone again, without weights: plain values."""
        return {
            "name": self.name,
            "output_stride": self.output_stride,
            "method": self.dilation.method or self.method,
            "pretrained": False,
            "in_channels": self.in_channels,
            "timm_options": self.timm_options or None,
            "multi_grid": tuple(self.multi_grid),
            "hdc": self.hdc and {stride: tuple(rates) for stride, rates in self.hdc.items()},
            "hdc_at": self.hdc_at,
            "execution": self.dilation.execution,
            "read_at": self.read_at or None,
            "gradient_checkpointing": self.gradient_checkpointing,
        }

    def layers_to_head(self) -> dict[str, int]:
        """For every parameter, by name, how many layers it is away from the head, as timm counts them.

        Raises:
            ValueError: timm does not say which layers this network has.
        """
        with torch.random.fork_rng(devices=[]):  # the classifier's weights are of no use
            classifier = _create(self.name, self.in_channels, {**self.timm_options, "num_classes": 1})
        try:
            return {f"net.{name}": away for name, away in layers_to_head(self.net, classifier).items()}
        except ValueError as error:
            raise ValueError(f"layer_decay: {self.name} cannot have it, {error}; leave it out") from error

    def forward(self, image: Tensor) -> Features:
        """Normalised image ``(B, C, H, W)`` → maps ``(B, C_i, h_i, w_i)``, the finest first.

        Where a network takes multiples of its windows or patches alone, the image is continued with zeros to the right
        and below, and the maps are cut off where it ends.
        """
        height, width = image.shape[-2:]
        below, right = -height % self._grid, -width % self._grid
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        with recomputing(blocks_of(self.net)) if again else contextlib.nullcontext():
            features = self._maps(F.pad(image, (0, right, 0, below)) if below or right else image)
        if not self._channels_first:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        if not (below or right):
            return tuple(features)
        return tuple(
            feature[..., : -(-height // reduction), : -(-width // reduction)]
            for feature, reduction in zip(features, self.dilation.reductions, strict=True)
        )

    def _maps(self, image: Tensor) -> list[Tensor]:
        if not self.read_at:
            return self.net(image)
        read: dict[int, Tensor] = {}
        hooks = [
            self.net.get_submodule(place).register_forward_hook(functools.partial(_keep, read, level))
            for level, place in self.read_at.items()
        ]
        try:
            features = list(self.net(image))
        finally:
            for hook in hooks:
                hook.remove()
        for level, place in self.read_at.items():
            if read[level].shape != features[level].shape:
                raise ValueError(
                    f"read_at: at output stride {self.output_stride} {place} gives {tuple(read[level].shape)} where "
                    f"level {level} has {tuple(features[level].shape)}; name a module within that level's own stage, "
                    f"or take a coarser output stride"
                )
            features[level] = read[level]
        return features


def _keep(read: dict[int, Tensor], level: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    read[level] = output


def _checked_places(net: nn.Module, places: dict[int, str], levels: int) -> dict[int, str]:
    modules = [name for name, _ in net.named_modules() if name]
    for level, place in places.items():
        if level not in range(levels):
            raise ValueError(f"read_at: level {level} asked of a network with {levels} levels; give 0 to {levels - 1}")
        if place not in modules:
            raise ValueError(f"read_at: this network has no module '{place}'; {close_matches(place, modules)}")
    return places


def _check_name(name: str) -> None:
    if timm.is_model(name):
        return
    raise ValueError(f"timm has no network '{name}'; {close_matches(name.split('.')[0], timm.list_models())}")


def _check_options(options: Mapping[str, Any]) -> None:
    for option in options:
        if option in _OURS:
            raise ValueError(f"timm_options may not have '{option}': {_OURS[option]}")


def create_features(name: str, in_channels: int = 3, options: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """The network as features, of a kind that takes images of any size where it has the choice; no weights.

    Raises:
        ValueError: An unknown network or option, or one that gives no features.
    """
    _check_name(name)
    for choice in ("strict_img_size", "dynamic_img_size"):  # networks of windows, and of patches
        try:
            wanted = {choice: choice.startswith("dynamic")}
            return _create(name, in_channels, {"features_only": True, **wanted, **options})
        except ValueError as error:
            if f"'{choice}'" not in str(error.__cause__):
                raise
    return _create(name, in_channels, {"features_only": True, **options})


def _create(name: str, in_channels: int, options: Mapping[str, Any], **weights: Any) -> Any:
    """The network by timm's constructor."""
    try:
        return timm.create_model(name, in_chans=in_channels, **weights, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        unknown = str(error).rsplit("'", 2)[1]
        known = sorted(set(inspect.signature(type(timm.create_model(name))).parameters) - set(_OURS))
        raise ValueError(f"{name} in timm takes no option '{unknown}'; {close_matches(unknown, known)}") from error
    except (RuntimeError, AttributeError) as error:
        if weights:
            raise
        raise ValueError(f"timm does not give {name} as a feature network: {error}") from error


def _load_strictly(
    net: nn.Module,
    name: str,
    in_channels: int,
    options: Mapping[str, Any],
    pretrained: bool | str | os.PathLike[str],
) -> None:
    """Fill the feature network from a classifier that timm has loaded strictly, tensor by tensor.

    timm itself loads feature networks with ``strict=False``, which passes over what does not fit in silence.
    """
    full = _pretrained_classifier(name, in_channels, options, pretrained).state_dict()
    source = {key.replace(".", "_"): value for key, value in full.items()}
    loaded: dict[str, Tensor] = {}
    for key, value in net.state_dict().items():
        found = source.get(key.removeprefix("model.").replace(".", "_"))
        if found is None or found.shape != value.shape:
            raise ValueError(
                f"{name}: its feature network has a tensor {key} of shape {tuple(value.shape)} that its pretrained "
                f"weights do not have, so they cannot be loaded whole; take pretrained: false or another backbone"
            )
        loaded[key] = found
    net.load_state_dict(loaded, strict=True)


def _pretrained_classifier(
    name: str, in_channels: int, options: Mapping[str, Any], pretrained: bool | str | os.PathLike[str]
) -> nn.Module:
    if isinstance(pretrained, bool):
        try:
            return _create(name, in_channels, options, pretrained=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the pretrained weights of {name} could not be fetched or loaded ({_first_line(error)}). To go on "
                f"offline, save them where there is a network (timm.create_model('{name}', pretrained=True), then "
                f"safetensors.torch.save_file of its state_dict) and give pretrained: <that file>, or pretrained: false"
            ) from error
    path = Path(pretrained)
    if not path.is_file():
        raise ValueError(f"pretrained weights: there is no file {path}; give the path of a timm state dict of {name}")
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # each file format has its own errors
        raise ValueError(
            f"pretrained weights: {path} cannot be read as a state dict ({_first_line(error)}); "
            f"give a .safetensors or .pth file saved from timm's {name}"
        ) from error
    overlay: dict[str, Any] = {"file": str(path)}
    classifier = timm.get_pretrained_cfg_value(name, "classifier")
    if isinstance(classifier, str) and f"{classifier}.weight" in weights:
        overlay["num_classes"] = weights[f"{classifier}.weight"].shape[0]
    try:
        classes = {"num_classes": overlay["num_classes"]} if "num_classes" in overlay else {}
        return _create(
            name,
            in_channels,
            {**options, **classes},
            pretrained=True,
            pretrained_cfg_overlay=overlay,
        )
    except RuntimeError as error:
        raise ValueError(
            f"pretrained weights: {path} does not fit {name} ({_first_line(error, lines=2)}); "
            f"give a state dict that timm saved from {name} with the same timm_options"
        ) from error


def _preprocess(cfg: Mapping[str, Any], in_channels: int) -> Preprocess:
    """Mean and deviation as timm has them, repeated in turn over other numbers of channels, as it repeats weights."""
    mean, std = tuple(cfg["mean"]), tuple(cfg["std"])
    return Preprocess(
        tuple(mean[i % len(mean)] for i in range(in_channels)),
        tuple(std[i % len(std)] for i in range(in_channels)),
    )


def _first_line(error: BaseException | None, lines: int = 1) -> str:
    text = " ".join(line.strip() for line in str(error).strip().splitlines()[:lines]) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."
