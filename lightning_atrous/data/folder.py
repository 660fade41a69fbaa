"""Your own images and masks in a folder."""

from __future__ import annotations

from pathlib import Path

from lightning_atrous.data.base import FileDataset, FilePair, SegmentationData, Split
from lightning_atrous.images import RGB, Reader
from lightning_atrous.transforms import Augment
from lightning_atrous.types import ClassInfo

__all__ = ["Folder"]

AUGMENT = Augment(crop=(512, 512))


class Folder(SegmentationData):
    """Images, and PNG masks of class indices under the same names.

    Splits are sub-folders::

        root/images/train/a.jpg   root/masks/train/a.png
        root/images/val/…         root/masks/val/…

    or, where ``root/train.txt`` stands, lists: ``train.txt``, ``val.txt`` and maybe ``test.txt``, each
    line a name under ``images`` with or without its suffix (or, with it, a path in the root). Both may have
    folders inside. Without a test split, testing uses the validation split.

    Args:
        root: The folder.
        class_names: In the order of their indices; by default the lines of ``root/classes.txt``.
        palette: One RGB triple in 0..255 per class, for pictures; evenly spaced hues by default.
        ignore_index: The label that no loss and no metric counts.
        images: Folder of the images in the root.
        masks: Folder of the masks in the root.
        batch_size: Of training, over all devices.
        eval_batch_size: Of validation and test, per device; more than 1 needs images of one size.
        num_workers: Processes that read and augment; 0 does it in the main one.
        augment: Of training samples; none gives them as they are.
        reader: How image files are read; 8-bit RGB pictures by default, and nothing else.

    Raises:
        ValueError: No root, no class names; later: no image in a split, an image without its mask.
    """

    def __init__(
        self,
        root: str | Path,
        class_names: list[str] | None = None,
        *,
        palette: list[tuple[int, int, int]] | None = None,
        ignore_index: int = 255,
        images: str = "images",
        masks: str = "masks",
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        augment: Augment | None = AUGMENT,
        reader: Reader = RGB,
    ) -> None:
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"there is no folder {self.root}; pass as root what holds {images}/ and {masks}/")
        names = _lines(self.root / "classes.txt") if class_names is None else class_names
        if names is None:
            raise ValueError(f"no class_names, nor a file {self.root / 'classes.txt'}; give one name a line there")
        super().__init__(
            ClassInfo(tuple(names), tuple(palette or ()), ignore_index),
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            augment=augment,
            reader=reader,
        )
        self.images, self.masks = self.root / images, self.root / masks

    def build(self, split: Split) -> FileDataset:
        """The files of a split, in the order of their names or of their list."""
        by_list = (self.root / "train.txt").is_file()
        places = {s: self.root / f"{s}.txt" if by_list else self.images / s for s in ("train", "val", "test")}
        place = places["val"] if split == "test" and not places["test"].exists() else places[split]
        pairs = self._listed(place) if by_list else self._found(place, self.masks / place.name)
        if not pairs:
            raise ValueError(f"the {split} split is empty: {place} names no image; add some")
        return FileDataset(pairs, self.classes, reader=self.reader)

    def _found(self, images: Path, masks: Path) -> list[FilePair]:
        """Every image below a folder, each with the mask at the same place below the other."""
        if not images.is_dir():
            raise ValueError(
                f"there is no folder {images}; make it, or list images in {self.root}/train.txt and val.txt"
            )
        pairs: dict[str, FilePair] = {}
        for file in sorted(images.rglob("*")):
            if file.suffix.lower() not in self.reader.suffixes or file.name.startswith("."):
                continue
            stem = file.relative_to(images).with_suffix("")
            name = stem.as_posix()
            if name in pairs:
                raise ValueError(f"{pairs[name].image} and {file} would share one mask; rename or remove one")
            pairs[name] = FilePair(name, file, masks / f"{name}.png")
        return list(pairs.values())

    def _listed(self, path: Path) -> list[FilePair]:
        """The images that the lines of a file name."""
        lines = _lines(path)
        if lines is None:
            raise ValueError(f"there is no list {path}; write one image name a line into it")
        by_name: dict[str, FilePair] = {}
        for pair in self._found(self.images, self.masks):
            by_name[pair.name] = by_name[pair.image.relative_to(self.images).as_posix()] = pair
            by_name[pair.image.relative_to(self.root).as_posix()] = pair
        unknown = [line for line in lines if line not in by_name]
        if unknown:
            raise ValueError(
                f"{path} names {len(unknown)} image{'s' * (len(unknown) > 1)} that {self.images} lacks, such as "
                f"'{unknown[0]}'; names are relative to that folder, with or without the suffix"
            )
        return [by_name[line] for line in lines]


def _lines(path: Path) -> list[str] | None:
    """The lines of a text file that are not blank, or none if there is no such file."""
    if not path.is_file():
        return None
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
