"""Cross-entropy against PyTorch's own on interpolated logits, its edges, and two ranks against one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_atrous.losses import CrossEntropy, Focal, Loss, WeightedSum, mean_over_ranks
from lightning_atrous.types import ClassInfo

K = 4
WEIGHTS = (0.5, 1.0, 2.0, 0.0)


def class_info(ignore_index: int = 255) -> ClassInfo:
    return ClassInfo(("road", "car", "tree", "sky"), ignore_index=ignore_index)


def random_pair(
    size: tuple[int, int] = (3, 4),
    *,
    batch: int = 2,
    ignore_index: int = 255,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Logits at a size of their own, and a target (B, 9, 12), a third of it ignored."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, K, *size, generator=rng, dtype=dtype)
    target = torch.randint(K, (batch, 9, 12), generator=rng)
    target[torch.rand(target.shape, generator=rng) < 1 / 3] = ignore_index
    return logits.requires_grad_(), target


@pytest.mark.parametrize("size", [(3, 4), (9, 12), (4, 5)])
def test_labels_may_be_shrunk_in_place_of_raising_logits(size: tuple[int, int]) -> None:
    logits, target = random_pair(size)
    rows, columns = ([int((i + 0.5) * n / m) for i in range(m)] for m, n in zip(size, (9, 12), strict=True))
    small = torch.tensor([[[int(image[row, column]) for column in columns] for row in rows] for image in target])
    value = CrossEntropy(class_info(), shrink_labels=True)(logits, target)
    torch.testing.assert_close(value, F.cross_entropy(logits, small, ignore_index=255))


@pytest.mark.parametrize("size", [(3, 4), (9, 12), (20, 7)])
@pytest.mark.parametrize("ignore_index", [255, -1, -100])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_equals_pytorch_on_interpolated_logits(
    size: tuple[int, int], ignore_index: int, class_weights: tuple[float, ...] | None, label_smoothing: float
) -> None:
    logits, target = random_pair(size, ignore_index=ignore_index)
    expected = F.cross_entropy(
        F.interpolate(logits, size=(9, 12), mode="bilinear", align_corners=False),
        target,
        weight=None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )
    loss = CrossEntropy(class_info(ignore_index), class_weights=class_weights, label_smoothing=label_smoothing)
    value = loss(logits, target)
    assert isinstance(loss, Loss)
    assert value.shape == ()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (value, expected)))


def test_one_valid_pixel_is_the_whole_loss() -> None:
    logits, target = random_pair((9, 12))
    target.fill_(255)
    target[1, 4, 5] = 2
    expected = -logits[1, :, 4, 5].log_softmax(0)[2]
    torch.testing.assert_close(CrossEntropy(class_info())(logits, target), expected)


@pytest.mark.parametrize(
    ("class_weights", "fill"),
    [(None, 255), (WEIGHTS, 255), (WEIGHTS, 3)],
    ids=["ignored", "ignored, with weights", "of weight 0"],
)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_without_a_pixel_that_counts_loss_and_gradient_are_0(
    class_weights: tuple[float, ...] | None, fill: int, label_smoothing: float
) -> None:
    logits, target = random_pair()
    loss = CrossEntropy(class_info(), class_weights=class_weights, label_smoothing=label_smoothing)
    value = loss(logits, torch.full_like(target, fill))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert logits.grad.count_nonzero() == 0


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_gradcheck(class_weights: tuple[float, ...] | None) -> None:
    logits, target = random_pair((2, 3))
    loss = CrossEntropy(class_info(), class_weights=class_weights, label_smoothing=0.1)
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
def test_half_precision_is_raised_and_averaged_in_float32(
    dtype: torch.dtype, class_weights: tuple[float, ...] | None
) -> None:
    logits, target = random_pair(dtype=torch.float32)
    loss = CrossEntropy(class_info(), class_weights=class_weights)
    half = logits.detach().to(dtype)
    value = loss(half, target)
    assert value.dtype == torch.float32
    assert value == loss(half.float(), target)


def test_under_autocast_the_loss_is_float32() -> None:
    logits, target = random_pair(dtype=torch.float32)
    head = nn.Conv2d(K, K, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(logits)
        value = CrossEntropy(class_info(), class_weights=WEIGHTS)(out, target)
    assert (out.dtype, value.dtype) == (torch.bfloat16, torch.float32)
    value.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.isfinite().all()


def test_weights_follow_the_module_but_stay_out_of_its_state() -> None:
    loss = CrossEntropy(class_info(), class_weights=WEIGHTS).to("meta")
    assert loss.class_weights is not None
    assert loss.class_weights.device.type == "meta"
    assert not loss.state_dict()


@pytest.mark.parametrize(
    ("class_weights", "message"),
    [
        ((1.0, 2.0), "2 class_weights for 4 classes; give one each, in the order road, car, tree, sky"),
        ((1.0, 1.0, 1.0, -1.0), "none negative"),
        ((1.0, 1.0, 1.0, float("nan")), "must be finite"),
        ((0, 0, 0, 0), "not all 0"),
    ],
)
def test_weights_that_do_not_fit_are_named(class_weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossEntropy(class_info(), class_weights=class_weights)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.0, float("nan")])
def test_smoothing_has_a_range(label_smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\)"):
        CrossEntropy(class_info(), label_smoothing=label_smoothing)


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        ((2, 3, 4, 4), (2, 8, 8), r"expected logits \(B, 4, h, w\).* got \(2, 3, 4, 4\)"),
        ((4, 4, 4), (2, 8, 8), r"expected logits .* got \(4, 4, 4\)"),
        ((2, 4, 4, 4), (1, 8, 8), r"expected an int64 target \(2, H, W\), got torch.int64 \(1, 8, 8\)"),
        ((2, 4, 4, 4), (2, 1, 8, 8), r"expected an int64 target .* got torch.int64 \(2, 1, 8, 8\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(logits: tuple[int, ...], target: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossEntropy(class_info())(torch.zeros(logits), torch.zeros(target, dtype=torch.int64))


def test_a_target_of_another_type_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected an int64 target .* got torch.uint8"):
        CrossEntropy(class_info())(torch.zeros(2, 4, 4, 4), torch.zeros(2, 8, 8, dtype=torch.uint8))


def test_the_base_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Loss()


def test_without_a_process_group_a_mean_over_ranks_is_the_tensor() -> None:
    x = torch.tensor(3.0)
    assert mean_over_ranks(x) is x


def global_batch() -> tuple[Tensor, Tensor]:
    """Four images; the first two, rank 0's, have one valid pixel between them, the last one none."""
    images, target = random_pair((6, 8), batch=4)
    target[:2], target[3] = 255, 255
    target[1, 2, 3] = 1
    return images.detach(), target


def losses() -> list[Loss]:
    return [
        CrossEntropy(class_info()),
        CrossEntropy(class_info(), class_weights=WEIGHTS, label_smoothing=0.1),
        Focal(class_info(), class_weights=WEIGHTS),
        WeightedSum(class_info(), losses=[CrossEntropy, Focal], weights=(0.5, 2.0)),
    ]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(K, K, 3, stride=2, padding=1).double()


def train_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    images, target = (x[2 * rank : 2 * rank + 2] for x in global_batch())
    saved = []
    for loss in losses():
        model = DistributedDataParallel(network())
        value = loss(model(images), target)
        value.backward()
        with torch.no_grad():
            own = loss(model(images), target)
        void = loss(model(images), torch.full_like(target, 255))
        grads = [parameter.grad for parameter in model.parameters()]
        saved.append({"value": value.detach(), "own": own, "void": void.detach(), "grads": grads})
    torch.save(saved, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_train_as_one_on_all_images(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_on_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    images, target = global_batch()
    for loss, *saved in zip(losses(), *ranks, strict=True):
        model = network()
        value = loss(model(images), target)
        value.backward()
        torch.testing.assert_close((saved[0]["value"] + saved[1]["value"]) / 2, value.detach())
        for rank in range(2):
            torch.testing.assert_close(saved[rank]["grads"], [p.grad for p in model.parameters()])
            assert saved[rank]["void"] == 0
            mine = slice(2 * rank, 2 * rank + 2)  # without gradients each rank is on its own
            torch.testing.assert_close(saved[rank]["own"], loss(model(images[mine]), target[mine]).detach())
