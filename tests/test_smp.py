"""SMP's decoders over our backbones, against SMP's own models."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.heads import Head, create_head
from lightning_atrous.model import SegmentationModel
from lightning_atrous.types import FeatureInfo, Features

CLASSES = 3
MODELS = {
    "unet": smp.Unet,
    "unetplusplus": smp.UnetPlusPlus,
    "linknet": smp.Linknet,
    "manet": smp.MAnet,
    "fpn": smp.FPN,
    "pan": functools.partial(smp.PAN, encoder_output_stride=32),
    "upernet": smp.UPerNet,
    "segformer": smp.Segformer,
}
TO_STRIDE_4 = ("fpn", "pan", "upernet", "segformer")
DOUBLING = ("unetplusplus", "linknet", "manet", "fpn")
ANY_STRIDE = ("unet", "pan", "upernet", "segformer")
SMALL = {"channels": (24, 20, 16, 12, 8)}
OTHER_OPTIONS: dict[str, dict[str, Any]] = {
    "unet": {"attention_type": "scse", "interpolation": "bilinear", "channels": (48, 40, 32, 24, 16)},
    "unetplusplus": {"use_norm": "instancenorm", **SMALL},
    "linknet": {"use_norm": "identity"},
    "manet": {"pab_channels": 16, "interpolation": "bicubic", **SMALL},
    "fpn": {"merge_policy": "cat", "pyramid_channels": 24, "segmentation_channels": 32, "interpolation": "area"},
    "pan": {"channels": 12, "interpolation": "nearest"},
    "upernet": {"channels": 24, "use_norm": "identity"},
    "segformer": {"segmentation_channels": 24},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def backbone(name: str, output_stride: int | None = None) -> TimmBackbone:
    return TimmBackbone(name, output_stride=output_stride, pretrained=False)


def smp_model(name: str, encoder: str, options: dict[str, Any]) -> torch.nn.Module:
    """SMP's own, every tensor of it drawn, so that none has a value that hides a mistake."""
    theirs = {f"decoder_{option}": value for option, value in options.items()}
    if options.get("use_norm") == "instancenorm":
        theirs["decoder_use_norm"] = {"type": "instancenorm", "affine": True}
    model = MODELS[name](encoder_name=encoder, encoder_weights=None, classes=CLASSES, **theirs)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.ndim == 1:
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    return model.double().eval()


def ours_from(model: torch.nn.Module, name: str, encoder: str, options: dict[str, Any]) -> tuple[TimmBackbone, Head]:
    """The same network of our parts, every tensor taken from SMP's."""
    weights = model.state_dict()
    net = backbone(encoder.removeprefix("tu-"))
    keys = {key.replace(".", "_"): key for key in net.net.state_dict()}
    encoder_weights = {
        keys[key.removeprefix("encoder.").removeprefix("model.").replace(".", "_")]: tensor
        for key, tensor in weights.items()
        if key.startswith("encoder.")
    }
    net.net.load_state_dict(encoder_weights, strict=True)
    upsampling = 4 if name in TO_STRIDE_4 else 1
    head = create_head(name, net.info, CLASSES, upsampling=upsampling, **options)
    head.load_state_dict(
        {
            key.replace("segmentation_head.0.", "classifier."): tensor
            for key, tensor in weights.items()
            if not key.startswith("encoder.")
        },
        strict=True,
    )
    return net.double().eval(), head.double().eval()


def assert_parity(name: str, encoder: str, options: dict[str, Any], size: tuple[int, int], **head: Any) -> None:
    model = smp_model(name, encoder, options)
    net, ours = ours_from(model, name, encoder, options | head)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected, logits = model(image), ours(net(image))
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", ["defaults", "others"])
def test_logits_are_those_of_smps_model(name: str, options: str) -> None:
    # pan's pyramid wants 8 pixels a side of the last map
    size = (256, 288) if name == "pan" else (64, 96)
    assert_parity(name, "resnet18", OTHER_OPTIONS[name] if options == "others" else {}, size)


@pytest.mark.parametrize("name", MODELS)
def test_no_level_of_stride_2_is_as_in_smp(name: str) -> None:
    size = (256, 288) if name == "pan" else (64, 96)
    assert_parity(name, "tu-test_convnext", OTHER_OPTIONS[name], size)


def test_timm_encoders_of_smp_are_ours() -> None:
    assert_parity("unet", "tu-resnet18", SMALL, (64, 96))


def test_a_level_of_stride_1_says_how_large_the_image_is() -> None:
    assert_parity("unet", "vgg11", SMALL, (33, 49), center=True)


@pytest.mark.parametrize("name", ["upernet", "pan"])
def test_pooled_norms_train_as_smps(name: str) -> None:
    options = {"channels": 12}
    model = smp_model(name, "resnet18", options)
    net, head = ours_from(model, name, "resnet18", options)
    image = torch.randn(2, 3, 256, 256, dtype=torch.float64)
    for module in (model, net, head):
        module.train()
    torch.testing.assert_close(head(net(image)), model(image), rtol=0, atol=1e-10)
    ours, theirs = head.state_dict(), model.state_dict()
    for key in ours:
        if "running" in key:
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["upernet", "pan"])
def test_a_single_value_leaves_the_running_statistics(name: str) -> None:
    head = create_head(name, levels(16), CLASSES, channels=8).train()
    norm = (head.decoder.psp.blocks[0] if name == "upernet" else head.decoder.fpa.branch1)[1]
    norm = norm[1] if name == "upernet" else norm.bn
    norm.running_mean.normal_()
    before = norm.running_mean.clone()
    # the last map has 8 pixels a side, of which pan's pyramid leaves one
    logits = head(features_at(16, 1, 128, 128))
    assert logits.isfinite().all()
    assert torch.equal(norm.running_mean, before)
    head(features_at(16, 2, 128, 128))
    assert not torch.equal(norm.running_mean, before)


def levels(output_stride: int) -> tuple[FeatureInfo, ...]:
    strides = [min(stride, output_stride) for stride in (2, 4, 8, 16, 32)]
    return tuple(FeatureInfo(channels, stride) for channels, stride in zip((5, 6, 8, 12, 20), strides, strict=True))


def features_at(output_stride: int, batch: int, height: int, width: int) -> Features:
    return tuple(
        torch.randn(batch, level.channels, -(-height // level.reduction), -(-width // level.reduction))
        for level in levels(output_stride)
    )


def small(name: str, info: tuple[FeatureInfo, ...]) -> Head:
    options = OTHER_OPTIONS[name] if name in TO_STRIDE_4 else {} if name == "linknet" else SMALL
    return create_head(name, info, CLASSES, **options)


@pytest.mark.parametrize("size", [(65, 97), (33, 32), (64, 96)])
@pytest.mark.parametrize(
    ("name", "output_stride"),
    [(name, 32) for name in DOUBLING] + [(name, stride) for name in ANY_STRIDE for stride in (8, 16, 32)],
)
def test_one_image_of_any_size_trains(name: str, output_stride: int, size: tuple[int, int]) -> None:
    net = backbone("test_resnet", output_stride).train()
    head = small(name, net.info)
    logits = head(net(torch.randn(1, 3, *size)))
    assert head.training
    stride = 4 if name in TO_STRIDE_4 else 1
    fine = 4 if name in TO_STRIDE_4 else 2  # the finest map whose size the head knows
    assert logits.shape == (1, CLASSES, *(-(-side // fine) * fine // stride for side in size))
    logits.square().mean().backward()
    for key, parameter in head.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize(
    ("name", "sides"), [*((name, (96, 128)) for name in DOUBLING), ("pan", (256, 256))], ids=lambda value: str(value)
)
def test_maps_that_do_not_fit_end_in_zeros(name: str, sides: tuple[int, int]) -> None:
    # an image of 65×97 has maps as large as one of 96×128, rounded up; those of pan must be halved three times
    head = small(name, levels(32)).eval()
    features = features_at(32, 2, 65, 97)
    whole = tuple(
        F.pad(
            pixels,
            (0, sides[1] // level.reduction - pixels.shape[-1], 0, sides[0] // level.reduction - pixels.shape[-2]),
        )
        for pixels, level in zip(features, levels(32), strict=True)
    )
    with torch.no_grad():
        logits, expected = head(features), head(whole)
    assert logits.shape[-2:] < expected.shape[-2:]
    torch.testing.assert_close(logits, expected[..., : logits.shape[-2], : logits.shape[-1]], rtol=0, atol=0)


@pytest.mark.parametrize("name", DOUBLING)
@pytest.mark.parametrize("output_stride", [8, 16])
def test_doubling_is_refused_where_strides_do_not(name: str, output_stride: int) -> None:
    strides = "4, 8, 8, 8" if output_stride == 8 else "4, 8, 16, 16"
    with pytest.raises(ValueError, match=f"^{name} doubles .* gives {strides}; take output_stride: 32, or a head"):
        create_head(name, levels(output_stride), CLASSES)


@pytest.mark.parametrize("name", MODELS)
def test_one_map_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} needs a feature level of stride 4.* such as fcn or deeplabv3"):
        create_head(name, backbone("test_vit").info, CLASSES)


@pytest.mark.parametrize(("name", "before", "after"), [("unet", 32, 16), ("unet", 16, 32), ("segformer", 32, 8)])
def test_retarget_equals_a_head_built_at_that_stride(name: str, before: int, after: int) -> None:
    moved, built = small(name, levels(before)).eval(), small(name, levels(after)).eval()
    built.load_state_dict(moved.state_dict())
    moved.retarget(levels(after))
    features = features_at(after, 1, 65, 64)
    torch.testing.assert_close(moved(features), built(features), rtol=0, atol=0)


@pytest.mark.parametrize("name", [*DOUBLING, "pan", "upernet"])
def test_convolutions_stay_on_their_grids(name: str) -> None:
    head = small(name, levels(32))
    head.retarget(levels(32))
    with pytest.raises(
        ValueError, match=f"^{name} runs .* 4, 8, 16, 32, for which it was built.* 4, 8, 16, 16 the same"
    ):
        head.retarget(levels(16))


def test_unet_follows_as_far_as_it_only_raises() -> None:
    model = SegmentationModel(backbone("test_resnet", 32), create_head("unet", levels(32), CLASSES, **SMALL))
    model.output_stride = 16
    with pytest.raises(ValueError, match="unet runs its convolutions on maps of strides 1, 2, 4, 8, 16, for which"):
        model.output_stride = 8
    assert model.output_stride == 16
    model.output_stride = 32
    with pytest.raises(ValueError, match="on maps of strides 1, 2, 4, 8, 16, 16 the same weights"):
        create_head("unet", levels(32), CLASSES, center=True).retarget(levels(16))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("unet", {"channels": (16, 8)}, "unet takes 5 entries of channels, .* to strides 16, 8, 4, 2, 1; got 2: 16, 8"),
        ("unet", {"channels": (16, 8, 0, 8, 8)}, "channels must be at least 1, got 16, 8, 0, 8, 8"),
        ("unet", {"attention_type": "cbam"}, "attention_type must be one of scse, None; got 'cbam'"),
        ("unet", {"attention_type": "scse", **SMALL}, "attention_type scse narrows channels by 16 .* left of 8"),
        ("unetplusplus", {"attention_type": "scse"}, "attention_type scse .* left of 5"),
        ("unetplusplus", {"channels": (4,)}, "unetplusplus takes 5 entries of channels"),
        ("unetplusplus", {"interpolation": "linear"}, "interpolation must be one of nearest, .* got 'linear'"),
        ("linknet", {"use_norm": "layernorm"}, "use_norm must be one of batchnorm, .* got 'layernorm'"),
        ("linknet", {"segmentation_kernel": 2}, "segmentation_kernel must be odd"),
        ("manet", {"pab_channels": 0}, "pab_channels must be at least 1, got 0"),
        ("fpn", {"merge_policy": "max"}, "merge_policy must be one of add, cat; got 'max'"),
        ("fpn", {"segmentation_channels": 100}, "segmentation_channels must be a multiple of 32.* got 100"),
        ("fpn", {"dropout": 2.0}, "dropout"),
        ("pan", {"interpolation": "cubic"}, "interpolation must be one of"),
        ("upernet", {"use_norm": "instancenorm"}, "use_norm must be one of batchnorm, identity; got 'instancenorm'"),
        ("segformer", {"upsampling": 0}, "upsampling must be at least 1, got 0"),
    ],
)
def test_options_are_refused_by_name(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        create_head(name, levels(32), CLASSES, **options)


@pytest.mark.parametrize(
    ("name", "strides", "says"),
    [
        ("fpn", (4, 8, 16), "fpn reads 4 or more levels from stride 4 on, but this backbone gives 3"),
        ("upernet", (4,), "upernet reads 2 or more levels"),
        ("segformer", (2, 4), "segformer reads 2 or more levels"),
        ("pan", (4, 8, 16, 32, 64), "pan reads 2 to 4 levels from stride 4 on, but this backbone gives 5"),
    ],
)
def test_numbers_of_levels_are_refused(name: str, strides: tuple[int, ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        create_head(name, tuple(FeatureInfo(8, stride) for stride in strides), CLASSES)
