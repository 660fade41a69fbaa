from __future__ import annotations

import functools
import inspect

import pytest
import timm
import torch

from lightning_atrous.context import ASPP, rates_at_reduction
from lightning_atrous.dilation import set_output_stride
from lightning_atrous.heads import (
    DUC,
    FCN,
    HEADS,
    LRASPP,
    PSP,
    RFB,
    DeepLabV1,
    DeepLabV2,
    DeepLabV3,
    DeepLabV3Plus,
    DenseASPPHead,
    SegNet,
    SkipFCN,
    create_head,
)
from lightning_atrous.heads.fcn_skips import bilinear_transposed
from lightning_atrous.layers import resize
from lightning_atrous.types import FeatureInfo

CHANNELS = (5, 6, 8, 12, 20)


def info_at(output_stride: int) -> tuple[FeatureInfo, ...]:
    return tuple(FeatureInfo(c, min(r, output_stride)) for c, r in zip(CHANNELS, (2, 4, 8, 16, 32), strict=True))


def features_at(output_stride: int, batch: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.randn(batch, level.channels, -(-height // level.reduction), -(-width // level.reduction))
        for level in info_at(output_stride)
    )


ATROUS = {
    "deeplabv1": {"dropout": 0.0},
    "deeplabv2": {"channels": 9},
    "deeplabv3": {"image_pool": False, "refine_convs": 0},
    "denseaspp": {"rates_at": 16},
    "rfb": {"branch_channels": 4},
}
"""Heads that read one map by kernels alone."""


@pytest.mark.parametrize("name", sorted(ATROUS))
def test_a_head_on_a_denser_map_gives_what_it_gave_in_between(name: str) -> None:
    """The theorem of the backbone, for the head: the same reach, every k-th score."""
    head = create_head(name, info_at(16), 3, **ATROUS[name]).double().eval()
    x = torch.randn(2, CHANNELS[-1], 34, 38, dtype=torch.float64)
    coarse = head((x[..., ::2, ::2],))
    before = {key: value.clone() for key, value in head.state_dict().items()}
    head.retarget(info_at(8))
    torch.testing.assert_close(head((x,))[..., ::2, ::2], coarse, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[key]) for key, value in head.state_dict().items())


@pytest.mark.parametrize("stride", [2, 3, 4, 8])
def test_transposed_convolution_begins_bilinear(stride: int) -> None:
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    raised = bilinear_transposed(3, stride).double()(x)
    assert raised.shape == (2, 3, 7 * stride, 9 * stride)
    inside = (..., slice(stride, -stride), slice(stride, -stride))
    torch.testing.assert_close(raised[inside], resize(x, raised.shape[-2:])[inside])


def test_fcn8s_adds_scores_level_by_level() -> None:
    head = SkipFCN(info_at(32), 4).eval()
    for score in head.scores:
        torch.nn.init.normal_(score.weight)
    *_, x8, x16, x32 = features_at(32, 1, 70, 90)
    s32, s16, s8 = (score(x) for score, x in zip(head.scores, (x32, x16, x8), strict=True))
    s16 = s16 + head.raises[0](s32)[..., :5, :6]
    torch.testing.assert_close(head((x8, x16, x32)), s8 + head.raises[1](s16)[..., :9, :12])
    assert not SkipFCN(info_at(32), 4).scores[1].weight.any()
    wide = SkipFCN(info_at(32), 4, skips=0, classifier_channels=24)
    assert [conv.kernel_size for conv in wide.modules() if isinstance(conv, torch.nn.Conv2d)] == [
        (7, 7),
        (1, 1),
        (1, 1),
    ]


def test_duc_rearranges_as_a_loop_does() -> None:
    head = DUC(info_at(8), 3, rates=(1,)).eval()
    features = features_at(8, 2, 32, 40)
    channels = head.branches[0](features[-1])
    by_hand = torch.empty(2, 3, 32, 40)
    for y in range(32):
        for x in range(40):
            for k in range(3):
                by_hand[:, k, y, x] = channels[:, k * 64 + (y % 8) * 8 + x % 8, y // 8, x // 8]
    assert torch.equal(head(features), by_hand)
    halved = DUC(info_at(8), 3, stride=2, channels=7).eval()(features_at(8, 1, 33, 41))
    assert halved.shape == (1, 3, 17, 21)


def test_duc_sums_its_branches() -> None:
    head = DUC(info_at(8), 2, rates=(1, 2)).eval()
    features = features_at(8, 1, 32, 32)
    one, other = (torch.nn.functional.pixel_shuffle(branch(features[-1]), 8) for branch in head.branches)
    torch.testing.assert_close(head(features), one + other)


def test_largefov_on_vgg16_sees_what_theory_says() -> None:
    """The recurrence over VGG-16 up to its last pool, and 2·12 pixels of stride 8: the support of a gradient."""
    net = timm.create_model("vgg16", features_only=True, pretrained=False)
    for name, module in list(net.named_modules()):
        if isinstance(module, torch.nn.MaxPool2d):  # a mean hands its gradient to all that it sees
            net.set_submodule(name, torch.nn.AvgPool2d(2, 2))
    dilation = set_output_stride(net, 8)
    head = DeepLabV1([FeatureInfo(512, r) for r in dilation.reductions], 1, channels=4).eval()
    for parameter in (*net.parameters(), *head.parameters()):
        torch.nn.init.constant_(parameter, 1 / max(parameter[0].numel(), 1))
    field, stride = 1, 1
    for kernel, step in [(3, 1), (3, 1), (2, 2)] * 2 + [(3, 1), (3, 1), (3, 1), (2, 2)] * 3:
        field, stride = field + (kernel - 1) * stride, stride * step
    assert field == 212  # Araujo et al., Distill 2019
    field += 2 * 12 * 8
    image = torch.rand(1, 3, 480, 448, requires_grad=True)
    head(net.eval()(image))[0, 0, 30, 28].backward()
    seen = image.grad[0].sum(0) != 0
    assert [int(seen.any(dim).sum()) for dim in (1, 0)] == [field, field]


def test_psp_sees_the_means_of_parts() -> None:
    head = PSP(info_at(16), 3, channels=5).eval()
    x = torch.randn(2, CHANNELS[-1], 7, 11)
    assert [branch.bins for branch in head.pyramid.branches] == [1, 2, 3, 6]
    halves = head.pyramid.branches[1]
    parts = torch.stack([x[..., i : i + 4, j : j + 6].mean((2, 3)) for i in (0, 3) for j in (0, 5)], dim=-1).unflatten(
        -1, (2, 2)
    )
    expected = resize(torch.relu(halves.norm(halves.conv(parts))), (7, 11))
    torch.testing.assert_close(head.pyramid(x)[:, CHANNELS[-1] + CHANNELS[-1] // 4 :][:, : CHANNELS[-1] // 4], expected)


def test_unpooling_puts_each_value_where_the_maximum_was() -> None:
    head = SegNet(info_at(32), 3, stride=16).eval()
    finer, coarse = torch.randn(1, 12, 5, 7), torch.randn(1, 20, 3, 4)
    narrow = head.narrow[0](coarse)
    expected = torch.zeros_like(finer)
    for c in range(12):
        for i in range(3):
            for j in range(4):
                window = finer[0, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                row, column = divmod(int(window.argmax()), window.shape[1])
                expected[0, c, 2 * i + row, 2 * j + column] = narrow[0, c, i, j]
    features = (torch.zeros(0),) * 3 + (finer, coarse)
    torch.testing.assert_close(head(features), head.classifier(head.refine[0](expected)))


def test_denseaspp_reads_all_that_came_before() -> None:
    head = DenseASPPHead(info_at(8), 3)
    assert [layer[0][0].in_channels for layer in head.aspp.layers] == [20 + 2 * i for i in range(5)]
    assert head.aspp.rates == (3, 6, 12, 18, 24)
    assert head.classifier.in_channels == 20 + 5 * 2


def test_lraspp_adds_the_scores_of_two_levels() -> None:
    head = LRASPP(info_at(16), 3).eval()
    features = features_at(16, 2, 64, 48)
    gate = torch.sigmoid(head.gate(features[-1].mean((2, 3), keepdim=True)))
    high = resize(head.project(features[-1]) * gate, features[2].shape[-2:])
    torch.testing.assert_close(head(features), head.low_classifier(features[2]) + head.high_classifier(high))


@pytest.mark.parametrize("name", ["deeplabv3", "deeplabv3plus"])
def test_retarget_equals_a_head_built_at_that_stride(name: str) -> None:
    moved = create_head(name, info_at(16), 3).eval()
    built = create_head(name, info_at(8), 3).eval()
    built.load_state_dict(moved.state_dict())
    moved.retarget(info_at(8))
    assert moved.aspp.rates == (12, 24, 36)
    features = features_at(8, 2, 64, 80)
    torch.testing.assert_close(moved(features), built(features), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["fcn_skips", "duc", "segnet"])
def test_a_head_that_cannot_follow_says_so(name: str) -> None:
    head = create_head(name, info_at(16), 3)
    head.retarget(info_at(16))
    with pytest.raises(ValueError, match="was built for"):
        head.retarget(info_at(8))
    assert head(features_at(16, 1, 64, 64)).isfinite().all()


def test_the_decoder_of_deeplabv3plus_is_an_option() -> None:
    """The rows of the paper's tables 1 and 2."""
    info, features = info_at(16), features_at(16, 1, 64, 64)
    off = DeepLabV3Plus(info, 3, low_levels=()).eval()
    v3 = DeepLabV3(info, 3).eval()
    v3.load_state_dict(off.state_dict())
    assert torch.equal(off(features), v3(features))
    two = DeepLabV3Plus(info, 3, low_levels=(2, 8), low_level_channels=16, decoder_kernel=1, decoder_channels=24).eval()
    assert two(features).shape == (1, 3, 32, 32)
    x = two.aspp(features[-1])
    for i, stride in ((1, 8), (0, 2)):
        low = two.reduce[i](features[two.low_levels[i]])
        assert low.shape[-1] == 64 // stride
        x = two.refine[i](torch.cat([resize(x, low.shape[-2:]), low], 1))
    torch.testing.assert_close(two(features), two.classifier(x))
    assert {conv.kernel_size for conv in two.refine.modules() if isinstance(conv, torch.nn.Conv2d)} == {(1, 1)}


@pytest.mark.parametrize("name", ["deeplabv3", "deeplabv3plus"])
def test_logits_are_raised_by_the_head_if_it_is_told_to(name: str) -> None:
    plain, raised = (create_head(name, info_at(16), 3, upsampling=times).eval() for times in (1, 4))
    raised.load_state_dict(plain.state_dict())
    features = features_at(16, 1, 64, 64)
    expected = plain(features)
    size = [4 * n for n in expected.shape[-2:]]
    torch.testing.assert_close(raised(features), resize(expected, size, align_corners=True))


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
    summed = ASPP(7, 4, rates=(2, 3), merge="sum", norm=False, pointwise=False, image_pool=False).eval()
    torch.testing.assert_close(summed(x), summed.atrous[0](x) + summed.atrous[1](x))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in summed.modules())
    assert all(branch[0].bias is not None for branch in summed.atrous)
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
        (functools.partial(FCN, info_at(16), convs=-1), "convs must be at least 0"),
        (functools.partial(DeepLabV3Plus, info_at(16), decoder_convs=0), "decoder_convs must be at least 1"),
        (functools.partial(DeepLabV3Plus, info_at(16), low_levels=(8, 4)), "the finest first; got"),
        (functools.partial(DeepLabV3Plus, info_at(16), low_levels=(3,)), "needs a feature level of stride 3"),
        (functools.partial(SkipFCN, info_at(16), skips=5), "skips must be 0 to 4"),
        (functools.partial(DUC, info_at(8), stride=3), "must divide the backbone's output stride of 8"),
        (functools.partial(DUC, info_at(8), rates=()), "duc needs at least one rate"),
        (functools.partial(DeepLabV2, info_at(8), rates=()), "deeplabv2 needs at least one rate"),
        (functools.partial(PSP, info_at(8), bins=(0, 1)), "at least 1 each"),
        (functools.partial(RFB, info_at(32)), "give rates_at: 32"),
        (functools.partial(LRASPP, (FeatureInfo(384, 16),)), "lraspp needs a feature level of stride 8"),
        (functools.partial(SegNet, (FeatureInfo(384, 16),) * 3), "segnet needs a level finer than the last"),
        (functools.partial(SegNet, info_at(8), stride=8), "needs a level of stride 8 before the last"),
        (functools.partial(SegNet, info_at(8), convs=0), "convs must be at least 1"),
        (functools.partial(ASPP, 7, 4, rates=(), pointwise=False, image_pool=False), "has no branch"),
    ],
)
def test_heads_refuse_with_a_sentence(build, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build() if build.func is ASPP else build(num_classes=3)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_what_a_head_cannot_be_built_of_is_refused_by_name(name: str) -> None:
    """Every width below 1, even kernel, and share outside 0 to 1, before torch meets it."""
    stride = 8 if name == "denseaspp" else 16
    info = info_at(32 if name in ("unetplusplus", "linknet", "manet", "fpn") else stride)
    for option, parameter in list(inspect.signature(HEADS[name]).parameters.items())[2:]:
        if option == "dropout":
            wrong = [1.5, -0.1, float("nan")]
        elif option.endswith("kernel"):
            wrong = [0, 2, -1]
        elif (
            (option.endswith("channels") and isinstance(parameter.default, int | None))
            or option in ("upsampling", "rates_at")
            or (option == "convs" and name == "segnet")
        ):
            wrong = [0, -1]
        elif option.endswith("convs"):
            wrong = [-1]
        else:
            continue
        for value in wrong:
            with pytest.raises(ValueError, match=option):
                create_head(name, info, 3, **{option: value})


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
