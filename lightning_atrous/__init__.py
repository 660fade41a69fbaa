"""Semantic segmentation with exact atrous backbones.

The line: uint8 image → `Normalize` → `TimmBackbone` → features → `Head` → logits → loss, metric or prediction.
"""

from __future__ import annotations

from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.dilation import Dilation, DilationError, set_output_stride
from lightning_atrous.heads import HEADS, Head, create_head
from lightning_atrous.images import Reader
from lightning_atrous.model import SegmentationModel
from lightning_atrous.task import SegmentationTask
from lightning_atrous.types import ClassInfo, FeatureInfo, Preprocess

__version__ = "0.1.0"

__all__ = [
    "HEADS",
    "ClassInfo",
    "Dilation",
    "DilationError",
    "FeatureInfo",
    "Head",
    "Preprocess",
    "Reader",
    "SegmentationModel",
    "SegmentationTask",
    "TimmBackbone",
    "create_head",
    "load",
    "set_output_stride",
]

load = SegmentationTask.load_from_checkpoint
"""A checkpoint's task, ready to predict: ``load(path).predict(image)``."""
