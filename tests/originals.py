"""Other packages' models, with nothing in them that hides a mistake, and how they are compared."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_atrous import SegmentationTask


def drawn(model: nn.Module) -> nn.Module:
    """The model in eval mode, its norms drawn at random: as they begin they are all alike, and some of them zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def differences(
    task: SegmentationTask, original: Callable[[Tensor], Tensor], *sizes: tuple[int, int]
) -> dict[tuple[int, int], float]:
    """By size of image: how far the task's logits are from those of the original, relative to the largest of these.

    Args:
        task: Ours, in float64.
        original: Normalised image ``(B, 3, H, W)`` → logits ``(B, K, H, W)``, in float64.
        sizes: Height and width.
    """
    found = {}
    for size in sizes:
        image = torch.rand(2, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            expected, logits = original(task.model.normalize(image)), task(image)
        assert logits.shape == expected.shape
        found[size] = float((logits - expected).abs().max() / expected.abs().max())
    return found
