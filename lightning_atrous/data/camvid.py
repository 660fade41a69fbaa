"""CamVid: driving scenes from Cambridge, in the split and the 11 classes of SegNet."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from lightning_atrous.data.base import FileDataset, FilePair, SegmentationData, Split
from lightning_atrous.transforms import Augment
from lightning_atrous.types import ClassInfo

__all__ = ["CAMVID", "CamVid"]

CAMVID = ClassInfo(
    names=(
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
    ),
    palette=(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ),
)
LABELS = {**{label: label for label in range(len(CAMVID))}, 11: CAMVID.ignore_index}
"""What stands in the files → what it means: 11 is void."""
AUGMENT = Augment(crop=(360, 360))


class CamVid(SegmentationData):
    """CamVid (Brostow et al. 2008) as SegNet (Badrinarayanan et al. 2015) published it: 480×360, 11 classes.

    The root holds ``train.txt`` and ``val.txt``, each line the path of an image and of its mask; what those
    paths start with, ``/SegNet/CamVid/``, is stripped. Label 11 is void and becomes the ignore index. Where
    there is no ``test.txt``, testing uses the validation split: say so when you quote the number.

    Args:
        root: The folder with the lists.
        batch_size: Of training, over all devices.
        eval_batch_size: Of validation and test, per device; the images are of one size.
        num_workers: Processes that read and augment; 0 does it in the main one.
        augment: Of training samples; none gives them as they are.

    Raises:
        ValueError: No root; later: no list, a line that is not two paths, a file that is missing.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        augment: Augment | None = AUGMENT,
    ) -> None:
        super().__init__(
            CAMVID,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            augment=augment,
        )
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"there is no folder {self.root}; pass as root what holds CamVid's train.txt")

    def build(self, split: Split) -> FileDataset:
        """The files that the split's list names, in its order."""
        path = self.root / f"{split}.txt"
        if split == "test" and not path.exists():
            path = self.root / "val.txt"
        if not path.is_file():
            raise ValueError(f"there is no list {path}; pass as root the folder of SegNet's CamVid")
        pairs = []
        for line in path.read_text(encoding="utf-8-sig").splitlines():
            paths = line.split()
            if len(paths) not in (0, 2):
                raise ValueError(f"{path} has the line '{line}', expected the paths of an image and a mask")
            if paths:
                # the last two parts, such as train/0001TP_006690.png, whatever the list was written for
                image, mask = (self.root.joinpath(*PurePosixPath(p).parts[-2:]) for p in paths)
                pairs.append(FilePair(image.stem, image, mask))
        if not pairs:
            raise ValueError(f"the {split} split is empty: {path} names no image; add some")
        return FileDataset(pairs, CAMVID, label_map=LABELS)
