"""Cityscapes: street scenes from 50 cities, in the official splits and the 19 classes of the benchmark."""

from __future__ import annotations

from pathlib import Path

from lightning_atrous.data.base import FileDataset, FilePair, SegmentationData, Split
from lightning_atrous.transforms import Augment
from lightning_atrous.types import ClassInfo

__all__ = ["CITYSCAPES", "Cityscapes"]

CITYSCAPES = ClassInfo(
    names=(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
    palette=(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
        (0, 0, 142),
        (0, 0, 70),
        (0, 60, 100),
        (0, 80, 100),
        (0, 0, 230),
        (119, 11, 32),
    ),
)
SCORED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The labelIds of the classes, in their order."""

LABEL_IDS = {**dict.fromkeys(range(-1, 34), CITYSCAPES.ignore_index), **{raw: i for i, raw in enumerate(SCORED)}}
"""labelId → trainId; what the benchmark does not score is ignored, -1 is a licence plate."""

TRAIN_IDS = {label: label for label in (*range(len(CITYSCAPES)), CITYSCAPES.ignore_index)}
AUGMENT = Augment(crop=(512, 1024))

KINDS = {
    "labelIds": (
        LABEL_IDS,
        {255: "it holds trainIds in spite of its name; rename it to *_gtFine_labelTrainIds.png"},
    ),
    "labelTrainIds": (
        TRAIN_IDS,
        dict.fromkeys(range(19, 34), "it holds labelIds in spite of its name; rename it to *_gtFine_labelIds.png"),
    ),
}
"""The two kinds of mask files: what their labels mean, and what labels of the other kind look like."""


class Cityscapes(SegmentationData):
    """Cityscapes (Cordts et al. 2016) as its authors publish it: 2048×1024, 2975 + 500 finely labelled images.

    The root holds the unpacked ``leftImg8bit_trainvaltest.zip`` and ``gtFine_trainvaltest.zip``::

        root/leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png
        root/gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png

    A split is read from its ``labelIds``, which are mapped by the official table, or from its
    ``labelTrainIds``, if every image has those alone. The authors withhold the labels of the test split (its
    files are void), so testing uses the validation split: say so when you quote the number.

    Args:
        root: The folder with ``leftImg8bit`` and ``gtFine``.
        batch_size: Of training, over all devices.
        eval_batch_size: Of validation and test, per device; the images are of one size.
        num_workers: Processes that read and augment; 0 does it in the main one.
        augment: Of training samples; none gives them as they are.

    Raises:
        ValueError: No root, or one without the two folders; later: no image in a split, an image without its
            label file, one kind of labels under the name of the other.
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
            CITYSCAPES,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            augment=augment,
        )
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"there is no folder {self.root}; pass as root what holds leftImg8bit/ and gtFine/")
        if not (self.root / "leftImg8bit").is_dir():
            raise ValueError(f"there is no folder {self.root / 'leftImg8bit'}; {_where(self.root)}")
        if not (self.root / "gtFine").is_dir():
            raise ValueError(
                f"there is no folder {self.root / 'gtFine'}; unpack gtFine_trainvaltest.zip there, beside leftImg8bit"
            )

    def build(self, split: Split) -> FileDataset:
        """The images of a split's cities, in the order of their names."""
        split = "val" if split == "test" else split
        folder = self.root / "leftImg8bit" / split
        images = [path for path in sorted(folder.glob("*/*_leftImg8bit.png")) if not path.name.startswith(".")]
        if not images:
            raise ValueError(
                f"the {split} split is empty: {folder} has no <city>/*_leftImg8bit.png; "
                "unpack leftImg8bit_trainvaltest.zip in the root"
            )
        names = [f"{path.parent.name}/{path.stem.removesuffix('_leftImg8bit')}" for path in images]
        labels = self.root / "gtFine" / split
        masks = {kind: [labels / f"{name}_gtFine_{kind}.png" for name in names] for kind in KINDS}
        # the first kind wins a tie, as where every image has both
        kind = max(KINDS, key=lambda kind: sum(path.is_file() for path in masks[kind]))
        (other,) = set(KINDS) - {kind}
        for mask, instead in zip(masks[kind], masks[other], strict=True):
            if instead.is_file() and not mask.is_file():
                raise ValueError(
                    f"the {split} split has {kind} for some images and {other} for others, such as {instead}; give all "
                    "of them one kind"
                )
        label_map, hints = KINDS[kind]
        pairs = [FilePair(*files) for files in zip(names, images, masks[kind], strict=True)]
        return FileDataset(pairs, CITYSCAPES, label_map=label_map, hints=hints)


def _where(root: Path) -> str:
    """What to do where the root does not hold the images: the folder one step off that does, if there is one."""
    above = root.absolute().parent
    parts = {name: [c for c in sorted(root.iterdir()) if (c / name).is_dir()] for name in ("leftImg8bit", "gtFine")}
    below = [child for child in parts["leftImg8bit"] if child in parts["gtFine"]]
    if (above / "leftImg8bit").is_dir():
        return f"{above} has it, pass that as root"
    if below:
        return f"{below[0]} has it, pass that as root"
    if parts["leftImg8bit"] and parts["gtFine"]:
        return f"move it here from {parts['leftImg8bit'][0]}, and gtFine from {parts['gtFine'][0]}"
    return "pass as root what holds leftImg8bit/ and gtFine/, as they are unpacked"
