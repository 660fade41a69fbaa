from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lightning_atrous.layers import ConvNormAct, ImagePool, Normalize, SeparableConv, raised_rows, resize, rows_behind
from lightning_atrous.types import Preprocess


def test_normalize_is_the_textbook_formula_for_uint8_and_float() -> None:
    preprocess = Preprocess((0.1, 0.5, 0.4, 0.2), (0.3, 0.2, 0.9, 1.0))
    image = torch.randint(0, 256, (2, 4, 5, 7), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
    expected = (image / 255 - mean) / std
    normalize = Normalize(preprocess)
    torch.testing.assert_close(normalize(image), expected)
    torch.testing.assert_close(normalize(image / 255), expected)
    assert not normalize.state_dict()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (torch.zeros(3, 8, 8), r"expected images of shape \(B, 3, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), r"got \(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "uint8 image in 0..255 or a floating one in 0..1"),
    ],
)
def test_normalize_refuses(image: torch.Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Normalize(Preprocess())(image)


@pytest.mark.parametrize("layer", [ConvNormAct, SeparableConv])
@pytest.mark.parametrize("rate", [1, 2, 18])
def test_size_stays_at_any_rate_and_the_rate_can_move(layer: type, rate: int) -> None:
    x = torch.randn(2, 4, 9, 13)
    built, moved = layer(4, 6, 3, dilation=rate).eval(), layer(4, 6, 3).eval()
    moved.load_state_dict(built.state_dict())
    moved.rate = rate
    assert moved.rate == rate
    assert built(x).shape == (2, 6, 9, 13)
    torch.testing.assert_close(moved(x), built(x))


def test_image_pool_trains_with_one_image_and_is_a_mean() -> None:
    pool = ImagePool(4, 6).train()
    out = pool(torch.randn(1, 4, 5, 3))
    assert out.shape == (1, 6, 5, 3)
    out.sum().backward()
    assert pool.conv.weight.grad.isfinite().all()
    assert int(pool.norm.num_batches_tracked) == 0
    pool(torch.randn(2, 4, 5, 3))
    assert int(pool.norm.num_batches_tracked) == 1
    bare = ImagePool(4, 6, norm=False)
    x = torch.randn(2, 4, 5, 3)
    expected = F.relu(bare.conv(F.adaptive_avg_pool2d(x, 1))).expand(-1, -1, 5, 3)
    torch.testing.assert_close(bare(x), expected)


@pytest.mark.parametrize("size", [(9, 12), (20, 7), (5, 6), (5, 40), (1, 1)])
@pytest.mark.parametrize("height", [5, 1])
@pytest.mark.parametrize("deterministic", [False, True])
def test_raised_rows_are_rows_of_the_raised_map(size: tuple[int, int], height: int, deterministic: bool) -> None:
    x = torch.randn(2, 3, height, 6, dtype=torch.float64)
    expected = resize(x, size)
    torch.use_deterministic_algorithms(deterministic)
    try:
        for first in range(size[0]):
            for last in range(first + 1, size[0] + 1):
                top, bottom = rows_behind(first, last, height, size[0])
                rows = raised_rows(x, first, last, size)
                torch.testing.assert_close(rows, expected[..., first:last, :])
                only = raised_rows(x[..., top:bottom, :], first, last, size, above=top, height=height)
                torch.testing.assert_close(only, rows, rtol=0, atol=0)
    finally:
        torch.use_deterministic_algorithms(False)


def test_resize_to_the_same_size_is_the_same_tensor() -> None:
    x = torch.randn(1, 2, 4, 5)
    assert resize(x, (4, 5)) is x
    assert resize(x, (8, 3)).shape == (1, 2, 8, 3)
    # areas aligned: doubling keeps the mean
    torch.testing.assert_close(resize(torch.ones(1, 1, 3, 3), (6, 6)), torch.ones(1, 1, 6, 6))
