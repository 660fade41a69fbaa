"""Changes of colour against torchvision's, one by one and drawn at random, and against Python's own HSV."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from lightning_atrous.colours import brightness, contrast, hue, saturation
from lightning_atrous.images import RGB
from lightning_atrous.transforms import distort

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = [
    (brightness, F.adjust_brightness_image, (0.0, 0.875, 1.0, 1.125, 3.0)),
    (contrast, F.adjust_contrast_image, (0.0, 0.5, 1.0, 1.5, 3.0)),
    (saturation, F.adjust_saturation_image, (0.0, 0.5, 1.0, 1.5, 3.0)),
    (hue, F.adjust_hue_image, (-1 / 12, -0.05, -0.001, 0.0, 0.02, 0.05, 1 / 12)),
]


def picture(height: int = 40, width: int = 60, *, seed: int = 0) -> Tensor:
    """Bytes ``(3, H, W)``: smooth, with noise, white, black, grey and pure colours in it."""
    generator = torch.Generator().manual_seed(seed)
    smooth = F.resize_image(torch.rand(3, 5, 7, generator=generator), [height, width], antialias=True)
    image = (smooth * 1.4 - 0.2 + 0.03 * torch.randn(3, height, width, generator=generator)).clamp(0, 1)
    image[:, :2] = torch.tensor([0.0, 1.0]).repeat(width // 2)
    image[:, 2:4] = torch.rand(width, generator=generator)
    image[:, 4:8] = torch.randint(0, 2, (3, 4, width), generator=generator).float()
    return (image * 255).round().to(torch.uint8)


@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize(("ours", "theirs", "amounts"), PAIRS)
def test_each_change_is_torchvisions(
    ours: Callable[[Tensor, float], Tensor],
    theirs: Callable[[Tensor, float], Tensor],
    amounts: tuple[float, ...],
    scale: float,
) -> None:
    image = picture().float() / 255 * scale
    before = image.clone()
    for amount in amounts:
        torch.testing.assert_close(ours(image, amount), theirs(image, amount), rtol=0, atol=3e-6)
    assert torch.equal(image, before)


def test_hue_is_that_of_hsv() -> None:
    colours = torch.cat([torch.rand(300, 3), torch.randint(0, 3, (100, 3)) / 2]).double()
    for turn in (-1 / 12, -0.03, 0.01, 1 / 12):
        expected = []
        for colour in colours.tolist():
            h, s, v = colorsys.rgb_to_hsv(*colour)
            expected.append(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
        turned = hue(colours.T[..., None], turn)[..., 0].T
        torch.testing.assert_close(turned, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_threads_change_no_pixel() -> None:
    image = picture(300, 500).float() / 255
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append([change(image, amounts[-2]) for change, _, amounts in PAIRS])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def chain(image: Tensor, p: float, seed: int) -> Tensor:
    """The four changes by torchvision's functions, drawn as `distort` draws them."""
    generator = torch.Generator().manual_seed(seed)
    ends = ((0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05))
    for (_, adjust, _), (low, high) in zip(PAIRS, ends, strict=True):
        if float(torch.rand((), generator=generator)) < p:
            image = adjust(image, low + (high - low) * float(torch.rand((), generator=generator)))
    return image


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_bytes_are_rounded_once(p: float) -> None:
    """Half a level from torchvision's changes of floats; from those of bytes, which cut at every step, more."""
    darker = []
    for seed in range(60):
        image = picture(seed=seed)
        given = image.permute(1, 2, 0).contiguous().permute(2, 0, 1) if seed % 2 else image  # as out of a file
        result = distort(given, p, torch.Generator().manual_seed(seed))
        assert result.dtype == torch.uint8
        exact = chain(image.double() / 255, p, seed) * 255
        assert float((result - exact).abs().max()) < 0.501
        cut = result.int() - chain(image, p, seed).int()
        assert int(cut.abs().max()) <= (6 if p else 0)
        darker.append(float(cut.float().mean()))
    assert max(map(abs, darker)) < 2.5
    assert sum(darker) / len(darker) == pytest.approx({0.0: 0.0, 0.5: 0.6, 1.0: 1.3}[p], abs=0.2)


class NotPermuted(v2.RandomPhotometricDistort):
    """Torchvision's own, without the permutation of channels."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {**super().make_params(flat_inputs), "channel_permutation": None}


def test_the_distribution_is_torchvisions() -> None:
    """Over many draws, to within a level of means and deviations, and 1 % of the pixels in other bins of 16."""
    image = picture(24, 36)
    torch.manual_seed(0)
    given, theirs = tv_tensors.Image(image.float() / 255), NotPermuted()
    images = {
        "ours": [distort(image, 0.5) for _ in range(4000)],
        "theirs": [(theirs(given).as_subclass(Tensor) * 255).round().to(torch.uint8) for _ in range(4000)],
    }
    drawn = {name: torch.stack(each).float() for name, each in images.items()}
    for moment in (
        lambda x: x.mean((0, 2, 3)),  # per channel
        lambda x: x.std((0, 2, 3)),
        lambda x: x.mean((2, 3)).std(0),  # from image to image
        lambda x: x.std((2, 3)).mean(0),  # within images
    ):
        torch.testing.assert_close(moment(drawn["ours"]), moment(drawn["theirs"]), rtol=0, atol=1)
    for channel in range(3):
        ours, theirs_ = (torch.histc(x[:, channel], 16, 0, 256) / x[:, channel].numel() for x in drawn.values())
        assert float((ours - theirs_).abs().sum() / 2) < 0.01


@pytest.mark.slow
@pytest.mark.skipif("CAMVID_ROOT" not in os.environ, reason="CAMVID_ROOT names no folder with the real CamVid")
def test_photographs_are_changed_as_torchvision_does() -> None:
    """About one level lighter than its changes of bytes, six at the most; half a level from those of floats."""
    lighter = []
    for seed, path in enumerate(sorted(Path(os.environ["CAMVID_ROOT"], "train").glob("*.png"))[::12]):
        image = RGB(path).as_subclass(Tensor)
        result = distort(image, 1, torch.Generator().manual_seed(seed)).int()
        assert float((result - chain(image.double() / 255, 1, seed) * 255).abs().max()) < 0.501
        difference = result - chain(image, 1, seed).int()
        assert int(difference.abs().max()) <= 6
        lighter.append(float(difference.float().mean()))
    assert sum(lighter) / len(lighter) == pytest.approx(1.3, abs=0.3)
