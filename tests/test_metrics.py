"""The confusion matrix against scikit-learn and a loop, scores at the edges, and two ranks against one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix as sklearn_confusion_matrix
from torch import Tensor

from lightning_atrous import argmax
from lightning_atrous.metrics import (
    SegmentationScore,
    class_accuracy,
    class_iou,
    confusion_matrix,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
    scores,
)
from lightning_atrous.types import ClassInfo


def class_info(k: int, ignore_index: int = 255) -> ClassInfo:
    return ClassInfo(tuple(f"class{i}" for i in range(k)), ignore_index=ignore_index)


def random_pair(k: int, shape: tuple[int, ...], *, ignore_index: int = 255, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A class map and a target, a fifth of it ignored."""
    rng = torch.Generator().manual_seed(seed)
    prediction, target = torch.randint(k, (2, *shape), generator=rng)
    target[torch.rand(shape, generator=rng) < 0.2] = ignore_index
    return prediction, target


def naive_scores(prediction: Tensor, target: Tensor, classes: ClassInfo) -> tuple[list[float], list[float]]:
    """IoU and accuracy per class from sets of pixels, nan where there is nothing to divide by."""
    pixels = [
        (p, t)
        for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True)
        if t != classes.ignore_index
    ]
    ious, accuracies = [], []
    for c in range(len(classes)):
        predicted = {i for i, (p, _) in enumerate(pixels) if p == c}
        true = {i for i, (_, t) in enumerate(pixels) if t == c}
        ious.append(len(predicted & true) / len(predicted | true) if predicted | true else torch.nan)
        accuracies.append(len(predicted & true) / len(true) if true else torch.nan)
    return ious, accuracies


@pytest.mark.parametrize(("k", "ignore_index"), [(2, -1), (19, 255), (40, 40), (254, 255), (300, -1), (5, -(2**14))])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
def test_equals_scikit_learn(k: int, ignore_index: int, dtype: torch.dtype) -> None:
    prediction, target = random_pair(k, (3, 17, 23), ignore_index=ignore_index)
    confusion = confusion_matrix(prediction.to(dtype), target.to(dtype), class_info(k, ignore_index))
    valid = target != ignore_index
    expected = sklearn_confusion_matrix(target[valid], prediction[valid], labels=range(k))
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == expected.tolist()


def test_with_one_class_all_valid_pixels_are_right() -> None:
    score = SegmentationScore(class_info(1))
    _, target = random_pair(1, (3, 17, 23))
    score.update(torch.randn(3, 1, 5, 5), target)
    assert score.confusion.tolist() == [[int((target == 0).sum())]]
    assert all(value == 1 for value in scores(score.compute().reshape(1, 1)).values())


def test_uint8_masks_count_like_int64() -> None:
    prediction, target = random_pair(5, (2, 9, 9))
    classes = class_info(5)
    small = confusion_matrix(prediction.byte(), target.byte(), classes)
    assert torch.equal(small, confusion_matrix(prediction, target, classes))


@pytest.mark.parametrize("ignore_index", [65535, 2**40, -(2**62)])
@pytest.mark.parametrize("k", [1, 300])
def test_an_ignore_index_may_be_far_from_the_classes(ignore_index: int, k: int) -> None:
    prediction, target = random_pair(k, (2, 17, 23))
    classes, far = class_info(k, -1), class_info(k, ignore_index)
    near, away = target.masked_fill(target == 255, -1), target.masked_fill(target == 255, ignore_index)
    prediction[target == 255] = 2**50  # does not matter
    assert torch.equal(confusion_matrix(prediction, away, far), confusion_matrix(prediction, near, classes))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.int8])
def test_masks_of_rarer_types_count_like_int64(dtype: torch.dtype) -> None:
    prediction, target = random_pair(5, (2, 9, 9), ignore_index=100)
    classes = class_info(5, 100)
    rare = confusion_matrix(prediction.to(dtype), target.to(dtype), classes)
    assert torch.equal(rare, confusion_matrix(prediction, target, classes))


@pytest.mark.parametrize("logits", [True, False])
def test_per_image_is_the_matrix_of_each_image(logits: bool) -> None:
    classes = class_info(5)
    prediction, target = random_pair(5, (3, 9, 11))
    if logits:
        prediction = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    found = confusion_matrix(prediction, target, classes, per_image=True)
    assert torch.equal(found.sum(0), confusion_matrix(prediction, target, classes))
    for i in range(3):
        assert torch.equal(found[i], confusion_matrix(prediction[i : i + 1], target[i : i + 1], classes))
    assert confusion_matrix(prediction[:0], target[:0], classes, per_image=True).shape == (0, 5, 5)


@pytest.mark.parametrize("absent", [(), (0,), (2, 4)])
def test_scores_equal_a_loop_over_pixels(absent: tuple[int, ...]) -> None:
    classes = class_info(5)
    prediction, target = random_pair(5, (2, 12, 10), seed=1)
    for c in absent:
        prediction[prediction == c] = 1
        target[target == c] = 3
    ious, accuracies = map(torch.tensor, naive_scores(prediction, target, classes))
    confusion = confusion_matrix(prediction, target, classes)
    torch.testing.assert_close(class_iou(confusion), ious, equal_nan=True)
    torch.testing.assert_close(class_accuracy(confusion), accuracies, equal_nan=True)
    assert class_iou(confusion).isnan().nonzero().flatten().tolist() == list(absent)
    present = [c for c in range(5) if c not in absent]
    torch.testing.assert_close(mean_iou(confusion), ious[present].mean())
    torch.testing.assert_close(mean_accuracy(confusion), accuracies[present].mean())
    valid = target != 255
    torch.testing.assert_close(pixel_accuracy(confusion), (prediction == target)[valid].float().mean())


def test_a_class_predicted_but_not_in_the_target_has_iou_0_and_no_accuracy() -> None:
    confusion = torch.tensor([[3, 1], [0, 0]])
    assert class_iou(confusion).tolist() == [0.75, 0]
    torch.testing.assert_close(class_accuracy(confusion), torch.tensor([0.75, torch.nan]), equal_nan=True)
    assert (mean_iou(confusion).item(), mean_accuracy(confusion).item()) == (0.375, 0.75)


@pytest.mark.parametrize("shape", [(2, 4, 4), (0, 4, 4)], ids=["ignored", "empty"])
@pytest.mark.parametrize("logits", [True, False])
def test_nothing_to_count_is_nan(shape: tuple[int, ...], logits: bool) -> None:
    score = SegmentationScore(class_info(3))
    prediction = torch.zeros(shape[0], 3, 2, 2) if logits else torch.zeros(shape, dtype=torch.int64)
    score.update(prediction, torch.full(shape, 255))
    assert score.confusion.sum() == 0
    assert all(value.isnan() for value in scores(score.compute()).values())


def test_batching_and_order_do_not_matter() -> None:
    classes = class_info(4)
    prediction, target = random_pair(4, (6, 8, 8))
    whole, parts = SegmentationScore(classes), SegmentationScore(classes)
    whole.update(prediction, target)
    for part in ([5], [2, 0, 4], [], [3, 1]):
        parts.update(prediction[part], target[part])
    assert torch.equal(whole.confusion, parts.confusion)
    assert torch.equal(whole.compute(), parts.compute())


def test_forward_gives_the_batch_and_keeps_the_total() -> None:
    classes = class_info(3)
    first, second = random_pair(3, (1, 8, 8), seed=1), random_pair(3, (1, 8, 8), seed=2)
    score = SegmentationScore(classes)
    score(*first)
    assert torch.equal(score(*second), confusion_matrix(*second, classes))
    total = confusion_matrix(*first, classes) + confusion_matrix(*second, classes)
    assert torch.equal(score.confusion, total)
    score.reset()
    assert score.confusion.sum() == 0


@pytest.mark.parametrize("size", [(4, 6), (32, 48), (9, 100)])
@pytest.mark.parametrize("rows", [1, 5, 99])
def test_logits_count_as_their_argmax_at_full_size(
    size: tuple[int, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(argmax, "_RAISED", 7 * rows * 100)
    classes = class_info(7)
    _, target = random_pair(7, (2, 32, 48))
    logits = torch.randn(2, 7, *size, generator=torch.Generator().manual_seed(0))
    by_hand = F.interpolate(logits, size=(32, 48), mode="bilinear", align_corners=False).argmax(1)
    expected = confusion_matrix(by_hand, target, classes)
    assert torch.equal(confusion_matrix(logits, target, classes), expected)


def test_half_precision_is_raised_in_float32() -> None:
    _, target = random_pair(7, (2, 32, 48))
    logits = torch.randn(2, 7, 4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    classes = class_info(7)
    assert torch.equal(confusion_matrix(logits, target, classes), confusion_matrix(logits.float(), target, classes))


def test_inputs_are_left_as_they_were_and_no_graph_is_kept() -> None:
    prediction, target = random_pair(3, (2, 8, 8))
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    before = prediction.clone(), target.clone()
    score = SegmentationScore(class_info(3))
    score.update(prediction, target)
    score.update(logits, target)
    assert torch.equal(prediction, before[0])
    assert torch.equal(target, before[1])
    assert not score.confusion.requires_grad


def test_runs_with_deterministic_algorithms() -> None:
    prediction, target = random_pair(3, (2, 8, 8))
    torch.use_deterministic_algorithms(True)
    try:
        confusion = confusion_matrix(prediction, target, class_info(3))
    finally:
        torch.use_deterministic_algorithms(False)
    assert confusion.sum() == (target != 255).sum()


def test_a_compiled_evaluation_may_count() -> None:
    _, target = random_pair(3, (2, 8, 8))
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    classes = class_info(3)
    compiled = torch.compile(lambda x: confusion_matrix(x + 1, target, classes), backend="eager")
    assert torch.equal(compiled(logits), confusion_matrix(logits + 1, target, classes))


MAP = torch.zeros(1, 4, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (torch.zeros(1, 2, 4, 4), MAP, r"expected logits \(B, 3, h, w\).* got \(1, 2, 4, 4\)"),
        (torch.zeros(2, 3, 4, 4), MAP, "2 images of logits for 1 targets"),
        (
            torch.zeros(1, 3, 4, 4),
            MAP[0],
            r"expected an integer target \(B, H, W\), got torch.int64 \(4, 4\)",
        ),
        (torch.zeros(1, 3, 4, 4), MAP.float(), "expected an integer target .* got torch.float32"),
        (torch.zeros(1, 4, 4), MAP, "expected floating logits .* got torch.float32"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), MAP, "expected floating logits .* got torch.int64"),
        (MAP[:, :2], MAP, r"a class map has the target's shape \(1, 4, 4\), got \(1, 2, 4\)"),
        (MAP, MAP + 3, "the target holds 3, but 3 classes are 0..2 and 255 is ignored"),
        (MAP, MAP - 1, "the target holds -1, but"),
        (MAP, torch.arange(16).view(1, 4, 4), "the target holds 3, 4, 5, 6, 7, 8, 9, 10, …, but"),
        (MAP + 255, MAP, "the prediction holds 255, but"),
        (MAP - 2, MAP, "the prediction holds -2, but"),
        (MAP, MAP + 2**40, "the target holds 1099511627776, but"),
        (MAP - 2**40, MAP, "the prediction holds -1099511627776, but"),
    ],
)
def test_what_does_not_fit_is_named(prediction: Tensor, target: Tensor, message: str) -> None:
    score = SegmentationScore(class_info(3))
    with pytest.raises(ValueError, match=message):
        score.update(prediction, target)


def test_an_ignore_index_that_uint8_cannot_hold_ignores_nothing() -> None:
    target = (MAP + 255).byte()
    with pytest.raises(ValueError, match=r"the target holds 255, but .* -1 is ignored"):
        confusion_matrix(MAP, target, class_info(3, ignore_index=-1))


def test_predictions_on_ignored_pixels_may_be_anything() -> None:
    prediction, target = MAP.clone(), MAP.clone()
    prediction[..., 0], target[..., 0] = 200, 255
    assert confusion_matrix(prediction, target, class_info(3)).tolist() == [[12, 0, 0], [0, 0, 0], [0, 0, 0]]


def score_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    prediction, target = random_pair(4, (5, 8, 8))
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    score = SegmentationScore(class_info(4))
    score.update(prediction[mine], target[mine])
    total = score.compute().clone()
    torch.save({"total": total, "own": score.confusion}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_matrix_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(score_on_rank, args=(str(tmp_path),), nprocs=2)
    alone = SegmentationScore(class_info(4))
    prediction, target = random_pair(4, (5, 8, 8))
    alone.update(prediction, target)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for saved in ranks:
        assert torch.equal(saved["total"], alone.confusion)
    assert torch.equal(ranks[0]["own"] + ranks[1]["own"], alone.confusion)
