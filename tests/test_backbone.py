"""Weights loaded strictly, options checked, shapes as promised. Exactness itself is tested with `Dilation`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from lightning_atrous.backbone import TimmBackbone, list_backbones
from lightning_atrous.types import FeatureInfo

NAME = "test_resnet"


@pytest.fixture(scope="module")
def classifier() -> torch.nn.Module:
    torch.manual_seed(1)
    return timm.create_model(NAME)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_state_dict_file_is_loaded_whole(classifier: torch.nn.Module, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    state = classifier.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    backbone = TimmBackbone(NAME, pretrained=path, output_stride=8)
    loaded = backbone.net.state_dict()
    assert loaded
    for key, value in loaded.items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)


def test_weights_of_another_number_of_classes_fit_and_channels_are_adapted(tmp_path: Path) -> None:
    model = timm.create_model(NAME, num_classes=7)
    torch.save(model.state_dict(), tmp_path / "seven.pth")
    backbone = TimmBackbone(NAME, pretrained=str(tmp_path / "seven.pth"), in_channels=5)
    assert backbone.net.conv1[0].weight.shape[1] == 5
    torch.testing.assert_close(backbone.net.layer4[0].conv1.weight, model.layer4[0].conv1.weight)
    assert backbone.preprocess.channels == 5
    assert backbone(torch.zeros(1, 5, 64, 64))[-1].shape[1] == backbone.info[-1].channels


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused(classifier: torch.nn.Module, damage: str, tmp_path: Path) -> None:
    state = dict(classifier.state_dict())
    if damage == "missing":
        del state["layer4.0.conv1.weight"]
    elif damage == "unexpected":
        state["layer5.weight"] = torch.zeros(1)
    else:
        state["layer4.0.conv1.weight"] = torch.zeros(3, 3, 3, 3)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=rf"bad\.pth does not fit {NAME}"):
        TimmBackbone(NAME, pretrained=tmp_path / "bad.pth")


def test_without_a_network_the_way_on_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    with pytest.raises(ValueError, match=r"could not be fetched or loaded \(no route to host\)\. To go on offline"):
        TimmBackbone(NAME, pretrained=True)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("size", [(64, 96), (65, 33), (17, 250)])
def test_any_size_at_any_stride(output_stride: int, size: tuple[int, int]) -> None:
    backbone = TimmBackbone(NAME, pretrained=False, output_stride=output_stride).eval()
    features = backbone(torch.randn(1, 3, *size))
    assert backbone.info[-1].reduction == backbone.output_stride == output_stride
    for feature, level in zip(features, backbone.info, strict=True):
        assert feature.shape == (1, level.channels, *(-(-n // level.reduction) for n in size))


def test_the_stride_moves_after_construction_and_back() -> None:
    backbone = TimmBackbone(NAME, pretrained=False, output_stride=16).eval()
    x = torch.randn(1, 3, 64, 96)
    before = backbone(x)[-1]
    backbone.output_stride = 8
    assert backbone.info[-1] == FeatureInfo(backbone.info[-1].channels, 8)
    # the theorem, at one level and in float32; its proof is elsewhere
    torch.testing.assert_close(backbone(x)[-1][..., ::2, ::2], before, rtol=1e-3, atol=1e-4)
    backbone.output_stride = 16
    assert torch.equal(backbone(x)[-1], before)


def test_rates_of_blocks_are_options_and_come_back() -> None:
    options = {"pretrained": False, "output_stride": 8}
    backbone = TimmBackbone("resnet18", multi_grid=(1, 2), execution="dilated", **options)
    assert backbone.net.layer4[1].conv1.dilation == (8, 8)
    again = TimmBackbone(**backbone.options())
    assert again.net.layer4[1].conv1.dilation == (8, 8)
    assert again.dilation.execution == "dilated"
    hdc = TimmBackbone("resnet18", hdc={16: (1, 2), 32: (5, 9)}, **options)
    again = TimmBackbone(**hdc.options())
    assert again.net.layer4[1].conv1.dilation == (9, 9)
    for stride in (32, None):  # not passed over in silence
        with pytest.raises(ValueError, match=r"resnet18 cannot run at output stride 32: .* Strides it supports: 8$"):
            TimmBackbone("resnet18", hdc={16: (1, 2)}, pretrained=False, output_stride=stride)


def test_a_network_with_statistics_over_the_map_runs_on_phases() -> None:
    dense = TimmBackbone("test_efficientnet", pretrained=False, output_stride=8, method="dilate")
    assert dense.dilation.dense_statistics
    assert dense.options()["method"] == "dilate"
    with pytest.raises(ValueError, match=r"mobilevit_xxs cannot run at output stride 8: .*Strides it supports: 32"):
        TimmBackbone("mobilevit_xxs", pretrained=False, output_stride=8, method="dilate")
    backbone = TimmBackbone("test_efficientnet", pretrained=False, output_stride=8)
    assert backbone.info[-1].reduction == 8
    assert backbone.options()["method"] == "phases"  # by which it is built again
    assert TimmBackbone(**backbone.options()).dilation.method == "phases"
    assert TimmBackbone("test_efficientnet", pretrained=False, output_stride=32).options()["method"] == "auto"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"name": "resnet180"}, "timm has no network 'resnet180'; did you mean 'resnet18"),
        ({"in_channels": 0}, "in_channels must be at least 1"),
        ({"timm_options": {"out_indices": (1,)}}, "may not have 'out_indices'"),
        ({"timm_options": {"stem_widht": 3}}, "takes no option 'stem_widht'; did you mean 'stem_width'"),
        ({"output_stride": 64}, "cannot run at output stride 64"),
        ({"pretrained": "nowhere.pth"}, r"there is no file nowhere\.pth"),
    ],
)
def test_bad_options(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TimmBackbone(**{"name": NAME, "pretrained": False, **options})


def test_a_backbone_builds_again_from_its_options() -> None:
    backbone = TimmBackbone("mobilenetv2_050", pretrained=False, output_stride=8, timm_options={"pad_type": "same"})
    again = TimmBackbone(**backbone.options())
    again.load_state_dict(backbone.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    for one, other in zip(backbone.eval()(x), again.eval()(x), strict=True):
        assert torch.equal(one, other)


def test_backbones_by_pattern() -> None:
    assert "resnet50" in list_backbones("resnet5?")
    assert list_backbones("mobilenetv2_100") == ["mobilenetv2_100"]
    assert not list_backbones("no_such_network")


@pytest.mark.skipif(
    "MOBILENETV2_WEIGHTS" not in os.environ, reason="MOBILENETV2_WEIGHTS names no file of ImageNet weights"
)
def test_real_imagenet_weights_load() -> None:
    backbone = TimmBackbone(
        "mobilenetv2_100", pretrained=os.environ["MOBILENETV2_WEIGHTS"], timm_options={"pad_type": "same"}
    )
    # trained weights: the stem's filters are not the initialisation's
    assert float(backbone.net.conv_stem.weight.detach().abs().max()) > 1


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("test_resnet", 1),
        ("swin_tiny_patch4_window7_224", 32),
        pytest.param("maxvit_pico_rw_256", 256, marks=pytest.mark.slow),
        pytest.param("inception_v4", 1, marks=pytest.mark.slow),
    ],
)
def test_images_of_any_size(name: str, grid: int) -> None:
    """Networks of windows see the image continued with zeros; their maps end where it does."""
    backbone = TimmBackbone(name, pretrained=False, output_stride=32).eval()
    x = torch.randn(1, 3, 129, 150)
    with torch.no_grad():
        maps = backbone(x)
        padded = backbone(torch.nn.functional.pad(x, (0, -150 % grid, 0, -129 % grid)))
    for small, whole, level in zip(maps, padded, backbone.info, strict=True):
        assert small.shape[1] == level.channels
        if name != "inception_v4":  # which does not pad, and loses some pixels on the way
            assert small.shape[-2:] == (-(-129 // level.reduction), -(-150 // level.reduction))
        assert torch.equal(small, whole[..., : small.shape[-2], : small.shape[-1]])


def test_a_network_of_one_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"levit_128s .* takes images of one size alone"):
        TimmBackbone("levit_128s", pretrained=False)
