"""DeepLabV3: atrous spatial pyramid pooling on the last map.

Chen, Papandreou, Schroff, Adam: Rethinking Atrous Convolution for Semantic Image Segmentation (arXiv:1706.05587),
section 3.3 and figure 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_atrous.context import ASPP, Merge, rates_at_reduction
from lightning_atrous.heads.base import HEADS, Head, at_least, odd, share
from lightning_atrous.layers import ConvNormAct, enlarge
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["DeepLabV3"]


@HEADS.register("deeplabv3")
class DeepLabV3(Head):
    """ASPP, then a 1×1 to the classes. Reads the last level; any backbone will do.

    Dropout of 0.1 behind the pyramid is that of the authors' released code. Multi-grid, the paper's other half, is an
    option of the backbone.

    Args:
        info: The backbone's levels.
        num_classes: ``K``.
        rates: Atrous rates of the 3×3 branches, at the output stride ``rates_at``; any number of them.
        rates_at: The output stride for which ``rates`` are given; elsewhere they are scaled to the same reach.
        channels: Width of every branch and of the projection.
        merge: ``concat`` the branches and project them, or ``sum`` them as v2 does.
        norm: Batch norm in the pyramid.
        image_pool: The branch that sees the mean of the whole map.
        separable: Atrous separable convolutions in the branches.
        inner_norm: Norm and ReLU also between the two parts of a separable convolution.
        project_kernel: Of the projection; 3 in mmsegmentation.
        refine_convs: How many 3×3 convolutions follow the projection; 1 in torchvision and SMP.
        dropout: After the projection.
        upsampling: By how much the head raises its own logits, with corners aligned, as SMP's models do. At 1 they stay
            at their stride, for whoever asks to raise.

    Raises:
        ValueError: A rate that is no whole number of at least 1 at the backbone's stride, or a pyramid of nothing.
    """

    paper: ClassVar[str] = "Chen, Papandreou, Schroff, Adam 2017, arXiv:1706.05587"

    def __init__(
        self,
        info: Sequence[FeatureInfo],
        num_classes: int,
        *,
        rates: tuple[int, ...] = (6, 12, 18),
        rates_at: int = 16,
        channels: int = 256,
        merge: Merge = "concat",
        norm: bool = True,
        image_pool: bool = True,
        separable: bool = False,
        inner_norm: bool = True,
        project_kernel: int = 1,
        refine_convs: int = 0,
        dropout: float = 0.1,
        upsampling: int = 1,
    ) -> None:
        super().__init__(info, num_classes)
        at_least(1, "channels", channels)
        at_least(0, "refine_convs", refine_convs)
        at_least(1, "upsampling", upsampling)
        odd("project_kernel", project_kernel)
        share("dropout", dropout)
        self.rates, self.rates_at = tuple(rates), rates_at
        self.upsampling = upsampling
        last = info[-1]
        self.aspp = ASPP(
            last.channels,
            channels,
            rates=rates_at_reduction(self.rates, rates_at, last.reduction),
            merge=merge,
            norm=norm,
            image_pool=image_pool,
            separable=separable,
            inner_norm=inner_norm,
            project_kernel=project_kernel,
            dropout=dropout,
        )
        self.refine = nn.Sequential(*(ConvNormAct(channels, channels, 3) for _ in range(refine_convs)))
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        """Scale the pyramid's rates to the new stride."""
        self.aspp.rates = rates_at_reduction(self.rates, self.rates_at, info[-1].reduction)

    def forward(self, features: Features) -> Tensor:
        """Scores at the backbone's output stride."""
        logits = self.classifier(self.refine(self.aspp(features[-1])))
        return logits if self.upsampling == 1 else enlarge(logits, self.upsampling)
