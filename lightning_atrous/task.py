"""The Lightning side: what a step computes, what is scored, what a checkpoint says of itself."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence
from typing import Any, TypedDict, overload

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_atrous.accumulation import Accumulation
from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.boundaries import BoundaryFactory
from lightning_atrous.checkpoint import (
    SPEC_KEY,
    check_classes,
    check_fits,
    check_shapes,
    load_weights,
    read_checkpoint,
)
from lightning_atrous.evaluation import Evaluated, Evaluation
from lightning_atrous.heads import DeepLabV3Plus, HeadFactory
from lightning_atrous.images import RGB, Reader, as_image
from lightning_atrous.inference import WHOLE, Inference
from lightning_atrous.losses import CrossEntropy, LossFactory, mean_over_ranks
from lightning_atrous.metrics import SegmentationScore
from lightning_atrous.model import SegmentationModel
from lightning_atrous.optim import (
    POLY,
    SGD_RECIPE,
    Freezing,
    Grouping,
    OptimizerFactory,
    ParameterGroup,
    Poly,
    build_optimizer,
    check_optimizer,
    check_resumed,
    options_of,
    realign,
    take_options,
)
from lightning_atrous.spec import describe
from lightning_atrous.types import ClassInfo, Preprocess

__all__ = ["Batch", "SegmentationTask"]


class Batch(TypedDict):
    """What the data yields: ``image`` ``(B, C, H, W)`` as read, ``mask`` integer ``(B, H, W)``, ``name`` of each."""

    image: Tensor
    mask: Tensor
    name: list[str]


class SegmentationTask(L.LightningModule):
    """Semantic segmentation: a backbone, a head, a loss, a score.

    Args:
        backbone: The timm network that turns images into features.
        head: The class that turns features into logits, with its options.
        classes: What the mask values mean. On the command line it comes from the data.
        reader: How the image files were read. On the command line it comes from the data.
        aux_head: A second head for a second loss in training, such as FCN with ``level: -2``.
        aux_weight: Of the second loss.
        preprocess: Mean and deviation per channel in units of 0..1; the backbone's own where not given.
        loss: The class of the loss, with its options.
        optimizer: The class of the optimiser, with its options; SGD with learning rate 0.01, momentum 0.9 and weight
            decay 5e-4 where not given.
        schedule: The learning rate's course over the optimiser's steps.
        backbone_lr_factor: The backbone's learning rate in units of the optimiser's.
        layer_decay: By what the learning rate shrinks with every layer of the backbone down from the head; 0.75, say.
        decay_norm_and_bias: Whether weight decay also pulls at normalisation weights and biases.
        parameter_groups: Other rates by name, such as ``[{match: head, lr_factor: 10}]``: ``match`` as in ``freeze``,
            of several the first; ``lr_factor`` multiplies the rate that is there without it, ``weight_decay`` replaces.
        freeze: What is not trained: shell patterns over the names of the model's parameters, or modules, such as
            ``[backbone.net.layer1, "*.bias"]``. Modules that are frozen whole stay in eval mode.
        freeze_stages: How many of the backbone's maps, the finest first, keep all that they are computed with; in a
            ResNet 1 freezes the stem, 2 the first stage too.
        freeze_norm: Whether the backbone's batch norms keep their statistics and their weights.
        compile: Whether `fit` compiles backbone and heads (``torch.compile``): slow first steps, faster ones after.
        channels_last: Keep images and weights in the memory format that is faster for convolutions nearly everywhere.
        eval_output_stride: Of the backbone while validating and testing; that of the training where not given. It is no
            part of what a checkpoint describes.
        inference: How images are taken through the network while validating and testing: whole by default, or in
            windows, at several scales, mirrored too. It is no part of what a checkpoint describes.
        boundaries: The class of scores near the boundaries, `BoundaryScore`, with its options, where they are wanted
            beside the others in validations and tests; no part of the checkpoint's description either.

    Raises:
        ValueError: Parts that do not fit together, or that a checkpoint could not describe.
    """

    def __init__(
        self,
        backbone: TimmBackbone,
        head: HeadFactory = DeepLabV3Plus,
        *,
        classes: ClassInfo,
        reader: Reader = RGB,
        aux_head: HeadFactory | None = None,
        aux_weight: float = 0.4,
        preprocess: Preprocess | None = None,
        loss: LossFactory = CrossEntropy,
        optimizer: OptimizerFactory | None = None,
        schedule: Poly = POLY,
        backbone_lr_factor: float = 1.0,
        layer_decay: float | None = None,
        decay_norm_and_bias: bool = False,
        parameter_groups: Sequence[ParameterGroup] = (),
        freeze: Sequence[str] = (),
        freeze_stages: int = 0,
        freeze_norm: bool = False,
        compile: bool = False,
        channels_last: bool = True,
        eval_output_stride: int | None = None,
        inference: Inference = WHOLE,
        boundaries: BoundaryFactory | None = None,
    ) -> None:
        super().__init__()
        optimizer = optimizer or SGD_RECIPE
        check_optimizer(optimizer)
        if reader.out_channels != backbone.in_channels:
            raise ValueError(
                f"the backbone takes images of {backbone.in_channels} channels, but the data's reader ({reader}) gives "
                f"{reader.out_channels}; set model.backbone.in_channels: {reader.out_channels}, or another data.reader"
            )
        self.classes = classes
        self.reader = reader
        self.model = SegmentationModel(
            backbone,
            head(backbone.info, len(classes)),
            aux_head and aux_head(backbone.info, len(classes)),
            preprocess=preprocess,
        )
        self.aux_weight = aux_weight
        self.loss = loss(classes)
        self.score = SegmentationScore(classes)
        self.boundaries = boundaries and boundaries(classes)
        self.confusion: Tensor | None = None
        """The confusion matrix ``(K, K)`` of the last whole evaluation, over all ranks."""
        self.optimizer_factory = optimizer
        self.schedule = schedule
        self.freezing = Freezing(freeze=tuple(freeze), freeze_stages=freeze_stages, freeze_norm=freeze_norm)
        self.model.keep(self.freezing(self.model, backbone))
        self.grouping = Grouping(
            backbone_lr_factor=backbone_lr_factor,
            layer_decay=layer_decay,
            decay_norm_and_bias=decay_norm_and_bias,
            parameter_groups=tuple(parameter_groups),
        )
        self.grouping(self.model, backbone)  # what is refused is refused now
        self.compiles = compile
        if compile:
            self.model.check_compiles()
        self.channels_last = channels_last
        self._accumulation: Accumulation | None = None
        self._steps_trained = 0
        self._options: list[dict[str, Any]] = []  # of the optimiser's groups, before the schedule
        self._resumed: tuple[str, list[dict[str, Any]]] | None = None  # a checkpoint's optimiser, and its groups
        self.evaluation = Evaluation(
            self.model,
            self.loss,
            self.score,
            output_stride=eval_output_stride,
            inference=inference,
            boundaries=self.boundaries,
        )
        self.evaluation.check()  # what is refused is refused now, before a step is done
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        self._factories = {
            "head": describe(head),
            "aux_head": aux_head and describe(aux_head),
            "loss": describe(loss),
            "optimizer": describe(optimizer),
        }

    @property
    def spec(self) -> dict[str, Any]:
        """The arguments that build this task again, without weights: plain values."""
        return {
            "backbone": self.evaluation.trained_as or self.model.backbone.options(),
            **self._factories,
            "classes": dataclasses.asdict(self.classes),
            "reader": dataclasses.asdict(self.reader),
            "aux_weight": self.aux_weight,
            "preprocess": dataclasses.asdict(self.model.preprocess),
            "schedule": dataclasses.asdict(self.schedule),
            **dataclasses.asdict(self.grouping),
            **dataclasses.asdict(self.freezing),
            "compile": self.compiles,
            "channels_last": self.channels_last,
        }

    @classmethod
    def from_spec(cls, spec: dict[str, Any], *, trust: Collection[str] = ()) -> SegmentationTask:
        """Build what `spec` describes, with fresh weights.

        Args:
            spec: As from the property of that name.
            trust: Class paths from outside the package and its plug-ins that may be imported.

        Raises:
            ValueError: A class that may not or cannot be imported.
        """
        spec, factories = dict(spec), check_classes(spec, trust=trust)
        return cls(
            TimmBackbone(**spec.pop("backbone")),
            classes=ClassInfo(**spec.pop("classes")),
            reader=Reader(**spec.pop("reader")),
            preprocess=Preprocess(**spec.pop("preprocess")),
            schedule=Poly(**spec.pop("schedule")),
            parameter_groups=[ParameterGroup(**group) for group in spec.pop("parameter_groups", ())],
            **{**spec, **factories},
        )

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | os.PathLike[str], *, trust: Collection[str] = ()
    ) -> SegmentationTask:
        """The task of a checkpoint, with its weights, on the CPU and in eval mode. Needs no argument and no network.

        Args:
            checkpoint_path: A file that a run has written.
            trust: Class paths from outside the package and its plug-ins that may be imported.

        Raises:
            ValueError: A file that is missing, damaged or no checkpoint of this package.
        """
        checkpoint = read_checkpoint(checkpoint_path)
        task = cls.from_spec(checkpoint[SPEC_KEY], trust=trust)
        load_weights(task, checkpoint, checkpoint_path)
        return task.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Image ``(B, C, H, W)``, uint8 or floating in 0..1 → logits ``(B, K, H, W)``."""
        return self.model(image)

    @overload
    def predict(self, image: Tensor, *, inference: Inference = WHOLE) -> Tensor: ...

    @overload
    def predict(self, image: Image.Image | np.ndarray, *, inference: Inference = WHOLE) -> np.ndarray: ...

    def predict(self, image: Image.Image | np.ndarray | Tensor, *, inference: Inference = WHOLE) -> np.ndarray | Tensor:
        """The class of every pixel, computed in eval mode on the task's device.

        Args:
            image: A PIL picture (as it is: its EXIF orientation is not applied), an array ``(H, W, C)`` or ``(H, W)``,
                or a tensor ``(C, H, W)`` or ``(B, C, H, W)``; uint8, or floating in 0..1.
            inference: Whole by default, or in windows, at several scales, mirrored too.

        Returns:
            For a picture or an array, an array ``(H, W)``: uint8 for at most 256 classes, else int32. For a tensor,
            int64 ``(H, W)`` or ``(B, H, W)`` on the task's device.

        Raises:
            ValueError: An image that is not of the kind the task was trained on.
        """
        x = as_image(image, self.reader).to(self.device)
        batched = x.ndim == 4
        labels = self.model.predict(self.in_memory_format(x if batched else x[None]), inference=inference)
        if isinstance(image, Tensor):
            return labels if batched else labels[0]
        return labels[0].cpu().numpy().astype(np.uint8 if len(self.classes) <= 256 else np.int32)

    def on_fit_start(self) -> None:
        """Compile, where that is asked for."""
        if self.compiles:
            self.model.compile_parts()

    def on_train_start(self) -> None:
        """Begin a resumed run with this run's options and on its curve, if they have changed."""
        for config in self.trainer.lr_scheduler_configs:
            assert isinstance(config.scheduler, LambdaLR)
            take_options(config.scheduler, self._options)
            realign(config.scheduler)

    def on_train_epoch_start(self) -> None:
        """Begin to accumulate gradients, where this epoch does."""
        self._accumulation = Accumulation() if self.trainer.accumulate_grad_batches > 1 else None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        logits, aux = self.model.forward_train(self._image(batch))
        mask = batch["mask"].long()
        loss = self.loss(logits, mask)
        if aux is not None:
            loss = loss + self.aux_weight * self.loss(aux, mask)
        # not by `sync_dist`, which stops all ranks at a barrier in every step
        self.log("train/loss", mean_over_ranks(loss.detach()), prog_bar=True, batch_size=len(batch["image"]))
        if self._accumulation is None:
            return loss
        return self._accumulation.weigh(loss, mask, self.loss.weight(mask))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make accumulated gradients those of one batch; they are unscaled by now, and not yet clipped."""
        if self._accumulation is not None:
            self._accumulation.settle(self.parameters(), self.trainer.accumulate_grad_batches)

    def on_validation_start(self) -> None:
        """Go to the output stride of evaluation."""
        self.evaluation.begin()

    def on_test_start(self) -> None:
        """Go to the output stride of evaluation."""
        self.evaluation.begin()

    def validation_step(self, batch: Batch, batch_idx: int) -> Evaluated:
        """Score one batch; what comes of it is there for callbacks."""
        return self.evaluation.step(self._image(batch), batch["mask"].long())

    def test_step(self, batch: Batch, batch_idx: int) -> Evaluated:
        """Score one batch; what comes of it is there for callbacks."""
        return self.evaluation.step(self._image(batch), batch["mask"].long())

    def _image(self, batch: Batch) -> Tensor:
        return self.in_memory_format(batch["image"])

    def in_memory_format(self, image: Tensor) -> Tensor:
        """An image ``(B, C, H, W)`` as the model wants it."""
        return image.contiguous(memory_format=torch.channels_last) if self.channels_last else image

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the whole data set, and go back to the output stride of the training."""
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        """Log the scores of the whole data set, and go back to the output stride of the training."""
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        self.confusion, results = self.evaluation.end()
        for name, value in results.items():  # the same on every rank
            self.log(f"{stage}/{name}", value.to(self.device), prog_bar=name == "miou", sync_dist=True)
        if self.trainer.state.fn != "fit":
            # the name under which Lightning takes another step than its own, which is 0 outside a training
            self.log("step", float(self._steps_trained), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser over the parameter groups, and the schedule by step."""
        groups = self.grouping(self.model, self.model.backbone)
        optimizer = build_optimizer(self.optimizer_factory, groups)
        if self._resumed is not None:
            check_resumed(optimizer, *self._resumed)
        self._options = options_of(optimizer)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("the schedule needs to know where training ends; give trainer.max_epochs or max_steps")
        scheduler = self.schedule.scheduler(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the description from which `load_from_checkpoint` builds the task."""
        checkpoint[SPEC_KEY] = self.spec

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model or other classes, before its tensors are found not to fit.

        Raises:
            ValueError: What differs.
        """
        if SPEC_KEY not in checkpoint:
            raise ValueError("this checkpoint was not written by lightning-atrous; it does not say what it is made of")
        self.check_fits(checkpoint[SPEC_KEY])
        check_shapes(checkpoint["state_dict"], self)
        self._steps_trained = checkpoint["global_step"]
        if states := checkpoint.get("optimizer_states"):
            self._resumed = checkpoint[SPEC_KEY]["optimizer"]["class_path"], states[0]["param_groups"]

    def check_fits(self, theirs: dict[str, Any]) -> None:
        """Refuse to go on with what a checkpoint describes, where it is another model, or was trained on other data.

        Raises:
            ValueError: What differs.
        """
        check_fits(theirs, self.spec)
