"""What is no dilation of the network is refused with a word, and what takes statistics is named."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from theorem import chain, maps, random_doubles, timm_net
from torch import Tensor, nn

from lightning_atrous.dilation import Dilation, DilationError, set_output_stride

pytestmark = pytest.mark.usefixtures("one_thread")


class Gated(nn.Module):
    """Squeeze-excite, whose gate has a 3×3 kernel on its one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((2, 3), keepdim=True)).sigmoid()


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1)


@pytest.mark.parametrize(
    ("op", "words"),
    [
        (nn.ConvTranspose2d(4, 4, 2, stride=2), r"departs first at '6' \(ConvTranspose2d\)"),
        (Functional(), r"departs first at '6' \(Functional\)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_other_functions_are_refused_by_name(op, words):
    net = nn.Sequential(*chain(), nn.Conv2d(4, 4, 3, stride=2, padding=1), op)
    x, state = torch.randn(1, 3, 64, 64), copy.deepcopy(net.state_dict())
    before, expected = repr(net), maps(net.eval(), x)[0]
    dilation = Dilation(net, method="dilate")
    with pytest.raises(DilationError, match=words) as caught:
        dilation.output_stride = 2
    assert "relative error" in str(caught.value)
    assert dilation.output_stride == dilation.native > 2
    assert repr(net) == before
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert torch.equal(maps(net, x)[0], expected)


@pytest.mark.parametrize("op", [Gated(), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)], ids=lambda op: type(op).__name__)
def test_dense_statistics_are_had_by_name_alone(op):
    """Dilated, an op sees the whole denser map: another function, and said to be. By phases, each sub-grid."""
    net = random_doubles(nn.Sequential(*chain(), nn.Conv2d(4, 4, 3, stride=2, padding=1), op, nn.Conv2d(4, 4, 3)))
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    strided, native = maps(net, x)[0], Dilation(net).native
    dilation = set_output_stride(net, native // 4, method="dilate")
    assert dilation.method == "dilate"
    assert dilation.dense_statistics
    departs = maps(net, x)[0][..., ::4, ::4] - strided
    assert departs.abs().max() > 1e-4 * strided.abs().max()
    assert max(dilation.errors()) > 1e-4  # that of the forward that runs
    features = net[:-2](x)
    assert torch.equal(maps(net, x)[0], net[-1](op(features)))
    dilation.output_stride = native
    assert not dilation.dense_statistics
    dilation = set_output_stride(net, native // 4)
    assert dilation.method == "phases"
    assert not dilation.dense_statistics
    torch.testing.assert_close(maps(net, x)[0][..., ::4, ::4], strided, rtol=1e-8, atol=1e-12)


def test_squeeze_excite_of_timm():
    dilation = Dilation(timm_net("mobilenetv3_small_050"))
    assert dilation.supported() == (8, 16, 32)
    assert dilation.method is None
    dilation.output_stride = 16
    assert dilation.method == "phases"
    dilation = set_output_stride(timm_net("mobilenetv3_small_050"), 16, method="dilate")
    assert dilation.dense_statistics
    # its statistics are in the forward of a module that has a kernel too, so that nothing tells them apart
    with pytest.raises(DilationError, match=r"by dilate: .*fc1.*statistics over the whole map"):
        set_output_stride(timm_net("resnest14d"), 8, method="dilate")


class Twice(nn.Module):
    """One kernel at two strides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.shared(self.stem(x)))


def test_an_op_at_two_strides_is_refused():
    net = Twice()
    dilation = Dilation(net, method="dilate")
    with pytest.raises(DilationError, match=r"'shared' \(Conv2d\) is called at the strides \[2, 4\]"):
        dilation.output_stride = 4
    assert dilation.output_stride == 8
    assert net.shared.stride == (2, 2)


class Adds(nn.Module):
    """Two branches that only fit while nothing is dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, stride=4, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + F.max_pool2d(x, 4)


def test_a_network_that_breaks_is_refused_with_its_error():
    net = Adds()
    dilation = Dilation(net, method="dilate")
    with pytest.raises(DilationError, match="RuntimeError") as caught:
        dilation.output_stride = 1
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert net.conv.stride == (4, 4)


def test_refusals_of_the_user():
    net = chain()
    dilation = Dilation(net)
    for wrong in (0, 3, 8, -2):
        with pytest.raises(ValueError, match=r"choose one of \[1, 2, 4\]"):
            dilation.output_stride = wrong
    with pytest.raises(DilationError, match="ran on no image"):
        Dilation(net, in_channels=5)
    with pytest.raises(DilationError, match="expected a map"):
        Dilation(nn.Sequential(net, nn.Flatten()))


def test_what_cannot_be_dilated_is_said():
    with pytest.raises(ValueError, match=r"expected a network \(nn.Module\), got str"):
        set_output_stride("resnet50", 8)  # type: ignore[arg-type]
    net = chain()
    own = net.forward
    net.forward = lambda x: 3 * own(x)
    with pytest.raises(ValueError, match="forward was replaced on the instance"):
        set_output_stride(net, 2)
    for wrong in (2.0, True):
        with pytest.raises(ValueError, match="choose one of"):
            set_output_stride(chain(), wrong)  # type: ignore[arg-type]
    with pytest.raises(DilationError, match=r"Strides it supports: 8, 4$|Strides it supports: 8$"):
        set_output_stride(Twice(), 2, method="dilate")
