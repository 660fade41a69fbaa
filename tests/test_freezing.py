"""What is frozen has no gradient, no graph and no mode but eval; the rest is trained."""

from __future__ import annotations

import functools
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

import lightning_atrous
from lightning_atrous import ClassInfo, SegmentationTask, TimmBackbone
from lightning_atrous.data import Shapes
from lightning_atrous.heads import FCN
from lightning_atrous.optim import Freezing
from lightning_atrous.optim.freezing import feeding
from lightning_atrous.plugins import SyncBatchNorm

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ClassInfo(("a", "b", "c"))


def task(name: str = "test_resnet", stride: int | None = 16, **options) -> SegmentationTask:
    torch.manual_seed(0)
    backbone = TimmBackbone(name, pretrained=False, output_stride=stride)
    return SegmentationTask(backbone, functools.partial(FCN, channels=8), **{"classes": CLASSES, **options})


def batch() -> dict:
    return {
        "image": torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8),
        "mask": torch.randint(0, 3, (2, 64, 64)),
        "name": ["a", "b"],
    }


def frozen(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def below(model: nn.Module, *prefixes: str) -> set[str]:
    return {
        name for name, _ in model.named_parameters() if name.startswith(tuple(f"backbone.net.{p}" for p in prefixes))
    }


@pytest.mark.parametrize(
    ("name", "stages", "prefixes"),
    [
        ("resnet18", 2, ("conv1.", "bn1.", "layer1.")),
        ("test_convnext", 1, ("stem_", "stages_0.")),
        ("test_convnext", 2, ("stem_", "stages_0.", "stages_1.")),
        ("test_efficientnet", 1, ("conv_stem.", "bn1.", "blocks.0.")),
        ("test_resnet", 5, ("",)),
    ],
)
@pytest.mark.parametrize("stride", [None, pytest.param(8, marks=pytest.mark.slow)])
def test_stages_are_what_their_maps_are_computed_with(
    name: str, stages: int, prefixes: tuple[str, ...], stride: int | None
) -> None:
    model = task(name, stride, freeze_stages=stages).model
    assert frozen(model) == below(model, *prefixes)
    assert model.backbone.training == (stages < len(model.backbone.info))


def test_finding_them_leaves_the_backbone_as_it_was() -> None:
    backbone = TimmBackbone("test_resnet", pretrained=False)
    backbone.net.layer1.eval()
    backbone.net.layer2.requires_grad_(False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    needs = [parameter.requires_grad for parameter in backbone.parameters()]
    state = torch.get_rng_state()
    assert len(feeding(backbone, 2)) > len(feeding(backbone, 1)) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in backbone.modules()] == modes
    assert [parameter.requires_grad for parameter in backbone.parameters()] == needs
    assert all(parameter.grad is None for parameter in backbone.parameters())
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("again", [False, True], ids=["plain", "recomputed"])
def test_a_step_trains_the_rest_alone_and_keeps_no_graph_below(again: bool) -> None:
    this = task(freeze_stages=2, freeze=["*.bias"])
    this.model.backbone.gradient_checkpointing = again
    maps = this.train().model.backbone(torch.randn(2, 3, 64, 64))
    assert [x.grad_fn is not None for x in maps] == [False, False, True, True, True]
    before = {name: value.clone() for name, value in this.model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in this.parameters() if p.requires_grad], lr=0.1)
    loss, _ = this.model.forward_train(batch()["image"])
    loss.square().mean().backward()
    optimizer.step()
    after, kept = this.model.state_dict(), frozen(this.model)
    assert {name for name, p in this.model.named_parameters() if p.grad is None} == kept
    assert kept == below(this.model, "conv1.", "bn1.", "layer1.") | {n for n in kept if n.endswith(".bias")}
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    # statistics move where a norm is not frozen whole: a frozen bias alone does not keep it in eval mode
    still = tuple(f"backbone.net.{part}." for part in ("conv1", "bn1", "layer1"))
    assert {name for name in after if "running" in name and not name.startswith(still)} <= changed
    assert not changed & kept
    assert not any(name.startswith(still) for name in changed)


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.backbone.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def test_frozen_norms_keep_their_statistics_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 1)
    this = task(freeze_norm=True)
    expected = {name for name, m in this.model.named_modules() if m in norms(this.model)}
    assert {name.rpartition(".")[0] for name in frozen(this.model)} == expected
    this.model.backbone.net.bn1.running_mean.fill_(0.3)
    before = {name: value.clone() for name, value in this.model.backbone.state_dict().items()}
    plugin = SyncBatchNorm()

    def check() -> None:
        this.eval()
        this.train()
        assert len(norms(this.model)) == len(expected)
        assert not any(norm.training for norm in norms(this.model))
        assert this.model.head.training
        this.model.forward_train(batch()["image"])[0].sum().backward()
        torch.testing.assert_close(dict(this.model.backbone.state_dict()), before, rtol=0, atol=0)
        assert all(p.grad is None for norm in norms(this.model) for p in norm.parameters())

    check()
    for stride in (8, 16):
        this.model.output_stride = stride
        check()
    plugin.apply(this.model)
    check()
    plugin.revert(this.model)
    check()
    this.model.predict(batch()["image"])
    assert not any(norm.training for norm in norms(this.model))


def test_a_training_by_lightning_leaves_them_alone(tmp_path: Path) -> None:
    """Also after its validations; and a checkpoint says what was frozen."""
    data = Shapes(size=32, train_length=4, val_length=2, batch_size=2, num_workers=0)
    this = task(classes=data.classes, freeze=["backbone.net.layer1"], freeze_stages=1, freeze_norm=True)
    before = {name: value.clone() for name, value in this.model.backbone.state_dict().items()}
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=2, default_root_dir=tmp_path, enable_checkpointing=False, **options)
    with pytest.warns(UserWarning, match="in eval mode at the start of training"):
        trainer.fit(this, data)
    after = this.model.backbone.state_dict()
    same = {name for name in before if torch.equal(before[name], after[name])}
    held = ["net.conv1.", "net.bn1.", "net.layer1."]
    held += [f"{name}." for name, module in this.model.backbone.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert same == {name for name in before if name.startswith(tuple(held))}
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = lightning_atrous.load(tmp_path / "a.ckpt")
    assert loaded.spec == this.spec
    assert frozen(loaded.model) == frozen(this.model)


def test_everything_in_the_backbone_may_be_frozen_and_the_faster_execution_is_still_measured(tmp_path: Path) -> None:
    from lightning_atrous.dilation.timing import fastest

    this = task(stride=8, freeze=["backbone"])
    assert {group["name"] for group in this.grouping(this.model, this.model.backbone)} == {"head", "head_no_decay"}
    assert fastest(this.model.backbone.dilation, torch.zeros(2, 3, 64, 64), training=True, rounds=1)


def test_what_cannot_be_frozen_is_refused() -> None:
    with pytest.raises(ValueError, match=r"freeze: no parameter .* like 'backbone.net.layr1', .*'backbone.net.layer1'"):
        task(freeze=["backbone.net.layr1"])
    with pytest.raises(ValueError, match="freeze_stages: test_resnet gives 5 maps, got 6; give 0 to 5"):
        task(freeze_stages=6)
    with pytest.raises(ValueError, match="freeze_stages must not be negative, got -1"):
        Freezing(freeze_stages=-1)
    with pytest.raises(ValueError, match="freeze_norm: test_convnext has no batch norm"):
        task("test_convnext", freeze_norm=True)
    with pytest.raises(ValueError, match="no parameter of SegmentationModel is trainable; freeze less"):
        task(freeze=["*"])
