"""The theorem of output strides, ready to be put to any network."""

from __future__ import annotations

import copy
import math

import timm
import torch
from torch import Tensor, nn

from lightning_atrous.dilation import Dilation

SIZES = ((64, 96), (96, 160))


def timm_net(name: str, **options: str) -> nn.Module:
    return timm.create_model(name, features_only=True, pretrained=False, **options)


def random_doubles(net: nn.Module, size: tuple[int, int] = (64, 96)) -> nn.Module:
    """Every weight, bias and BN statistic at random, in float64, with maps of sane magnitude; eval mode."""
    net = net.double().eval()
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.uniform_(parameter, -0.6, 0.6)
        elif parameter.numel() == max(parameter.shape, default=1):
            nn.init.uniform_(parameter, 0.4, 1.6)
        else:
            nn.init.normal_(parameter, std=math.sqrt(2 * parameter.shape[0] / parameter.numel()))

    def settle(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        norm.running_mean.copy_(args[0].mean((0, 2, 3)) * torch.rand_like(norm.running_mean))
        norm.running_var.copy_(args[0].var((0, 2, 3)).mean() * (0.5 + torch.rand_like(norm.running_var)))

    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_pre_hook(settle) for norm in norms]
    with torch.no_grad():
        net(torch.randn(1, 3, *size, dtype=torch.double))
    for handle in handles:
        handle.remove()
    return net


def maps(net: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        y = net(x)
    return [y] if isinstance(y, Tensor) else list(y)


def assert_theorem(
    net: nn.Module, output_strides: tuple[int, ...], sizes: tuple[tuple[int, int], ...] = SIZES, method: str = "auto"
) -> None:
    net = random_doubles(net, sizes[0])
    images = [torch.randn(2, 3, *size, dtype=torch.double) for size in sizes]
    expected = [maps(net, image) for image in images]
    dilation = Dilation(net, method=method)
    before = dilation.reductions
    for output_stride in output_strides:
        dilation.output_stride = output_stride
        assert method in ("auto", dilation.method)
        assert dilation.reductions == tuple(min(reduction, output_stride) for reduction in before)
        for image, strided in zip(images, expected, strict=True):
            dense = maps(net, image)
            assert len(dense) == len(strided)
            for d, s, old, new in zip(dense, strided, before, dilation.reductions, strict=True):
                on_grid = d[..., :: old // new, :: old // new]
                assert on_grid.shape == s.shape
                assert (on_grid - s).abs().max() <= 1e-8 * s.abs().max()
                assert s.std() > 1e-3 * s.abs().max()  # there is something to compare


def chain(*ops: nn.Module) -> nn.Sequential:
    """The ops between a strided convolution, whose stride they may have to make up for, and two more."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.Tanh(),  # both signs: a maximum must not see zeros at the border
        *copy.deepcopy(ops),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, (3, 5), padding=(1, 2)),
    )
