"""Parameter groups as a partition, learning rates as factors, and the poly curve in closed form."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_atrous.optim import Poly, build_optimizer, parameter_groups, realign


class Block(nn.Module):
    """One of each: convolution, norms of one and of two dimensions, a layer scale, a table called bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norms = nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.LayerNorm((4, 4)), nn.RMSNorm((4, 4)))
        self.gamma = nn.Parameter(torch.ones(8))
        self.bias = nn.Parameter(torch.zeros(1, 8, 1, 1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(Block(), Block())
        self.head = nn.Conv2d(8, 2, 1)


def names_of(model: nn.Module, group: dict) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_groups_partition_the_trainable_parameters(decay_norm_and_bias: bool) -> None:
    model = Net()
    model.backbone[0].requires_grad_(False)
    groups = parameter_groups(model, model.backbone, decay_norm_and_bias=decay_norm_and_bias)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(members) == len(trainable)
    assert set(members) == trainable


def test_norms_and_biases_are_not_decayed() -> None:
    model = Net()
    groups = {group["name"]: group for group in parameter_groups(model, model.backbone, backbone_lr_factor=0.1)}
    assert list(groups) == ["backbone", "backbone_no_decay", "head", "head_no_decay"]
    assert names_of(model, groups["backbone"]) == {"backbone.0.conv.weight", "backbone.1.conv.weight"}
    assert names_of(model, groups["head"]) == {"head.weight"}
    assert names_of(model, groups["head_no_decay"]) == {"head.bias"}
    assert [group.get("weight_decay") for group in groups.values()] == [None, 0.0, None, 0.0]
    assert [group["lr_scale"] for group in groups.values()] == [0.1, 0.1, 1.0, 1.0]


def test_everything_is_decayed_on_request() -> None:
    model = Net()
    groups = parameter_groups(model, model.backbone, decay_norm_and_bias=True)
    assert [group["name"] for group in groups] == ["backbone", "head"]
    assert not any("weight_decay" in group for group in groups)


def test_of_a_real_network_only_the_kernels_are_decayed() -> None:
    timm = pytest.importorskip("timm")
    model = nn.ModuleDict({"backbone": timm.create_model("resnet18", num_classes=0), "head": nn.Conv2d(512, 2, 1)})
    groups = {group["name"]: group for group in parameter_groups(model, model["backbone"])}
    kernels = {f"backbone.{n}.weight" for n, m in model["backbone"].named_modules() if isinstance(m, nn.Conv2d)}
    assert names_of(model, groups["backbone"]) == kernels
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


def test_shared_parameters_stand_in_one_group() -> None:
    model = Net()
    second = nn.Conv2d(8, 2, 1)
    second.weight = model.head.weight
    model.second = second
    model.tied = nn.ParameterDict({"conv": model.backbone[0].conv.weight})
    groups = parameter_groups(model, model.backbone)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(members) == len(set(members)) == len(list(model.parameters()))
    assert any(parameter is model.backbone[0].conv.weight for parameter in groups[0]["params"])


def test_groups_that_cannot_be_are_refused() -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"backbone_lr_factor must be positive, got 0; .* name it in freeze"):
        parameter_groups(model, model.backbone, backbone_lr_factor=0)
    with pytest.raises(ValueError, match="Sequential, given as the backbone, is no part of Net"):
        parameter_groups(model, Net().backbone)
    with pytest.raises(ValueError, match="no parameter of Net is trainable"):
        parameter_groups(model.requires_grad_(False), model.backbone)


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_the_optimiser_scales_the_factorys_rate_and_keeps_its_decay(kind: type[Optimizer]) -> None:
    model = Net()
    groups = parameter_groups(model, model.backbone, backbone_lr_factor=0.1)
    optimizer = build_optimizer(partial(kind, lr=0.5, weight_decay=0.01), groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05, 0.5, 0.5]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0, 0.01, 0.0]
    assert [group["name"] for group in optimizer.param_groups] == [group["name"] for group in groups]
    assert not any("lr_scale" in group for group in optimizer.param_groups)
    assert not any("lr" in group for group in groups)
    assert isinstance(optimizer, kind)


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_poly_in_closed_form(power: float) -> None:
    poly = Poly(power=power)
    for step in range(100):
        assert poly.factor(step, 100) == pytest.approx((1 - step / 100) ** power)
    floored = Poly(power=power, floor=0.25, warmup_steps=20, warmup_factor=0.5)
    assert floored.factor(0, 100) == 0.5
    assert floored.factor(10, 100) == 0.75
    assert floored.factor(60, 100) == pytest.approx(0.25 + 0.75 * 0.5**power)


@pytest.mark.parametrize("floor", [0.0, 0.01, 1.0])
def test_poly_rises_to_the_peak_and_falls_to_the_floor(floor: float) -> None:
    poly = Poly(warmup_steps=30, warmup_factor=0.001, floor=floor)
    curve = [poly.factor(step, 100) for step in range(130)]
    assert all(a < b for a, b in pairwise(curve[:31]))
    assert curve[30] == 1
    assert all(a >= b for a, b in pairwise(curve[30:]))
    assert curve[100:] == [floor] * 30
    assert max(abs(a - b) for a, b in pairwise(curve[:101])) < 0.05  # no jump, where the warm-up ends or elsewhere


def test_a_run_shorter_than_its_warm_up_is_cut_off() -> None:
    poly = Poly(warmup_steps=1000, warmup_factor=0.0, floor=0.01)
    assert [poly.factor(step, 2) for step in range(4)] == [0, 0.001, 0.01, 0.01]


@pytest.mark.parametrize("total_steps", [0, -1, float("inf"), float("nan")])
def test_a_run_needs_an_end(total_steps: float) -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=f"finite number of steps, at least 1, got {total_steps}"):
        Poly().scheduler(optimizer, total_steps)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("power", 0.0, "power must be positive, got 0.0"),
        ("warmup_steps", -1, "warmup_steps must not be negative, got -1"),
        ("warmup_factor", 1.5, "warmup_factor is a fraction of the peak, in 0..1, got 1.5"),
        ("floor", -0.1, "floor is a fraction of the peak, in 0..1, got -0.1"),
    ],
)
def test_options_have_ranges(option: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Poly(**{option: value})


def two_rates() -> Optimizer:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr_scale": scale} for scale in (0.1, 1.0)]
    return build_optimizer(partial(SGD, lr=0.2), groups)


def run(optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> list[list[float]]:
    """The learning rates that the next steps are made with."""
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return rates


def test_groups_keep_their_ratio_to_the_last_step() -> None:
    poly, optimizer = Poly(warmup_steps=3, floor=0.1), two_rates()
    rates = run(optimizer, poly.scheduler(optimizer, 10), 13)
    expected = [poly.factor(step, 10) for step in range(13)]
    assert [large for _, large in rates] == pytest.approx([0.2 * factor for factor in expected])
    assert [small for small, _ in rates] == pytest.approx([0.02 * factor for factor in expected])


@pytest.mark.parametrize("total_steps", [10, 20], ids=["same run", "longer run"])
def test_a_resumed_run_follows_its_own_curve(total_steps: int) -> None:
    poly = Poly(warmup_steps=2)
    first = two_rates()
    scheduler = poly.scheduler(first, 10)
    run(first, scheduler, 5)
    second = two_rates()
    resumed = poly.scheduler(second, total_steps)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    # the optimiser's own state brings the rate of the old curve along
    assert second.param_groups[0]["lr"] == second.param_groups[0]["initial_lr"] * poly.factor(5, 10)
    realign(resumed)
    rates = run(second, resumed, 6)
    whole = two_rates()
    assert rates == run(whole, poly.scheduler(whole, total_steps), 11)[5:]
