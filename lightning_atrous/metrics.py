"""Scores of a whole data set, from one confusion matrix.

Benchmark mIoU (Everingham et al., "The PASCAL Visual Object Classes Challenge: A Retrospective", 2015; Cordts
et al., "The Cityscapes Dataset", 2016) sums intersections and unions over all images and divides once. A mean
of per-image or per-batch scores is another number. The maths is a handful of pure functions on the matrix,
which `SegmentationScore` accumulates.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_atrous.argmax import class_indices
from lightning_atrous.types import ClassInfo

__all__ = [
    "SegmentationScore",
    "class_accuracy",
    "class_iou",
    "confusion_matrix",
    "mean_accuracy",
    "mean_iou",
    "pixel_accuracy",
    "scores",
]


@torch.compiler.disable  # how large a table is depends on the values
@torch.no_grad()
def confusion_matrix(prediction: Tensor, target: Tensor, classes: ClassInfo, *, per_image: bool = False) -> Tensor:
    """Count pixels: ``(K, K)`` int64, the target's class in rows and the predicted one in columns.

    Args:
        prediction: Logits ``(B, K, h, w)`` at any resolution, raised to the target's size before the argmax,
            or a class map ``(B, H, W)`` of integers. Its values do not matter where the target is ignored.
        target: ``(B, H, W)`` integers in ``0..K-1``, or the ignore index: those pixels are not counted.
        classes: Gives ``K`` and the ignore index.
        per_image: A matrix for each image, ``(B, K, K)``; else the one of all together.

    Raises:
        ValueError: Shapes or dtypes that do not fit, or a value that is neither a class nor the ignore index.

    Example:
        >>> import torch
        >>> from lightning_atrous.metrics import confusion_matrix
        >>> from lightning_atrous.types import ClassInfo
        >>> target = torch.tensor([[[0, 0, 1], [1, 1, 255]]])
        >>> confusion_matrix(torch.tensor([[[0, 1, 1], [1, 1, 0]]]), target, ClassInfo(("road", "car")))
        tensor([[1, 1],
                [0, 3]])
    """
    k = len(classes)
    _check(prediction, target, k)
    counts = torch.zeros(len(target), k, k, dtype=torch.int64, device=target.device)
    if target.numel():
        if prediction.ndim == 4:
            prediction = class_indices(prediction, target.shape[1:])
        for matrix, predicted, mask in zip(counts, prediction, target, strict=True):
            matrix.copy_(_count(_of_common_type(predicted), _of_common_type(mask), classes))
    return counts if per_image else counts.sum(0)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union per class: ``(K, K)`` → ``(K,)`` in 0..1; nan for a class on neither side."""
    hit = confusion.diagonal()
    return hit / (confusion.sum(0) + confusion.sum(1) - hit)


def class_accuracy(confusion: Tensor) -> Tensor:
    """Recall per class: ``(K, K)`` → ``(K,)`` in 0..1; nan where the target has no pixel of the class."""
    return confusion.diagonal() / confusion.sum(1)


def mean_iou(confusion: Tensor) -> Tensor:
    """Benchmark mIoU: ``(K, K)`` → the mean of `class_iou` over the classes that occur; nan if none does.

    Example:
        >>> import torch
        >>> from lightning_atrous.metrics import class_iou, mean_iou
        >>> confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
        >>> class_iou(confusion)
        tensor([0.7500, 0.8000,    nan])
        >>> mean_iou(confusion)
        tensor(0.7750)
    """
    return class_iou(confusion).nanmean()


def pixel_accuracy(confusion: Tensor) -> Tensor:
    """The share of counted pixels that are right: ``(K, K)`` → scalar in 0..1; nan if none was counted."""
    return confusion.diagonal().sum() / confusion.sum()


def mean_accuracy(confusion: Tensor) -> Tensor:
    """The mean of `class_accuracy` over the classes in the target: ``(K, K)`` → scalar in 0..1, or nan."""
    return class_accuracy(confusion).nanmean()


def scores(confusion: Tensor) -> dict[str, Tensor]:
    """The numbers that people quote: ``(K, K)`` → ``miou``, ``pixel_accuracy``, ``mean_accuracy``, scalars in 0..1."""
    return {
        "miou": mean_iou(confusion),
        "pixel_accuracy": pixel_accuracy(confusion),
        "mean_accuracy": mean_accuracy(confusion),
    }


class SegmentationScore(Metric):
    """The confusion matrix of everything seen since the last reset, over all ranks.

    All scores are functions of it: `scores`, `class_iou`, `class_accuracy`.

    Args:
        classes: Gives ``K`` and the ignore index.

    Example:
        >>> import torch
        >>> from lightning_atrous.metrics import SegmentationScore, class_iou, scores
        >>> from lightning_atrous.types import ClassInfo
        >>> score = SegmentationScore(ClassInfo(("road", "car")))
        >>> logits = torch.tensor([[[[2.0, -1.0]], [[0.0, 1.0]]]])  # (1, 2, 1, 2): road, car
        >>> score.update(logits, torch.tensor([[[0, 0, 1, 1], [0, 0, 0, 255]]]))
        >>> confusion = score.compute()
        >>> {name: round(value.item(), 3) for name, value in scores(confusion).items()}
        {'miou': 0.733, 'pixel_accuracy': 0.857, 'mean_accuracy': 0.9}
        >>> class_iou(confusion)
        tensor([0.8000, 0.6667])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False  # a batch's own score is that of its own matrix

    confusion: Tensor

    def __init__(self, classes: ClassInfo) -> None:
        super().__init__()
        self.classes = classes
        k = len(classes)
        self.add_state("confusion", torch.zeros(k, k, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch; arguments and errors as in `confusion_matrix`."""
        self.confusion += confusion_matrix(prediction, target, self.classes)

    def compute(self) -> Tensor:
        """``(K, K)`` int64, the target's class in rows, summed over all ranks.

        For a single class torchmetrics squeezes the result to a scalar, as it does with every tensor of one element.
        """
        return self.confusion


def _check(prediction: Tensor, target: Tensor, k: int) -> None:
    if target.ndim != 3 or not _is_integer(target):
        raise ValueError(f"expected an integer target (B, H, W), got {target.dtype} {tuple(target.shape)}")
    if prediction.ndim == 4 and prediction.is_floating_point():
        if prediction.shape[1] != k:
            raise ValueError(f"expected logits (B, {k}, h, w), one channel a class, got {tuple(prediction.shape)}")
        if prediction.shape[0] != target.shape[0]:
            raise ValueError(f"{prediction.shape[0]} images of logits for {target.shape[0]} targets")
    elif prediction.ndim == 3 and _is_integer(prediction):
        if prediction.shape != target.shape:
            raise ValueError(f"a class map has the target's shape {tuple(target.shape)}, got {tuple(prediction.shape)}")
    else:
        raise ValueError(
            f"expected floating logits (B, {k}, h, w) or an integer class map (B, H, W), "
            f"got {prediction.dtype} {tuple(prediction.shape)}"
        )


def _is_integer(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _of_common_type(x: Tensor) -> Tensor:
    """What torch can do little with as int64."""
    return x if x.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64) else x.long()


def _count(predicted: Tensor, mask: Tensor, classes: ClassInfo) -> Tensor:
    """The matrix ``(K, K)`` of one image, from two maps ``(H, W)``.

    All pairs of values are counted, whatever they mean, and the table is looked at afterwards: the pixels themselves
    are passed over three times.
    """
    k, ignore_index = len(classes), classes.ignore_index
    (low, high), (left, right) = _range(mask, k), _range(predicted, k)
    height, width = high - low + 1, right - left + 1
    if height * width > max(_PAIRS, k * (k + 1)):
        ignored = mask.long() == ignore_index  # not before it is long: in uint8, 255 equals -1
        mask, predicted = mask.long().masked_fill(ignored, 0), predicted.long().masked_fill(ignored, 0)
        _check_values(mask, "target", classes)
        _check_values(predicted, "prediction", classes)
        return _count(predicted, mask.masked_fill_(ignored, k), dataclasses.replace(classes, ignore_index=k))
    dtype = torch.int16 if height * width <= 2**15 else torch.int32
    pairs = (_from(low, mask).to(dtype) * width).add_(_from(left, predicted).to(dtype))
    table = torch.bincount(pairs.flatten(), minlength=height * width).view(height, width)
    if low <= ignore_index <= high:
        table[ignore_index - low] = 0
    matrix = table[-low : k - low, -left : k - left]
    if matrix.sum() != table.sum():
        _check_values(low + table.any(1).nonzero(), "target", classes)
        _check_values(left + table.any(0).nonzero(), "prediction", classes)
    return matrix


_PAIRS = 2**16
"""Different pairs of values that are counted in one table: all those of two maps in uint8."""


def _range(x: Tensor, k: int) -> tuple[int, int]:
    """The least and the greatest value, of the classes too."""
    low, high = torch.stack(x.aminmax()).tolist()
    return min(low, 0), max(high, k - 1)


def _from(low: int, x: Tensor) -> Tensor:
    """Values counted from the least."""
    return x.long() - low if low else x


def _check_values(values: Tensor, name: str, classes: ClassInfo) -> None:
    """Raise where any of the values of a map that are not ignored is no class."""
    wrong = values[(values < 0) | (values >= len(classes))].unique().tolist()
    if wrong:
        shown = ", ".join(map(str, wrong[:8])) + (", …" if len(wrong) > 8 else "")
        raise ValueError(
            f"the {name} holds {shown}, but {len(classes)} classes are 0..{len(classes) - 1} "
            f"and {classes.ignore_index} is ignored"
        )
