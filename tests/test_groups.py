"""Rates and decays by depth and by name: a partition, the numbers of timm's own, and what a task makes of them."""

from __future__ import annotations

import functools
import random

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from lightning_atrous import ClassInfo, SegmentationTask, TimmBackbone
from lightning_atrous.heads import FCN
from lightning_atrous.optim import ParameterGroup, build_optimizer, parameter_groups
from lightning_atrous.optim.patterns import matching

CLASSES = ClassInfo(("a", "b"))
RESNET = TimmBackbone("test_resnet", pretrained=False)


def task(backbone: TimmBackbone = RESNET, **options) -> SegmentationTask:
    return SegmentationTask(
        backbone.requires_grad_(True), functools.partial(FCN, channels=8), classes=CLASSES, **options
    )


def assigned(this: SegmentationTask) -> dict[str, tuple[float, float | None]]:
    """By its name, each parameter's scale and weight decay."""
    names = {id(parameter): name for name, parameter in this.model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr_scale"], group.get("weight_decay"))
        for group in this.grouping(this.model, this.model.backbone)
        for parameter in group["params"]
    }


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("resnet18", None),
        ("test_convnext", None),
        ("test_vit", None),
        ("test_efficientnet", None),
        ("test_byobnet", 16),
        ("test_mambaout", None),
        pytest.param("convnext_atto", None, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", 8, marks=pytest.mark.slow),
        pytest.param("vit_tiny_patch16_224", None, marks=pytest.mark.slow),
        pytest.param("swin_tiny_patch4_window7_224", None, marks=pytest.mark.slow),
        pytest.param("hrnet_w18_small", None, marks=pytest.mark.slow),
        pytest.param("densenet121", None, marks=pytest.mark.slow),
    ],
)
def test_layers_decay_as_timms_own_groups_do(name: str, stride: int | None) -> None:
    """timm is asked about its classifier; that our feature network's parameter is the one, its values say."""
    classifier = timm.create_model(name)
    for i, parameter in enumerate(classifier.parameters()):
        parameter.data.fill_(i)
    theirs = {
        parameter.flatten()[0].item(): group["lr_scale"]
        for group in param_groups_layer_decay(classifier, layer_decay=0.7)
        for parameter in group["params"]
    }
    backbone = TimmBackbone(name, output_stride=stride, pretrained=False)
    values = {key.replace(".", "_"): value for key, value in classifier.state_dict().items()}
    state = torch.get_rng_state()
    this = task(backbone, layer_decay=0.7, decay_norm_and_bias=True)
    ours = assigned(this)
    for key, _ in backbone.net.named_parameters():
        number = values[key.removeprefix("model.").replace(".", "_")].flatten()[0].item()
        assert ours[f"backbone.net.{key}"] == (pytest.approx(theirs[number]), None), key
    assert all(scale == (1, None) for key, scale in ours.items() if not key.startswith("backbone."))
    head_alone = torch.get_rng_state()
    torch.set_rng_state(state)
    task(backbone)
    assert torch.equal(torch.get_rng_state(), head_alone)


def test_a_network_without_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(timm.models.resnet.ResNet, "group_matcher")
    with pytest.raises(ValueError, match="layer_decay: test_resnet cannot have it, timm does not say which layers"):
        task(layer_decay=0.5)
    monkeypatch.undo()
    monkeypatch.setattr(timm.models.resnet.ResNet, "named_parameters", lambda self: iter([("fc.weight", None)]))
    with pytest.raises(ValueError, match=r"timm does not say which layer its conv1\.\S+ is in; leave it out"):
        task(layer_decay=0.5)


def test_the_documented_order() -> None:
    """Factors multiply; of patterns the first counts; a decay by name beats the rule for norms and biases."""
    named = [
        ParameterGroup(match="*.layer4.*.bias", lr_factor=2.0, weight_decay=0.3),
        ParameterGroup(match="backbone.net.layer4", lr_factor=3.0),
        ParameterGroup(match="head", lr_factor=10.0),
        ParameterGroup(match="*.weight", weight_decay=0.1),
    ]
    options = {"backbone_lr_factor": 0.1, "layer_decay": 0.5, "parameter_groups": named}
    found = assigned(task(**options))
    assert found["backbone.net.layer4.0.bn1.bias"] == (pytest.approx(0.1 * 0.5 * 2), 0.3)
    assert found["backbone.net.layer4.0.bn1.weight"] == (pytest.approx(0.1 * 0.5 * 3), 0.0)
    assert found["backbone.net.layer4.0.conv1.weight"] == (pytest.approx(0.1 * 0.5 * 3), None)
    assert found["backbone.net.layer3.0.bn1.weight"] == (pytest.approx(0.1 * 0.5**2), 0.1)
    assert found["backbone.net.layer3.0.bn1.bias"] == (pytest.approx(0.1 * 0.5**2), 0.0)
    assert found["head.classifier.weight"] == (10.0, None)
    assert found["head.classifier.bias"] == (10.0, 0.0)
    assert assigned(task(**options, decay_norm_and_bias=True))["head.classifier.bias"] == (10.0, None)


@pytest.mark.parametrize("seed", range(8))
def test_every_trainable_parameter_is_in_one_group_whatever_is_asked_for(seed: int) -> None:
    rng = random.Random(seed)
    patterns = rng.sample(["head", "*.bias", "*.conv?.weight", "backbone.net.layer[13]"], 3)
    named = [
        ParameterGroup(match=pattern, lr_factor=rng.choice([0.5, 1, 2]), weight_decay=rng.choice([None, 0.0, 0.1]))
        for pattern in patterns
    ]
    this = task(
        parameter_groups=named,
        layer_decay=rng.choice([None, 0.9, 1.0]),
        backbone_lr_factor=rng.choice([0.1, 1.0]),
        freeze_stages=rng.choice([0, 1]),
        freeze_norm=rng.random() < 0.5,
    )
    groups = this.grouping(this.model, this.model.backbone)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in this.model.parameters() if parameter.requires_grad]
    assert sorted(members) == sorted(trainable)
    # one group for each pair of numbers in each part, with a name of its own that says so
    kinds = [(g["name"].partition("_")[0], g["lr_scale"], g.get("weight_decay")) for g in groups]
    assert len(set(kinds)) == len(groups) == len({group["name"] for group in groups})
    optimizer = build_optimizer(functools.partial(torch.optim.SGD, lr=0.5, weight_decay=0.01), groups)
    for group, (_, scale, decay) in zip(optimizer.param_groups, kinds, strict=True):
        assert group["lr"] == 0.5 * scale
        assert group["weight_decay"] == (0.01 if decay is None else decay)


def test_a_group_of_what_is_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match="all that matches 'head' is frozen; leave it out, or freeze less"):
        task(freeze=["head"], parameter_groups=[ParameterGroup(match="head", lr_factor=2.0)])


def test_names_say_what_is_different() -> None:
    named = [ParameterGroup(match="head", lr_factor=10.0, weight_decay=0.1)]
    this = task(layer_decay=0.5, backbone_lr_factor=0.1, decay_norm_and_bias=True, parameter_groups=named)
    names = [group["name"] for group in this.grouping(this.model, this.model.backbone)]
    assert names == [*(f"backbone_x{0.5**i:g}" for i in (5, 4, 3, 2, 1)), "head_x10_decay0.1"]


def test_options_are_in_the_description() -> None:
    named = [ParameterGroup(match="head", lr_factor=3.0)]
    this = task(parameter_groups=named, layer_decay=0.75, freeze=["*.bn1"], freeze_stages=1, compile=True)
    again = SegmentationTask.from_spec(this.spec)
    assert again.spec == this.spec
    assert assigned(again) == assigned(this)
    old = {key: value for key, value in task().spec.items() if key not in ("parameter_groups", "layer_decay", "freeze")}
    assert assigned(SegmentationTask.from_spec(old)) == assigned(task())


def test_patterns_take_in_names_and_modules() -> None:
    names = ["backbone.net.layer1.0.weight", "backbone.net.layer10.0.weight", "head.weight", "header.bias"]
    for pattern, expected in {
        "head": [2],
        "head*": [2, 3],
        "*.weight": [0, 1, 2],
        "backbone.net.layer1": [0],
        "backbone.net.layer?": [0],
        "backbone.net.layer1*": [0, 1],
        "*": [0, 1, 2, 3],
        "HEAD*": [],
    }.items():
        if expected:
            assert matching(pattern, names, option="freeze") == {names[i] for i in expected}
        else:
            with pytest.raises(ValueError, match=r"freeze: no parameter .* like 'HEAD\*', .*; did you mean 'head'"):
                matching(pattern, names, option="freeze")


def test_groups_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lr_factor of 'head' must be positive, got 0; .* freeze"):
        ParameterGroup(match="head", lr_factor=0)
    with pytest.raises(ValueError, match="weight_decay of 'head' must not be negative, got -1"):
        ParameterGroup(match="head", weight_decay=-1)
    with pytest.raises(ValueError, match=r"layer_decay must be above 0 and at most 1, got 1\.5"):
        task(layer_decay=1.5)
    named = [ParameterGroup(match="head"), ParameterGroup(match="head.*.bias")]
    with pytest.raises(ValueError, match=r"all that matches 'head\.\*\.bias' has matched an earlier pattern"):
        task(parameter_groups=named)
    with pytest.raises(ValueError, match=r"parameter_groups: no parameter .* like 'heads', .*'head'"):
        parameter_groups(task().model, RESNET, named=[ParameterGroup(match="heads")])
