import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from theorem import SIZES, assert_theorem, chain, maps, random_doubles, timm_net
from torch import Tensor, nn

from lightning_atrous.dilation import Dilation, set_output_stride

SMALL = (
    "resnet18",
    "mobilenetv1_100",
    "mobilenetv2_100",
    "tf_efficientnet_lite0",  # "SAME" padding throughout
    "regnetx_002",
    "convnext_atto",  # even kernels
    "resnetblur18",  # reflecting blur pools
    "resnet18d",  # average pools in the shortcuts
    "dla46x_c",
    "vgg11_bn",
)
LARGE = (
    "resnet50",
    "resnet50d",
    "resnet101",
    "resnext50_32x4d",
    "convnext_tiny",
    "xception41",
    "vgg16_bn",
    "res2net50_14w_8s",
    "densenetblur121d",
    "inception_v4",  # unpadded: the probe needs a larger image
    "legacy_xception",
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", SMALL)
def test_theorem_on_timm(name):
    assert_theorem(timm_net(name), (16, 8))


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_theorem_on_large_timm(name):
    sizes = ((320, 384), (320, 352)) if name.startswith("inception") else SIZES
    assert_theorem(timm_net(name), (16, 8), sizes)


def test_theorem_on_same_padding():
    assert_theorem(timm_net("mobilenetv2_100", pad_type="same"), (16, 8))


def test_theorem_at_every_stride():
    assert_theorem(timm_net("mobilenetv2_050"), (16, 8, 4, 2, 1), ((64, 96),))


class Same(nn.Conv2d):
    """TensorFlow's "SAME": padding computed from the input, most of it on the right."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for n, k, s, d in zip(x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True):
            total = max((-(-n // s) - 1) * s + d * (k - 1) + 1 - n, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """Weight standardisation in the forward, which a rewrite must keep."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std(), self.bias, self.stride, self.padding, self.dilation, self.groups)


class SameAverage(nn.AvgPool2d):
    """An average pool of even size that pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size, self.stride
        stride = stride if isinstance(stride, int) else stride[0]
        pads = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (x.shape[-1], x.shape[-2])]
        around = (pads[0] // 2, pads[0] - pads[0] // 2, pads[1] // 2, pads[1] - pads[1] // 2)
        return F.avg_pool2d(F.pad(x, around), kernel, stride)


OPS = {
    "even kernel": (nn.Conv2d(4, 4, 2, stride=2),),
    "stride four": (nn.Conv2d(4, 4, 4, stride=4),),
    "stride four, padded": (nn.Conv2d(4, 4, 7, stride=4, padding=3),),
    "strided 1x1": (nn.Conv2d(4, 4, 1, stride=2),),
    "dilated original": (
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.Conv2d(4, 4, 3, 2, padding=2, dilation=2),
    ),
    "spelt same": (nn.Conv2d(4, 4, 5, padding="same"), nn.Conv2d(4, 4, 3, padding="same", dilation=3)),
    "spelt valid": (nn.Conv2d(4, 4, 1, padding="valid"),),
    "reflecting": (nn.Conv2d(4, 4, 3, stride=2, padding=1, padding_mode="reflect"),),
    "depthwise": (nn.Conv2d(4, 4, 5, stride=2, padding=2, groups=4),),
    "rectangular": (
        nn.Conv2d(4, 4, (1, 7), padding=(0, 3)),
        nn.Conv2d(4, 4, (3, 2), stride=2, padding=(1, 0)),
    ),
    "padding module": (nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, stride=2)),
    "shifting module": (nn.ZeroPad2d((-1, 1, -1, 1)), nn.AvgPool2d(1, stride=2)),
    "max pool": (nn.MaxPool2d(3, stride=2, padding=1),),
    "max pool, even": (nn.MaxPool2d(2),),
    "max pool, ceiling": (nn.MaxPool2d(3, stride=2, ceil_mode=True),),
    "max pool, stride one": (nn.MaxPool2d(5, stride=1, padding=2),),
    "average, ceiling": (nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),),
    "average, padding not counted": (nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),),
    "average, padding counted": (nn.AvgPool2d(3, stride=2, padding=1),),
    "average, even and padded": (nn.AvgPool2d(4, stride=4, padding=1),),
    "average, even, padding not counted": (nn.AvgPool2d(4, stride=2, padding=1, count_include_pad=False),),
    "average, divisor": (nn.AvgPool2d(2, divisor_override=3),),
    "average, stride one": (nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),),
    "SAME": (Same(4, 4, 3, stride=2), Same(4, 4, 5)),
    "SAME, even": (Same(4, 4, 4, stride=2), Same(4, 4, 2)),
    "SAME average": (SameAverage(2, 2), SameAverage(3, 2)),
    "standardised": (Standardised(4, 4, 3, stride=2, padding=1), Standardised(4, 4, 2, stride=2)),
    "power average": (nn.LPPool2d(2, 1, stride=2),),
    "transposed, stride one": (nn.ConvTranspose2d(4, 4, 3, padding=1),),
    "a reused op": (conv := nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), conv),
}


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS.keys())
def test_theorem_on_ops(ops):
    net = random_doubles(chain(*ops))
    native = Dilation(net).native
    assert_theorem(net, tuple(2**i for i in range(native.bit_length())), ((64, 96), (32, 128)))


@pytest.mark.parametrize("ops", OPS.values(), ids=OPS.keys())
def test_dense_maps_have_every_pixel(ops):
    net = chain(*ops)
    for output_stride in (2, 1):
        dilation = set_output_stride(copy.deepcopy(net), output_stride)
        for size in ((64, 96), (63, 97), (70, 45)):
            dense = maps(dilation._module, torch.randn(1, 3, *size))[0]
            assert dense.shape[-2:] == tuple(-(-n // output_stride) for n in size)
        assert dilation.errors(dtype=torch.double)[0] <= 1e-12


def test_only_what_follows_the_lost_stride_is_dilated():
    net = timm_net("resnet18")
    set_output_stride(net, 8)
    found = {
        name: (module.stride[0], module.dilation[0], module.padding[0])
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and name[:6] in ("layer2", "layer3", "layer4")
    }
    assert found.pop("layer2.0.conv1") == (2, 1, 1)
    assert found.pop("layer3.0.conv1") == (1, 1, 1)
    assert found.pop("layer4.0.conv1") == (1, 2, 2)
    assert {value for name, value in found.items() if name.startswith("layer2")} == {(1, 1, 1)}
    assert {value for name, value in found.items() if name.startswith("layer3")} == {(1, 2, 2)}
    assert {value for name, value in found.items() if name.startswith("layer4")} == {(1, 4, 4)}


def test_dilated_convolution_is_the_naive_sum():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, stride=4), nn.Conv2d(1, 1, 3, padding=1, bias=False)).double()
    nn.init.ones_(net[0].weight)
    nn.init.zeros_(net[0].bias)
    nn.init.normal_(net[1].weight)
    set_output_stride(net, 1, in_channels=1)
    x, kernel = torch.randn(11, 13, dtype=torch.double), net[1].weight[0, 0]
    expected = torch.zeros_like(x)
    for i in range(11):
        for j in range(13):
            for m in range(3):
                for n in range(3):
                    row, column = i + 4 * (m - 1), j + 4 * (n - 1)
                    if 0 <= row < 11 and 0 <= column < 13:
                        expected[i, j] += kernel[m, n] * x[row, column]
    torch.testing.assert_close(net(x[None, None])[0, 0], expected)


def test_dilated_average_is_the_naive_mean():
    net = nn.Sequential(nn.MaxPool2d(1, stride=2), nn.AvgPool2d(2, stride=2, ceil_mode=True, count_include_pad=False))
    set_output_stride(net, 1, in_channels=1)
    x = torch.randn(8, 10)
    expected = torch.empty_like(x)
    for i in range(8):
        for j in range(10):
            expected[i, j] = x[i : i + 3 : 2, j : j + 3 : 2].mean()
    torch.testing.assert_close(net(x[None, None])[0, 0], expected)


@pytest.mark.parametrize("name", ["resnet18d", "convnext_atto", "tf_efficientnet_lite0", "mobilenetv3_small_050"])
def test_reversible_bit_for_bit(name):
    net = random_doubles(timm_net(name)).float()
    x = torch.randn(1, 3, 64, 96)
    attributes = [dict(vars(module)) for module in net.modules()]
    state, first = copy.deepcopy(net.state_dict()), maps(net, x)
    dilation = Dilation(net)
    for output_stride in (8, 32, 16, 8, 32):
        dilation.output_stride = output_stride
        assert list(net.state_dict()) == list(state)
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(maps(net, x), first, strict=True))
    for module, before in zip(net.modules(), attributes, strict=True):
        assert vars(module).keys() - {"_lightning_atrous_dilation"} == before.keys()
        for key in ("stride", "padding", "dilation", "ceil_mode", "count_include_pad"):
            assert vars(module).get(key) == before.get(key)


def test_one_stride_after_another_is_that_stride():
    net = random_doubles(timm_net("resnet18d"))
    x = torch.randn(1, 3, 64, 96, dtype=torch.double)
    dilation = set_output_stride(net, 16)
    direct = maps(net, x)
    dilation.output_stride = 8
    dilation.output_stride = 16
    assert all(torch.equal(a, b) for a, b in zip(maps(net, x), direct, strict=True))


def by_pickle(thing: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    pickle.dump(thing, buffer)
    buffer.seek(0)
    return pickle.load(buffer)


class Backbone(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.dilation = Dilation(net)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.net(x)


@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle])
def test_copies_are_whole_and_apart(copied):
    ops = (Same(4, 4, 3, stride=2), nn.Conv2d(4, 4, 2, stride=2), nn.AvgPool2d(2, ceil_mode=True))
    backbone = Backbone(chain(*ops)).eval()
    x = torch.randn(1, 3, 128, 128)
    strided = maps(backbone, x)[0]
    backbone.dilation.output_stride = 4
    dense = maps(backbone, x)[0]
    twin = copied(backbone)
    assert torch.equal(maps(twin, x)[0], dense)
    twin.dilation.output_stride = twin.dilation.native
    assert torch.equal(maps(twin, x)[0], strided)
    assert torch.equal(maps(backbone, x)[0], dense)
    nn.init.zeros_(backbone.net[0].weight)
    assert torch.equal(maps(twin, x)[0], strided)
    twin.dilation.output_stride = 4
    assert torch.equal(maps(twin, x)[0], dense)


def test_mode_weights_and_random_state_are_left_alone():
    net = nn.Sequential(*chain(), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    net[1].eval()
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    Dilation(net).output_stride = 1
    assert [module.training for module in net.children()] == [True, False, *[True] * 5]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_the_proof_does_not_see_the_weights():
    net = timm_net("resnet18")
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    assert set_output_stride(net, 8).errors(dtype=torch.double)[-1] < 1e-12


def test_rounding_alone_is_not_refused(monkeypatch):
    monkeypatch.setattr("lightning_atrous.dilation.network.TOLERANCE", 1e-6)
    dilation = set_output_stride(timm_net("tf_efficientnet_lite0"), 8)
    assert dilation.output_stride == 8
    # float32 alone would have refused it
    assert max(dilation.errors()) > 1e-6
    assert max(dilation.errors(dtype=torch.double)) < 1e-10


def test_a_single_map_and_a_tuple():
    net = random_doubles(timm_net("resnet18", out_indices=(4,)))
    assert_theorem(nn.Sequential(net, Last()), (16, 8))
    assert Dilation(chain()).reductions == (4,)


class Last(nn.Module):
    def forward(self, features: list[Tensor]) -> Tensor:
        return features[-1]


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 65), (100, 75), (127, 31)])
@pytest.mark.parametrize("name", ["resnet18d", "mobilenetv2_100", "tf_efficientnet_lite0"])
def test_any_size(name, size):
    net = timm_net(name).eval()
    dilation = set_output_stride(net, 8)
    for feature, reduction in zip(maps(net, torch.randn(1, 3, *size)), dilation.reductions, strict=True):
        assert feature.shape[-2:] == tuple(-(-n // reduction) for n in size)
        assert feature.isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "resnet18d", "mobilenetv2_050", "tf_efficientnet_lite0"])
def test_theorem_at_odd_sizes(name):
    """ "SAME" pads an odd map otherwise than an even one."""
    assert_theorem(timm_net(name), (16, 8), ((65, 97), (129, 129)))
    assert_theorem(timm_net(name), (16, 8), ((130, 33), (97, 131)))


def test_a_branch_of_another_stride_fits_at_every_size():
    """A kernel of 3 at stride 4 leaves pixels over, of which a whole map shows nothing."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 4, 1)
            self.narrow = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.wide(x) + self.narrow(x)

    for method in ("dilate", "phases"):
        net = Branches().double()
        images = [torch.randn(1, 3, *size, dtype=torch.double) for size in ((64, 96), (97, 131), (33, 47), (250, 65))]
        strided = [maps(net, x)[0] for x in images]
        for output_stride in (4, 2):
            set_output_stride(net, output_stride, method=method)
            for x, before in zip(images, strided, strict=True):
                k = 8 // output_stride
                torch.testing.assert_close(maps(net, x)[0][..., ::k, ::k], before)


def test_a_second_call_goes_on_with_the_first():
    net = random_doubles(timm_net("resnet18"))
    x = torch.randn(1, 3, 64, 96, dtype=torch.double)
    strided, state = maps(net, x)[-1], list(net.state_dict())
    first = set_output_stride(net, 16)
    assert set_output_stride(net, 8) is first
    torch.testing.assert_close(maps(net, x)[-1][..., ::4, ::4], strided)
    with pytest.raises(ValueError, match="brought to output stride 8 already; set the output_stride of the Dilation"):
        Dilation(net)
    with pytest.raises(ValueError, match="brought to output stride 8 already"):
        set_output_stride(net, 16, method="phases")
    first.output_stride = 32
    assert set_output_stride(net, 16, method="phases").method == "phases"
    assert list(net.state_dict()) == state


def test_a_mapping_of_maps():
    """As detectors have them."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm_net("resnet18")

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {str(i): y for i, y in enumerate(self.net(x))}

    for method in ("dilate", "phases"):
        net = Named()
        random_doubles(net.net)
        x = torch.randn(1, 3, 64, 96, dtype=torch.double)
        strided = net.eval()(x)
        set_output_stride(net, 8, method=method)
        dense = net(x)
        assert list(dense) == list(strided)
        torch.testing.assert_close(dense["4"][..., ::4, ::4], strided["4"])


def test_gradients():
    net = chain(nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False), nn.Conv2d(4, 4, 2, stride=2)).double()
    set_output_stride(net, 2)
    x = torch.randn(1, 3, 6, 7, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(net, (x,))
    net(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in net.parameters())


def test_training_step_moves_the_weights():
    net = timm_net("mobilenetv2_050").train()
    set_output_stride(net, 8)
    before = copy.deepcopy(net.state_dict())
    net(torch.randn(2, 3, 64, 64))[-1].square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert any(not torch.equal(value, before[key]) for key, value in net.state_dict().items() if "conv" in key)


def awkward() -> nn.Module:
    """All that attributes alone can't say: unequal padding, phases, counts, crops."""
    ops = (Same(4, 4, 3, stride=2), nn.Conv2d(4, 4, 2, stride=2), nn.AvgPool2d(2, 2, ceil_mode=True))
    net = chain(*ops).eval()
    set_output_stride(net, 1)
    return net


def test_compiles_in_one_graph():
    net, x = awkward(), torch.randn(1, 3, 66, 93)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))


def test_exports():
    net, x = awkward(), torch.randn(1, 3, 66, 93)
    graph = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(graph(x), net(x))


def test_convolutions_export_with_free_sizes():
    net = chain(Same(4, 4, 3, stride=2), nn.Conv2d(4, 4, 2, stride=2)).eval()
    set_output_stride(net, 2)
    sides = {2: torch.export.Dim("height", min=32, max=512), 3: torch.export.Dim("width", min=32, max=512)}
    graph = torch.export.export(net, (torch.randn(1, 3, 67, 93),), dynamic_shapes=(sides,)).module()
    for size in ((64, 128), (96, 32)):  # of which "SAME" knows the remainder
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(graph(x), net(x))


def test_channels_last_and_autocast():
    net = awkward()
    x = torch.randn(2, 3, 64, 96)
    expected = net(x).detach()
    net = net.to(memory_format=torch.channels_last)
    last = net(x.to(memory_format=torch.channels_last)).detach()
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    assert last.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(x).detach()
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))


def test_a_half_precision_network_is_proved_in_full():
    net = timm_net("resnet18").to(torch.bfloat16)
    dilation = set_output_stride(net, 8)
    assert max(dilation.errors()) < 1e-5
    assert {parameter.dtype for parameter in net.parameters()} == {torch.bfloat16}
