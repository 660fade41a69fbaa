"""Cross-entropy without the raised logits, against PyTorch's own on logits that are raised as a whole."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_atrous.losses import CrossEntropy, raised, raised_cross_entropy
from lightning_atrous.losses.raised import true_log_probability
from lightning_atrous.types import ClassInfo

K = 5
SIZE = (23, 17)
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0])


@pytest.fixture(params=[1, 200, 1500, 10**6], ids=["rows", "strips", "images", "one strip"])
def strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything a row at a time, some rows of an image, whole images apart, and all in one."""
    monkeypatch.setattr(raised, "_RAISED", request.param)


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pair(size: tuple[int, int], *, ignore_index: int = 255, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Logits (3, K, *size), a target (3, 23, 17) a third of which is ignored, and weights of its pixels."""
    rng = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, K, *size, generator=rng, dtype=dtype)
    target = torch.randint(K, (3, *SIZE), generator=rng)
    target[torch.rand(target.shape, generator=rng) < 1 / 3] = ignore_index
    pixels = torch.rand(target.shape, generator=rng, dtype=dtype) * (torch.rand(target.shape, generator=rng) < 0.8)
    return logits.requires_grad_(), target, pixels


def plain(
    logits: Tensor,
    target: Tensor,
    *,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
    label_smoothing: float = 0.0,
    pixel_weights: Tensor | None = None,
) -> Tensor:
    """All scores at once."""
    losses = F.cross_entropy(
        F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False),
        target,
        weight=None if class_weights is None else class_weights.to(logits.dtype),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction="none",
    )
    return (losses if pixel_weights is None else losses * pixel_weights).sum()


def assert_same(logits: Tensor, *values: Tensor) -> None:
    """The same value and the same gradient, to what float64 allows."""
    value, expected = values
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = (torch.autograd.grad(3 * x, logits)[0] for x in values)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("size", [(6, 5), SIZE, (1, 1), (40, 31), (23, 5), (3, 17)])
def test_equals_the_plain_form_at_any_size(size: tuple[int, int]) -> None:
    logits, target, pixels = pair(size)
    options = {"class_weights": WEIGHTS, "ignore_index": 255, "label_smoothing": 0.2, "pixel_weights": pixels}
    assert_same(logits, raised_cross_entropy(logits, target, **options), plain(logits, target, **options))


@pytest.mark.parametrize("class_weights", [None, WEIGHTS])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighed", [False, True])
def test_equals_the_plain_form_with_any_option(
    class_weights: Tensor | None, label_smoothing: float, weighed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raised, "_RAISED", 200)
    logits, target, pixels = pair((6, 5))
    options = {
        "class_weights": class_weights,
        "ignore_index": 255,
        "label_smoothing": label_smoothing,
        "pixel_weights": pixels if weighed else None,
    }
    assert_same(logits, raised_cross_entropy(logits, target, **options), plain(logits, target, **options))


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("ignore_index", [-1, -100, K, 2**40])
def test_any_index_may_be_ignored(ignore_index: int) -> None:
    logits, target, _ = pair((6, 5), ignore_index=ignore_index)
    options = {"class_weights": WEIGHTS, "ignore_index": ignore_index, "label_smoothing": 0.1}
    assert_same(logits, raised_cross_entropy(logits, target, **options), plain(logits, target, **options))


@pytest.mark.usefixtures("strips", "deterministic")
def test_equals_the_plain_form_in_deterministic_mode() -> None:
    logits, target, _ = pair((6, 5))
    options = {"class_weights": None, "ignore_index": 255, "label_smoothing": 0.1}
    assert_same(logits, raised_cross_entropy(logits, target, **options), plain(logits, target, **options))


def ours(logits: Tensor, target: Tensor) -> Tensor:
    return raised_cross_entropy(logits, target, class_weights=None, ignore_index=255, label_smoothing=0.0)


@pytest.mark.usefixtures("strips")
def test_channels_last_is_kept() -> None:
    logits, target, _ = pair((6, 5))
    logits = logits.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert_same(logits, ours(logits, target), plain(logits, target))
    (gradient,) = torch.autograd.grad(ours(logits, target), logits)
    assert gradient.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits, target, _ = pair((6, 5), dtype=torch.float32)
    half = logits.detach().to(dtype).requires_grad_()
    value, expected = ours(half, target), plain(half.float(), target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    gradients = [torch.autograd.grad(x, half)[0] for x in (value, expected)]
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(*gradients)


def test_what_counts_nothing_may_be_impossible() -> None:
    logits, target, _ = pair(SIZE)
    with torch.no_grad():
        logits[:, 0] = -torch.inf  # a class that no valid pixel has
    target[target == 0] = 255
    expected = F.cross_entropy(logits, target, ignore_index=255, reduction="sum")
    assert expected.isfinite()
    assert_same(logits, ours(logits, target), expected)


def test_gradients_accumulate() -> None:
    logits, target, _ = pair((6, 5))
    for _ in range(2):
        (2 * ours(logits, target)).backward()
    (expected,) = torch.autograd.grad(4 * plain(logits, target), logits)
    torch.testing.assert_close(logits.grad, expected)


def test_a_second_derivative_is_refused() -> None:
    logits, target, _ = pair((6, 5))
    (gradient,) = torch.autograd.grad(ours(logits, target) ** 2, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Largest(TorchDispatchMode):
    """The largest tensor that any op makes, in elements; views are not counted."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("loss", [ours, plain])
def test_only_the_plain_form_holds_all_scores(
    loss: Callable[[Tensor, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raised, "_RAISED", 200)
    logits, target, _ = pair((6, 5))
    with Largest() as largest:
        loss(logits, target).backward()
    # a strip, the logits, or one number per pixel
    assert (largest.numel <= max(200, logits.numel(), target.numel())) == (loss is ours)


def test_without_gradients_none_is_kept() -> None:
    logits, target, _ = pair((6, 5))
    expected = ours(logits, target)
    assert expected.requires_grad
    with torch.no_grad():
        value = ours(logits, target)
    assert not value.requires_grad
    assert not ours(logits.detach(), target).requires_grad
    assert value == expected
    for grad in (True, False):
        with Largest() as largest, torch.set_grad_enabled(grad):
            ours(logits, target[:, :1, :1])
        assert (largest.numel >= logits.numel()) == grad


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("size", [(6, 5), (40, 31)])
def test_probability_of_the_own_class(size: tuple[int, int]) -> None:
    logits, target, _ = pair(size)
    expected = F.interpolate(logits, size=SIZE, mode="bilinear").softmax(1)
    found = true_log_probability(logits, target, ignore_index=255)
    assert not found.requires_grad
    for b, i, j in torch.cartesian_prod(torch.arange(3), torch.arange(23), torch.arange(17)).tolist():
        y = int(target[b, i, j])
        assert found[b, i, j].exp().item() == pytest.approx(1 if y == 255 else expected[b, y, i, j].item(), rel=1e-10)


@pytest.mark.filterwarnings("default")  # torch's own, about what it does itself
def test_inside_a_compiled_function() -> None:
    torch.manual_seed(0)
    net, loss = nn.Conv2d(3, 4, 3, stride=2), CrossEntropy(ClassInfo(tuple("abcd")), class_weights=(1, 2, 3, 4))
    image, target = torch.randn(2, 3, 12, 12), torch.randint(4, (2, 12, 12))

    def step(image: Tensor, target: Tensor) -> Tensor:
        return 2 * loss(net(image).relu(), target)

    values = [step(image, target), torch.compile(step, backend="aot_eager")(image, target)]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*(torch.autograd.grad(value, net.weight)[0] for value in values))
