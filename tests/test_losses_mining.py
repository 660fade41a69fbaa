"""Hard example mining against a loop over pixels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_atrous.losses import OHEM, CrossEntropy, raised
from lightning_atrous.types import ClassInfo

CLASSES = ClassInfo(("road", "car", "tree", "sky"))
WEIGHTS = (0.5, 1.0, 2.0, 0.0)


def pair() -> tuple[Tensor, Tensor]:
    """Logits (2, 4, 3, 4), and a target (2, 9, 12) of 141 valid pixels."""
    rng = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, 4, 3, 4, generator=rng, dtype=torch.float64)
    target = torch.randint(4, (2, 9, 12), generator=rng)
    target[torch.rand(target.shape, generator=rng) < 1 / 3] = 255
    return logits.requires_grad_(), target


def by_hand(
    logits: Tensor, target: Tensor, threshold: float, min_kept: int, weights: tuple[float, ...]
) -> tuple[Tensor, int]:
    """Pixels in the order of their probability, kept while they are hard or too few."""
    log_p = F.interpolate(logits, size=target.shape[-2:], mode="bilinear").log_softmax(1)
    pixels = [
        (log_p[b, int(target[b, i, j]), i, j], weights[int(target[b, i, j])])
        for b, i, j in (target != 255).nonzero().tolist()
    ]
    pixels.sort(key=lambda pixel: pixel[0].item())
    kept = [pixel for n, pixel in enumerate(pixels) if pixel[0].exp() < threshold or n < min_kept]
    total = sum((-weight * log for log, weight in kept), torch.zeros(()))
    divisor = sum(weight for _, weight in kept)
    return total / divisor if divisor else 0 * logits.sum(), len(kept)


@pytest.mark.parametrize(("threshold", "min_kept", "kept"), [(0.7, 1, 130), (0.1, 60, 60), (0.1, 0, 51), (1e-9, 0, 0)])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_equals_a_loop_over_pixels(
    threshold: float,
    min_kept: int,
    kept: int,
    class_weights: tuple[float, ...] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(raised, "_RAISED", 200)
    logits, target = pair()
    expected, count = by_hand(logits, target, threshold, min_kept, class_weights or (1.0,) * 4)
    assert count == kept  # each case is what it is meant for
    value = OHEM(CLASSES, threshold=threshold, min_kept=min_kept, class_weights=class_weights)(logits, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (value, expected)))


@pytest.mark.parametrize("options", [{"threshold": 1.0, "min_kept": 0}, {"threshold": 0.1, "min_kept": 10**6}])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_with_every_pixel_it_is_cross_entropy(options: dict, class_weights: tuple[float, ...] | None) -> None:
    logits, target = pair()
    value = OHEM(CLASSES, class_weights=class_weights, **options)(logits, target)
    torch.testing.assert_close(value, CrossEntropy(CLASSES, class_weights=class_weights)(logits, target))


def test_pixels_of_equal_probability_are_kept_together() -> None:
    logits, target = torch.zeros(1, 4, 1, 4), torch.tensor([[[0, 1, 2, 255]]])
    logits[0, 0, 0, 0] = 5
    value = OHEM(CLASSES, threshold=0.01, min_kept=1)(logits, target)
    torch.testing.assert_close(value, torch.tensor(4.0).log())  # of both others, and without the sure one


def test_without_a_valid_pixel_loss_and_gradient_are_0() -> None:
    logits, target = pair()
    loss = OHEM(CLASSES)
    value = loss(logits, torch.full_like(target, 255))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert logits.grad.count_nonzero() == 0
    assert loss.weight(target) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.0}, r"threshold must be a probability in \(0, 1\], got 0.0"),
        ({"threshold": 1.5}, r"threshold must be a probability in \(0, 1\], got 1.5"),
        ({"min_kept": -1}, "min_kept must be a number of pixels, 0 or more, got -1"),
        ({"class_weights": (1.0,)}, "1 class_weights for 4 classes"),
    ],
)
def test_options_out_of_range_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OHEM(CLASSES, **options)
