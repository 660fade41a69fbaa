"""Multi-grid and hybrid dilated convolution: rates of their own for the blocks of a stage."""

from __future__ import annotations

import copy

import pytest
import torch
from theorem import maps, random_doubles, timm_net
from torch import nn

from lightning_atrous.dilation import Dilation, DilationError

pytestmark = pytest.mark.usefixtures("one_thread")


def rates(net: nn.Module, stage: str = "layer4", conv: str = "conv2") -> list[int]:
    return [block.get_submodule(conv).dilation[0] for block in net.get_submodule(stage)]


def test_multi_grid_multiplies_the_stage_own_rate():
    """(1, 2, 4) at output stride 16 is (2, 4, 8), as the paper says; the strided op's rate is that of its input."""
    net = timm_net("resnet50")
    dilation = Dilation(net, multi_grid=(1, 2, 4))
    assert dilation.output_stride == 32
    assert rates(net) == [1, 2, 4]
    found = {}
    for output_stride in (16, 8):
        dilation.output_stride = output_stride
        found[output_stride] = rates(net), rates(net, "layer3")
    assert found == {16: ([1, 4, 8], [1] * 6), 8: ([2, 8, 16], [1, 2, 2, 2, 2, 2])}
    dilation.output_stride = 32
    assert rates(net) == [1, 2, 4]
    assert net.layer4[2].conv2.padding == (4, 4)


@pytest.mark.parametrize("method", ["dilate", "phases"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_atto", "mobilenetv2_050", "tf_efficientnet_lite0"])
def test_theorem_with_multi_grid(name, method):
    """At every stride, the network of the strided one with those rates."""
    net = random_doubles(timm_net(name))
    grid = (1, 2) if name in ("resnet18", "convnext_atto") else (1, 2, 4)
    x = torch.randn(2, 3, 64, 96, dtype=torch.double)
    plain = maps(net, x)[-1]
    dilation = Dilation(net, method=method, multi_grid=grid)
    strided = maps(net, x)[-1]
    assert strided.shape == plain.shape
    assert not torch.allclose(strided, plain)
    for output_stride in (16, 8):
        dilation.output_stride = output_stride
        dense = maps(net, x)[-1]
        k = 32 // output_stride
        assert dense.shape[-2:] == (64 // output_stride, 96 // output_stride)
        torch.testing.assert_close(dense[..., ::k, ::k], strided, rtol=1e-8, atol=1e-11)
        dilation.execution = "dilated"
        torch.testing.assert_close(maps(net, x)[-1], dense, rtol=1e-8, atol=1e-11)
        dilation.execution = "auto"


def test_multi_grid_takes_squeeze_excite_along_by_phases():
    net = random_doubles(timm_net("mobilenetv3_small_050"))
    x = torch.randn(1, 3, 64, 96, dtype=torch.double)
    dilation = Dilation(net, multi_grid=(1, 2))
    strided = maps(net, x)[-1]
    dilation.output_stride = 8
    assert dilation.method == "phases"
    torch.testing.assert_close(maps(net, x)[-1][..., ::4, ::4], strided, rtol=1e-8, atol=1e-11)


def test_hdc_puts_its_rates_in_place_of_the_stage_own():
    net = timm_net("resnet50")
    dilation = Dilation(net, hdc={16: (1, 2, 5, 9), 32: (5, 9, 17)})
    with pytest.raises(
        DilationError, match=r"'layer3\.2\.conv2' were told to stand 40 image pixels apart, which are 2\.5"
    ):
        dilation.output_stride = 16
    dilation.output_stride = 8
    assert rates(net, "layer3") == [1, 2, 5, 9, 1, 2]
    assert rates(net) == [5, 9, 17]
    assert dilation.method == "dilate"
    dilation.output_stride = 4
    assert rates(net, "layer3") == [2, 4, 10, 18, 2, 4]
    with pytest.raises(DilationError, match="were told to stand"):
        dilation.output_stride = 32


def test_theorem_with_hdc():
    """Of the coarsest stride at which such a network is there."""
    net = random_doubles(timm_net("resnet18"))
    x = torch.randn(1, 3, 64, 96, dtype=torch.double)
    dilation = Dilation(net, hdc={16: (1, 2), 32: (5, 9)})
    dilation.output_stride = 8
    assert rates(net, "layer3") == [1, 2]
    coarse = maps(net, x)
    dilation.output_stride = 4
    for dense, strided in zip(maps(net, x)[-2:], coarse[-2:], strict=True):
        torch.testing.assert_close(dense[..., ::2, ::2], strided, rtol=1e-8, atol=1e-11)


def test_hdc_of_the_own_rates_is_the_network_itself():
    net = random_doubles(timm_net("resnet18"))
    other = copy.deepcopy(net)
    x = torch.randn(1, 3, 64, 96, dtype=torch.double)
    Dilation(net, method="dilate").output_stride = 8
    dilation = Dilation(other, hdc={32: (4,)})
    dilation.output_stride, dilation.execution = 8, "dilated"
    # but for the strided op, whose rate is that of its input, until it is told
    other.layer4[0].conv1.dilation, other.layer4[0].conv1.padding = (2, 2), (2, 2)
    torch.testing.assert_close(maps(other, x)[-1], maps(net, x)[-1], rtol=1e-9, atol=1e-12)


def test_blocks_are_found_in_stages_of_all_kinds():
    found = {}
    for name in ("resnet18", "mobilenetv2_050", "convnext_atto", "regnetx_002", "xception41"):
        dilation = Dilation(timm_net(name), multi_grid=(1, 2))
        found[name] = [op.times for op in dilation._probe.ops if op.times > 1]
    assert found["resnet18"] == [2, 2]
    assert found["mobilenetv2_050"] == [2, 2]  # of four blocks, in turn
    assert found["convnext_atto"] == [2]
    assert found["regnetx_002"] == [2, 2, 2]
    assert 2 in found["xception41"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"multi_grid": (1, 0)}, "multi_grid: rates must be whole numbers of at least 1"),
        ({"multi_grid": ()}, "multi_grid: rates must be whole numbers of at least 1"),
        ({"multi_grid": 2}, "multi_grid: rates must be whole numbers of at least 1, got 2"),
        ({"multi_grid": (1.5,)}, "multi_grid: rates must be whole numbers"),
        ({"multi_grid": (1, 2, 4)}, "3 rates were given for the 2 blocks at stride 32"),
        ({"hdc": {32: ()}}, "hdc: rates must be whole numbers of at least 1"),
        ({"hdc": {32: 3}}, "hdc: rates must be whole numbers of at least 1"),
        ({"hdc": {"32": (3,)}}, "hdc must be rates by the stride of the stage"),
        ({"hdc": (5, 9)}, "hdc must be rates by the stride of the stage"),
        ({"hdc": {32: (5,)}, "hdc_at": 0}, "hdc_at: rates must be whole numbers of at least 1"),
        ({"hdc": {32: (1,)}, "multi_grid": (1, 2)}, "by hdc and factors by multi_grid"),
        ({"hdc": {64: (1, 2)}}, r"no block of convolutions at stride 64 .*blocks at the strides 4, 8, 16, 32"),
    ],
)
def test_bad_rates(options, says):
    with pytest.raises(ValueError, match=says):
        Dilation(timm_net("resnet18"), **options)


def test_a_network_without_blocks():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1))
    with pytest.raises(DilationError, match="blocks at the strides none"):
        Dilation(net, multi_grid=(1, 2))
