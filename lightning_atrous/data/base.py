"""What every source of data shares: the file dataset, and the data module."""

from __future__ import annotations

import math
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, SequentialSampler, default_collate
from torchvision import tv_tensors

from lightning_atrous.data.labels import LabelTable
from lightning_atrous.images import RGB, Reader, read_mask
from lightning_atrous.transforms import Augment, Sample
from lightning_atrous.types import ClassInfo

__all__ = ["FileDataset", "FilePair", "SegmentationData", "Split", "collate"]

Split = Literal["train", "val", "test"]


class FilePair(NamedTuple):
    """One image file, its mask file, and the name that tells them from the others of their split."""

    name: str
    image: Path
    mask: Path


class FileDataset(Dataset[Sample]):
    """Pairs of files as samples: image ``(C, H, W)`` as read, mask ``(H, W)`` in uint8, or in int64 if it must.

    Args:
        pairs: At least one.
        classes: What the masks mean.
        label_map: Raw label in the files → class or ignore index; by default each stands for itself.
        hints: For labels that the map lacks, what is probably wrong with a mask that holds them (`LabelTable`).
        reader: How image files are read.

    Raises:
        ValueError: No pair, a missing file; when read: damage, sizes that differ, a label that is not in the map.
    """

    def __init__(
        self,
        pairs: Sequence[FilePair],
        classes: ClassInfo,
        *,
        label_map: Mapping[int, int] | None = None,
        hints: Mapping[int, str] | None = None,
        reader: Reader = RGB,
    ) -> None:
        if not pairs:
            raise ValueError("a dataset of no images: give at least one pair of an image and a mask")
        for pair in pairs:
            if not pair.image.is_file():
                raise ValueError(f"there is no image {pair.image}; add it or take '{pair.name}' off the list")
            if not pair.mask.is_file():
                raise ValueError(f"image {pair.image} has no mask {pair.mask}; add it or remove the image")
        self.pairs, self.classes, self.reader = tuple(pairs), classes, reader
        self.table = LabelTable(classes, label_map, hints)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Read, check, map labels to classes."""
        pair = self.pairs[index]
        mask = self._mask(pair)
        return Sample(image=self._image(pair, tuple(mask.shape)), mask=mask, name=pair.name)

    def augmented(self, index: int, augment: Augment, generator: torch.Generator) -> Sample:
        """What `augment` makes of a sample, in less time: of the image no more is read than its crop needs."""
        pair = self.pairs[index]
        mask = self._mask(pair)
        read = partial(self._image, pair, tuple(mask.shape))
        ignore = self.classes.ignore_index
        return augment.reading(mask, read, name=pair.name, generator=generator, ignore_index=ignore)

    def _mask(self, pair: FilePair) -> tv_tensors.Mask:
        mask = self.table(read_mask(pair.mask), f"mask {pair.mask}")
        return tv_tensors.Mask(torch.from_numpy(mask))

    def _image(
        self, pair: FilePair, size: tuple[int, int], rows: slice = slice(None), columns: slice = slice(None)
    ) -> tv_tensors.Image:
        """A part of an image, by default all of it, if it is as large as its mask."""
        image, (height, width) = self.reader.window(pair.image, rows, columns)
        if size != (height, width):
            raise ValueError(
                f"mask {pair.mask} is {size[1]}×{size[0]} pixels but its image is {width}×{height}; "
                "make them the same size"
            )
        return image


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples → ``{"image": uint8 or float32 (B, C, H, W), "mask": integer (B, H, W), "name": [B names]}``.

    The mask keeps the type of the samples' masks, an eighth of the bytes in uint8, until it is on the device. In a
    worker process the batch is built where the main one reads it.

    Raises:
        ValueError: Images of different sizes.
    """
    sizes = {tuple(sample["image"].shape[-2:]) for sample in samples}
    if len(sizes) > 1:
        raise ValueError(
            f"images of different sizes make no batch, got (H, W) {', '.join(map(str, sorted(sizes)))}; "
            "set augment.crop for training, eval_batch_size: 1 for evaluation"
        )
    return {
        "image": default_collate([sample["image"].as_subclass(torch.Tensor) for sample in samples]).contiguous(),
        "mask": default_collate([sample["mask"].as_subclass(torch.Tensor) for sample in samples]),
        "name": [sample["name"] for sample in samples],
    }


class _Start(NamedTuple):
    """Where the order of the images begins."""

    seed: int
    epoch: int = 0
    batches: int = 0


class _EpochOrder(DistributedSampler):
    """One order for all ranks, in whole batches, by seed and epoch; keys are ``(epoch, index)``.

    Lightning calls `set_epoch`, so a run that is resumed goes on with the order it would have had. Within the epoch it
    is resumed in, the order begins behind the batches that are done: what is left is the same for any number of
    workers and devices, and nothing is read to get there.
    """

    def __init__(self, dataset: Dataset[Sample], batch_size: int, ranks: int, rank: int, start: _Start) -> None:
        super().__init__(dataset, ranks, rank, shuffle=True, seed=start.seed)
        length = len(cast(Any, dataset))
        self.epoch, self.start, self.done = start.epoch, start, start.batches * batch_size
        # the only batch there is may be short; images are then repeated until every rank has as many
        self.total_size = length // batch_size * batch_size or math.ceil(length / ranks) * ranks
        self.num_samples = self.total_size // ranks

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(cast(Any, self.dataset)), generator=generator).tolist()
        order = (order * math.ceil(self.total_size / len(order)))[: self.total_size]
        done = self.done if self.epoch == self.start.epoch else 0
        return ((self.epoch, index) for index in order[done + self.rank :: self.num_replicas])


class _Augmented(Dataset[Sample]):
    """A dataset whose transform is a pure function of seed, epoch and index: of no worker, and of no past."""

    def __init__(self, dataset: Dataset[Sample], augment: Augment | None, *, seed: int, ignore_index: int) -> None:
        self.dataset, self.augment, self.seed, self.ignore_index = dataset, augment, seed, ignore_index

    def __len__(self) -> int:
        return len(cast(Any, self.dataset))

    def __getitem__(self, key: tuple[int, int] | int) -> Sample:
        # a plain index comes from a sampler that Lightning put in place of ours (`overfit_batches`)
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if self.augment is None:
            return self.dataset[index]
        seed = np.random.SeedSequence(self.seed, spawn_key=(epoch, index)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed))
        if type(self.dataset) is FileDataset:  # no subclass, whose `__getitem__` may do more
            return self.dataset.augmented(index, self.augment, generator)
        return self.augment(self.dataset[index], generator, ignore_index=self.ignore_index)


class _TrainLoader(DataLoader):
    """A loader whose sampler knows where an epoch is resumed.

    Lightning warns of loaders without these methods in the middle of an epoch. It does not call the second where a
    schedule has asked for the length of the run, for the order is begun by then; `SegmentationData.resume_at` comes
    before.
    """

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the number of batches done is Lightning's to count, for a loader has read some ahead."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""


def _ignore_signals(worker: int) -> None:
    """What ends a run is sent to all its processes: the first one finishes its step, for which it needs the others."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class SegmentationData(LightningDataModule, ABC):
    """Batches for training and evaluation; a source of data implements `build`.

    A batch is ``{"image": uint8 (B, C, H, W), "mask": integer (B, H, W), "name": list of B}``, the image float32 in
    0..1 where the reader has a range of values, the mask as the samples have it, most often uint8: the task widens it
    on the device. Images are not normalised: that is the model's. Training batches are shuffled and augmented by the
    seed of `lightning.seed_everything`, the epoch and the index alone, whatever the number of workers and devices; a
    last batch that is not full is left out, unless it is the only one. Evaluation batches are whole images in their own
    size, in the order of the source, each counted once on however many ranks.

    Args:
        classes: Of the masks; an attribute from here on.
        batch_size: Of training, over all devices: what a run computes does not depend on their number.
        eval_batch_size: Of validation and test, per device; more than 1 needs images of one size.
        num_workers: Processes that read and augment; 0 does it in the main one.
        augment: Of training samples; none gives them as they are.
        reader: How image files are read; an attribute from here on.

    Raises:
        ValueError: A batch size below 1, a negative number of workers.
    """

    def __init__(
        self,
        classes: ClassInfo,
        *,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        num_workers: int = 2,
        augment: Augment | None = None,
        reader: Reader = RGB,
    ) -> None:
        super().__init__()
        for name, value, low in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}")
        self.classes = classes
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers = num_workers
        self.augment = augment
        self.reader = reader
        self._datasets: dict[Split, Dataset[Sample]] = {}
        self._resumed: _Start | None = None
        self._seed = 0

    @abstractmethod
    def build(self, split: Split) -> Dataset[Sample]:
        """The samples of a split, not augmented; its `__getitem__` takes ``0..len-1``."""

    def dataset(self, split: Split) -> Dataset[Sample]:
        """The samples of a split, built once."""
        if split not in self._datasets:
            self._datasets[split] = self.build(split)
        return self._datasets[split]

    def setup(self, stage: str) -> None:
        """Build what a stage needs, so that what is missing is said before anything runs."""
        stages: dict[str, tuple[Split, ...]] = {
            "fit": ("train", "val"),
            "validate": ("val",),
            "test": ("test",),
        }
        for split in stages.get(stage, ()):
            self.dataset(split)
        self._resumed = None  # of another training than this

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented batches; without a trainer, call ``sampler.set_epoch`` before each epoch."""
        seed = torch.initial_seed() % 2**32
        if self.trainer is not None:
            seed = self.trainer.strategy.broadcast(seed)  # ranks that were not seeded share the order too
        start = self._resumed or _Start(seed)
        self._seed = start.seed
        ranks, rank = self._ranks()
        share = self.share_of(ranks)
        dataset = _Augmented(
            self.dataset("train"), self.augment, seed=start.seed, ignore_index=self.classes.ignore_index
        )
        return self._loader(dataset, _EpochOrder(dataset, self.batch_size, ranks, rank, start), share, _TrainLoader)

    def resume_at(self, *, seed: int, epoch: int, batches: int) -> None:
        """Begin the order of this training within an epoch; call it after `setup` and before `train_dataloader`.

        Args:
            seed: Of order and augmentation, from `order`.
            epoch: Counted from 0.
            batches: Of ``batch_size`` images that are done in it.
        """
        self._resumed = _Start(seed, epoch, batches)

    def order(self) -> dict[str, int]:
        """What the order of the training images depends on: ``seed``, and their number, ``length``."""
        return {"seed": self._seed, "length": len(cast(Any, self.dataset("train")))}

    def val_dataloader(self) -> DataLoader:
        """Whole images of the validation split."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader:
        """Whole images of the test split."""
        return self._eval_loader("test")

    def share_of(self, ranks: int) -> int:
        """How many images of a training batch each of several processes takes.

        Raises:
            ValueError: A batch that they cannot share evenly.
        """
        share, rest = divmod(self.batch_size, ranks)
        if rest:
            raise ValueError(
                f"data.batch_size {self.batch_size} is shared by {ranks} processes and does not divide by {ranks}; "
                f"give a multiple of it"
            )
        return share

    def _eval_loader(self, split: Split) -> DataLoader:
        dataset = self.dataset(split)
        ranks, rank = self._ranks()
        if (length := len(cast(Any, dataset))) < ranks:
            raise ValueError(
                f"the {split} split has {length} image{'s' * (length != 1)} for {ranks} processes, expected one each; "
                f"give --trainer.devices {length}"
            )
        sampler: Sampler[int] = SequentialSampler(cast(Any, dataset))
        if ranks > 1:  # Lightning's own choice would repeat images until all ranks have as many
            sampler = UnrepeatedDistributedSampler(dataset, ranks, rank, shuffle=False)
        return self._loader(dataset, sampler, self.eval_batch_size)

    def _ranks(self) -> tuple[int, int]:
        """How many processes share the data, and which one this is."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _loader(
        self,
        dataset: Dataset[Sample],
        sampler: Sampler[Any],
        batch_size: int,
        loader: type[DataLoader] = DataLoader,
    ) -> DataLoader:
        return loader(
            dataset,
            batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_ignore_signals,
            # of its own: else every epoch and every validation would draw a seed from what dropout draws from
            generator=torch.Generator().manual_seed((torch.initial_seed() + self._ranks()[1]) % 2**32),
        )
