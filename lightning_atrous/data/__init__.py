"""Sources of data, one a file."""

from lightning_atrous.data.base import SegmentationData
from lightning_atrous.data.camvid import CamVid
from lightning_atrous.data.cityscapes import Cityscapes
from lightning_atrous.data.folder import Folder
from lightning_atrous.data.shapes import Shapes

__all__ = ["CamVid", "Cityscapes", "Folder", "SegmentationData", "Shapes"]
