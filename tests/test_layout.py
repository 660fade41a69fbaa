"""Dilation on sub-grids: the numbers of dilated kernels, in eval mode and in training, wherever it is chosen."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from theorem import maps, random_doubles, timm_net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_atrous.dilation import Dilation, set_output_stride

pytestmark = pytest.mark.usefixtures("one_thread")


def splits(net: nn.Module, x: Tensor) -> bool:
    """Whether some convolution of the network sees more images than came."""
    batches: set[int] = set()
    hooks = [
        m.register_forward_hook(lambda m, args, y: batches.add(len(y)))
        for m in net.modules()
        if isinstance(m, nn.BatchNorm2d | nn.LayerNorm)
    ]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return max(batches) > len(x)


ALIKE = (
    "resnet18",
    "resnet18d",  # average pools in the shortcuts
    "mobilenetv2_100",
    "tf_efficientnet_lite0",  # "SAME" padding
    "convnext_atto",  # even kernels
    "resnetblur18",  # reflecting blur pools
    "regnetx_002",
    "dla46x_c",
)


@pytest.mark.parametrize("name", ALIKE)
def test_the_numbers_are_those_of_dilated_kernels_everywhere(name):
    net = random_doubles(timm_net(name))
    dilation = Dilation(net)
    for output_stride in (16, 8):
        dilation.output_stride = output_stride
        assert dilation.method == "dilate"
        x = torch.randn(2, 3, 64, 160, dtype=torch.double)
        outcomes = []
        for execution in ("dilated", "split"):
            dilation.execution = execution
            assert splits(net.eval(), x) == (execution == "split")
            outcomes.append(maps(net, x))
        for dilated, split in zip(*outcomes, strict=True):
            torch.testing.assert_close(split, dilated, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050", "convnext_atto"])
def test_a_training_step_is_that_of_dilated_kernels(name):
    """Gradients of every weight."""
    nets = []
    for execution in ("dilated", "split"):
        torch.manual_seed(1)
        net = random_doubles(timm_net(name))
        set_output_stride(net, 8).execution = execution
        x = torch.randn(2, 3, 64, 96, dtype=torch.double)
        net.train()
        torch.manual_seed(2)
        sum((y * torch.randn_like(y)).sum() for y in net(x)).backward()
        nets.append(net)
    assert splits(nets[1], x)
    assert not splits(nets[0], x)
    largest = max(float(parameter.grad.abs().max()) for parameter in nets[0].parameters())
    for (key, old), new in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(new.grad, old.grad, rtol=1e-8, atol=1e-11 * largest, msg=key)


def test_running_statistics_are_those_of_dilated_kernels():
    nets = [timm_net("resnet18").double() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(2, 3, 64, 96, dtype=torch.double)
    for net, execution in zip(nets, ("dilated", "split"), strict=True):
        set_output_stride(net, 8).execution = execution
        net.train()(x)
    for key, value in nets[0].state_dict().items():
        torch.testing.assert_close(nets[1].state_dict()[key], value, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("size", [(65, 97), (64, 100), (33, 64), (8, 8)])
def test_maps_that_do_not_divide_are_dilated(size):
    net = random_doubles(timm_net("resnet18"))
    dilation = set_output_stride(net, 8)
    x = torch.randn(1, 3, *size, dtype=torch.double)
    assert not splits(net, x)
    found = maps(net, x)
    dilation.execution = "dilated"
    assert all(torch.equal(a, b) for a, b in zip(found, maps(net, x), strict=True))


def test_what_is_random_per_image_is_not_split_in_training():
    """Drop-path drops images; on sub-grids it would drop parts of them."""
    net = timm_net("convnext_atto", drop_path_rate=0.5)
    dilation = set_output_stride(net, 8)
    assert dilation.alternatives == {False}
    x = torch.randn(1, 3, 64, 64)
    assert splits(net.eval(), x)
    assert not splits(net.train(), x)
    assert set_output_stride(timm_net("convnext_atto"), 8).alternatives == {False, True}


def test_what_is_preferred_is_done_and_what_is_pinned_stays():
    net = timm_net("resnet18")
    dilation, x = set_output_stride(net, 8), torch.randn(1, 3, 64, 64)
    dilation.prefer(False, training=True)
    assert splits(net.eval(), x)
    assert not splits(net.train(), x)
    dilation.output_stride = 16
    assert splits(net.eval(), x)
    assert not splits(net.train(), x)
    dilation.execution = "split"
    assert splits(net.train(), x)
    assert dilation.alternatives == frozenset()
    dilation.execution = "dilated"
    assert not splits(net.eval(), x)
    assert all("forward" not in vars(module) for module in net.modules())
    with pytest.raises(ValueError, match="there is no execution 'fast'; give one of auto, dilated, split"):
        dilation.execution = "fast"


def test_kernels_say_their_rates_however_they_are_run():
    net = timm_net("resnet18")
    dilation = set_output_stride(net, 8)
    assert net.layer4[1].conv2.dilation == (4, 4)
    dilation.output_stride = 32
    assert net.layer4[1].conv2.dilation == (1, 1)


def test_weights_are_shared_through_all_that_happens_to_them():
    net = timm_net("resnet18").eval()
    net.dilation = set_output_stride(net, 8)
    x = torch.randn(1, 3, 64, 64)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other = other.double().to(memory_format=torch.channels_last)
        other.load_state_dict({key: value * 1.5 for key, value in other.state_dict().items()})
        assert splits(other, x.double())
        split = maps(other, x.double())
        other.dilation.execution = "dilated"
        for a, b in zip(split, maps(other, x.double()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert next(net.parameters()).dtype == torch.float32


def test_threads_with_images_of_different_sizes_do_not_meet():
    net = random_doubles(timm_net("resnet18"))
    set_output_stride(net, 8)
    images = [torch.randn(1, 3, *size, dtype=torch.double) for size in ((64, 64), (65, 65)) * 8]
    alone = [maps(net, image)[-1] for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: maps(net, image)[-1], images))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_checkpointed_parts_are_repeated_as_they_were():
    """The part is run again in the backward pass, from a thread that may have begun no forward."""
    net = random_doubles(timm_net("resnet18"))
    set_output_stride(net, 8)
    x = torch.randn(1, 3, 64, 64, dtype=torch.double)
    net(x)[-1].square().sum().backward()
    expected = net.layer4[1].conv2.weight.grad.clone()
    net.zero_grad()
    layer, own = net.layer4, net.layer4.forward
    layer.forward = lambda x: checkpoint(own, x, use_reentrant=False)
    loss = net(x)[-1].square().sum()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    torch.testing.assert_close(net.layer4[1].conv2.weight.grad, expected, rtol=1e-9, atol=1e-12)


def test_compiles_in_one_graph_for_every_size():
    net = timm_net("resnet18").eval()
    dilation = set_output_stride(net, 8)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    for size in ((64, 96), (65, 97), (64, 64)):
        x = torch.randn(1, 3, *size)
        for a, b in zip(compiled(x), net(x), strict=True):
            torch.testing.assert_close(a, b)
    assert dilation.execution == "auto"


def test_what_is_exported_is_dilated():
    net = timm_net("resnet18").eval()
    set_output_stride(net, 8)
    x = torch.randn(1, 3, 64, 96)
    program = torch.export.export(net, (x,))
    rates = {node.args[5][0] for node in program.graph.nodes if "conv2d" in str(node.target) and len(node.args) > 5}
    assert rates >= {2, 4}
    torch.testing.assert_close(program.module()(x)[-1], net(x)[-1], rtol=1e-3, atol=1e-4)
