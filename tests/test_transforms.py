"""The joint transforms: alignment, labels, sizes, and what a seed decides."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torchvision import tv_tensors

from lightning_atrous.transforms import GREY, Augment, Sample, distort, largest_share, window


def make(image: torch.Tensor, mask: torch.Tensor) -> Sample:
    return Sample(image=tv_tensors.Image(image), mask=tv_tensors.Mask(mask), name="a")


def random_sample(height: int, width: int, *, dtype: torch.dtype = torch.uint8) -> Sample:
    g = torch.Generator().manual_seed(height * 1000 + width)
    image = torch.randint(0, 256, (3, height, width), generator=g, dtype=torch.uint8)
    mask = torch.randint(0, 3, (height, width), generator=g).to(dtype) * 2
    return make(image, mask)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (7, 13), (64, 48), (131, 257)])
@pytest.mark.parametrize("crop", [(2, 2), (33, 65), (64, 48)])
@pytest.mark.parametrize("scale", [(0.5, 2.0), (1.0, 1.0), (0.01, 0.01), (40.0, 40.0)])
def test_any_image_gives_the_crop_and_no_new_labels(
    size: tuple[int, int], crop: tuple[int, int], scale: tuple[float, float]
) -> None:
    sample = random_sample(*size)
    for seed in range(4):
        out = Augment(crop, scale)(sample, seeded(seed))
        assert out["image"].shape == (3, *crop)
        assert out["mask"].shape == crop
        assert (out["image"].dtype, out["mask"].dtype) == (torch.uint8, torch.uint8)
        assert isinstance(out["image"], tv_tensors.Image)
        assert isinstance(out["mask"], tv_tensors.Mask)
        assert set(out["mask"].unique().tolist()) <= set(sample["mask"].unique().tolist()) | {255}


@pytest.mark.parametrize(("dtype", "ignore"), [(torch.uint8, 255), (torch.int64, -100), (torch.int64, 1000)])
def test_padding_is_grey_and_ignored_and_only_where_the_image_ends(dtype: torch.dtype, ignore: int) -> None:
    sample = make(torch.full((3, 20, 30), 200, dtype=torch.uint8), torch.full((20, 30), 4, dtype=dtype))
    augment = Augment((50, 41), (1.0, 1.0), distort=0)
    corners = set()
    for seed in range(20):
        out = augment(sample, seeded(seed), ignore_index=ignore)
        image, mask = out["image"], out["mask"]
        assert set(mask.unique().tolist()) == {4, ignore}
        assert int((mask == 4).sum()) == 20 * 30
        assert bool((image[:, mask == 4] == 200).all())
        assert bool((image[:, mask == ignore] == GREY).all())
        corners.add(tuple((mask == 4).nonzero()[0].tolist()))
    assert len(corners) > 10  # the image is put anywhere in the crop


def test_an_image_of_void_stays_void() -> None:
    sample = make(torch.zeros(3, 40, 40, dtype=torch.uint8), torch.full((40, 40), 255, dtype=torch.uint8))
    assert bool((Augment((32, 32))(sample, seeded(0))["mask"] == 255).all())


@pytest.mark.parametrize("scale", [0.6, 0.71, 1.0, 1.37, 2.0])
def test_image_and_mask_stay_aligned(scale: float) -> None:
    """A disk's centre of mass is the same in both: they differ by 0.05 pixels at most, NEAREST by more."""
    y, x = torch.meshgrid(torch.arange(120), torch.arange(140), indexing="ij")
    augment = Augment((250, 250), (scale, scale), flip=0, distort=0)
    shifts = []
    for seed in range(16):
        cy, cx = (50 + 20 * torch.rand(2, generator=seeded(seed))).tolist()
        disk = ((y - cy) ** 2 + (x - cx) ** 2 < 25**2).to(torch.uint8)
        out = augment(make((disk * 255).expand(3, -1, -1).contiguous(), disk), seeded(seed))
        valid = out["mask"] != 255
        image = (out["image"][0].float() / 255 * valid).as_subclass(torch.Tensor)
        mask = (out["mask"] == 1).as_subclass(torch.Tensor).float()
        assert mask.sum() == pytest.approx(3.1416 * (25 * scale) ** 2, rel=0.05)
        for axis in (0, 1):
            place = torch.arange(250.0).unsqueeze(1 - axis)
            shifts.append(float((image * place).sum() / image.sum() - (mask * place).sum() / mask.sum()))
        assert float((image - mask).abs().mean()) < 0.01
    assert max(map(abs, shifts)) < 0.3
    assert abs(sum(shifts) / len(shifts)) < 0.05


def test_at_scale_one_the_crop_is_a_piece_of_the_image() -> None:
    sample = random_sample(40, 50)
    pieces = {}
    for top in range(21):
        for left in range(31):
            pieces[sample["image"][:, top : top + 20, left : left + 20].numpy().tobytes()] = (top, left)
    found = set()
    for seed in range(60):
        out = Augment((20, 20), (1.0, 1.0), flip=0, distort=0)(sample, seeded(seed))
        top, left = pieces[out["image"].numpy().tobytes()]
        assert torch.equal(out["mask"], sample["mask"][top : top + 20, left : left + 20])
        found.add((top, left))
    assert len(found) > 40


def test_flip_is_certain_at_one_and_absent_at_zero() -> None:
    sample = random_sample(16, 16)
    plain = Augment((16, 16), (1.0, 1.0), flip=0, distort=0)(sample)
    assert torch.equal(plain["image"], sample["image"])
    assert torch.equal(plain["mask"], sample["mask"])
    flipped = Augment((16, 16), (1.0, 1.0), flip=1, distort=0)(sample)
    assert torch.equal(flipped["image"], sample["image"].flip(-1))
    assert torch.equal(flipped["mask"], sample["mask"].flip(-1))


def test_distortion_changes_colours_within_bounds_and_nothing_else() -> None:
    sample = random_sample(24, 24)
    before = sample["image"].clone()
    out = Augment((24, 24), (1.0, 1.0), flip=0, distort=1)(sample, seeded(0))
    assert not torch.equal(out["image"], sample["image"])
    assert torch.equal(out["mask"], sample["mask"])
    assert torch.equal(sample["image"], before)  # the given sample is left as it is
    grey = torch.full((3, 8, 8), 100, dtype=torch.uint8)
    levels = [int(distort(grey, 1, seeded(seed))[0, 0, 0]) for seed in range(50)]
    assert 85 <= min(levels) < 95  # only brightness moves an even grey: 0.875 to 1.125
    assert 105 < max(levels) <= 114


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("size", [(20, 30), (90, 70)])
def test_any_channels_and_floats_are_augmented_alike(channels: int, dtype: torch.dtype, size: tuple[int, int]) -> None:
    """Floats in 0..1 come out as bytes do, to within their rounding; images smaller than the crop too."""
    octets = torch.randint(0, 256, (channels, *size), generator=seeded(1), dtype=torch.uint8)
    image = octets if dtype == torch.uint8 else octets / 255
    mask = torch.zeros(size, dtype=torch.uint8)
    for seed in range(4):
        out = Augment((64, 48), distort=1)(make(image, mask), seeded(seed))
        same = Augment((64, 48), distort=1)(make(octets, mask), seeded(seed))
        assert (out["image"].dtype, out["image"].shape) == (dtype, (channels, 64, 48))
        assert torch.equal(out["mask"], same["mask"])
        result = out["image"].as_subclass(torch.Tensor)
        padding = result[:, out["mask"] == 255]
        assert bool((padding == (GREY if dtype == torch.uint8 else GREY / 255)).all())
        if dtype == torch.float32:
            assert 0 <= float(result.min()) <= float(result.max()) <= 1
            difference = result - same["image"].as_subclass(torch.Tensor) / 255
            assert float(difference.abs().mean()) < 0.005


def test_contrast_is_about_the_mean_of_each_channel() -> None:
    """Of six channels, each is changed as a grey image of its own is."""
    image = torch.rand(6, 9, 9, generator=seeded(0)) * 0.5 + 0.2
    together = distort(image, 1, seeded(5))
    for i in range(6):
        torch.testing.assert_close(together[i : i + 1], distort(image[i : i + 1], 1, seeded(5)))
    assert not torch.allclose(together, image)


def test_the_seed_decides_all_and_the_global_generator_nothing() -> None:
    sample, augment = random_sample(60, 60), Augment((32, 32))
    first = augment(sample, seeded(3))
    state = torch.get_rng_state()
    torch.rand(5)
    second = augment(sample, seeded(3))
    assert torch.equal(first["image"], second["image"])
    assert torch.equal(first["mask"], second["mask"])
    torch.set_rng_state(state)
    augment(sample, seeded(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augment(sample, seeded(4))["image"], first["image"])


@pytest.mark.parametrize("length", [1, 5, 64, 101])
@pytest.mark.parametrize("crop", [2, 8, 65])
def test_windows_are_inside_and_reach_both_ends(length: int, crop: int) -> None:
    for scale in (0.05, 0.5, 0.9, 1.0, 1.7, 30.0):
        ends = set()
        for position in torch.linspace(0, 0.9999, 300).tolist():
            piece, (before, after) = window(length, crop, scale, position)
            assert 0 <= piece.start < piece.stop <= length
            assert before >= 0
            assert after >= 0
            assert crop - before - after >= 2
            ends |= {
                ("start", piece.start == 0 and before == 0),
                ("stop", piece.stop == length and after == 0),
            }
        if length * scale >= 1 and length <= 300:
            assert {("start", True), ("stop", True)} <= ends


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": (-3, 8)}, "crop must be a height and a width of at least 2 pixels, got (-3, 8)"),
        ({"crop": (8, 1)}, "crop must be a height and a width"),
        ({"crop": (8,)}, "crop must be a height and a width"),
        ({"scale": (2.0, 0.5)}, "scale must be two positive factors, the lower first, got (2.0, 0.5)"),
        ({"scale": (0.0, 1.0)}, "scale must be two positive factors"),
        ({"scale": (1.0, float("inf"))}, "scale must be two positive factors"),
        ({"flip": 1.5}, "flip is a probability and must lie in 0..1, got 1.5"),
        ({"distort": -0.1}, "distort is a probability"),
        ({"max_share": 0.0}, "max_share must lie between 0 and 1, got 0.0; try 0.75, or null to take every crop"),
        ({"max_share": 1.0}, "max_share must lie between 0 and 1, got 1.0"),
        ({"max_share": float("nan")}, "max_share must lie between 0 and 1, got nan"),
        ({"flip": float("nan")}, "flip is a probability"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Augment(**{"crop": (8, 8), **options})


# --- max_share


def patches(size: int = 240, *, dtype: torch.dtype = torch.uint8) -> Sample:
    """Class 0 with a square of class 1 and one of class 2 in it, and a band that is ignored."""
    sample = random_sample(size, size)
    mask = torch.zeros(size, size, dtype=dtype)
    mask[40:110, 40:110], mask[130:200, 60:150], mask[-20:] = 1, 2, 255
    return make(sample["image"].as_subclass(torch.Tensor), mask)


def shares(mask: torch.Tensor) -> list[float]:
    """Of the classes, the largest first, each counted on its own."""
    labels = [label for label in mask.flatten().tolist() if label != 255]
    return sorted((labels.count(label) / len(labels) for label in set(labels)), reverse=True)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_the_first_crop_that_max_share_allows_is_taken_or_the_tenth(dtype: torch.dtype) -> None:
    """At scale 1 each try can be cut out of the mask by hand."""
    sample, limit, refused = patches(dtype=dtype), 0.6, set()
    augment = Augment((48, 48), (1.0, 1.0), flip=0, distort=0, max_share=limit)
    for seed in range(60):
        generator = seeded(seed)
        torch.rand((), generator=generator)  # the scale
        tries = 0
        for _ in range(10):
            y, x = (window(240, 48, 1.0, float(torch.rand((), generator=generator)))[0] for _ in range(2))
            if max(shares(sample["mask"][y, x]), default=1) <= limit:
                break
            tries += 1
        out = augment(sample, seeded(seed))
        assert torch.equal(out["mask"], sample["mask"][y, x])
        assert torch.equal(out["image"], sample["image"][:, y, x])
        refused.add(tries)
    assert {0, 1, 10} <= refused  # taken at once, later, and never


@pytest.mark.usefixtures("one_thread")
def test_a_crop_that_max_share_allows_is_the_one_without_it() -> None:
    sample, same = patches(), 0
    for seed in range(40):
        first = Augment((48, 48))(sample, seeded(seed))
        chosen = Augment((48, 48), max_share=0.8)(sample, seeded(seed))
        if max(shares(first["mask"]), default=1) <= 0.8:
            assert torch.equal(chosen["image"], first["image"])
            assert torch.equal(chosen["mask"], first["mask"])
            same += 1
    assert 5 < same < 35


@pytest.mark.parametrize(("dtype", "ignore"), [(torch.uint8, 255), (torch.uint8, 2), (torch.int64, -100)])
def test_the_largest_share_is_of_what_counts(dtype: torch.dtype, ignore: int) -> None:
    mask = torch.tensor([[0, 0, 0, 1], [1, 7, ignore, ignore]], dtype=dtype)
    assert largest_share(mask, ignore) == 0.5
    assert largest_share(mask[1:, 2:], ignore) == math.inf
    assert largest_share(mask[:, 3:][:1], ignore) == 1
