"""FCN-32s, FCN-16s and FCN-8s: scores of several levels, added where transposed convolutions bring them together.

Long, Shelhamer, Darrell: Fully Convolutional Networks for Semantic Segmentation (CVPR 2015), section 4.2 and figure 3.
The last enlargement, fixed to bilinear in the paper, is left to whoever asks for the logits. Maps are as large as the
image allows by padding in every layer, not by 100 pixels in the first; so nothing is cropped but a last odd row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_atrous.heads.base import HEADS, Head
from lightning_atrous.layers import ConvNormAct
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["SkipFCN", "bilinear_transposed"]


@HEADS.register("fcn_skips")
class SkipFCN(Head):
    """FCN-32s, 16s, 8s: 1×1 scores of the last levels, fused by transposed convolutions that begin as bilinear.

    Reads the last ``skips + 1`` levels. It cannot follow the backbone to another output stride, for the strides of its
    transposed convolutions are those between the levels.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        skips: How many levels before the last are scored too: 0 is FCN-32s, 1 is FCN-16s, 2 is FCN-8s.
        classifier_channels: Width of a 7×7 and a 1×1 before the scores of the last level, VGG's classifier made
            convolutional: 4096 in the paper. None where not given, as behind networks that end in pooling.
        dropout: Behind each of these two.

    Raises:
        ValueError: More skips than the backbone has levels for.
    """

    paper: ClassVar[str] = "Long, Shelhamer, Darrell 2015, arXiv:1411.4038"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        skips: int = 2,
        classifier_channels: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(info, num_classes)
        if not 0 <= skips < len(info):
            raise ValueError(
                f"skips must be 0 to {len(info) - 1} on a backbone with {len(info)} levels, got {skips}; "
                "2 is FCN-8s, 1 is FCN-16s, 0 is FCN-32s"
            )
        self.skips = skips
        self._steps = _steps(info, skips)
        self.classifier = _classifier(info[-1].channels, classifier_channels, dropout)
        self.scores = nn.ModuleList(
            nn.Conv2d(classifier_channels or info[-1].channels if i == 0 else info[-1 - i].channels, num_classes, 1)
            for i in range(skips + 1)
        )
        for score in list(self.scores)[1:]:  # what is added begins as nothing, as in the paper
            nn.init.zeros_(score.weight)  # type: ignore[arg-type]
            nn.init.zeros_(score.bias)  # type: ignore[arg-type]
        self.raises = nn.ModuleList(
            bilinear_transposed(num_classes, step) if step > 1 else nn.Identity() for step in self._steps
        )

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Refuse strides with other steps between the levels.

        Raises:
            ValueError: They are others.
        """
        steps = _steps(info, self.skips)
        if steps != self._steps:
            raise ValueError(
                f"fcn_skips was built for steps of {', '.join(map(str, self._steps))} between its levels, and its "
                f"transposed convolutions cannot take {', '.join(map(str, steps))}; build it at that output stride, or "
                "take skips: 0, fcn or deeplabv3, which follow"
            )

    def forward(self, features: Features) -> Tensor:
        """Scores at the stride of the finest level that is read."""
        logits = self.scores[0](self.classifier(features[-1]))
        for i, enlarge in enumerate(self.raises, start=1):
            skip = self.scores[i](features[-1 - i])
            logits = enlarge(logits)[..., : skip.shape[-2], : skip.shape[-1]]
            # networks of patches round sizes down: what no position stands for is as its neighbour
            missing = (0, skip.shape[-1] - logits.shape[-1], 0, skip.shape[-2] - logits.shape[-2])
            logits = F.pad(logits, missing, mode="replicate") + skip if any(missing) else logits + skip
        return logits


def bilinear_transposed(channels: int, stride: int) -> nn.ConvTranspose2d:
    """A transposed convolution that enlarges ``(B, K, h, w)`` to ``(B, K, s·h, s·w)``, to begin with bilinearly.

    Inside the border, where no zero from beyond it is mixed in, its first weights give what bilinear interpolation
    (with pixel areas aligned) gives.

    Args:
        channels: ``K``; at first no channel reads another.
        stride: ``s``.
    """
    kernel = 2 * stride - stride % 2
    layer = nn.ConvTranspose2d(channels, channels, kernel, stride, padding=(kernel - stride) // 2, bias=False)
    centre = (kernel - 1) / 2
    tent = 1 - (torch.arange(kernel) - centre).abs() / stride
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[range(channels), range(channels)] = tent.outer(tent)
    return layer


def _steps(info: Sequence[FeatureInfo], skips: int) -> tuple[int, ...]:
    """From each level that is read to the next finer one, the last first."""
    return tuple(info[-i].reduction // info[-i - 1].reduction for i in range(1, skips + 1))


def _classifier(in_channels: int, channels: int | None, dropout: float) -> nn.Module:
    if channels is None:
        return nn.Identity()
    return nn.Sequential(
        ConvNormAct(in_channels, channels, 7, norm=False),
        nn.Dropout(dropout),
        ConvNormAct(channels, channels, norm=False),
        nn.Dropout(dropout),
    )
