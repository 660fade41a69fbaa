"""Shapes: drawn alike everywhere, in no two splits, and not told apart by colour alone."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from lightning_atrous.data.base import Split
from lightning_atrous.data.shapes import FORMS, ShapesDataset, draw


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
