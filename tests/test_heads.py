from __future__ import annotations

import functools
import inspect

import pytest
import torch

from lightning_atrous.context import ASPP, rates_at_reduction
from lightning_atrous.heads import FCN, HEADS, DeepLabV3, DeepLabV3Plus, create_head
from lightning_atrous.types import FeatureInfo

CHANNELS = (5, 6, 8, 12, 20)


def info_at(output_stride: int) -> tuple[FeatureInfo, ...]:
    return tuple(FeatureInfo(c, min(r, output_stride)) for c, r in zip(CHANNELS, (2, 4, 8, 16, 32), strict=True))


def features_at(output_stride: int, batch: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.randn(batch, level.channels, -(-height // level.reduction), -(-width // level.reduction))
        for level in info_at(output_stride)
    )


@pytest.mark.parametrize("name", ["deeplabv3", "deeplabv3plus"])
def test_retarget_equals_a_head_built_at_that_stride(name: str) -> None:
    moved = create_head(name, info_at(16), 3).eval()
    built = create_head(name, info_at(8), 3).eval()
    built.load_state_dict(moved.state_dict())
    moved.retarget(info_at(8))
    assert moved.aspp.rates == (12, 24, 36)
    features = features_at(8, 2, 64, 80)
    torch.testing.assert_close(moved(features), built(features), rtol=0, atol=0)


def test_deeplabv3plus_is_the_papers() -> None:
    head = DeepLabV3Plus(info_at(16), 21)
    (refine,) = head.refine
    convs = [m for m in refine.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size) for c in convs] == [
        (48 + 256, 256, (3, 3)),
        (256, 256, (3, 3)),
    ]
    assert head.aspp.rates == (6, 12, 18)
    assert head.aspp.project[0].in_channels == 5 * 256
    separable = DeepLabV3Plus(info_at(16), 21, separable=True)
    grouped = [m for m in separable.modules() if isinstance(m, torch.nn.Conv2d) and m.groups > 1]
    assert len(grouped) == 3 + 2
    assert all(m.groups == m.in_channels for m in grouped)


def test_aspp_equals_its_definition() -> None:
    aspp = ASPP(7, 4, rates=(2, 3), dropout=0.5).eval()
    x = torch.randn(2, 7, 9, 11)
    branches = [aspp.pointwise(x), aspp.atrous[0](x), aspp.atrous[1](x), aspp.pool(x)]
    torch.testing.assert_close(aspp(x), aspp.project(torch.cat(branches, 1)))
    assert ASPP(7, 4, rates=(1, 2, 3, 4, 5), image_pool=False).project[0].in_channels == 6 * 4


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (functools.partial(DeepLabV3Plus, (FeatureInfo(384, 16),)), "needs a feature level of stride 4.*fcn"),
        (
            functools.partial(DeepLabV3, info_at(32), rates=(5,)),
            "atrous rate 5, quoted at output stride 16, would be 2.5",
        ),
        (functools.partial(DeepLabV3, info_at(32), rates=(1,), rates_at=8), "would be 0.25"),
        (functools.partial(FCN, info_at(16), level=5), "level 5 asked of a backbone with 5 levels"),
        (functools.partial(FCN, info_at(16), convs=-1), "convs must be 0 or more"),
        (functools.partial(DeepLabV3Plus, info_at(16), decoder_convs=0), "decoder_convs must be at least 1"),
    ],
)
def test_heads_refuse_with_a_sentence(build, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build(num_classes=3)


def test_rates_keep_their_reach() -> None:
    for reduction in (8, 16, 32):
        rates = rates_at_reduction((6, 12, 18), 16, reduction)
        assert [rate * reduction for rate in rates] == [96, 192, 288]


@pytest.mark.parametrize("name", sorted(HEADS))
def test_options_are_keywords_with_types_and_words(name: str) -> None:
    cls = HEADS[name]
    for option, parameter in list(inspect.signature(cls).parameters.items())[2:]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert f"{option}:" in cls.__doc__
