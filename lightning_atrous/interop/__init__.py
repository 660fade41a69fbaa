"""Checkpoints from elsewhere: torchvision, segmentation_models_pytorch, mmsegmentation."""

from lightning_atrous.interop.base import Imported
from lightning_atrous.interop.mmseg import from_mmseg
from lightning_atrous.interop.smp import from_smp, read_smp
from lightning_atrous.interop.torchvision import from_torchvision

__all__ = ["Imported", "from_mmseg", "from_smp", "from_torchvision", "read_smp"]
