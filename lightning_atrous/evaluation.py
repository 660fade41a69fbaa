"""What is computed where images are scored: classes, losses and counts, batch by batch, and what comes of them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from lightning_atrous.boundaries import BoundaryScore, BoundaryScores
from lightning_atrous.inference import WHOLE, Inference, winners
from lightning_atrous.losses import Loss, mean_over_ranks
from lightning_atrous.metrics import SegmentationScore, class_iou, scores
from lightning_atrous.model import SegmentationModel

__all__ = ["Evaluated", "Evaluation"]


class Evaluated(TypedDict):
    """What came of one batch.

    Keys:
        prediction: The class of every pixel, int64 ``(B, H, W)``.
        confusion: Of each image, int64 ``(B, K, K)``, the target's class in rows.
    """

    prediction: Tensor
    confusion: Tensor


class Evaluation:
    """Scores a model over a data set: `begin`, `step` with every batch, `end`.

    The loss of the data set is the mean over its batches by their weights (`Loss.weight`): for a mean over pixels it is
    that over all valid pixels, on however many ranks; for other losses every image counts the same. It is taken of the
    logits from which the classes are taken, with windows as they are blended. With several scales or flips it is the
    mean of the loss of each, which for cross-entropy is not less than that of their average.

    Args:
        model: What is scored.
        loss: With which it is trained.
        score: Counts the pixels.
        output_stride: Of the backbone meanwhile; that of the training where not given.
        inference: How images are taken through the network.
        boundaries: Counts them near the boundaries too.
    """

    def __init__(
        self,
        model: SegmentationModel,
        loss: Loss,
        score: SegmentationScore,
        *,
        output_stride: int | None = None,
        inference: Inference = WHOLE,
        boundaries: BoundaryScore | None = None,
    ) -> None:
        self.model, self.loss, self.score, self.boundaries = model, loss, score, boundaries
        self.output_stride, self.inference = output_stride, inference
        self.trained_as: dict[str, Any] | None = None
        """The backbone's options in training, while it is at another output stride."""
        self.boundary_scores: BoundaryScores | None = None
        """Of the last whole data set, where they were asked for."""
        self._totals = torch.zeros(2)  # losses times weights, and weights

    def check(self) -> None:
        """Refuse now what would be refused later.

        Raises:
            ValueError: An output stride or windows that the model cannot take.
        """
        try:
            self.begin()
        finally:
            self._go_back()

    def begin(self) -> None:
        """Go to the output stride, and forget whatever was counted.

        Raises:
            ValueError: As of `check`.
        """
        self.score.reset()
        if self.boundaries is not None:
            self.boundaries.reset()
        device = self.score.device
        wide = torch.float32 if device.type == "mps" else torch.float64  # which Apple's devices do not have
        self._totals = torch.zeros(2, dtype=wide, device=device)
        if self.output_stride is not None:
            self.trained_as = self.trained_as or self.model.backbone.options()
            self.model.output_stride = self.output_stride
        self.inference.check(self.model.output_stride)

    @torch.no_grad()
    def step(self, image: Tensor, target: Tensor) -> Evaluated:
        """Score one batch.

        Args:
            image: ``(B, C, H, W)``, uint8 or floating in 0..1.
            target: ``(B, H, W)`` int64 in ``0..K-1``, or the ignore index.

        Raises:
            ValueError: As of `confusion_matrix` and of the loss.
        """
        views = self.inference.views(self.model.logits, image, grid=self.model.output_stride)
        prediction = winners(views, target.shape[-2:])
        k = len(self.score.classes)
        # the metric's value for one image is that image's own matrix
        confusion = [self.score(prediction[i : i + 1], target[i : i + 1]).reshape(k, k) for i in range(len(prediction))]
        if self.boundaries is not None:
            self.boundaries.update(prediction, target)
        loss = torch.stack([self.loss(view, target) for view in views]).mean()
        weight = self.loss.weight(target)
        counted = loss.new_tensor(len(image)) if weight is None else weight
        counted = counted.to(self._totals)
        self._totals += torch.stack([loss.to(self._totals) * counted, counted])
        return {"prediction": prediction, "confusion": torch.stack(confusion)}

    def end(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Go back to the output stride of the training.

        Returns:
            The confusion matrix ``(K, K)`` of the whole data set, on the CPU, and its ``loss``, ``miou``, ``iou/CLASS``
            and so on, scalars; the same on every rank. With boundaries also ``boundary_miou``, ``boundary_iou/CLASS``
            and ``trimap_miou/PIXELS``.
        """
        classes = self.score.classes
        confusion = self.score.compute().cpu().reshape(len(classes), len(classes))
        self.score.reset()
        loss, counted = mean_over_ranks(self._totals)
        self._go_back()
        results = {"loss": (loss / torch.where(counted > 0, counted, 1)).float(), **scores(confusion)}
        results |= {f"iou/{name}": iou for name, iou in zip(classes.names, class_iou(confusion), strict=True)}
        if self.boundaries is not None:
            self.boundary_scores = self.boundaries.compute()
            self.boundaries.reset()
            results |= _named(self.boundary_scores, classes.names)
        return confusion, results

    def _go_back(self) -> None:
        if self.trained_as is not None:
            self.model.output_stride = self.trained_as["output_stride"]
            self.trained_as = None


def _named(found: BoundaryScores, names: Sequence[str]) -> dict[str, Tensor]:
    """Boundary scores by the names under which they are logged."""
    ious = zip(names, found.boundary_iou.reshape(-1), strict=True)
    curve = zip(found.bands, found.trimap_miou.reshape(-1), strict=True)
    return {
        "boundary_miou": found.boundary_miou,
        **{f"boundary_iou/{name}": iou for name, iou in ious},
        **{f"trimap_miou/{band}": miou for band, miou in curve},
    }
