"""A level that is read within its stage: another package's decoder may want it there."""

from __future__ import annotations

import pytest
import torch

from lightning_atrous import TimmBackbone

pytestmark = pytest.mark.usefixtures("one_thread")


def backbone(**options) -> TimmBackbone:
    torch.manual_seed(0)
    # timm starts the last norm of each block at zero, and a block that adds nothing would hide a mistake
    options = {"timm_options": {"zero_init_last": False}, **options}
    return TimmBackbone("resnet18", pretrained=False, **options).eval()


@pytest.mark.parametrize("output_stride", [32, 8])
def test_a_level_is_what_the_named_module_gives(output_stride: int) -> None:
    plain, within = backbone(output_stride=32), backbone(output_stride=32, read_at={2: "layer2.0"})
    within.output_stride = output_stride
    plain.output_stride = output_stride
    image = torch.randn(2, 3, 65, 97)
    net = plain.net
    with torch.no_grad():
        stem = net.maxpool(net.act1(net.bn1(net.conv1(image))))
        expected = net.layer2[0](net.layer1(stem))
        levels, others = within(image), plain(image)
    torch.testing.assert_close(levels[2], expected)
    for i in (0, 1, 3, 4):
        torch.testing.assert_close(levels[i], others[i])
    assert not torch.equal(levels[2], others[2])


def test_nothing_stays_on_the_network_and_a_checkpoint_keeps_it() -> None:
    within = backbone(output_stride=32, read_at={2: "layer2.0"})
    within(torch.randn(1, 3, 64, 64))
    assert not any(module._forward_hooks for module in within.net.modules())
    again = TimmBackbone(**within.options()).eval()
    again.load_state_dict(within.state_dict())
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(image)[2], within(image)[2], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("read_at", "says"),
    [
        ({7: "layer2.0"}, "level 7 asked of a network with 5 levels"),
        ({2: "layer2.9"}, "no module 'layer2.9'; did you mean"),
    ],
)
def test_places_that_are_not_there_are_refused(read_at: dict[int, str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        backbone(output_stride=32, read_at=read_at)


def test_a_module_of_another_stage_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer1.0 gives \(1, 64, 16, 16\) where level 2 has \(1, 128, 8, 8\)"):
        backbone(output_stride=32, read_at={2: "layer1.0"})(torch.randn(1, 3, 64, 64))
