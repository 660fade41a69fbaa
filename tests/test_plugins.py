"""Batch norm over processes keeps what timm's norms hold; a checkpoint is whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import full_disk
from torch import nn

from lightning_atrous.backbone import TimmBackbone
from lightning_atrous.layers import ImagePool
from lightning_atrous.plugins import SyncBatchNorm, WholeCheckpointIO


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `torch.distributed` ran with a single process."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda *_: 1)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_synchronised_norms_compute_what_the_others_did(name: str, one_process: None) -> None:
    """In eval and in training mode; and back, with what was trained in between."""
    torch.manual_seed(0)
    net = TimmBackbone(name, output_stride=32, pretrained=False)
    image = torch.randn(3, 3, 64, 64)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    keys, before = list(net.state_dict()), [net.eval()(image), net.train()(image)]
    plugin = SyncBatchNorm()
    plugin.apply(net)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in net.modules()) == len(norms)
    assert list(net.state_dict()) == keys
    after = [net.eval()(image), net.train()(image)]
    # two steps of running statistics lie between the two evaluations
    for ours, theirs in zip(after[1], before[1], strict=True):
        torch.testing.assert_close(ours, theirs)
    # what moves a model makes new tensors of its buffers
    net.double()
    image = image.double()
    trained = net.eval()(image)
    plugin.revert(net)
    assert [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)] == norms
    assert not any(module.training for module in norms)
    for ours, theirs in zip(net(image), trained, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torchs_own_conversion_would_drop_activations() -> None:
    """Why there is one of ours: if this fails, torch or timm has changed and ours may go."""
    net = TimmBackbone("test_efficientnet", output_stride=32, pretrained=False).eval()
    image = torch.randn(1, 3, 64, 64)
    before = net(image)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert (before[-1] - converted(image)[-1]).abs().max() > 0.01


def test_image_pool_takes_one_image_with_a_synchronised_norm(one_process: None) -> None:
    pool = ImagePool(4, 5)
    SyncBatchNorm().apply(pool)
    assert not isinstance(pool.norm, nn.SyncBatchNorm)  # which wants several values, and one process has one
    x = torch.randn(1, 4, 6, 7)
    torch.testing.assert_close(pool.train()(x), pool.eval()(x))


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "a" / "last.ckpt"
    writer = WholeCheckpointIO()
    writer.save_checkpoint({"weights": torch.ones(3)}, path)
    with full_disk(100_000), pytest.raises(ValueError, match=r"last\.ckpt cannot be written \(File too large\); make"):
        writer.save_checkpoint({"weights": torch.ones(100_000)}, path)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    assert torch.load(path)["weights"].tolist() == [1, 1, 1]
