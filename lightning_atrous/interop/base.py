"""What all importers share: others' tensors under our names, all of them or none; class names; a checkpoint."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lightning_atrous.files import whole_file
from lightning_atrous.heads import Head, HeadFactory
from lightning_atrous.task import SegmentationTask
from lightning_atrous.types import ClassInfo

__all__ = [
    "HeadPlan",
    "Imported",
    "Tensors",
    "aspp_moves",
    "choose_classes",
    "fill",
    "numbered",
    "read_file",
    "separable_moves",
    "tensors_of",
    "width",
]

Tensors = Mapping[str, Tensor]
"""A state dict."""

_SHOWN = 4
"""Names on each side of an error: enough to see what they have in common."""

_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.")
"""What data-parallel training, compilation and Lightning modules put before every name."""

_PLACES = ("state_dict", "model_state_dict", "model")
"""Under which people save a state dict beside other things."""

RESAVE = (
    "python -c \"import torch; c = torch.load('OLD', map_location='cpu', weights_only=False); "
    "c = c if isinstance(c, dict) else {'model': c}; "
    "torch.save({k: v.state_dict() if hasattr(v, 'state_dict') else v for k, v in c.items() "
    "if k in ('state_dict', 'model_state_dict', 'model', 'meta')}, 'NEW')\""
)
"""What to run where a file holds more than weights: it works for dictionaries and for whole modules."""


@dataclass(frozen=True)
class Imported:
    """A model that came from elsewhere.

    Args:
        task: The model as ours, with its weights, in eval mode.
        origin: What it was.
        remarks: What it is good to know: what was reproduced, assumed, left out, or never compared with the original.
    """

    task: SegmentationTask
    origin: str
    remarks: tuple[str, ...] = ()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint like that of a run before its first step.

        Raises:
            ValueError: The place cannot be written.
        """
        checkpoint: dict[str, Any] = {
            "epoch": 0,
            "global_step": 0,
            "pytorch-lightning_version": version("lightning"),
            "state_dict": self.task.state_dict(),
            "callbacks": {},
            "optimizer_states": [],
            "lr_schedulers": [],
        }
        self.task.on_save_checkpoint(checkpoint)
        with whole_file(path) as file:
            torch.save(checkpoint, file)


@dataclass(frozen=True)
class HeadPlan:
    """A head that reproduces another package's.

    Args:
        head: Its class.
        options: Its own.
        moves: What others call its modules, and what they are called in our model.
    """

    head: type[Head]
    options: dict[str, Any]
    moves: dict[str, str]

    @property
    def factory(self) -> HeadFactory:
        """The class with its options."""
        return functools.partial(self.head, **self.options)


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a file of weights: tensors and plain values, on the CPU; nothing in it is executed.

    Args:
        path: A ``.safetensors`` file, or one that `torch.save` has written.

    Raises:
        ValueError: A file that is missing or damaged, or holds more than that.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give the path of the weights")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # its own errors are of several kinds
            raise ValueError(f"{path} cannot be read ({error}): it is damaged; fetch or save it again") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives, foreign pickles: each has its own error
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged, or holds more than tensors and plain "
            f"values, which are not loaded because they could run code. If you trust it, save these alone where its "
            f"own packages are installed: {RESAVE}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, expected a state dict; save the model's state_dict()"
        )
    return content


def tensors_of(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in a file's content, without what stands before every name.

    Args:
        content: A state dict, or a checkpoint that has one as ``state_dict``, ``model_state_dict`` or ``model``. Of a
            Lightning module, whose loss and buffers stand beside the model, the model.

    Raises:
        ValueError: There is none.
    """
    of_lightning = "pytorch-lightning_version" in content
    for key in _PLACES:
        if isinstance(content.get(key), Mapping):
            content = content[key]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"there are no weights in this file; it has {_few(list(content))}; save a state_dict()")
    if of_lightning:
        of_model = {key: value for key, value in tensors.items() if key.startswith(_WRAPPERS)}
        tensors = of_model or tensors
    while wrapper := next((w for w in _WRAPPERS if all(key.startswith(w) for key in tensors)), None):
        tensors = {key.removeprefix(wrapper): value for key, value in tensors.items()}
    return tensors


def numbered(pattern: str, tensors: Tensors) -> int:
    """How many modules are numbered so, from 0 on.

    Args:
        pattern: A name with ``{}`` where the number stands.
        tensors: A state dict.

    Example:
        >>> numbered("convs.{}.weight", {"convs.0.weight": torch.empty(0), "convs.1.weight": torch.empty(0)})
        2
    """
    n = 0
    while pattern.format(n) in tensors:
        n += 1
    return n


def width(weight: str, tensors: Tensors) -> int:
    """How many channels a weight gives.

    Raises:
        ValueError: There is no such weight.
    """
    if weight not in tensors:
        raise ValueError(
            f"there is no {weight} in these weights, so they are not of the model that they were taken for"
        )
    return len(tensors[weight])


def aspp_moves(theirs: str, *, separable: bool = False) -> dict[str, str]:
    """The names of a pyramid of three rates, as torchvision and SMP have it.

    Args:
        theirs: What it is called there.
        separable: Whether the convolutions with rates are separable, as SMP has them.
    """
    moves = {
        f"{theirs}.convs.0": "head.aspp.pointwise",
        f"{theirs}.convs.4.1": "head.aspp.pool.conv",
        f"{theirs}.convs.4.2": "head.aspp.pool.norm",
        f"{theirs}.project": "head.aspp.project",
    }
    for i in range(3):
        branch, ours = f"{theirs}.convs.{i + 1}", f"head.aspp.atrous.{i}"
        moves |= separable_moves(branch, 0, ours) if separable else {branch: ours}
    return moves


def separable_moves(theirs: str, at: int, ours: str) -> dict[str, str]:
    """The names of SMP's separable convolution, in a sequence with the norm behind it.

    Args:
        theirs: The sequence.
        at: Its place there.
        ours: What it is called here.
    """
    return {
        f"{theirs}.{at}.0": f"{ours}.0.0",
        f"{theirs}.{at}.1": f"{ours}.1.0",
        f"{theirs}.{at + 1}": f"{ours}.1.1",
    }


def choose_classes(num_classes: int, given: ClassInfo | None, known: Sequence[ClassInfo] = ()) -> ClassInfo:
    """The names of the classes.

    Args:
        num_classes: ``K`` of the weights.
        given: By the user.
        known: Those of the data sets that the source usually is trained on.

    Raises:
        ValueError: Names for another number of classes, or none at all.
    """
    if given is not None:
        if len(given) != num_classes:
            raise ValueError(
                f"names were given for {len(given)} classes, but these weights have {num_classes}; give one for each"
            )
        return given
    for classes in known:
        if len(classes) == num_classes:
            return classes
    raise ValueError(
        f"these weights have {num_classes} classes, and nothing says what they are called; give their names in the "
        f"order of their indices (--classes road,sky,… or a file with one a line)"
    )


def fill(task: SegmentationTask, tensors: Tensors, moves: Mapping[str, str], origin: str) -> SegmentationTask:
    """Put others' tensors into our model: every one of theirs, into every one of ours.

    Args:
        task: With the model to fill.
        tensors: Their state dict.
        moves: Names of their modules and what ours are called; of several that fit, the longest counts.
        origin: What the tensors are from, for the message.

    Returns:
        The task, in eval mode.

    Raises:
        ValueError: Tensors that have no place on the other side, or another shape there.
    """
    ours = task.model.state_dict()
    renamed: dict[str, Tensor] = {}
    left_over, misshapen = [], []
    for key, value in tensors.items():
        name = _moved(key, moves)
        if name is None or name not in ours or name in renamed:
            left_over.append(key)
            continue
        renamed[name] = value
        if value.shape != ours[name].shape:
            misshapen.append(f"{key} {tuple(value.shape)} for {tuple(ours[name].shape)}")
    wanting = [name for name in ours if name not in renamed]
    if left_over or wanting or misshapen:
        raise ValueError(
            f"these weights are not those of {origin} as it is built here: {_few(left_over)} left over in the file, "
            f"{_few(wanting)} wanting in it, {_few(misshapen)} of another shape; name the network that they are of"
        )
    task.model.load_state_dict(renamed, strict=True)
    return task.eval()


def _moved(key: str, moves: Mapping[str, str]) -> str | None:
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        prefix = ".".join(parts[:n])
        if prefix in moves:
            return ".".join([moves[prefix], *parts[n:]])
    return None


def _few(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return f"{len(names)} ({', '.join(names[:_SHOWN])}{', …' * (len(names) > _SHOWN)})"
