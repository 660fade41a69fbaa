"""The state of all random number generators of a process, as tensors and plain numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "set_random_state"]


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators: nothing that ``weights_only`` loading refuses.

    Args:
        device: Whose generator is kept beside the CPU's, where it is a CUDA device.

    Example:
        >>> from lightning_atrous.randomness import random_state, set_random_state
        >>> state = random_state()
        >>> drawn = torch.rand(3)
        >>> set_random_state(state)
        >>> torch.equal(torch.rand(3), drawn)
        True
    """
    version, words, gauss = random.getstate()
    _, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - it is this global one that others use
    state = {
        "python": torch.tensor(words),
        "python_rest": [version, gauss],
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": rest,
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """Draw from here on what was drawn after `random_state`.

    Args:
        state: As it was returned, perhaps read from a file.
        device: The CUDA device that draws on; a state without one leaves it as it is.
    """
    version, gauss = state["python_rest"]
    random.setstate((version, tuple(state["python"].tolist()), gauss))
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), *state["numpy_rest"]))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
