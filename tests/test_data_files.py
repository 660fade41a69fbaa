"""Sources that read files: what they find, what masks mean, and what they refuse."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made import save_image, save_mask
from PIL import Image

from lightning_atrous.data import CamVid, Folder
from lightning_atrous.data.base import FileDataset, FilePair
from lightning_atrous.data.camvid import CAMVID
from lightning_atrous.images import read_mask
from lightning_atrous.types import ClassInfo


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


def test_a_bad_line_of_camvid_is_quoted(camvid: Path) -> None:
    (camvid / "val.txt").write_text("only_one.png\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"val\.txt has the line 'only_one\.png', expected the paths"):
        CamVid(camvid).setup("validate")
