"""torchvision's models against what is imported of them, on the same images."""

from __future__ import annotations

import functools

import pytest
import torch
from originals import differences, drawn
from torch import Tensor, nn
from torchvision.models import segmentation

from lightning_atrous import ClassInfo
from lightning_atrous.interop import from_torchvision
from lightning_atrous.interop.torchvision import VOC
from lightning_atrous.layers import resize

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = ((65, 97), (64, 96))


def original(name: str, num_classes: int = 21, *, aux: bool = False) -> nn.Module:
    options = {"aux_loss": True} if aux else {}
    return drawn(getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=num_classes, **options))


def assert_same_logits(name: str, *, aux: bool = False) -> None:
    model = original(name, aux=aux)
    task = from_torchvision(model, name).task.double()
    model.double()
    assert max(differences(task, lambda image: model(image)["out"], *SIZES).values()) < 1e-9
    assert (task.model.aux_head is not None) == aux
    if not aux:
        return

    def auxiliary(image: Tensor) -> Tensor:
        return resize(task.model.forward_train(image)[1], image.shape[-2:])

    image = torch.rand(1, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(auxiliary(image), model(task.model.normalize(image))["aux"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "aux"),
    [
        ("deeplabv3_resnet50", True),
        ("deeplabv3_mobilenet_v3_large", True),
        ("lraspp_mobilenet_v3_large", False),
    ],
)
def test_logits_are_torchvisions(name: str, aux: bool) -> None:
    assert_same_logits(name, aux=aux)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn_resnet50", "fcn_resnet101", "deeplabv3_resnet101"])
@pytest.mark.parametrize("aux", [False, True])
def test_logits_are_torchvisions_in_larger_models(name: str, aux: bool) -> None:
    assert_same_logits(name, aux=aux)


def test_the_classes_are_voc_where_there_are_21() -> None:
    model = original("lraspp_mobilenet_v3_large")
    imported = from_torchvision(model, "lraspp_mobilenet_v3_large")
    weights = segmentation.LRASPP_MobileNet_V3_Large_Weights.DEFAULT
    assert list(imported.task.classes.names) == weights.meta["categories"]
    # as the data set's own table has them
    assert VOC.palette[:9] == (
        (0, 0, 0),
        (128, 0, 0),
        (0, 128, 0),
        (128, 128, 0),
        (0, 0, 128),
        (128, 0, 128),
        (0, 128, 128),
        (128, 128, 128),
        (64, 0, 0),
    )
    assert VOC.palette[20] == (0, 64, 128)
    transforms = weights.transforms()
    assert list(imported.task.model.preprocess.mean) == transforms.mean
    assert list(imported.task.model.preprocess.std) == transforms.std


def test_other_classes_need_names() -> None:
    weights = original("lraspp_mobilenet_v3_large", 3).state_dict()
    convert = functools.partial(from_torchvision, weights, "lraspp_mobilenet_v3_large")
    with pytest.raises(ValueError, match="have 3 classes, and nothing says what they are called"):
        convert()
    with pytest.raises(ValueError, match="given for 2 classes, but these weights have 3"):
        convert(classes=ClassInfo(("a", "b")))
    assert convert(classes=ClassInfo(("a", "b", "c"))).task.classes.names == ("a", "b", "c")


def test_what_does_not_fit_is_named_on_both_sides() -> None:
    name = "lraspp_mobilenet_v3_large"
    weights = original(name).state_dict()
    with pytest.raises(ValueError, match=r"no classifier\.4\.weight in these weights"):
        from_torchvision(weights, "fcn_resnet50")
    weights["backbone.99.0.weight"] = weights.pop("backbone.0.0.weight")
    weights["classifier.cbr.0.weight"] = torch.zeros(7, 960, 1, 1)
    with pytest.raises(ValueError, match="not those of torchvision's lraspp_mobilenet_v3_large") as raised:
        from_torchvision(weights, name)
    said = str(raised.value)
    assert "1 (backbone.99.0.weight) left over in the file" in said
    assert "1 (backbone.net.conv_stem.weight) wanting in it" in said
    assert "1 (classifier.cbr.0.weight (7, 960, 1, 1) for (128, 960, 1, 1)) of another shape" in said
    with pytest.raises(ValueError, match="did you mean 'deeplabv3_resnet50'"):
        from_torchvision(weights, "deeplab_resnet50")
