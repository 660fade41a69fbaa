"""Boundary IoU against scipy's erosion, trimaps against scipy's distances."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import binary_erosion, distance_transform_cdt
from torch import Tensor

from lightning_atrous.boundaries import BoundaryScore, BoundaryScores, near_boundary
from lightning_atrous.types import ClassInfo

IGNORED = 255


def class_info(k: int) -> ClassInfo:
    return ClassInfo(tuple(f"class{i}" for i in range(k)))


def blobs(k: int, shape: tuple[int, int, int], *, seed: int, patch: int = 7) -> Tensor:
    """Maps of ``k`` classes in patches, some of them ignored."""
    rng = torch.Generator().manual_seed(seed)
    b, h, w = shape
    coarse = torch.randint(k + 1, (b, -(-h // patch), -(-w // patch)), generator=rng)
    coarse[coarse == k] = IGNORED
    return coarse.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :h, :w].contiguous()


def disturbed(target: Tensor, k: int, *, seed: int) -> Tensor:
    """A prediction: the target moved by two pixels, with noise, and something where it is ignored."""
    rng = torch.Generator().manual_seed(seed)
    prediction = target.roll((2, 1), (1, 2))
    wrong = torch.rand(target.shape, generator=rng) < 0.02
    return torch.where(wrong | (prediction == IGNORED), torch.randint(k, target.shape, generator=rng), prediction)


def eroded_boundary(mask: np.ndarray, ignored: np.ndarray, distance: int) -> np.ndarray:
    """What erosions by 3×3, as many as the distance is long, take away; 0 stands around the image."""
    whole = mask | ignored
    return mask & ~binary_erosion(whole, np.ones((3, 3)), iterations=distance, border_value=0)


def expected_boundary_iou(prediction: Tensor, target: Tensor, k: int, fraction: float) -> Tensor:
    intersection, union = np.zeros(k), np.zeros(k)
    for p, t in zip(prediction.numpy(), target.numpy(), strict=True):
        ignored = t == IGNORED
        distance = max(1, round(fraction * math.sqrt(t.shape[0] ** 2 + t.shape[1] ** 2)))
        for c in range(k):
            ours, theirs = (eroded_boundary((x == c) & ~ignored, ignored, distance) for x in (p, t))
            intersection[c] += (ours & theirs).sum()
            union[c] += (ours | theirs).sum()
    return torch.tensor([i / u if u else math.nan for i, u in zip(intersection, union, strict=True)])


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("fraction", [1e-9, 0.02, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(2, 61, 47), (1, 1, 9), (2, 80, 5)], ids=str)
def test_boundary_iou_equals_that_of_erosions(k: int, fraction: float, shape: tuple[int, int, int]) -> None:
    score = BoundaryScore(class_info(k), fraction=fraction)
    target = blobs(k, shape, seed=1)
    prediction = disturbed(target, k, seed=2)
    score.update(prediction, target)
    expected = expected_boundary_iou(prediction, target, k, fraction).float()
    torch.testing.assert_close(score.compute().boundary_iou.reshape(k), expected, equal_nan=True)


@pytest.mark.skipif("CITYSCAPES_SAMPLE" not in os.environ, reason="CITYSCAPES_SAMPLE names no folder of Cityscapes")
def test_boundary_iou_of_streets_equals_that_of_erosions() -> None:
    found = sorted(Path(os.environ["CITYSCAPES_SAMPLE"]).rglob("*_labelTrainIds.png"))
    assert found, "no *_labelTrainIds.png in CITYSCAPES_SAMPLE"
    with Image.open(found[0]) as picture:
        target = torch.from_numpy(np.array(picture)).long()[None]
    prediction = disturbed(target, 19, seed=0)
    score = BoundaryScore(class_info(19))
    score.update(prediction, target)
    expected = expected_boundary_iou(prediction, target, 19, 0.02).float()
    torch.testing.assert_close(score.compute().boundary_iou, expected, equal_nan=True)


def distances(target: np.ndarray, *, ignored_boundaries: bool) -> np.ndarray:
    """Chessboard distance of every pixel to the next of another label; far where there is none."""
    far = np.full(target.shape, 10**6)
    for label in np.unique(target):
        other = target != label
        if not ignored_boundaries:
            other &= target != IGNORED
        if other.any():
            far = np.where(target == label, distance_transform_cdt(~other, "chessboard"), far)
    return far


@pytest.mark.parametrize("ignored_boundaries", [False, True])
def test_trimaps_are_the_pixels_within_a_distance(ignored_boundaries: bool) -> None:
    k, bands = 4, (1, 2, 3, 5, 8, 60)
    target = blobs(k, (3, 41, 63), seed=3, patch=9)
    target[2] = 1  # has no boundary
    prediction = disturbed(target, k, seed=4)
    score = BoundaryScore(class_info(k), bands=bands, ignored_boundaries=ignored_boundaries)
    score.update(prediction, target)
    found = score.compute()
    assert found.bands == bands
    away = np.stack([distances(t, ignored_boundaries=ignored_boundaries) for t in target.numpy()])
    p, t = prediction.numpy(), target.numpy()
    for i, band in enumerate(bands):
        counted = (away <= band) & (t != IGNORED)
        expected = [((p == c) & (t == c) & counted).sum() / (((p == c) | (t == c)) & counted).sum() for c in range(k)]
        torch.testing.assert_close(found.trimap_iou[i], torch.tensor(expected).float())
        torch.testing.assert_close(found.trimap_miou[i], torch.tensor(expected).mean().float())


@pytest.mark.parametrize("num_labels", [2, 255, 300])
def test_every_distance_is_exact(num_labels: int) -> None:
    labels = blobs(num_labels - 1, (1, 37, 29), seed=5, patch=4)[0]
    labels[labels == IGNORED] = num_labels - 1
    away = distances(np.where(labels == IGNORED, -1, labels), ignored_boundaries=True)
    for distance in range(1, 45):
        near = near_boundary(
            labels, distance, num_labels=num_labels, ignored=torch.zeros_like(labels).bool(), edge=False
        )
        assert np.array_equal(near.numpy(), away <= distance), distance


def test_what_is_right_wherever_it_counts_scores_1() -> None:
    target = blobs(5, (2, 40, 50), seed=6)
    prediction = torch.where(target == IGNORED, torch.randint(200, target.shape), target)
    score = BoundaryScore(class_info(5), ignored_boundaries=True)
    score.update(prediction, target)
    found = score.compute()
    assert found.boundary_iou.tolist() == [1] * 5
    assert found.trimap_miou.tolist() == [1] * 5


def test_pixels_far_from_boundaries_do_not_count() -> None:
    """A wrong prediction inside a large segment leaves the trimap as it was, and so does the image's edge."""
    target = torch.zeros(1, 40, 40, dtype=torch.int64)
    target[..., 20:] = 1
    prediction = target.clone()
    prediction[:, :, 0] = 1
    score = BoundaryScore(class_info(2), bands=(4, 19, 20))
    score.update(prediction, target)
    assert score.compute().trimap_miou.lt(1).tolist() == [False, False, True]


def test_without_boundaries_or_pixels_all_is_nan() -> None:
    score = BoundaryScore(class_info(3))
    score.update(torch.zeros(1, 9, 9, dtype=torch.int64), torch.full((1, 9, 9), IGNORED))
    score.update(torch.zeros(0, 9, 9, dtype=torch.int64), torch.zeros(0, 9, 9, dtype=torch.int64))
    found = score.compute()
    assert found.boundary_iou.isnan().all()
    assert found.boundary_miou.isnan()
    assert found.trimap_miou.isnan().all()


def test_batching_does_not_matter_and_inputs_stay() -> None:
    target = blobs(4, (3, 30, 30), seed=7)
    prediction = disturbed(target, 4, seed=8)
    before = prediction.clone(), target.clone()
    whole, parts = BoundaryScore(class_info(4)), BoundaryScore(class_info(4))
    whole.update(prediction.byte(), target.byte())
    for i in (2, 0, 1):
        parts.update(prediction[i : i + 1], target[i : i + 1])
    assert torch.equal(prediction, before[0])
    assert torch.equal(target, before[1])
    assert_equal(whole.compute(), parts.compute())


def assert_equal(a: BoundaryScores, b: BoundaryScores) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


MAP = torch.zeros(1, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (torch.zeros(1, 3, 4, 4), MAP, r"expected a class map \(B, H, W\), got torch.float32 \(1, 3, 4, 4\); make one"),
        (MAP.float(), MAP, "expected .* an integer class map"),
        (MAP, MAP + 3, "the target holds 3, but 3 classes"),
        (MAP + 7, MAP, "the prediction holds 7, but 3 classes"),
    ],
)
def test_what_does_not_fit_is_named(prediction: Tensor, target: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoundaryScore(class_info(3)).update(prediction, target)


@pytest.mark.parametrize("bands", [(), (0, 1), (2, 1), (1, 1), (1.5,)])
def test_bands_that_do_not_grow_are_refused(bands: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="bands are whole numbers of pixels from 1 on"):
        BoundaryScore(class_info(3), bands=bands)


@pytest.mark.parametrize("fraction", [0, -1, 1.5, math.nan])
def test_a_fraction_is_one(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction is of the image's diagonal"):
        BoundaryScore(class_info(3), fraction=fraction)


def test_two_ranks_score_as_one() -> None:
    """Merged as torchmetrics merges ranks: by the reduction that each state has."""
    target = blobs(4, (3, 30, 30), seed=7)
    prediction = disturbed(target, 4, seed=8)
    alone, first, second = (BoundaryScore(class_info(4)) for _ in range(3))
    alone.update(prediction, target)
    first.update(prediction[:1], target[:1])
    second.update(prediction[1:], target[1:])
    first.merge_state(second)
    assert_equal(first.compute(), alone.compute())
