"""Heads, one a file; `HEADS` has them all by name."""

from lightning_atrous.heads.base import HEADS, Head, HeadFactory, create_head
from lightning_atrous.heads.deeplabv3 import DeepLabV3
from lightning_atrous.heads.deeplabv3plus import DeepLabV3Plus
from lightning_atrous.heads.fcn import FCN

__all__ = ["FCN", "HEADS", "DeepLabV3", "DeepLabV3Plus", "Head", "HeadFactory", "create_head"]
