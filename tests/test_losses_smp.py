"""SMP's losses as ours: the same numbers as SMP's own on raised logits, and no nan at the edges."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import segmentation_models_pytorch.losses as smp
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_atrous.losses import Dice, Focal, Jaccard, Loss, Lovasz, Tversky
from lightning_atrous.types import ClassInfo

NAMES = ("road", "car", "tree", "sky")
WEIGHTS = [0.5, 1.0, 2.0, 0.0]

REGION = {"log_loss": True, "smooth": 2.0, "class_weights": WEIGHTS}
FOCAL = {"alpha": 0.25, "gamma": 1.5, "class_weights": WEIGHTS}

CASES: dict[str, tuple[Any, type, dict[str, Any]]] = {
    "dice": (Dice, smp.DiceLoss, {}),
    "dice, options": (Dice, smp.DiceLoss, REGION),
    "jaccard": (Jaccard, smp.JaccardLoss, {}),
    "jaccard, options": (Jaccard, smp.JaccardLoss, REGION),
    "tversky": (Tversky, smp.TverskyLoss, {}),
    "tversky, options": (Tversky, smp.TverskyLoss, {**REGION, "alpha": 0.3, "beta": 0.7, "gamma": 0.75}),
    "lovasz": (Lovasz, smp.LovaszLoss, {}),
    "lovasz, per image": (Lovasz, smp.LovaszLoss, {"per_image": True}),
    "focal": (Focal, smp.FocalLoss, {}),
    "focal, options": (Focal, smp.FocalLoss, FOCAL),
}


def pair(ignore_index: int = 255, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits (3, 4, 3, 4) and a target (3, 9, 12), a third of it ignored."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 3, 4, generator=rng, dtype=dtype)
    target = torch.randint(4, (3, 9, 12), generator=rng)
    target[torch.rand(target.shape, generator=rng) < 1 / 3] = ignore_index
    return logits.requires_grad_(), target


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ignore_index", [255, -1])
def test_equals_smps_own_on_raised_logits(case: str, ignore_index: int) -> None:
    cls, theirs, options = CASES[case]
    logits, target = pair(ignore_index, torch.float32 if cls is Lovasz else torch.float64)
    raised = F.interpolate(logits, size=(9, 12), mode="bilinear", align_corners=False)
    expected = theirs(smp.MULTICLASS_MODE, ignore_index=ignore_index, **options)(raised, target)
    loss = cls(ClassInfo(NAMES, ignore_index=ignore_index), **options)
    value = loss(logits, target)
    assert isinstance(loss, Loss)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (value, expected)))


@pytest.mark.parametrize("case", CASES)
def test_images_without_a_valid_pixel_change_nothing(case: str) -> None:
    cls, _, options = CASES[case]
    loss = cls(ClassInfo(NAMES), **options)
    logits, target = pair()
    target[1] = 255
    torch.testing.assert_close(loss(logits, target), loss(logits[[0, 2]], target[[0, 2]]))
    nothing = loss(logits, torch.full_like(target, 255))
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad is not None
    assert logits.grad.count_nonzero() == 0


@pytest.mark.parametrize("case", CASES)
def test_half_precision_is_raised_and_compared_in_float32(case: str) -> None:
    cls, _, options = CASES[case]
    loss = cls(ClassInfo(NAMES), **options)
    logits, target = pair()
    half = logits.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, target)
    assert value.dtype == torch.float32
    assert value == loss(half.float(), target)


@pytest.mark.parametrize("weights", [(0.5, 0.5, Dice), (1.0, 1.0, Jaccard)])
def test_tversky_lies_between_dice_and_jaccard(weights: tuple[float, float, Any]) -> None:
    alpha, beta, cls = weights
    classes, (logits, target) = ClassInfo(NAMES), pair()
    torch.testing.assert_close(Tversky(classes, alpha=alpha, beta=beta)(logits, target), cls(classes)(logits, target))


def test_reduced_focal_loss_is_its_definition() -> None:
    logits, target = pair()
    raised = F.interpolate(logits, size=(9, 12), mode="bilinear", align_corners=False)
    valid = target != 255
    values = []
    for c in range(4):
        own = target == c
        p = torch.where(own, raised[:, c].sigmoid(), 1 - raised[:, c].sigmoid())
        factor = torch.where(p < 0.4, 1, ((1 - p) / 0.4) ** 2)
        values.append((-factor * p.log())[valid].mean())
    value = Focal(ClassInfo(NAMES), reduced_threshold=0.4)(logits, target)
    torch.testing.assert_close(value, torch.stack(values).mean())


def test_only_the_focal_loss_is_a_mean_over_pixels() -> None:
    _, target = pair()
    classes = ClassInfo(NAMES)
    assert [loss(classes).weight(target) for loss in (Dice, Jaccard, Tversky, Lovasz)] == [None] * 4
    assert Focal(classes, class_weights=WEIGHTS).weight(target) == (target != 255).sum()


@pytest.mark.parametrize("cls", [Dice, Jaccard, Tversky, Lovasz, Focal])
def test_shapes_that_do_not_fit_are_named(cls: Any) -> None:
    with pytest.raises(ValueError, match=r"expected logits \(B, 4, h, w\).* got \(2, 3, 4, 4\)"):
        cls(ClassInfo(NAMES))(torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        *((partial(cls, class_weights=[1.0]), "1 class_weights for 4") for cls in (Dice, Jaccard, Tversky, Focal)),
        *((partial(cls, smooth=-1.0), "smooth is a number of pixels") for cls in (Dice, Jaccard, Tversky)),
        (partial(Tversky, alpha=-0.1), "alpha and beta weigh mistakes and may not be negative, got -0.1 and 0.5"),
        (partial(Tversky, gamma=0.0), "gamma is a power and must be positive, got 0.0"),
        (partial(Focal, alpha=1.1), r"alpha must be in \[0, 1\], got 1.1"),
        (partial(Focal, gamma=-1.0), "gamma is a power and must not be negative, got -1.0"),
        (partial(Focal, reduced_threshold=0.0), r"reduced_threshold must be a probability in \(0, 1\], got 0.0"),
    ],
)
def test_options_out_of_range_are_named(factory: partial[Loss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        factory(ClassInfo(NAMES))


def test_lovasz_wants_two_classes() -> None:
    with pytest.raises(ValueError, match="needs two at least, got one; take Dice or Jaccard"):
        Lovasz(ClassInfo(("road",)))
