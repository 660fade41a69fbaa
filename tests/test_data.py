"""The data modules: what they yield, what they refuse, and that a seed gives the same batches everywhere."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import seed_everything
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from lightning_atrous.data import CamVid, Folder, SegmentationData, Shapes
from lightning_atrous.data.base import FileDataset, FilePair, Split, collate
from lightning_atrous.data.camvid import CAMVID
from lightning_atrous.data.shapes import FORMS, SHAPES, ShapesDataset, draw
from lightning_atrous.images import RGB, read_mask
from lightning_atrous.transforms import Augment, Sample
from lightning_atrous.types import ClassInfo


def save_image(path: Path, height: int = 20, width: int = 30, *, mode: str = "RGB", seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def save_mask(path: Path, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def save_pair(root: Path, name: str, *, split: str = "", height: int = 20, width: int = 30, classes: int = 3) -> None:
    labels = np.random.default_rng(1).integers(0, classes, (height, width)).astype(np.uint8)
    save_image(root / "images" / split / f"{name}.png", height, width)
    save_mask(root / "masks" / split / f"{name}.png", labels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sub-folders: five training images in two folders, two for validation; three classes."""
    root = tmp_path / "folder"
    for i in range(5):
        save_pair(root, f"{'ab'[i % 2]}/{i}.x", split="train", height=20 + i)
    for i in range(2):
        save_pair(root, f"{i}", split="val", width=31 + 4 * i)
    (root / "classes.txt").write_text("one\ntwo\n\nthree\n", encoding="utf-8")
    return root


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """The official layout, small: labels 0..11, lists with the authors' prefix."""
    root = tmp_path / "camvid"
    labels = (np.arange(36 * 48) % 12).astype(np.uint8).reshape(36, 48)
    for split, number in (("train", 3), ("val", 2)):
        lines = []
        for i in range(number):
            name = f"{split}_{i}.png"
            save_image(root / split / name, 36, 48, seed=i)
            save_mask(root / f"{split}annot" / name, labels)
            lines.append(f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}\n")
        (root / f"{split}.txt").write_text("".join(lines), encoding="utf-8")
    return root


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
                assert (batch["image"].dtype, batch["mask"].dtype) == (torch.uint8, torch.int64)
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


# --- Shapes


def test_shapes_are_the_same_in_another_process() -> None:
    code = (
        "import hashlib; from lightning_atrous.data.shapes import ShapesDataset;"
        "d = ShapesDataset('val', 9, size=64, seed=3);"
        "print(hashlib.sha256(b''.join(d[i]['image'].numpy().tobytes() for i in range(9))).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    dataset = ShapesDataset("val", 9, size=64, seed=3)
    for i in (8, 3, 3, 0):
        dataset[i]  # neither the order of the calls nor their number matters
    here = hashlib.sha256(b"".join(dataset[i]["image"].numpy().tobytes() for i in range(9))).hexdigest()
    assert here == there


def test_no_image_is_in_two_splits_or_two_seeds() -> None:
    keys: set[bytes] = set()
    for seed in (0, 1):
        for split in ("train", "val", "test"):
            dataset = ShapesDataset(split, 10**9, size=32, seed=seed)
            keys |= {dataset[i]["image"].numpy().tobytes() for i in [*range(40), 10**9 - 1]}
    assert len(keys) == 2 * 3 * 41


def test_shapes_images_are_what_they_should_be() -> None:
    dataset = ShapesDataset("train", 300, size=96)
    counts = np.zeros(256)
    for i in range(300):
        sample = dataset[i]
        assert sample["image"].shape == (3, 96, 96)
        counts += np.bincount(sample["mask"].numpy().ravel(), minlength=256)
    share = counts / counts.sum()
    assert set(np.flatnonzero(share)) == {*range(7), 255}
    assert share[0] < 0.75
    assert share[1:7].min() > 0.015
    assert 0.03 < share[255] < 0.15


@pytest.mark.parametrize("size", [32, 33, 101])
def test_draw_takes_odd_sizes_and_no_shapes(size: int) -> None:
    image, mask = draw(np.random.default_rng(0), size, shapes=(0, 0))
    assert image.shape == (size, size, 3)
    assert not mask.any()
    image, mask = draw(np.random.default_rng(0), size, shapes=(20, 20))
    assert image.dtype == mask.dtype == np.uint8
    assert mask.any()


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_forms_fill_their_radius(form: int) -> None:
    """Every form reaches radius 1, not beyond; and its area is the one of its formula."""
    grid = ((np.arange(800, dtype=np.float32) + 0.5) / 800 - 0.5) * 2.4
    u, v = np.meshgrid(grid, grid)
    inside = FORMS[form](u, v) <= 0
    assert np.sqrt(u * u + v * v)[inside].max() == pytest.approx(1, abs=0.01)
    golden = (1 + 5**0.5) / 2
    area = {
        0: np.pi,
        1: np.pi * 0.75,
        2: 2,
        3: 3 * 3**0.5 / 4,
        4: 10 * np.sin(np.pi / 5) * golden**-2 / 2,
        5: 4 * (2 * 0.95 * 0.3 - 0.3**2),
    }[form]
    assert inside.mean() * 2.4**2 == pytest.approx(area, rel=0.01)


def labelled_colours(split: Split, length: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pixel that is not void: which of 8³ bins its colour is in, and its class."""
    dataset = ShapesDataset(split, length)
    samples = [dataset[i] for i in range(length)]
    red, green, blue = torch.stack([s["image"] for s in samples], dim=1).numpy().astype(int) // 32
    labels = torch.stack([s["mask"] for s in samples]).numpy()
    return (red * 64 + green * 8 + blue)[labels != 255], labels[labels != 255]


def test_colour_alone_does_not_tell_the_classes() -> None:
    """The best classifiers of single pixels, by majority and by likelihood, stay below 0.25 mIoU."""
    bins, labels = labelled_colours("train", 1000)
    votes = np.bincount(bins * 7 + labels, minlength=512 * 7).reshape(512, 7)
    bins, labels = labelled_colours("val", 200)
    for weights in (np.ones(7), 1 / votes.sum(0)):
        prediction = (votes * weights).argmax(1)[bins]
        confusion = np.bincount(labels * 7 + prediction, minlength=49).reshape(7, 7)
        union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
        assert (confusion.diagonal() / union).mean() < 0.25


# --- files


def test_camvid_strips_the_prefix_and_voids_label_11(camvid: Path) -> None:
    data = CamVid(camvid, num_workers=0)
    assert data.classes is CAMVID
    assert len(data.classes) == 11
    dataset = data.dataset("train")
    raw = np.arange(36 * 48).reshape(36, 48) % 12
    sample = dataset[0]
    assert sample["name"] == "train_0"
    assert torch.equal(sample["mask"], torch.from_numpy(np.where(raw == 11, 255, raw)).to(torch.uint8))
    assert [s["name"] for s in (data.dataset("test")[0], data.dataset("val")[0])] == ["val_0", "val_0"]
    (camvid / "test.txt").write_text((camvid / "train.txt").read_text(encoding="utf-8"), encoding="utf-8")
    assert CamVid(camvid).dataset("test")[0]["name"] == "train_0"


@pytest.mark.skipif("CAMVID_ROOT" not in os.environ, reason="CAMVID_ROOT names no folder with the real CamVid")
def test_the_real_camvid() -> None:
    data = CamVid(os.environ["CAMVID_ROOT"])
    lengths = [len(data.dataset(split)) for split in ("train", "val")]  # type: ignore[arg-type]
    assert lengths == [367, 101]
    seen: set[int] = set()
    for i in range(0, 367, 20):
        sample = data.dataset("train")[i]
        assert sample["image"].shape == (3, 360, 480)
        seen |= set(sample["mask"].unique().tolist())
    assert seen == {*range(11), 255}


def test_folder_finds_images_in_folders_and_in_lists(folder: Path) -> None:
    data = Folder(folder)
    assert data.classes.names == ("one", "two", "three")
    assert [p.name for p in data.build("train").pairs] == ["a/0.x", "a/2.x", "a/4.x", "b/1.x", "b/3.x"]
    (folder / "train.txt").write_text("val/1\ntrain/a/2.x.png\n", encoding="utf-8")
    (folder / "val.txt").write_text("val/0\n", encoding="utf-8")
    data = Folder(folder, ["x", "y", "z"], palette=[(0, 0, 0), (1, 1, 1), (2, 2, 2)])
    assert [p.name for p in data.build("train").pairs] == ["val/1", "train/a/2.x"]
    assert [p.name for p in data.build("test").pairs] == ["val/0"]
    assert data.classes.palette[2] == (2, 2, 2)


def test_masks_are_indices_whatever_holds_them(tmp_path: Path) -> None:
    labels = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    palette = Image.fromarray(labels)
    palette.putpalette([9, 8, 7, 200, 100, 50, 1, 2, 3])
    assert palette.mode == "P"
    palette.save(tmp_path / "p.png")
    save_mask(tmp_path / "l.png", labels)
    save_mask(tmp_path / "16.png", labels.astype(np.uint16) * 300)
    Image.fromarray(labels > 0).save(tmp_path / "1.png")
    assert np.array_equal(read_mask(tmp_path / "p.png"), labels)
    assert np.array_equal(read_mask(tmp_path / "l.png"), labels)
    assert np.array_equal(read_mask(tmp_path / "16.png"), labels.astype(int) * 300)
    assert np.array_equal(read_mask(tmp_path / "1.png"), (labels > 0).astype(int))


def test_many_classes_and_a_negative_ignore_index_fit(tmp_path: Path) -> None:
    save_image(tmp_path / "a.png", 2, 2)
    save_mask(tmp_path / "m.png", np.array([[0, 299], [300, 7]], np.uint16))
    pair = [FilePair("a", tmp_path / "a.png", tmp_path / "m.png")]
    classes = ClassInfo(tuple(str(i) for i in range(300)), ignore_index=-100)
    labels = {**{i: i for i in range(300)}, 300: -100}
    assert FileDataset(pair, classes, label_map=labels)[0]["mask"].tolist() == [[0, 299], [-100, 7]]


def _broken(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _drop(root: Path, *names: str) -> None:
    for name in names:
        (root / name).unlink()


TRAIN = "images/train/a/0.x.png"
MASK = "masks/train/a/0.x.png"
ZEROS = np.zeros((20, 30), np.uint8)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: _drop(r, "classes.txt"), ["classes.txt", "class_names"]),
        (lambda r: _drop(r, MASK), [TRAIN, "no mask", MASK, "add"]),
        (
            lambda r: [p.unlink() for p in (r / "images/train").rglob("*.png")],
            ["train split is empty", "images/train"],
        ),
        (
            lambda r: (r / "images/train").rename(r / "images/training"),
            ["no folder", "images/train", "train.txt"],
        ),
        (lambda r: save_image(r / "images/train/a/0.x.jpg"), ["0.x.jpg", "0.x.png", "share one mask"]),
        (
            lambda r: (r / "train.txt").write_text("val/0\nnope\n"),
            ["train.txt", "1 image ", "'nope'", "suffix"],
        ),
        (lambda r: (r / "train.txt").write_text("\n"), ["train split is empty", "train.txt"]),
        (lambda r: save_mask(r / MASK, ZEROS[:7]), [MASK, "30×7", "30×20", "same size"]),
        (lambda r: save_mask(r / MASK, ZEROS + 77), [MASK, "labels 77", "0..2", "255"]),
        (lambda r: save_image(r / MASK), [MASK, "mode RGB", "indices", "convert"]),
        (lambda r: save_image(r / MASK, mode="RGBA"), [MASK, "mode RGBA", "convert"]),
        (lambda r: save_image(r / TRAIN, mode="L"), [TRAIN, "mode L", "expected RGB", "convert"]),
        (lambda r: save_image(r / TRAIN, mode="P"), [TRAIN, "mode P", "convert"]),
        (lambda r: save_image(r / TRAIN, mode="RGBA"), [TRAIN, "mode RGBA", "convert"]),
        (lambda r: _broken(r / TRAIN), [TRAIN, "cannot be decoded", "intact"]),
        (lambda r: _broken(r / MASK), [MASK, "cannot be decoded"]),
        (lambda r: (r / TRAIN).write_bytes(b"text"), [TRAIN, "cannot be decoded"]),
    ],
)
def test_what_is_wrong_with_files_is_said_in_a_sentence(
    folder: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        Folder(folder).build("train")[0]
    message = str(error.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


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


def test_a_bad_line_of_camvid_is_quoted(camvid: Path) -> None:
    (camvid / "val.txt").write_text("only_one.png\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"val\.txt has the line 'only_one\.png', expected the paths"):
        CamVid(camvid).setup("validate")


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
        "augment": {"crop": [16, 24], "scale": [0.75, 1.5], "flip": 0},
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=SegmentationData)
    config = parser.parse_object({"data": {"class_path": f"lightning_atrous.data.{source}", "init_args": options}})
    assert parser.parse_string(parser.dump(config)) == config
    data = parser.instantiate(config).data
    assert data.augment == Augment((16, 24), (0.75, 1.5), flip=0)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["image"].shape == (2, 3, 16, 24)
    with pytest.raises(Exception, match="batch_size"):
        parser.parse_args([f"--data={source}", "--data.batch_size=many"])
