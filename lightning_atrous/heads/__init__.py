"""Heads, one a file, SMP's by their kind; `HEADS` has them all by name."""

from lightning_atrous.heads.base import HEADS, Head, HeadFactory, create_head
from lightning_atrous.heads.deeplabv1 import DeepLabV1
from lightning_atrous.heads.deeplabv2 import DeepLabV2
from lightning_atrous.heads.deeplabv3 import DeepLabV3
from lightning_atrous.heads.deeplabv3plus import DeepLabV3Plus
from lightning_atrous.heads.denseaspp import DenseASPPHead
from lightning_atrous.heads.duc import DUC
from lightning_atrous.heads.fcn import FCN
from lightning_atrous.heads.fcn_skips import SkipFCN
from lightning_atrous.heads.lraspp import LRASPP
from lightning_atrous.heads.psp import PSP
from lightning_atrous.heads.rfb import RFB
from lightning_atrous.heads.segnet import SegNet
from lightning_atrous.heads.smp_pyramids import FPN, PAN, Segformer, UPerNet
from lightning_atrous.heads.smp_skips import Linknet, MAnet, Unet, UnetPlusPlus

__all__ = [
    "DUC",
    "FCN",
    "FPN",
    "HEADS",
    "LRASPP",
    "PAN",
    "PSP",
    "RFB",
    "DeepLabV1",
    "DeepLabV2",
    "DeepLabV3",
    "DeepLabV3Plus",
    "DenseASPPHead",
    "Head",
    "HeadFactory",
    "Linknet",
    "MAnet",
    "SegNet",
    "Segformer",
    "SkipFCN",
    "UPerNet",
    "Unet",
    "UnetPlusPlus",
    "create_head",
]
