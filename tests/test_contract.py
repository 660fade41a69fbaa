"""Every registered head keeps the contract of a head, and `check_head` tells each way of breaking it."""

from __future__ import annotations

import functools
import itertools
import re
import sys
import types
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor, nn

from lightning_atrous.heads import HEADS, DeepLabV3, Head
from lightning_atrous.testing import HEAD_CASES, check_head
from lightning_atrous.types import FeatureInfo, Features

pytestmark = pytest.mark.usefixtures("one_thread")

CHEAP = HEAD_CASES[-3:]
"""One network of few channels, at all strides."""


@pytest.mark.parametrize("name", sorted(HEADS))
def test_registered_heads_keep_the_contract(name: str) -> None:
    refused = check_head(HEADS[name])
    assert len(refused) < len(HEAD_CASES)
    assert HEADS[name].paper


def test_the_cases_put_any_two_values_together() -> None:
    axes = [
        [(case.backbone, case.output_stride, case.size, case.batch, case.precision)[axis] for case in HEAD_CASES[1:]]
        for axis in range(5)
    ]
    for one, other in itertools.combinations(axes, 2):
        assert set(zip(one, other, strict=True)) == set(itertools.product(one, other))


class Sound(Head):
    """An atrous convolution and a score.

    Args:
        info: The backbone's levels.
        num_classes: K.
        reach: In image pixels.
    """

    def __init__(self, info: Sequence[FeatureInfo], num_classes: int, *, reach: int = 32) -> None:
        super().__init__(info, num_classes)
        self.reach = reach
        if reach % info[-1].reduction:
            raise ValueError(f"reach {reach} must be a multiple of the output stride {info[-1].reduction}")
        self.conv = nn.Conv2d(info[-1].channels, 8, 3)
        self.score = nn.Conv2d(8, num_classes, 1)
        Sound.retarget(self, info)

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        rate = self.reach // info[-1].reduction
        self.conv.dilation = self.conv.padding = (rate, rate)

    def hidden(self, features: Features) -> Tensor:
        return self.conv(features[-1]).relu()

    def forward(self, features: Features) -> Tensor:
        return self.score(self.hidden(features))


class OfOneSize(Sound):
    def forward(self, features: Features) -> Tensor:
        return F.adaptive_avg_pool2d(super().forward(features), 16)


class CountsPositions(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes)
        self.dense = nn.Linear(6, 6)

    def forward(self, features: Features) -> Tensor:
        return self.dense(super().forward(features))


class OneClassTooMany(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes + 1)


class Indices(Sound):
    def forward(self, features: Features) -> Tensor:
        return super().forward(features).argmax(1, keepdim=True)


class Pair(Sound):
    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        return super().forward(features), features[-1]


class NotFinite(Sound):
    def forward(self, features: Features) -> Tensor:
        return super().forward(features).log()


class GradientNotFinite(Sound):
    def forward(self, features: Features) -> Tensor:
        logits = super().forward(features)
        return logits + (logits - logits.detach()).sqrt()


class OverwritesWhatBackwardNeeds(Sound):
    def forward(self, features: Features) -> Tensor:
        gates = super().forward(features).sigmoid()
        logits = gates * gates
        gates.zero_()
        return logits


class MixesTheBatch(Sound):
    def forward(self, features: Features) -> Tensor:
        logits = super().forward(features)
        return logits - logits.mean(0, keepdim=True)


class Random(Sound):
    def forward(self, features: Features) -> Tensor:
        return self.score(F.dropout(self.hidden(features), 0.1))


class ChangesItsInput(Sound):
    def forward(self, features: Features) -> Tensor:
        return super().forward((*features[:-1], features[-1].relu_()))


class RemembersTheFirstSize(Sound):
    width = 0

    def forward(self, features: Features) -> Tensor:
        logits = super().forward(features)
        self.width = self.width or logits.shape[-1]
        return logits / self.width


class RemembersTheLastSize(Sound):
    width = 0

    def forward(self, features: Features) -> Tensor:
        logits = super().forward(features)
        before, self.width = self.width or logits.shape[-1], logits.shape[-1]
        return logits / before


class GrowsAsItRuns(Sound):
    def forward(self, features: Features) -> Tensor:
        logits = super().forward(features)
        self.register_buffer(f"grid{logits.shape[-1]}", torch.zeros(1))
        return logits


class UnusedWeight(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes)
        self.spare = nn.Conv2d(1, 1, 1)


class Detached(Sound):
    def forward(self, features: Features) -> Tensor:
        return super().forward(tuple(level.detach() for level in features))


class LearnsFromTheFirst(Sound):
    def forward(self, features: Features) -> Tensor:
        logits = super().forward(features)
        return torch.cat([logits[:1], logits[1:].detach()])


class FinerInTraining(Sound):
    def forward(self, features: Features) -> Tensor:
        logits = super().forward(features)
        return logits.repeat_interleave(2, 2).repeat_interleave(2, 3) if self.training else logits


class Counts(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, features: Features) -> Tensor:
        self.runs += 1
        return super().forward(features)


class Lazy(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes)
        self.score = nn.LazyConv2d(num_classes, 1)


class NormOfOneValue(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes)
        self.norm = nn.BatchNorm2d(num_classes)

    def forward(self, features: Features) -> Tensor:
        logits = super().forward(features)
        return logits + self.norm(logits.mean((2, 3), keepdim=True))


class OfOneType(Sound):
    def forward(self, features: Features) -> Tensor:
        return torch.lerp(super().forward(features), features[-1].mean(1, keepdim=True), 0.5)


class CannotBeCopied(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes)
        self.scale = self.score.weight * 1  # no leaf of the graph


class StaysWhereItIs(Sound):
    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        pass


class StaysBehindAGate(StaysWhereItIs):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes)
        self.gate = nn.Parameter(torch.zeros(1))
        self.plain = nn.Conv2d(info[-1].channels, num_classes, 1)

    def forward(self, features: Features) -> Tensor:
        return self.plain(features[-1]) + self.gate * super().forward(features)


class FollowsTooFar(Sound):
    """Quoted for 16 pixels, and no refusal on the way to 32.

    Args:
        info: The backbone's levels.
        num_classes: K.
        reach: In image pixels.
    """

    def __init__(self, info: Sequence[FeatureInfo], num_classes: int, *, reach: int = 16) -> None:
        super().__init__(info, num_classes, reach=reach)

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        rate = max(1, self.reach // info[-1].reduction)
        self.conv.dilation = self.conv.padding = (rate, rate)


class Upsamples(Sound):
    """As many channels as pixels of the output stride."""

    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes)
        self.factor = info[-1].reduction
        self.score = nn.Conv2d(8, num_classes * self.factor**2, 1)

    def forward(self, features: Features) -> Tensor:
        return F.pixel_shuffle(super().forward(features), self.factor)


class UpsamplesAtOneStride(Upsamples):
    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        if info[-1].reduction != self.factor:
            raise ValueError(f"its scores are those of output stride {self.factor}; keep the backbone at that one")


class RefusesTheWayBack(Sound):
    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        raise ValueError("this head stays at the stride at which it was built")


class RefusesHalfway(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes)
        self.home = info[-1].reduction

    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        if info[-1].reduction != self.home:
            self.conv.weight.data.zero_()
            raise ValueError("this head stays at the stride at which it was built")


class RunsAtHomeAlone(Sound):
    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        self.conv.dilation = (0, 0)


class CrashesOnRetarget(Sound):
    def retarget(self, info: Sequence[FeatureInfo]) -> None:
        raise KeyError(info[-1].reduction)


class RefusesInAWord(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        raise ValueError("no")


class LeavesItToTorch(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes)
        self.conv = nn.Conv2d(info[-1].channels, 8, 3, groups=7)


class CrashesAtOnce(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes)
        self.low = info[4]


class RefusesAll(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        raise ValueError(f"this head needs a level of stride 64, got {info[-1].reduction}")


class RefusesOneClass(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        if num_classes < 2:
            raise ValueError(f"this head needs two classes or more, got {num_classes}")
        super().__init__(info, num_classes)


class DropsOneClass(Sound):
    def forward(self, features: Features) -> Tensor:
        return super().forward(features).squeeze(1)


class ComparesClasses(Sound):
    def forward(self, features: Features) -> Tensor:
        logits = super().forward(features)
        centred = logits - logits.mean(1, keepdim=True)
        return centred / centred.abs().amax(1, keepdim=True)


class NoHead(nn.Conv2d):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info[-1].channels, num_classes, 1)


class AnyOptions(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int, **options: int) -> None:
        super().__init__(info, num_classes, **options)


class OptionByPlace(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int, reach: int = 32) -> None:
        super().__init__(info, num_classes, reach=reach)


class OptionsAlone(Sound):
    def __init__(self, *, info: Sequence[FeatureInfo], num_classes: int) -> None:
        super().__init__(info, num_classes)


class OptionWithoutType(Sound):
    def __init__(self, info: Sequence[FeatureInfo], num_classes: int, *, reach=32) -> None:
        super().__init__(info, num_classes, reach=reach)


class OptionOfCode(Sound):
    """With an activation of one's choice.

    Args:
        info: The backbone's levels.
        num_classes: K.
        act: The activation.
    """

    def __init__(
        self, info: Sequence[FeatureInfo], num_classes: int, *, act: Callable[[Tensor], Tensor] = F.relu
    ) -> None:
        super().__init__(info, num_classes)


BROKEN = {
    OfOneSize: "of none of them a whole multiple",
    CountsPositions: "forward at another size raises RuntimeError",
    OneClassTooMany: r"gives logits \(2, 6, .*where \(2, 5, h, w\) is expected",
    Indices: "gives torch.int64, where a floating tensor",
    Pair: "gives tuple, where a floating tensor",
    NotFinite: "logits that are not finite",
    GradientNotFinite: r"the parameter conv\.\w+ a gradient that is not finite",
    OverwritesWhatBackwardNeeds: "the backward pass raises RuntimeError",
    MixesTheBatch: "where other images are in its batch",
    Random: "other logits for the same features in eval mode",
    ChangesItsInput: "changes the features in place",
    RemembersTheFirstSize: "after it has run at another",
    RemembersTheLastSize: "after it has run at another",
    GrowsAsItRuns: r"changes its state dict as it runs: grid\d+ is",
    UnusedWeight: "the parameter spare.weight no gradient",
    Detached: "no level of the backbone a gradient",
    LearnsFromTheFirst: "no gradient from some images of the batch",
    FinerInTraining: r"gives logits \(.*\) in training, and \(.*\) in eval mode",
    Counts: "changes runs as it runs in eval mode",
    Lazy: "has no shape yet for its parameter score.weight",
    NormOfOneValue: "training on a batch of 1 raises ValueError: Expected more than 1 value per channel",
    OfOneType: "bfloat16: forward raises RuntimeError: expected dtype",
    CannotBeCopied: "copy.deepcopy raises RuntimeError",
    StaysWhereItIs: "other logits after retarget to output stride 16 than a head built there",
    StaysBehindAGate: "other logits after retarget to output stride 16 than a head built there",
    FollowsTooFar: "follows to output stride 32, where it refuses to be built: reach 16 must be a multiple",
    Upsamples: r"with other weights than a head built there: score.weight is \(320, .* in place of \(1280, ",
    RefusesTheWayBack: "retarget back from output stride 16 raises ValueError",
    RefusesHalfway: "is not what it was after retarget to output stride 16 and back",
    RunsAtHomeAlone: "forward after retarget to output stride 16 raises RuntimeError",
    CrashesOnRetarget: "retarget raises KeyError: 16",
    RefusesInAWord: "refuses by 'no', where one sentence must say what is needed",
    LeavesItToTorch: r"leaves a refusal to torch \(in_channels must be divisible by groups\)",
    CrashesAtOnce: r"raises IndexError when it is built .*refuses by ValueError",
    RefusesAll: "refuses to be built for every case; for the last: this head needs a level of stride 64, got 32",
    RefusesOneClass: "refuses one class, where it takes 5: this head needs two classes",
    DropsOneClass: "an image through the network and the head, to one class, raises",
    ComparesClasses: "an image of 47×70 and one class logits .* or not finite",
    NoHead: "gives a NoHead when it is built, where a Head is expected",
    AnyOptions: r"\*\*options: 'int' must be a keyword-only option",
    OptionByPlace: "reach: 'int' = 32 must be a keyword-only option",
    OptionsAlone: "its first two arguments must be info and num_classes",
    OptionWithoutType: "option reach has no type",
    OptionOfCode: "a default is no plain value: option act",
}


@pytest.mark.parametrize("head", BROKEN, ids=lambda head: head.__name__)
def test_a_broken_head_is_caught(head: type[Head]) -> None:
    with pytest.raises(AssertionError, match=BROKEN[head]) as failure:
        check_head(head, cases=CHEAP)
    where = r" on swin_tiny_patch4_window7_224 at output stride \d+, \S+, \w+:"
    assert re.match(rf"{head.__name__}({where}|:| refuses)", str(failure.value))


def test_what_a_checkpoint_cannot_hold_is_caught() -> None:
    with pytest.raises(AssertionError, match="a checkpoint cannot hold it: option reach"):
        check_head(functools.partial(Sound, reach=abs), cases=CHEAP)
    with pytest.raises(AssertionError, match="a checkpoint cannot hold it: expected a class"):
        check_head(lambda info, num_classes: Sound(info, num_classes), cases=CHEAP)


@pytest.mark.parametrize("head", [Sound, UpsamplesAtOneStride], ids=lambda head: head.__name__)
def test_a_sound_head_passes(head: type[Head]) -> None:
    before = torch.get_rng_state()
    assert check_head(head, cases=CHEAP) == {}
    assert torch.equal(torch.get_rng_state(), before)


def test_a_refusal_with_a_sentence_is_allowed() -> None:
    refused = check_head(functools.partial(DeepLabV3, rates=(1,), channels=8), cases=CHEAP)
    assert [case.output_stride for case in refused] == [32]
    assert "would be 0.5 on a map of stride 32" in refused[CHEAP[-1]]
    with pytest.raises(ValueError, match="got no cases; give at least one"):
        check_head(Sound, cases=())


def test_the_head_in_the_documentation_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "heads.md").read_text()
    head, test = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    module = types.ModuleType("my_package")
    monkeypatch.setitem(sys.modules, "my_package", module)
    exec(head, vars(module))
    assert issubclass(module.Linear, Head)
    tests: dict[str, Callable[[], None]] = {}
    exec(test, tests)
    tests["test_linear"]()
