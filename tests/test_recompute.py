"""Computing blocks again changes no number, not even the running statistics, and takes less memory."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys

import pytest
import torch
from conftest import PEAK_KIB, ROOT
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_atrous import ClassInfo, SegmentationTask, TimmBackbone
from lightning_atrous.heads import FCN
from lightning_atrous.recompute import blocks_of, recomputing

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS = [
    ("test_resnet", 8, "dilate", "split", {}),
    ("test_resnet", 8, "dilate", "dilated", {"drop_path_rate": 0.5}),
    ("test_resnet", 8, "phases", "auto", {"drop_path_rate": 0.5}),
    ("test_efficientnet", 16, "phases", "auto", {"drop_path_rate": 0.5}),
    ("test_convnext", 16, "auto", "auto", {"drop_path_rate": 0.5}),
    ("test_vit", None, "auto", "auto", {"drop_path_rate": 0.5}),
    ("test_byobnet", 16, "auto", "auto", {}),
]
SLOW = [
    (name, stride, "auto", "auto", {})
    for name, stride in [
        ("densenet121", 16),  # lists of maps that grow
        ("hrnet_w18_small", None),
        ("regnetx_002", 8),
        ("resnetv2_50", 8),
        ("swin_tiny_patch4_window7_224", 8),
        ("maxvit_pico_rw_256", None),
        ("rdnet_tiny", None),
    ]
]


@pytest.mark.parametrize(
    ("name", "stride", "method", "execution", "options"),
    [*NETWORKS, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_numbers_are_those_of_the_plain_network(
    name: str, stride: int | None, method: str, execution: str, options: dict
) -> None:
    """Maps, gradients, running statistics, and what is drawn next: bit by bit."""
    net = TimmBackbone(
        name, output_stride=stride, method=method, execution=execution, pretrained=False, timm_options=options
    )
    net.double().train()
    image = torch.randn(2, 3, 96, 96, dtype=torch.double)
    before, outcomes = copy.deepcopy(net.state_dict()), []
    for again in (False, True):
        net.load_state_dict(before)
        net.gradient_checkpointing = again
        net.zero_grad()
        torch.manual_seed(1)
        maps = net(image)
        drawn = torch.rand(1)
        torch.stack([(x * torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)).sum() for x in maps]).sum().backward()
        gradients = {key: p.grad for key, p in net.named_parameters() if p.grad is not None}
        outcomes.append((maps, gradients, copy.deepcopy(net.state_dict()), drawn))
    torch.testing.assert_close(outcomes[1], outcomes[0], rtol=0, atol=0)
    counts = {int(value) for key, value in outcomes[1][2].items() if key.endswith("num_batches_tracked")}
    assert counts <= {1}


def test_the_trap_is_there() -> None:
    """A block that is repeated without care counts its batch twice; if this fails, torch does what we do."""
    block = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    image = torch.randn(2, 1, 8, 8)
    checkpoint(block, image, use_reentrant=False).square().sum().backward()
    assert block[1].num_batches_tracked == 2


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "test_convnext"])
def test_blocks_are_those_of_the_network(name: str) -> None:
    """They hold most of the weights, and none is in another."""
    net = TimmBackbone(name, output_stride=None, pretrained=False).net
    blocks = blocks_of(net)
    assert len(blocks) == {"resnet18": 8, "test_vit": 6, "test_convnext": 9}[name]
    held = [id(p) for block in blocks for p in block.parameters()]
    assert len(held) == len(set(held))
    weights = {id(p): p.numel() for p in net.parameters()}
    assert sum(weights[i] for i in held) > 0.7 * sum(weights.values())


def test_nothing_is_left_on_the_network() -> None:
    net = TimmBackbone("test_resnet", output_stride=8, pretrained=False)
    before = [dict(vars(module)) for module in net.modules()]
    net.gradient_checkpointing = True
    net.train()(torch.zeros(2, 3, 64, 64))[-1].sum().backward()
    for module, attributes in zip(net.modules(), before, strict=True):
        if module is not net:
            assert vars(module).keys() == attributes.keys()


def test_what_cannot_be_computed_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    block = Careless()
    with recomputing([block]), pytest.raises(ValueError, match="Careless changes what it is given"):
        block(torch.ones(2))
    assert blocks_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))) == []
    monkeypatch.setattr("lightning_atrous.backbone.blocks_of", lambda net: [])
    with pytest.raises(ValueError, match="test_resnet is not made of blocks"):
        TimmBackbone("test_resnet", pretrained=False, gradient_checkpointing=True)


def test_the_option_is_in_the_description() -> None:
    net = TimmBackbone("test_resnet", pretrained=False, gradient_checkpointing=True)
    task = SegmentationTask(net, functools.partial(FCN, channels=8), classes=ClassInfo(("a", "b")))
    assert SegmentationTask.from_spec(task.spec).model.backbone.gradient_checkpointing


MEASURE = f"""
import sys, torch
from lightning_atrous import TimmBackbone
torch.set_num_threads(1)
again = sys.argv[1] == "True"
net = TimmBackbone("resnet50", output_stride=8, method="dilate", execution="dilated", pretrained=False,
                   gradient_checkpointing=again).train()
image = torch.randn(2, 3, 384, 384)
before = {PEAK_KIB}
net(image)[-1].sum().backward()
print({PEAK_KIB} - before)
"""


@pytest.mark.slow
def test_less_memory_is_taken() -> None:
    """Of two images of 384 by 384 pixels, in a process of its own: the peak over what was there before."""
    peaks = {}
    for again in (False, True):
        arguments = [sys.executable, "-W", "ignore", "-c", MEASURE, str(again)]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks[again] = int(done.stdout)
    assert peaks[True] < 0.6 * peaks[False]
