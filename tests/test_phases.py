"""Stages run on sub-grids: exact where rewriting is not, at any size, in training."""

from __future__ import annotations

import copy

import pytest
import torch
from theorem import assert_theorem, maps, random_doubles, timm_net
from torch import Tensor, nn

from lightning_atrous.dilation import Dilation

pytestmark = pytest.mark.usefixtures("one_thread")


PHASED = (
    "mobilenetv3_small_050",
    "test_efficientnet",  # squeeze-excite
    "regnety_002",
    "convnextv2_atto",  # global response normalisation
    "edgenext_xx_small",  # attention over the whole map
    "pvt_v2_b0",  # keys and values at another stride than queries
    "resnet18",  # what dilate can do too
    "mobilenetv2_100",
    "resnetblur18",
    "vgg11_bn",
)


@pytest.mark.parametrize("name", PHASED)
def test_theorem_by_phases(name):
    assert_theorem(timm_net(name), (16, 8), method="phases")


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "davit_tiny"])
def test_theorem_by_phases_on_windows(name):
    """Maps in ``(B, h, w, C)``, and downsampling in the forward alone."""
    options = {"strict_img_size": False} if name.startswith("swin") else {}
    net = random_doubles(timm_net(name, **options))
    x, last = torch.randn(1, 3, 96, 128, dtype=torch.double), name.startswith("swin")
    first = [y.permute(0, 3, 1, 2) if last else y for y in maps(net, x)]
    dilation = Dilation(net)
    for output_stride in (16, 8):
        dilation.output_stride = output_stride
        assert dilation.method == "phases"
        dense = [y.permute(0, 3, 1, 2) if last else y for y in maps(net, x)]
        for d, s in zip(dense, first, strict=True):
            k = d.shape[-1] // s.shape[-1]
            assert (d[..., ::k, ::k] - s).abs().max() <= 1e-8 * s.abs().max()
        assert dense[-1].shape[-2:] == (96 // output_stride, 128 // output_stride)


@pytest.mark.parametrize("size", [(65, 97), (33, 47), (40, 200), (100, 130)])
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18", "convnextv2_atto"])
def test_phases_take_any_size(name, size):
    """The map has a pixel for every stride begun, and its grid is the strided network's as far as that reaches."""
    net = random_doubles(timm_net(name))
    x = torch.randn(1, 3, *size, dtype=torch.double)
    strided = maps(net, x)[-1]
    dilation = Dilation(net, method="phases")
    for output_stride in (16, 8):
        dilation.output_stride = output_stride
        dense = maps(net, x)[-1]
        k = 32 // output_stride
        assert abs(dense.shape[-2] - size[0] / output_stride) < 2
        assert abs(dense.shape[-1] - size[1] / output_stride) < 2
        on_grid = dense[..., ::k, ::k]
        assert on_grid.shape == strided.shape
        torch.testing.assert_close(on_grid, strided, rtol=1e-8, atol=1e-10)


def test_phases_train_and_their_gradients_are_right():
    """Against finite differences, in a network with squeeze-excite; running statistics move; keys stay."""
    net = random_doubles(timm_net("test_efficientnet"))
    state = list(net.state_dict())
    dilation = Dilation(net, method="phases")
    dilation.output_stride = 8
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    weight = next(
        p for name, p in net.named_parameters() if "conv_reduce.weight" in name and name.startswith("blocks.3")
    )
    probe = torch.randn_like(maps(net, x)[-1])

    def loss() -> Tensor:
        return (net(x)[-1] * probe).sum()

    loss().backward()
    direction, step = torch.randn_like(weight), 1e-6
    with torch.no_grad():
        weight += step * direction
        above = loss()
        weight -= 2 * step * direction
        below = loss()
    found = (above - below) / (2 * step)
    torch.testing.assert_close((weight.grad * direction).sum(), found, rtol=1e-5, atol=1e-8)
    net.train()
    before = copy.deepcopy(net.state_dict())
    net(x)
    assert list(net.state_dict()) == state
    assert any(not torch.equal(value, before[key]) for key, value in net.state_dict().items() if "running" in key)


@pytest.mark.parametrize(
    "name", ["resnet18d", "mobilenetv2_050", "convnext_atto", "tf_efficientnet_lite0", "resnetblur18"]
)
def test_without_statistics_both_methods_are_one_function(name):
    """At every position and border; in training, running statistics and gradients too."""
    nets = [random_doubles(timm_net(name))]
    nets.append(copy.deepcopy(nets[0]))
    for net, method in zip(nets, ("dilate", "phases"), strict=True):
        Dilation(net, method=method).output_stride = 8
    x = torch.randn(2, 3, 64, 96, dtype=torch.double)
    for dilated, phased in zip(*(maps(net, x) for net in nets), strict=True):
        torch.testing.assert_close(phased, dilated, rtol=1e-9, atol=1e-11)
    for net in nets:
        torch.manual_seed(1)
        sum((y * torch.randn_like(y)).sum() for y in net.train()(x)).backward()
    largest = max(float(parameter.grad.abs().max()) for parameter in nets[0].parameters())
    for (key, old), new in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(new.grad, old.grad, rtol=1e-8, atol=1e-11 * largest, msg=key)
    for (key, old), new in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize("method", ["dilate", "phases"])
def test_trains_in_bfloat16(method):
    """Autocast, channels_last: gradients near those of float32, for every weight; memory format kept."""
    torch.manual_seed(3)
    net = timm_net("test_efficientnet").train()
    Dilation(net, method=method).output_stride = 8
    x, gradients = torch.randn(4, 3, 64, 64), []
    net.to(memory_format=torch.channels_last)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            last = net(x.to(memory_format=torch.channels_last))[-1]
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert last.dtype == (torch.bfloat16 if enabled else torch.float32)
        net.zero_grad()
        last.float().square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert all(torch.isfinite(g).all() for g in gradients)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.95


@pytest.mark.parametrize(("name", "stride"), [("test_vit", 8), ("hrnet_w18_small", 16)])
def test_a_network_in_no_parts_runs_whole_on_shifted_images(name, stride):
    """The map is that of every shift of the image, put together."""
    options = {"dynamic_img_size": True} if "vit" in name else {}
    net = random_doubles(timm_net(name, **options))
    x = torch.randn(2, 3, 64, 128, dtype=torch.double)
    dilation, first = Dilation(net), maps(net, x)
    k = dilation.native // stride
    shifted = [
        [maps(net, torch.nn.functional.pad(x, (0, j, 0, i))[..., i:, j:])[-1] for j in range(0, k * stride, stride)]
        for i in range(0, k * stride, stride)
    ]
    dilation.output_stride = stride
    assert (dilation.method, dilation.runs_whole) == ("phases", True)
    dense = maps(net, x)
    for d, s in zip(dense, first, strict=True):
        step = d.shape[-1] // s.shape[-1]
        torch.testing.assert_close(d[..., ::step, ::step], s, rtol=1e-9, atol=1e-11)
    for i in range(k):
        for j in range(k):
            torch.testing.assert_close(dense[-1][..., i::k, j::k], shifted[i][j], rtol=1e-9, atol=1e-11)


def test_a_method_that_there_is_not():
    with pytest.raises(ValueError, match="there is no method 'atrous'; give one of auto, dilate, phases"):
        Dilation(nn.Conv2d(3, 4, 2, stride=2), method="atrous")
