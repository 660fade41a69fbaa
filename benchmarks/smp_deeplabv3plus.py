"""SMP's own DeepLabV3+ in our training loop, as a yardstick: the command `fit` with another model inside.

python benchmarks/smp_deeplabv3plus.py fit --config configs/camvid.yaml ... (as `lightning-atrous fit`)

The backbone is timm's at timm's own output stride, through SMP's encoder, with the weights that ours has got; decoder,
scoring and enlargement are SMP's. Images whose sides 16 does not divide are continued with zeros, which SMP leaves to
its users.
"""

from __future__ import annotations

import sys

import segmentation_models_pytorch as smp
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_atrous.model import SegmentationModel
from lightning_atrous.training import TrainingCLI


class Yardstick(SegmentationModel):
    """SMP's model, where the task looks for ours."""

    def __init__(self, ours: SegmentationModel, classes: int) -> None:
        super().__init__(ours.backbone, ours.head, preprocess=ours.preprocess)
        backbone = ours.backbone
        theirs = smp.DeepLabV3Plus(
            f"tu-{backbone.name}",
            encoder_weights=None,
            encoder_output_stride=backbone.output_stride,
            classes=classes,
            **backbone.timm_options,
        )
        theirs.encoder.model.load_state_dict(backbone.net.state_dict())
        backbone.net = theirs.encoder
        self.head = nn.Sequential(theirs.decoder, theirs.segmentation_head)

    def logits(self, image: Tensor) -> Tensor:
        """SMP's, at the size of the image."""
        height, width = image.shape[-2:]
        x = F.pad(self.normalize(image), (0, -width % 16, 0, -height % 16))
        return self.head(self.backbone.net(x))[..., :height, :width]

    def forward_train(self, image: Tensor) -> tuple[Tensor, None]:
        """The same, without an auxiliary head."""
        return self.logits(image), None


class YardstickCLI(TrainingCLI):
    """`TrainingCLI`, its model exchanged before it is trained."""

    def instantiate_classes(self) -> None:
        """Put SMP's model in."""
        super().instantiate_classes()
        self.model.model = Yardstick(self.model.model, len(self.model.classes))


if __name__ == "__main__":
    YardstickCLI(sys.argv[1:])
