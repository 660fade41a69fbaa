"""Heads, one a file, SMP's by their kind; `HEADS` has them all by name."""

from lightning_atrous.heads.base import HEADS, Head, HeadFactory, create_head
from lightning_atrous.heads.deeplabv3 import DeepLabV3
from lightning_atrous.heads.deeplabv3plus import DeepLabV3Plus
from lightning_atrous.heads.fcn import FCN
from lightning_atrous.heads.smp_pyramids import FPN, PAN, Segformer, UPerNet
from lightning_atrous.heads.smp_skips import Linknet, MAnet, Unet, UnetPlusPlus

__all__ = [
    "FCN",
    "FPN",
    "HEADS",
    "PAN",
    "DeepLabV3",
    "DeepLabV3Plus",
    "Head",
    "HeadFactory",
    "Linknet",
    "MAnet",
    "Segformer",
    "UPerNet",
    "Unet",
    "UnetPlusPlus",
    "create_head",
]
