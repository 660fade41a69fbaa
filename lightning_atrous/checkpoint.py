"""What a checkpoint says of itself: read without executing anything, and built from nothing unknown."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from lightning_atrous.heads import HEADS
from lightning_atrous.spec import build

__all__ = ["SPEC_KEY", "check_classes", "load_weights", "read_checkpoint"]

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
