"""Which of two equal ways is the faster, on this machine, at this size: measured."""

from __future__ import annotations

import copy
import statistics
import time

import torch
from torch import Tensor

from lightning_atrous.dilation.network import Dilation, Execution

__all__ = ["fastest", "seconds"]


def fastest(dilation: Dilation, image: Tensor, *, training: bool, rounds: int = 5) -> Execution:
    """*dilated* or *split*, whichever takes less time: forward and backward in training, else forward.

    Args:
        dilation: Left as it is; a copy of its network is run.
        image: ``(B, C, H, W)``, of the size that will be used, and on the device.
        training: In which of the two modes.
        rounds: How often each is run, in turn, after once for warming up.
    """
    taken = seconds(dilation, image, training=training, rounds=rounds)
    dilated, split = (statistics.median(taken[execution]) for execution in ("dilated", "split"))
    return "dilated" if dilated < split else "split"


def seconds(dilation: Dilation, image: Tensor, *, training: bool, rounds: int) -> dict[Execution, list[float]]:
    """What each takes, round by round; in the caller's autocast."""
    twins: dict[Execution, Dilation] = {}
    for execution in ("dilated", "split"):
        twins[execution] = copy.deepcopy(dilation)
        twins[execution].execution = execution
        twins[execution].network.train(training)
    taken: dict[Execution, list[float]] = {execution: [] for execution in twins}
    for i in range(rounds + 1):
        for execution, twin in twins.items():
            once = _once(twin, image, training=training)
            if i > 0:
                taken[execution].append(once)
    return taken


def _once(dilation: Dilation, image: Tensor, *, training: bool) -> float:
    _finish(image)
    begun = time.perf_counter()
    with torch.random.fork_rng(), torch.set_grad_enabled(training):
        output = dilation.network(image)
        if training:
            maps = [output] if isinstance(output, Tensor) else list(output)
            total = torch.stack([x.float().mean() for x in maps]).sum()
            if total.requires_grad:  # not everything is frozen
                total.backward()
            dilation.network.zero_grad()
    _finish(image)
    return time.perf_counter() - begun


def _finish(image: Tensor) -> None:
    if image.device.type != "cpu":
        torch.accelerator.synchronize(image.device)
