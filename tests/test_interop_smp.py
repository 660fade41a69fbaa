"""segmentation_models_pytorch's models against what is imported of them, at image sizes that they take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from originals import differences, drawn
from torch import nn

from lightning_atrous import ClassInfo, Preprocess
from lightning_atrous.interop import from_smp, read_smp

pytestmark = pytest.mark.usefixtures("one_thread")

ABC = ClassInfo(("a", "b", "c"))
DECODERS = ("Unet", "UnetPlusPlus", "Linknet", "MAnet", "FPN", "PAN", "UPerNet", "Segformer")
SMALL: dict[str, dict[str, Any]] = {
    "DeepLabV3": {"decoder_channels": 16},
    "DeepLabV3Plus": {"decoder_channels": 16},
    "Unet": {"decoder_channels": (16, 12, 10, 8, 6)},
    "UnetPlusPlus": {"decoder_channels": (16, 16, 16, 16, 16), "decoder_attention_type": "scse"},
    "Linknet": {"decoder_use_norm": False},
    "MAnet": {"decoder_channels": (32, 24, 16, 16, 16), "decoder_pab_channels": 8},
    "FPN": {"decoder_merge_policy": "cat", "decoder_pyramid_channels": 16, "decoder_segmentation_channels": 32},
    "UPerNet": {"decoder_channels": 16},
    "Segformer": {"decoder_segmentation_channels": 16},
}


def original(architecture: str, encoder: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    options = {"encoder_weights": None, "classes": 3, **SMALL.get(architecture, {}), **options}
    return drawn(getattr(smp, architecture)(encoder, **options))


def assert_same_logits(model: nn.Module, *sizes: tuple[int, int]) -> tuple[str, ...]:
    imported = from_smp(model, classes=ABC)
    found = differences(imported.task.double(), model.double(), *sizes)
    assert max(found.values()) < 1e-9
    return imported.remarks


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("DeepLabV3", {"encoder_output_stride": 8}),
        ("DeepLabV3Plus", {"encoder_output_stride": 16, "decoder_atrous_rates": (2, 3, 5)}),
    ],
)
def test_deeplabs_on_smps_own_encoder_dilate_as_it_does(architecture: str, options: dict[str, Any]) -> None:
    remarks = assert_same_logits(original(architecture, "resnet18", **options), (64, 96), (48, 80))
    assert any("the kernel that gives up its stride is dilated itself" in remark for remark in remarks)


@pytest.mark.parametrize(
    ("architecture", "encoder", "options"),
    [
        ("DeepLabV3", "tu-test_convnext", {"encoder_output_stride": 16, "decoder_aspp_separable": True}),
        ("DeepLabV3Plus", "tu-test_efficientnet", {"encoder_output_stride": 8}),
    ],
)
def test_deeplabs_on_timms_networks(architecture: str, encoder: str, options: dict[str, Any]) -> None:
    remarks = assert_same_logits(original(architecture, encoder, **options), (64, 96), (48, 80))
    assert any(remark.startswith("compared on these weights") for remark in remarks)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["resnet50", "resnet101", "resnext50_32x4d", "tu-resnet50", "tu-efficientnet_b0"])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_deeplabs_on_larger_encoders(encoder: str, output_stride: int) -> None:
    assert_same_logits(original("DeepLabV3Plus", encoder, encoder_output_stride=output_stride), (64, 96), (48, 80))


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("encoder", ["tu-test_convnext", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_the_other_decoders(architecture: str, encoder: str) -> None:
    assert_same_logits(original(architecture, encoder), (128, 160))


def test_a_network_that_timm_dilates_in_its_own_way_is_refused() -> None:
    # it pools in the shortcut of the first block, which timm leaves out of the dilation
    with pytest.raises(ValueError, match=r"tu-test_resnet at output stride 16 cannot be imported.*in ways of its own"):
        from_smp(original("DeepLabV3", "tu-test_resnet", encoder_output_stride=16), classes=ABC)


def test_one_class_becomes_two_of_the_same_probability() -> None:
    model = original("DeepLabV3Plus", "tu-test_convnext", classes=1, activation="sigmoid")
    imported = from_smp(model)
    assert imported.task.classes.names == ("background", "foreground")
    assert any("'sigmoid' is left out" in remark for remark in imported.remarks)
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(imported.task.model.normalize(image))
        found = imported.task(image).softmax(dim=1)
    torch.testing.assert_close(found[:, 1:], expected)


def test_a_folder_and_a_bare_state_dict_are_the_same_model(tmp_path: Path) -> None:
    model = original("DeepLabV3Plus", "tu-test_efficientnet", encoder_output_stride=8, decoder_atrous_rates=(2, 4, 6))
    model.save_pretrained(tmp_path / "saved")
    weights, architecture, options = read_smp(tmp_path / "saved")
    folder = from_smp(weights, architecture, options, classes=ABC).task
    given = {
        "encoder_name": "tu-test_efficientnet",
        "encoder_output_stride": 8,
        "decoder_atrous_rates": [2, 4, 6],
        "decoder_channels": 16,
    }
    bare = {f"module.model.{key}": value for key, value in model.state_dict().items()}
    own = Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    named = from_smp(bare, "DeepLabV3Plus", given, classes=ABC, preprocess=own).task
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        normalised = folder.model.normalize(image)
        torch.testing.assert_close(folder(image), model(normalised), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(named(image), model(named.model.normalize(image)), rtol=1e-5, atol=1e-5)
        expected = (image - torch.tensor(own.mean).view(3, 1, 1)) / torch.tensor(own.std).view(3, 1, 1)
        torch.testing.assert_close(named.model.normalize(image), expected)


@pytest.mark.parametrize(
    ("architecture", "options", "says"),
    [
        ("PSPNet", {"encoder_name": "resnet18"}, "'PSPNet' is no model of SMP that can be imported"),
        ("DeepLabV3", {}, "do not say which encoder they are of"),
        ("DeepLabV3", {"encoder_name": "mit_b0"}, "'mit_b0' has names of its own"),
        ("DeepLabV3", {"encoder_name": "resnet18", "encoder_depth": 4}, "encoder_depth 4"),
        ("DeepLabV3", {"encoder_name": "resnet18", "in_channels": 4}, "images of 4 channels"),
        ("DeepLabV3", {"encoder_name": "resnet18", "decoder_width": 3}, "built with decoder_width"),
        (
            "DeepLabV3Plus",
            {"encoder_name": "resnet18", "decoder_aspp_separable": False},
            "decoder_aspp_separable=False",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused(architecture: str, options: dict[str, Any], says: str) -> None:
    weights = {"segmentation_head.0.weight": torch.zeros(3, 8, 1, 1), "segmentation_head.0.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=says):
        from_smp(weights, architecture, options, classes=ABC)


def test_a_folder_without_its_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json cannot be read \(FileNotFoundError\)"):
        read_smp(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"encoder_name": "resnet18"}))
    with pytest.raises(ValueError, match=r"config.json cannot be read \(KeyError\)"):
        read_smp(tmp_path)
