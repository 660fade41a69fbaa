"""The line itself: image → normalise → backbone → features → head → logits. Plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.heads import Head
from lightning_atrous.inference import WHOLE, Inference
from lightning_atrous.layers import Normalize, resize
from lightning_atrous.types import Preprocess

__all__ = ["SegmentationModel"]


class SegmentationModel(nn.Module):
    """An image's pixels in, a score for every class and pixel out.

    The normalisation is part of the model: uint8 images go in as they are, so that none can be normalised twice or
    never, and whoever exports the model exports it whole.

    Args:
        backbone: Image → features.
        head: Features → logits, built for this backbone's ``info``.
        aux_head: A second head, that only training asks for.
        preprocess: Mean and deviation; the backbone's own where not given.

    Raises:
        ValueError: A ``preprocess`` for another number of channels than the backbone takes.
    """

    def __init__(
        self,
        backbone: TimmBackbone,
        head: Head,
        aux_head: Head | None = None,
        *,
        preprocess: Preprocess | None = None,
    ) -> None:
        super().__init__()
        self.preprocess = preprocess or backbone.preprocess
        if self.preprocess.channels != backbone.in_channels:
            raise ValueError(
                f"preprocess has mean and std for {self.preprocess.channels} channels, but the backbone takes images "
                f"of {backbone.in_channels}; give one of each per channel"
            )
        self.normalize = Normalize(self.preprocess)
        self.backbone = backbone
        self.head = head
        self.aux_head = aux_head
        self.frozen: tuple[str, ...] = ()
        """Names of modules that stay in eval mode while the rest is trained."""

    def keep(self, frozen: tuple[str, ...]) -> None:
        """Have modules stay in eval mode, by name; go to training mode with the rest."""
        self.frozen = frozen
        self.train()

    def train(self, mode: bool = True) -> SegmentationModel:
        """Go to training mode, but for what is frozen; or to eval mode."""
        super().train(mode)
        if mode:
            for name in self.frozen:
                self.get_submodule(name).eval()
        return self

    def check_compiles(self) -> None:
        """Refuse to compile what excludes it.

        Raises:
            ValueError: A backbone whose blocks are computed again in training.
        """
        if self.backbone.gradient_checkpointing:
            raise ValueError(
                "compile and backbone.gradient_checkpointing exclude each other: what is compiled decides by itself "
                "what is computed again; leave one of them out"
            )

    def compile_parts(self) -> None:
        """Have backbone and heads compiled when they are called next. The names of the weights stay."""
        for part in (self.backbone, self.head, self.aux_head):
            if part is not None:
                part.compile()

    @property
    def output_stride(self) -> int:
        """Of the backbone; setting it takes the heads along. The weights stay the same."""
        return self.backbone.output_stride

    @output_stride.setter
    def output_stride(self, output_stride: int) -> None:
        before = self.output_stride
        self.backbone.output_stride = output_stride
        try:
            self._retarget_heads()
        except ValueError:
            self.backbone.output_stride = before
            self._retarget_heads()
            raise

    def _retarget_heads(self) -> None:
        for head in (self.head, self.aux_head):
            if head is not None:
                head.retarget(self.backbone.info)

    def forward(self, image: Tensor) -> Tensor:
        """Image ``(B, C, H, W)``, uint8 or floating in 0..1 → logits ``(B, K, H, W)``, any H and W."""
        return resize(self.logits(image), image.shape[-2:])

    def logits(self, image: Tensor) -> Tensor:
        """Image ``(B, C, H, W)`` → logits ``(B, K, h, w)`` at the head's own stride."""
        return self.head(self.backbone(self.normalize(image)))

    def forward_train(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Image ``(B, C, H, W)`` → logits ``(B, K, h, w)`` at the head's stride, and those of the auxiliary head."""
        features = self.backbone(self.normalize(image))
        return self.head(features), None if self.aux_head is None else self.aux_head(features)

    @torch.no_grad()
    def predict(self, image: Tensor, *, inference: Inference = WHOLE) -> Tensor:
        """Image ``(B, C, H, W)`` → the class of every pixel in eval mode, int64 ``(B, H, W)``."""
        modes = [(module, module.training) for module in self.modules()]
        try:
            self.eval()
            return inference.predict(self.logits, image, grid=self.output_stride)
        finally:  # one by one: a norm that was frozen stays so
            for module, training in modes:
                module.training = training
