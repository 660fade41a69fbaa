"""The data modules: what they yield, what they refuse, and that a seed gives the same batches everywhere."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import seed_everything
from made import save_mask
from torch.utils.data import Dataset
from torchvision import tv_tensors

from lightning_atrous.data import CamVid, Folder, SegmentationData, Shapes
from lightning_atrous.data.base import FileDataset, FilePair, Split, collate
from lightning_atrous.data.shapes import SHAPES
from lightning_atrous.images import RGB
from lightning_atrous.transforms import Augment, Sample
from lightning_atrous.types import ClassInfo


class Tiny(SegmentationData):
    """A source of six samples in memory, for what the base does."""

    def __init__(self, length: int = 6, **options: Any) -> None:
        super().__init__(ClassInfo(("only",)), **{"num_workers": 0, **options})
        self.length = length

    def build(self, split: Split) -> Dataset[Sample]:
        return _TinyDataset(self.length)


class _TinyDataset(Dataset[Sample]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        image = torch.randint(0, 256, (3, 24, 24), generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        return Sample(
            image=tv_tensors.Image(image),
            mask=tv_tensors.Mask(torch.zeros(24, 24, dtype=torch.uint8)),
            name=str(index),
        )


def digest(batches: list[dict[str, Any]]) -> str:
    h = hashlib.sha256()
    for batch in batches:
        h.update(batch["image"].numpy().tobytes() + batch["mask"].numpy().tobytes() + "".join(batch["name"]).encode())
    return h.hexdigest()


# --- what every data module yields


def test_batches_keep_the_contract(folder: Path, camvid: Path) -> None:
    sources = {
        "shapes": Shapes(32, train_length=4, val_length=3, test_length=2, batch_size=2, num_workers=0),
        "folder": Folder(folder, batch_size=2, num_workers=0, augment=Augment((17, 23))),
        "camvid": CamVid(camvid, batch_size=2, num_workers=0, augment=Augment((17, 23))),
    }
    for name, data in sources.items():
        size = (32, 32) if name == "shapes" else (17, 23)
        for batch in data.train_dataloader():
            assert batch["image"].shape == (2, 3, *size)
            assert batch["mask"].shape == (2, *size)
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            for batch in loader:
                assert set(batch) == {"image", "mask", "name"}
                # an eighth of the bytes of int64, on the way to the device
                assert (batch["image"].dtype, batch["mask"].dtype) == (torch.uint8, torch.uint8)
                assert type(batch["image"]) is type(batch["mask"]) is torch.Tensor
                assert len(batch["name"]) == batch["image"].shape[0] == batch["mask"].shape[0]
                assert batch["image"].shape[2:] == batch["mask"].shape[1:]
                labels = set(batch["mask"].unique().tolist())
                assert labels <= set(range(len(data.classes))) | {data.classes.ignore_index}


def test_evaluation_takes_whole_images_in_order(folder: Path) -> None:
    data = Folder(folder, num_workers=0)
    batches = list(data.val_dataloader())
    assert [tuple(b["image"].shape) for b in batches] == [(1, 3, 20, 31), (1, 3, 20, 35)]
    assert [b["name"] for b in batches] == [["0"], ["1"]]
    assert digest(list(data.test_dataloader())) == digest(batches)  # no test split of its own


@pytest.mark.parametrize(
    ("length", "batch_size", "sizes"),
    [(1, 1, [1]), (1, 4, [1]), (3, 4, [3]), (4, 4, [4]), (5, 4, [4]), (6, 2, [2, 2, 2]), (3, 1, [1, 1, 1])],
)
def test_a_short_batch_is_dropped_unless_it_is_the_only_one(length: int, batch_size: int, sizes: list[int]) -> None:
    loader = Tiny(length, batch_size=batch_size).train_dataloader()
    assert [len(batch["name"]) for batch in loader] == sizes


def as_rank(data: SegmentationData, rank: int, ranks: int) -> SegmentationData:
    """The data as one process of several sees it."""
    torch.manual_seed(rank)  # ranks that were not seeded alike
    strategy = SimpleNamespace(broadcast=lambda seed: 5)
    data.trainer = SimpleNamespace(world_size=ranks, global_rank=rank, strategy=strategy)  # type: ignore[assignment]
    return data


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_the_images(ranks: int) -> None:
    """Training: the same batches, each in equal shares. Evaluation: each image exactly once, whoever takes it."""
    batches: list[set[str]] = [set(), set()]
    seen = []
    for rank in range(ranks):
        data = as_rank(Tiny(17, batch_size=6), rank, ranks)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(3)  # type: ignore[attr-defined]
        for step, batch in enumerate(loader):
            assert len(batch["name"]) == 6 // ranks
            batches[step] |= set(batch["name"])
        seen += [name for batch in data.val_dataloader() for name in batch["name"]]
    order = torch.randperm(17, generator=torch.Generator().manual_seed(5 + 3)).tolist()
    assert batches == [{str(i) for i in order[:6]}, {str(i) for i in order[6:12]}]
    assert sorted(seen, key=int) == [str(i) for i in range(17)]


def test_a_short_batch_is_filled_up_so_that_all_processes_take_part() -> None:
    names = [next(iter(as_rank(Tiny(3, batch_size=8), rank, 4).train_dataloader()))["name"] for rank in range(4)]
    assert [len(each) for each in names] == [1, 1, 1, 1]
    assert {name for each in names for name in each} == set("012")


def test_what_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size 8 is shared by 3 processes .* give a multiple of it"):
        as_rank(Tiny(9, batch_size=8), 0, 3).train_dataloader()
    with pytest.raises(ValueError, match=r"val split has 2 images for 3 processes.*--trainer\.devices 2"):
        as_rank(Tiny(2), 2, 3).val_dataloader()


# --- files are read in part


def test_an_augmented_file_is_the_augmentation_of_the_whole(folder: Path) -> None:
    dataset = Folder(folder).build("train")
    for seed in range(20):
        augment = Augment((17, 23), max_share=0.5 if seed % 2 else None)
        index, generators = seed % 5, [torch.Generator().manual_seed(seed) for _ in range(2)]
        part = dataset.augmented(index, augment, generators[0])
        whole = augment(dataset[index], generators[1])
        assert torch.equal(part["image"], whole["image"])
        assert torch.equal(part["mask"], whole["mask"])
        assert part["name"] == whole["name"]


def test_what_a_subclass_makes_of_its_samples_is_not_passed_by(folder: Path) -> None:
    class Black(FileDataset):
        def __getitem__(self, index: int) -> Sample:
            sample = super().__getitem__(index)
            return Sample(image=tv_tensors.Image(sample["image"] * 0), mask=sample["mask"], name=sample["name"])

    data = Folder(folder, num_workers=0, batch_size=5, augment=Augment((8, 8), (2, 2), distort=0))
    data._datasets["train"] = Black(data.build("train").pairs, data.classes)
    assert not next(iter(data.train_dataloader()))["image"].any()


@pytest.mark.parametrize("size", [(7, 30), (20, 31), (300, 400)])
def test_a_mask_of_another_size_is_refused_wherever_the_crop_lies(folder: Path, size: tuple[int, int]) -> None:
    save_mask(folder / "masks/train/a/0.x.png", np.zeros(size, np.uint8))
    dataset = Folder(folder).build("train")
    for seed in range(10):
        with pytest.raises(ValueError, match=rf"{size[1]}×{size[0]} pixels but its image is 30×20; make them"):
            dataset.augmented(0, Augment((8, 8)), torch.Generator().manual_seed(seed))


# --- reproducibility


def epochs(num_workers: int, which: range, seed: int = 7) -> list[str]:
    seed_everything(seed, workers=True, verbose=False)
    loader = Tiny(num_workers=num_workers, batch_size=2, augment=Augment((16, 16))).train_dataloader()
    digests = []
    for epoch in which:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        digests.append(digest(list(loader)))
    return digests


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    straight = epochs(0, range(3))
    assert len(set(straight)) == 3
    assert epochs(2, range(3)) == straight  # whatever the number of workers
    assert epochs(0, range(2, 3)) == straight[2:]  # as after a resume
    assert epochs(0, range(1), seed=8) != straight[:1]


def test_samples_of_a_batch_are_augmented_each_on_its_own() -> None:
    data = Tiny(batch_size=6, augment=Augment((16, 16), distort=0))
    data._datasets["train"] = [_TinyDataset(1)[0]] * 6  # type: ignore[assignment]
    batch = next(iter(data.train_dataloader()))
    assert len({image.numpy().tobytes() for image in batch["image"]}) == 6


def test_a_plain_sampler_is_served_too() -> None:
    """`Trainer(overfit_batches=…)` puts a sequential sampler in place of ours."""
    data = Tiny(augment=Augment((16, 16)))
    dataset = data.train_dataloader().dataset
    assert torch.equal(dataset[1]["image"], dataset[1]["image"])
    assert len(dataset) == 6  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: Folder(p / "no"), "there is no folder"),
        (lambda p: CamVid(p / "no"), "there is no folder"),
        (lambda p: CamVid(p).setup("fit"), "there is no list"),
        (lambda p: Shapes(16), "size must be at least 32, got 16"),
        (lambda p: Shapes(shapes=(4, 2)), "got [4, 2]"),
        (lambda p: Shapes(shapes=(-1, 2)), "got [-1, 2]"),
        (lambda p: Shapes(val_length=0), "val_length must be at least 1, got 0"),
        (lambda p: Shapes(seed=-1), "seed must be at least 0, got -1"),
        (lambda p: Tiny(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda p: Tiny(eval_batch_size=0), "eval_batch_size must be at least 1"),
        (lambda p: Tiny(num_workers=-1), "num_workers must be at least 0"),
        (lambda p: FileDataset([], SHAPES), "no images"),
        (lambda p: FileDataset([FilePair("a", p / "a.png", p / "b.png")], SHAPES), "there is no image"),
        (lambda p: RGB(p / "a.png"), "does not exist"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path: Path, build: Callable[[Path], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(tmp_path)


def test_images_of_different_sizes_make_no_batch(folder: Path) -> None:
    samples = [Folder(folder).dataset("val")[i] for i in range(2)]
    with pytest.raises(ValueError, match=r"\(20, 31\), \(20, 35\); set augment.crop .* eval_batch_size: 1"):
        collate(samples)


# --- from YAML


@pytest.mark.parametrize("source", ["Shapes", "Folder", "CamVid"])
def test_yaml_gives_a_data_module(source: str, folder: Path, camvid: Path) -> None:
    options = {
        "Shapes": {"size": 64, "shapes": [2, 4], "train_length": 8},
        "Folder": {
            "root": str(folder),
            "class_names": ["x", "y", "z"],
            "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]],
        },
        "CamVid": {"root": str(camvid)},
    }[source]
    options |= {
        "batch_size": 2,
        "num_workers": 0,
        "augment": {"crop": [16, 24], "scale": [0.75, 1.5], "flip": 0, "max_share": 0.9},
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=SegmentationData)
    config = parser.parse_object({"data": {"class_path": f"lightning_atrous.data.{source}", "init_args": options}})
    assert parser.parse_string(parser.dump(config)) == config
    data = parser.instantiate(config).data
    assert data.augment == Augment((16, 24), (0.75, 1.5), flip=0, max_share=0.9)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 16, 24)
    with pytest.raises(Exception, match="batch_size"):
        parser.parse_args([f"--data={source}", "--data.batch_size=many"])
