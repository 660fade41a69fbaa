"""What a checkpoint says of itself: read without executing anything, and built from nothing unknown."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_atrous.heads import HEADS
from lightning_atrous.images import Reader
from lightning_atrous.spec import build

__all__ = ["SPEC_KEY", "check_classes", "check_fits", "check_shapes", "load_weights", "read_checkpoint"]

SPEC_KEY = "lightning_atrous"
"""Where in a checkpoint the description stands from which the task is built again."""


def check_classes(spec: dict[str, Any], *, trust: Collection[str] = ()) -> dict[str, Any]:
    """The factories that a task's description names: its heads, loss and optimiser.

    Args:
        spec: As from `SegmentationTask.spec`.
        trust: Class paths from outside the package and its plug-ins that may be imported.

    Raises:
        ValueError: A class that may not or cannot be imported.
    """
    return {
        name: spec[name] and build(spec[name], registry=HEADS, trust=trust)
        for name in ("head", "aux_head", "loss", "optimizer")
    }


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's content: plain values and tensors, on the CPU; nothing in it is executed.

    Raises:
        ValueError: A file that is missing, damaged or no checkpoint of this package.
    """
    if not os.path.isfile(path):
        raise ValueError(f"there is no checkpoint at {path}; give the path of a .ckpt file that a run has written")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated archives, foreign pickles: each has its own error
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is damaged, or holds more than "
            f"tensors and plain values; take another checkpoint of the run"
        ) from error
    if not isinstance(checkpoint, dict) or SPEC_KEY not in checkpoint:
        raise ValueError(f"{path} was not written by lightning-atrous; it does not say what it is made of")
    return checkpoint


def load_weights(module: nn.Module, checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Fill what a checkpoint describes with its weights, strictly.

    Args:
        module: As built from the description.
        checkpoint: As read.
        path: From where, for the message.

    Raises:
        ValueError: Weights of another model.
    """
    try:
        module.load_state_dict(checkpoint["state_dict"], strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())[:200]
        raise ValueError(
            f"{path} does not hold the weights of the model that it describes ({reason}); it was changed after it was "
            f"written, or a head of its own has changed since: take another"
        ) from error


def check_fits(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse to go on with what a checkpoint describes, where it is another model, or was trained on other data.

    Args:
        theirs: The checkpoint's description.
        ours: That of the task which is to go on.

    Raises:
        ValueError: What differs.
    """
    for what, key in (("backbone", "name"), ("head", "class_path")):
        if theirs[what][key] != ours[what][key]:
            raise ValueError(
                f"the checkpoint's {what} is {theirs[what][key]}, but this run builds {ours[what][key]}; "
                f"give the same model, or leave it out and the checkpoint's own is built"
            )
    if tuple(theirs["classes"]["names"]) != tuple(ours["classes"]["names"]):
        raise ValueError(
            f"the checkpoint was trained on the classes {', '.join(theirs['classes']['names'])}, but the data has "
            f"{', '.join(ours['classes']['names'])}; give data of the same classes"
        )
    readers = Reader(**theirs["reader"]), Reader(**ours["reader"])
    if readers[0] != readers[1]:
        raise ValueError(
            f"the checkpoint was trained on images read with {readers[0]}, but the data is read with {readers[1]}; "
            f"give the same data.reader"
        )


def check_shapes(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Refuse weights that have no place in a model, before torch lists all of them.

    Args:
        weights: A checkpoint's.
        model: Of the same backbone and head by name, but perhaps with other options.

    Raises:
        ValueError: A name that is only on one side, or another shape.
    """
    places = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in (*places, *given):
        if places.get(name) != given.get(name):
            shapes = given.get(name, "missing"), places.get(name, "not there")
            raise ValueError(
                f"the checkpoint's weights do not fit the model that this run builds: {name} is {shapes[0]} in the "
                f"file and {shapes[1]} in the model; give the options of backbone and heads that it was trained with, "
                f"or leave them out"
            )
