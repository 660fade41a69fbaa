"""Windows, scales and flips against the whole image, against plain PyTorch at full size, and in bounded memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import PEAK_KIB, environment
from torch import Tensor, nn

from lightning_atrous.inference import WHOLE, Inference, average, slide, winners

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(height: int, width: int, b: int = 1) -> Tensor:
    return torch.randint(0, 256, (b, 3, height, width), dtype=torch.uint8)


class Pointwise(nn.Module):
    """Logits at a stride that see nothing but their own cell; the last cell may be cut by the image's border."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride, self.layer = stride, nn.Conv2d(3, 5, 1).double()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(tuple(image.shape))
        return self.layer(F.avg_pool2d(image.double(), self.stride, ceil_mode=True))


class Context(nn.Module):
    """Logits at stride 4 with zero padding: the border of whatever is seen changes what is near it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, stride=4), nn.ReLU(), nn.Conv2d(8, 5, 5, padding=2)
        ).double()

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image.double() / (1 if image.is_floating_point() else 255))


@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.7])
@pytest.mark.parametrize("stride", [1, 4, 16])
@pytest.mark.parametrize("size", [(96, 160), (101, 135), (40, 200)], ids=str)
@torch.no_grad()
def test_without_context_windows_give_what_the_whole_gives(
    size: tuple[int, int], stride: int, overlap: float, at_once: int
) -> None:
    model, image = Pointwise(stride), picture(*size, b=2)
    merged = slide(model, image, window=(64, 48), overlap=overlap, grid=16, at_once=at_once)
    sizes = {shape[-2:] for shape in model.seen}
    assert all(height < 64 + 16 and width < 48 + 16 for height, width in sizes)
    assert all(height >= min(64, size[0]) and width >= min(48, size[1]) for height, width in sizes)
    assert max(shape[0] for shape in model.seen) <= 2 * at_once
    torch.testing.assert_close(merged, model(image), rtol=1e-10, atol=1e-10)


def test_neighbours_share_what_was_asked_for() -> None:
    """Where windows of 64 begin on 200 pixels: at every 32, and at the far border's last multiple of 16."""
    begins: list[int] = []

    def network(image: Tensor) -> Tensor:
        begins.append(int(image[0, 0, 0, 0]))
        return image[:, :1, ::16, ::16].double()

    columns = torch.arange(200, dtype=torch.uint8).expand(1, 3, 8, 200)
    for overlap, expected in [(0.5, [0, 32, 64, 96, 128]), (0.0, [0, 64, 128]), (0.4, [0, 32, 64, 96, 128])]:
        begins.clear()
        slide(network, columns, window=(64, 64), overlap=overlap, grid=16)
        assert sorted(begins) == expected


@torch.no_grad()
def test_an_image_that_fits_into_the_window_is_taken_as_it_is() -> None:
    model = Context()
    for size in [(64, 64), (50, 30), (70, 79)]:  # the last is larger by less than a cell
        image = picture(*size)
        assert torch.equal(slide(model, image, window=(64, 64), grid=16), model(image))
        assert torch.equal(
            Inference(window=(64, 64)).predict(model, image, grid=16), WHOLE.predict(model, image, grid=16)
        )


@torch.no_grad()
def test_there_is_no_seam() -> None:
    """Of a grey image, neighbouring logits differ where windows are cut hard, and hardly where they are blended."""
    model, image = Context(), torch.full((1, 3, 384, 384), 128, dtype=torch.uint8)

    def largest_step(overlap: float) -> float:
        logits = slide(model, image, window=(128, 128), overlap=overlap, grid=16)[..., 4:-4, 4:-4]
        return max(logits.diff(dim=2).abs().max().item(), logits.diff(dim=3).abs().max().item())

    assert largest_step(0.5) < 0.1 * largest_step(0.0)


@torch.no_grad()
def test_windows_move_with_the_image() -> None:
    """An image moved by a step of the windows gives logits moved as much, away from its borders."""
    model, scene = Context(), picture(256, 320)
    here, there = (slide(model, scene[..., x : x + 256], window=(64, 64), grid=16) for x in (0, 32))
    torch.testing.assert_close(here[..., 8 + 16 : -16], there[..., 16 : -16 - 8])


@pytest.mark.parametrize("window", [None, (48, 64)])
@pytest.mark.parametrize("size", [(64, 96), (61, 83)])
@torch.no_grad()
def test_scales_and_flips_are_the_mean_of_the_probabilities_at_full_size(
    size: tuple[int, int], window: tuple[int, int] | None
) -> None:
    model, image, scales = Context(), picture(*size, b=2), (0.5, 1.0, 1.75)
    inference = Inference(window=window, scales=scales, flip=True)
    probabilities = []
    for scale in scales:
        pixels = image.double() / 255
        if scale != 1:
            target = [round(side * scale) for side in size]
            pixels = F.interpolate(pixels.float(), target, mode="bilinear", antialias=True)
        for flipped in (False, True):
            seen = pixels.flip(-1) if flipped else pixels
            logits = model(seen) if window is None else slide(model, seen, window=window, grid=16)
            logits = F.interpolate(logits.flip(-1) if flipped else logits, size, mode="bilinear")
            probabilities.append(logits.softmax(1))
    expected = torch.stack(probabilities).mean(0)
    views = inference.views(model, image, grid=16)
    assert len(views) == 6
    torch.testing.assert_close(average(views, size), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(average(views, size, 7, 20), expected[:, :, 7:20], rtol=1e-6, atol=1e-7)
    best = expected.topk(2, dim=1).values
    sure = best[:, 0] - best[:, 1] > 1e-6
    assert sure.float().mean() > 0.99
    assert torch.equal(winners(views, size)[sure], expected.argmax(1)[sure])
    assert torch.equal(inference.predict(model, image, grid=16), winners(views, size))


def test_rows_at_a_time_are_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    views = torch.randn(3, 2, 5, 9, 13, dtype=torch.float64)
    at_once = winners(tuple(views), (70, 90))
    monkeypatch.setattr("lightning_atrous.inference._RAISED", 5 * 90 * 4)  # four rows, then two
    assert torch.equal(winners(tuple(views), (70, 90)), at_once)


@pytest.mark.parametrize("window", [None, (32, 32)])
@torch.no_grad()
def test_the_flipped_image_gives_the_flipped_prediction(window: tuple[int, int] | None) -> None:
    model, image = Context(), picture(64, 96)
    inference = Inference(window=window, scales=(0.75, 1.0), flip=True)
    assert not torch.equal(WHOLE.predict(model, image.flip(-1), grid=16), WHOLE.predict(model, image, grid=16).flip(-1))
    one, other = (inference.views(model, seen, grid=16) for seen in (image, image.flip(-1)))
    # but for the rounding of the image at another size, which is in single precision
    torch.testing.assert_close(average(one, (64, 96)), average(other, (64, 96)).flip(-1), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_half_precision_is_blended_in_single() -> None:
    model, image = Context().float(), torch.rand(1, 3, 96, 96)
    model.forward = model.layers.forward
    with torch.autocast("cpu", torch.bfloat16):
        assert model(image).dtype == torch.bfloat16
        merged = slide(model, image, window=(64, 64), grid=16)
        probabilities = average(Inference(flip=True).views(model, image, grid=16), (96, 96))
    assert merged.dtype == probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1, 96, 96))


def test_what_is_refused() -> None:
    for options, says in [
        ({"window": (0, 64)}, "a height and a width of at least 1"),
        ({"window": (64,)}, "a height and a width"),
        ({"overlap": 1.0}, "the overlap of windows is in 0..1 and less than 1, got 1.0"),
        ({"scales": ()}, "scales are positive, and at least one"),
        ({"scales": (1.0, -0.5)}, r"scales are positive, and at least one, got \(1.0, -0.5\)"),
        ({"windows_at_once": 0}, "windows_at_once must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=says):
            Inference(**options)
    with pytest.raises(ValueError, match=r"769×769 pixels do not lie on the grid of output stride 16; .* as 768 768"):
        Inference(window=(769, 769)).predict(Context(), picture(800, 800), grid=16)
    with pytest.raises(ValueError, match="a window of 64 pixels gives 10 logits, which do not tile"):
        slide(lambda image: image[:, :1, ::7, ::7].double(), picture(128, 128), window=(64, 64), grid=16)
    with pytest.raises(ValueError, match="do not tile: score images whole"):
        slide(
            lambda image: image.new_zeros(1, 1, 4, (image.shape[-1] % 64) ** 2 + 4), picture(64, 135), window=(64, 64)
        )


PEAK = f"""
import sys
import torch
from torch import nn
from lightning_atrous.inference import Inference

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Conv2d(3, 19, 4, stride=4)
size = int(sys.argv[1])
inference = Inference(window=(512, 512), scales=eval(sys.argv[2]), flip=sys.argv[3] == "flip")
image = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
with torch.no_grad():
    found = inference.predict(lambda pixels: model(pixels.float() / 255), image, grid=32)
assert found.shape == (1, size, size)
print({PEAK_KIB} // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("scales", "flip", "limit"), [((1.0,), "no", 1000), ((0.5, 1.0), "flip", 1100)])
def test_all_scores_at_full_size_are_never_in_memory(scales: tuple[float, ...], flip: str, limit: int) -> None:
    """In MiB, over what a small image takes; the scores of 19 classes at 4096×4096 are 1216."""

    def peak(size: int) -> int:
        arguments = [sys.executable, "-c", PEAK, str(size), repr(scales), flip]
        done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert peak(4096) - peak(512) < limit
