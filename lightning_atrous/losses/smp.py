"""SMP's losses on logits of any resolution: those of regions (Dice, Jaccard, Tversky, Lovász), and the focal one.

segmentation_models_pytorch takes logits at the labels' size. Here they are raised first, as a whole and in float32 or
better, and images without a valid pixel are left out, of which some of its losses are nan. The options have its names
and defaults. Not taken over are those that another part of the package stands for (``mode``, ``ignore_index``,
``from_logits``), its ``eps``, and its ``classes``: a class with a weight of 0 has no part in the loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from segmentation_models_pytorch import losses as smp
from torch import Tensor, nn

from lightning_atrous.layers import resize
from lightning_atrous.losses.base import Loss, check_pair
from lightning_atrous.losses.pixel_mean import PixelMean, check_class_weights
from lightning_atrous.types import ClassInfo

__all__ = ["Dice", "Focal", "Jaccard", "Lovasz", "Tversky"]


class _Region(Loss):
    """A loss that compares whole regions, so that it is no mean over pixels."""

    def __init__(self, classes: ClassInfo, loss: nn.Module) -> None:
        super().__init__()
        self.classes = classes
        self.loss = loss

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare, as `Loss.forward`.

        Raises:
            ValueError: Shapes that do not fit each other or the classes, or a target that is not int64.
        """
        check_pair(logits, target, self.classes)
        seen = (target != self.classes.ignore_index).flatten(1).any(1)
        logits, target = logits[seen], target[seen]
        # without an image the sum is 0, and has a graph
        return self.compare(_raised(logits, target), target) if len(target) else _wide(logits).sum()

    def compare(self, logits: Tensor, target: Tensor) -> Tensor:
        """SMP's loss of raised logits ``(B, K, H, W)``, and a target of which every image has a valid pixel."""
        value: Tensor = self.loss(logits, target)
        return value


class Dice(_Region):
    """Soft Dice loss (Milletari, Navab, Ahmadi: V-Net, 2016, section 3), SMP's: of each class over the whole batch.

    A class that is not in the batch adds 0. The loss does not decompose: over ranks it is the mean of what each finds
    on its own images, and every accumulated batch counts the same.

    Args:
        classes: Gives ``K`` and the ignore index.
        log_loss: The negative logarithm of the coefficient, in place of one minus it.
        smooth: Added to both sides of the fraction, in pixels.
        class_weights: One per class, finite, none negative and not all 0: of the mean over classes.

    Raises:
        ValueError: An option out of range.
    """

    def __init__(
        self,
        classes: ClassInfo,
        *,
        log_loss: bool = False,
        smooth: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        _check_smooth(smooth)
        loss = smp.DiceLoss(
            smp.MULTICLASS_MODE,
            log_loss=log_loss,
            smooth=smooth,
            ignore_index=classes.ignore_index,
            class_weights=_checked(class_weights, classes),
        )
        super().__init__(classes, loss)


class Jaccard(_Region):
    """Soft Jaccard loss, one minus the IoU (Rahman, Wang: Optimizing Intersection-Over-Union, 2016), SMP's.

    Of each class over the whole batch; a class that is not in it adds 0. The loss does not decompose: over ranks it is
    the mean of what each finds on its own images, and every accumulated batch counts the same.

    Args:
        classes: Gives ``K`` and the ignore index.
        log_loss: The negative logarithm of the coefficient, in place of one minus it.
        smooth: Added to both sides of the fraction, in pixels.
        class_weights: One per class, finite, none negative and not all 0: of the mean over classes.

    Raises:
        ValueError: An option out of range.
    """

    def __init__(
        self,
        classes: ClassInfo,
        *,
        log_loss: bool = False,
        smooth: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        _check_smooth(smooth)
        loss = smp.JaccardLoss(
            smp.MULTICLASS_MODE,
            log_loss=log_loss,
            smooth=smooth,
            ignore_index=classes.ignore_index,
            class_weights=_checked(class_weights, classes),
        )
        super().__init__(classes, loss)


class Tversky(_Region):
    """Tversky loss (Salehi, Erdogmus, Gholipour, 2017), SMP's: Dice that weighs the two kinds of mistakes.

    With both weights 0.5 it is `Dice`, with both 1 `Jaccard`. It does not decompose: over ranks it is the mean of what
    each finds on its own images, and every accumulated batch counts the same.

    Args:
        classes: Gives ``K`` and the ignore index.
        log_loss: The negative logarithm of the coefficient, in place of one minus it.
        smooth: Added to both sides of the fraction, in pixels.
        alpha: Weight of false positives.
        beta: Weight of false negatives.
        gamma: The power to which the loss is raised (Abraham, Khan: A Novel Focal Tversky Loss, 2019), in SMP after the
            mean over classes.
        class_weights: One per class, finite, none negative and not all 0: of the mean over classes.

    Raises:
        ValueError: An option out of range.
    """

    def __init__(
        self,
        classes: ClassInfo,
        *,
        log_loss: bool = False,
        smooth: float = 0.0,
        alpha: float = 0.5,
        beta: float = 0.5,
        gamma: float = 1.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        _check_smooth(smooth)
        if alpha < 0 or beta < 0:
            raise ValueError(f"alpha and beta weigh mistakes and may not be negative, got {alpha} and {beta}")
        if gamma <= 0:
            raise ValueError(f"gamma is a power and must be positive, got {gamma}")
        loss = smp.TverskyLoss(
            smp.MULTICLASS_MODE,
            log_loss=log_loss,
            smooth=smooth,
            ignore_index=classes.ignore_index,
            alpha=alpha,
            beta=beta,
            gamma=gamma,
            class_weights=_checked(class_weights, classes),
        )
        super().__init__(classes, loss)


class Lovasz(_Region):
    """Lovász-Softmax (Berman, Triki, Blaschko: The Lovász-Softmax Loss, CVPR 2018), SMP's: a surrogate of the mean IoU.

    The mean over the classes that are there, always in float32; it sorts all pixels once a class. It does not
    decompose: over ranks it is the mean of what each finds on its own images, and every accumulated batch counts the
    same.

    Args:
        classes: Gives ``K``, two at least, and the ignore index.
        per_image: The mean over images of the loss of each, in place of that of the whole batch.

    Raises:
        ValueError: A single class.
    """

    def __init__(self, classes: ClassInfo, *, per_image: bool = False) -> None:
        if len(classes) < 2:
            raise ValueError("Lovasz compares classes and needs two at least, got one; take Dice or Jaccard")
        loss = smp.LovaszLoss(smp.MULTICLASS_MODE, per_image=per_image, ignore_index=classes.ignore_index)
        super().__init__(classes, loss)

    def compare(self, logits: Tensor, target: Tensor) -> Tensor:
        """SMP's, which mixes in float32 of its own."""
        return super().compare(logits.float(), target)


class Focal(PixelMean):
    """Focal loss (Lin, Goyal, Girshick, He, Dollár: Focal Loss for Dense Object Detection, 2017), SMP's.

    Every class against the rest through a sigmoid; the mean over classes, and over the valid pixels. Unlike the others
    it decomposes: SMP's sum is divided as in every `PixelMean`, so that over ranks and accumulated batches it is the
    loss of all images in one. SMP's ``normalized`` would divide once more, by a number of each batch, and is left out.

    Args:
        classes: Gives ``K`` and the ignore index.
        alpha: Weight of a class's own pixels, in ``[0, 1]``, those of the rest having one minus it; both 1 where not
            given.
        gamma: The power of one minus the probability, by which what is sure already counts less; not negative.
        reduced_threshold: Probability up to which nothing counts less, in ``(0, 1]`` (Sergievskiy, Ponamarev: Reduced
            Focal Loss, 2019).
        class_weights: One per class, finite, none negative and not all 0: of the mean over classes.

    Raises:
        ValueError: An option out of range.
    """

    def __init__(
        self,
        classes: ClassInfo,
        *,
        alpha: float | None = None,
        gamma: float = 2.0,
        reduced_threshold: float | None = None,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(classes)  # the weights are those of the classes' losses, not of their pixels
        if alpha is not None and not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        if not gamma >= 0:
            raise ValueError(f"gamma is a power and must not be negative, got {gamma}")
        if reduced_threshold is not None and not 0 < reduced_threshold <= 1:
            raise ValueError(f"reduced_threshold must be a probability in (0, 1], got {reduced_threshold}")
        self.loss = smp.FocalLoss(
            smp.MULTICLASS_MODE,
            alpha=alpha,
            gamma=gamma,
            ignore_index=classes.ignore_index,
            reduction="sum",
            reduced_threshold=reduced_threshold,
            class_weights=_checked(class_weights, classes),
        )

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compare, as `Loss.forward`.

        Raises:
            ValueError: Shapes that do not fit each other or the classes, or a target that is not int64.
        """
        check_pair(logits, target, self.classes)
        return self.mean(self.loss(_raised(logits, target), target), target)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _raised(logits: Tensor, target: Tensor) -> Tensor:
    return resize(_wide(logits), target.shape[-2:])


def _checked(class_weights: Sequence[float] | None, classes: ClassInfo) -> list[float] | None:
    check_class_weights(class_weights, classes)
    return None if class_weights is None else list(class_weights)


def _check_smooth(smooth: float) -> None:
    if not smooth >= 0:
        raise ValueError(f"smooth is a number of pixels and may not be negative, got {smooth}")
