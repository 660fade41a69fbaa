"""How good a segmentation is at the boundaries between classes, over a whole data set.

Two measures, both in chessboard distance, that of steps to any of eight neighbours:

- Boundary IoU (Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation", CVPR 2021, eq. 1):
  the IoU of the pixels of each class that are near to where their own mask ends. Unlike the IoU, it does not grow with
  the size of what is segmented. The paper's masks are objects; here there is one a class and image, and intersections
  and unions are summed over the images.
- The trimap curve (Kohli et al., "Robust Higher Order Potentials for Enforcing Label Consistency", IJCV 2009; DeepLab
  v2 and v3+ in their figures): the mIoU of the pixels within a few of a boundary of the ground truth, by how many.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_atrous.metrics import class_iou, confusion_matrix
from lightning_atrous.types import ClassInfo

__all__ = ["BoundaryFactory", "BoundaryScore", "BoundaryScores", "near_boundary"]


@torch.no_grad()
def near_boundary(labels: Tensor, distance: int, *, num_labels: int, ignored: Tensor, edge: bool) -> Tensor:
    """The pixels that have another label within a distance: ``(H, W)`` integers → bool ``(H, W)``.

    What is ignored is no pixel's other label, and is near to none. Costs the logarithm of the distance.

    Args:
        labels: In ``0..num_labels - 1`` where they are not ignored.
        distance: The greatest, in pixels; of direct and diagonal neighbours it is 1.
        num_labels: How many there are.
        ignored: ``(H, W)`` bool.
        edge: Whether what is outside of the image is another label than all in it.

    Example:
        >>> import torch
        >>> from lightning_atrous.boundaries import near_boundary
        >>> labels = torch.tensor([[0, 0, 0, 1, 9, 2]])
        >>> near_boundary(labels, 1, num_labels=3, ignored=labels == 9, edge=False).long()
        tensor([[0, 0, 1, 1, 0, 0]])
    """
    # the greatest label in reach, and the greatest if counted from the other end; 0 is none
    labels = labels.to(torch.uint8 if num_labels < 2**8 else torch.int32)
    both = torch.stack([labels + 1, num_labels - labels]).masked_fill_(ignored, 0)
    low, high = _greatest(_greatest(both, distance, dim=-1), distance, dim=-2) != both
    near = low | high
    if edge:
        near[:distance] = near[-distance:] = near[:, :distance] = near[:, -distance:] = True
    return near & ~ignored


def _greatest(x: Tensor, radius: int, *, dim: int) -> Tensor:
    """The greatest value, of none below 0, within a radius along one of the last two dimensions."""
    size = x.shape[dim]
    radius = min(radius, size - 1)
    x = F.pad(x, (radius, radius) if dim == -1 else (0, 0, radius, radius))
    reach, whole = 1, 2 * radius + 1  # `reach` values from each on are in it by now
    while 2 * reach <= whole:
        x = torch.maximum(x.narrow(dim, 0, x.shape[dim] - reach), x.narrow(dim, reach, x.shape[dim] - reach))
        reach *= 2
    return torch.maximum(x.narrow(dim, 0, size), x.narrow(dim, whole - reach, size))


class BoundaryScores(NamedTuple):
    """What `BoundaryScore` found, all in 0..1; nan for a class that has no pixel there on either side.

    Args:
        boundary_iou: ``(K,)``.
        boundary_miou: Its mean over the classes that occur, a scalar.
        bands: The greatest distances, in pixels, of the ``N`` points of the curve.
        trimap_iou: ``(N, K)``: the IoU of every class within each band.
        trimap_miou: ``(N,)``: the curve, the mean over the classes that occur in the band.
    """

    boundary_iou: Tensor
    boundary_miou: Tensor
    bands: tuple[int, ...]
    trimap_iou: Tensor
    trimap_miou: Tensor


class BoundaryScore(Metric):
    """Boundary IoU and the trimap curve of everything seen since the last reset, over all ranks.

    Ignored pixels count nowhere. In target and prediction alike they belong to whatever is beside them, so that no
    boundary runs along them, and a prediction that is right wherever it counts scores 1. The image's edge ends a mask
    in Boundary IoU, as in the paper's code; it is no boundary of a trimap.

    Args:
        classes: Gives ``K`` and the ignore index.
        fraction: How near to its boundary a pixel counts in Boundary IoU, in units of the image's diagonal: as in the
            paper 0.02, which is 46 pixels of an image of Cityscapes. Rounded, and at least one pixel.
        bands: How near to a boundary of the target, in pixels, those of each trimap are.
        ignored_boundaries: Whether trimaps lie also around what the target ignores, as in PASCAL VOC, where a line of
            ignored pixels runs between the objects.

    Raises:
        ValueError: A fraction or a band that is not positive, or bands that do not grow.

    Example:
        >>> import torch
        >>> from lightning_atrous.boundaries import BoundaryScore
        >>> from lightning_atrous.types import ClassInfo
        >>> score = BoundaryScore(ClassInfo(("road", "car")), bands=(1, 2))
        >>> score.update(torch.tensor([[[0, 0, 0, 0, 1, 1]]]), torch.tensor([[[0, 0, 0, 1, 1, 1]]]))
        >>> score.compute().trimap_iou
        tensor([[0.5000, 0.0000],
                [0.6667, 0.5000]])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False  # a batch's own score is that of its own pixels

    intersection: Tensor
    union: Tensor
    trimap: Tensor

    def __init__(
        self,
        classes: ClassInfo,
        *,
        fraction: float = 0.02,
        bands: Sequence[int] = (1, 2, 4, 8, 16),
        ignored_boundaries: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction is of the image's diagonal, above 0 and at most 1, got {fraction}")
        if not bands or list(bands) != sorted({int(band) for band in bands}) or bands[0] < 1:
            raise ValueError(f"bands are whole numbers of pixels from 1 on, each greater than the last, got {bands}")
        self.classes = classes
        self.fraction = fraction
        self.bands = tuple(int(band) for band in bands)
        self.ignored_boundaries = ignored_boundaries
        k = len(classes)
        self.add_state("intersection", torch.zeros(k, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("union", torch.zeros(k, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("trimap", torch.zeros(len(self.bands), k, k, dtype=torch.int64), dist_reduce_fx="sum")

    @torch.compiler.disable  # how many pixels are near a boundary depends on the values
    @torch.no_grad()
    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count one batch.

        Args:
            prediction: Class map ``(B, H, W)`` of integers. Its values do not matter where the target is ignored.
            target: ``(B, H, W)`` integers in ``0..K-1``, or the ignore index.

        Raises:
            ValueError: Shapes or dtypes that do not fit, or a value that is neither a class nor the ignore index.
        """
        if prediction.ndim != 3:
            raise ValueError(
                f"expected a class map (B, H, W), got {prediction.dtype} {tuple(prediction.shape)}; "
                f"make one of logits by argmax.class_map(logits, target.shape[-2:])"
            )
        confusion_matrix(prediction, target, self.classes)  # for what it refuses
        if target.numel():
            dtype = torch.uint8 if len(self.classes) < 2**8 else torch.int32
            for predicted, mask in zip(prediction, target, strict=True):
                ignored = mask.long() == self.classes.ignore_index  # not before it is long: in uint8, 255 equals -1
                predicted, mask = (x.to(dtype).masked_fill(ignored, 0) for x in (predicted, mask))
                self._count_boundary(predicted, mask, ignored)
                self._count_trimaps(predicted, mask, ignored)

    def _count_boundary(self, predicted: Tensor, mask: Tensor, ignored: Tensor) -> None:
        k = len(self.classes)
        distance = max(1, round(self.fraction * math.hypot(*mask.shape)))
        ours, theirs = (near_boundary(x, distance, num_labels=k, ignored=ignored, edge=True) for x in (predicted, mask))
        hit = ours & theirs & (predicted == mask)
        found, true, both = (
            # the others in a bin more, which is dropped: cheaper than selecting these
            torch.bincount(x.masked_fill(~counted, k).flatten(), minlength=k + 1)[:k]
            for x, counted in ((predicted, ours), (mask, theirs), (mask, hit))
        )
        self.intersection += both
        self.union += found + true - both

    def _count_trimaps(self, predicted: Tensor, mask: Tensor, ignored: Tensor) -> None:
        k = len(self.classes)
        classes = dataclasses.replace(self.classes, ignore_index=k)
        labels, nowhere = mask, ignored
        if self.ignored_boundaries:  # one label more
            labels, nowhere = mask.masked_fill(ignored, k), torch.zeros_like(ignored)
        for band, confusion in zip(self.bands, self.trimap, strict=True):
            far = ~near_boundary(labels, band, num_labels=k + 1, ignored=nowhere, edge=False) | ignored
            confusion += confusion_matrix(predicted[None], mask.masked_fill(far, k)[None], classes)

    def compute(self) -> BoundaryScores:
        """The scores of all ranks.

        torchmetrics squeezes what has one element to a scalar, as it does with every tensor.
        """
        boundary_iou = self.intersection / self.union
        trimap_iou = torch.stack([class_iou(confusion) for confusion in self.trimap])
        return BoundaryScores(boundary_iou, boundary_iou.nanmean(), self.bands, trimap_iou, trimap_iou.nanmean(dim=1))


BoundaryFactory = Callable[[ClassInfo], BoundaryScore]
"""The class, or the class with its options already given (`functools.partial`)."""
