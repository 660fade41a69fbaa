"""What every head must do, as one function, for the tests of those who write one.

``check_head(MyHead)`` builds a head for networks of several kinds at several output strides, hands it feature maps of
the very sizes that those networks give, drawn at random, and then an image through each of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_atrous.heads import Head, HeadFactory
from lightning_atrous.model import SegmentationModel
from lightning_atrous.signatures import options_of
from lightning_atrous.spec import describe
from lightning_atrous.testing.cases import HEAD_CASES, WIDE, HeadCase, backbone_at, features_at, other_stride
from lightning_atrous.types import FeatureInfo, Features

__all__ = ["check_head"]

_CLASSES = 5
_TOLERANCE = 1e-4
"""Of the largest logit: well above what float32 rounds, well below what a mistake does."""


def check_head(head: HeadFactory, *, cases: Sequence[HeadCase] = HEAD_CASES) -> dict[HeadCase, str]:
    """Check that a head keeps the contract of a head.

    Its options are keywords with types and plain values. On every case, in training: logits ``(B, K, h, w)``,
    finite, on the grid of a level or a finer one, and a finite gradient to every parameter. In evaluation: the same
    logits for the same features, whatever else is in the batch and whatever sizes came before; features left as they
    are. `Head.retarget` gives what a head built at the other stride gives with the same weights, or refuses. And
    an image goes through each network and the head to one class.

    Args:
        head: The class, or a `functools.partial` of it with options.
        cases: On which to check it; one alone, such as a test's parameter, will do.

    Returns:
        By case, the sentence of the ValueError by which the head refused to be built; no other error is a refusal.

    Raises:
        AssertionError: What the head does wrong, and on which case.
        ValueError: No case.

    Example:
        >>> from lightning_atrous.heads import FCN
        >>> from lightning_atrous.testing import HEAD_CASES, check_head
        >>> check_head(FCN, cases=HEAD_CASES[-1:])
        {}
    """
    if not cases:
        raise ValueError("check_head got no cases; give at least one HeadCase")
    refusals: dict[HeadCase, str] = {}
    cls = _class_of(head)
    name = getattr(cls, "__name__", repr(cls))
    with _named(name):
        _check_options(head, cls)
    heads = _Heads(head)
    seen: set[str] = set()
    for case in cases:
        with _named(f"{name} on {case}"):
            try:
                built = heads.at(case.backbone, case.output_stride)
            except _Refused as refused:
                refusals[case] = str(refused)
                continue
            with _no_error("copy.deepcopy"):
                tried, fresh = copy.deepcopy(built), copy.deepcopy(built)
            _check_evaluation(tried, case)
            wide = _run(fresh, features_at(case.backbone, case.output_stride, WIDE, 1), "forward at another size")
            _check_sizes(tried, wide, case)
            _check_retarget(fresh, wide, heads, case)
            _check_training(tried, case)
            if case.backbone not in seen:
                _check_image(head, case)
            seen.add(case.backbone)
    if len(refusals) == len(cases):
        raise AssertionError(f"{name} refuses to be built for every case; for the last: {refusals[cases[-1]]}")
    return refusals


class _Refused(Exception):
    """A head's own ValueError, in its words."""


class _Heads:
    """One head of a factory for each network and stride, built when it is asked for."""

    def __init__(self, factory: HeadFactory) -> None:
        self.factory = factory
        self._built: dict[tuple[str, int], Head] = {}

    def at(self, backbone: str, output_stride: int) -> Head:
        """In eval mode, never run, and nothing of it at a value that would hide what it does."""
        key = (backbone, output_stride)
        if key not in self._built:
            self._built[key] = _stirred(_build(self.factory, backbone_at(*key).info, _CLASSES)).eval()
        return self._built[key]


def _class_of(head: object) -> object:
    while isinstance(head, functools.partial):
        head = head.func
    return head


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Say in a failure where it was, and leave the caller's random numbers alone."""
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error


@contextlib.contextmanager
def _no_error(doing: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a head under test may raise
        raise AssertionError(f"{doing} raises {type(error).__name__}: {error}") from error


# -- what stands in the signature


def _check_options(head: HeadFactory, cls: object) -> None:
    try:
        describe(head)
    except ValueError as error:
        raise AssertionError(f"a checkpoint cannot hold it: {error}") from error
    assert isinstance(cls, type)
    parameters = list(inspect.signature(cls).parameters.values())
    if len(parameters) < 2 or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters[:2]):
        raise AssertionError(f"its first two arguments must be info and num_classes, got {inspect.signature(cls)}")
    for parameter in parameters[2:]:
        if parameter.kind is not parameter.KEYWORD_ONLY:
            raise AssertionError(f"{parameter} must be a keyword-only option with a name, after a *")
    for option in options_of(cls):
        if not option.type:
            raise AssertionError(f"option {option.name} has no type, which the command line checks it by")
    defaults = {p.name: p.default for p in parameters[2:] if p.default is not p.empty}
    try:
        describe(functools.partial(cls, **defaults))
    except ValueError as error:
        raise AssertionError(f"a default is no plain value: {error}") from error


# -- what it is built for


def _build(factory: HeadFactory, info: Sequence[FeatureInfo], num_classes: int) -> Head:
    torch.manual_seed(0)
    try:
        built = factory(info, num_classes)
    except ValueError as error:
        raise _Refused(_sentence(error)) from error
    except Exception as error:  # whatever a head under test may raise
        raise AssertionError(
            f"raises {type(error).__name__} when it is built ({error}); what it cannot do it refuses by ValueError"
        ) from error
    if not isinstance(built, Head):
        raise AssertionError(f"gives a {type(built).__name__} when it is built, where a Head is expected")
    return built


def _sentence(error: ValueError) -> str:
    """What a refusal says, if it is one."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if raised_in.is_relative_to(Path(torch.__file__).parent):
        raise AssertionError(f"leaves a refusal to torch ({error}); say first what is needed") from error
    text = str(error).strip()
    if len(text.splitlines()) != 1 or len(text.split()) < 4:
        raise AssertionError(f"refuses by {text!r}, where one sentence must say what is needed") from error
    return text


def _stirred(head: Head) -> Head:
    """Move what is at a constant (gates of 0, norms of 1) away from it: behind a gate of 0 anything could be."""
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.is_floating_point() and parameter.min() == parameter.max():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for module in head.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(std=0.1)
    return head


# -- what it computes


def _run(head: Head, features: Features, doing: str = "forward") -> Tensor:
    """Logits in evaluation."""
    with torch.no_grad(), _no_error(doing):
        return head(features)


def _check_logits(logits: object, features: Features, case: HeadCase, size: tuple[int, int] | None = None) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise AssertionError(f"gives {kind}, where a floating tensor of logits is expected")
    batch = features[0].shape[0]
    if logits.ndim != 4 or logits.shape[:2] != (batch, _CLASSES):
        raise AssertionError(f"gives logits {tuple(logits.shape)}, where ({batch}, {_CLASSES}, h, w) is expected")
    height, width = size or case.size
    grids = {(-(-height // stride), -(-width // stride)) for stride in (1, 2, 4, 8, 16, 32)}
    hw = (logits.shape[-2], logits.shape[-1])
    if hw not in grids and not any(_is_multiple(hw, level.shape[-2:]) for level in features):
        levels = ", ".join(f"{level.shape[-2]}×{level.shape[-1]}" for level in features)
        raise AssertionError(
            f"gives logits of {hw[0]}×{hw[1]} from maps of {levels}: of none of them a whole multiple, and of an image "
            f"of {height}×{width} no stride"
        )
    if not logits.isfinite().all():
        raise AssertionError("gives logits that are not finite")


def _is_multiple(size: Sequence[int], of: Sequence[int]) -> bool:
    return size[0] % of[0] == 0 and size[1] % of[1] == 0 and size[0] // of[0] == size[1] // of[1]


def _apart(a: Tensor, b: Tensor) -> bool:
    # what is not finite is apart from everything
    return a.shape != b.shape or not float((a - b).abs().max()) <= _TOLERANCE * float(b.abs().max())


def _autocast(case: HeadCase) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "bfloat16")


def _check_evaluation(head: Head, case: HeadCase) -> None:
    features = features_at(case.backbone, case.output_stride, case.size, case.batch)
    kept = [level.clone() for level in features]
    logits = _run(head, features)
    _check_logits(logits, features, case)
    if not all(map(torch.equal, features, kept)):
        raise AssertionError("changes the features in place, which another head may read")
    if _apart(_run(head, features), logits):
        raise AssertionError("gives other logits for the same features in eval mode")
    if case.batch > 1:
        alone = _run(head, tuple(level[:1] for level in features), "forward on one image of the batch")
        if _apart(alone, logits[:1]):
            raise AssertionError("gives an image other logits where other images are in its batch")
    if case.precision != "float32":
        with _autocast(case):
            _check_logits(_run(head, features), features, case)


def _check_sizes(head: Head, wide: Tensor, case: HeadCase) -> None:
    """One size, another, at which ``wide`` came from a head that had not run yet, and the first again."""
    first = features_at(case.backbone, case.output_stride, case.size, 1)
    second = features_at(case.backbone, case.output_stride, WIDE, 1)
    shapes, before = _shapes(head), _run(head, first)
    logits = _run(head, second, "forward after another size")
    _check_logits(logits, second, case, WIDE)
    if _apart(logits, wide) or _apart(_run(head, first), before):
        raise AssertionError("gives other logits at a size after it has run at another")
    if _shapes(head) != shapes:
        raise AssertionError(f"changes its state dict as it runs: {_difference(_shapes(head), shapes)}")


def _check_retarget(moved: Head, wide: Tensor, heads: _Heads, case: HeadCase) -> None:
    """To another stride, and back to where it gave ``wide``."""
    there = other_stride(case.backbone, case.output_stride)
    try:
        moved.retarget(backbone_at(case.backbone, there).info)
    except ValueError as error:
        _sentence(error)
    except Exception as error:  # whatever a head under test may raise
        raise AssertionError(f"retarget raises {type(error).__name__}: {error}") from error
    else:
        _check_moved(moved, heads, case.backbone, there)
    with _no_error(f"retarget back from output stride {there}"):
        moved.retarget(backbone_at(case.backbone, case.output_stride).info)
    if _apart(_run(moved, features_at(case.backbone, case.output_stride, WIDE, 1)), wide):
        raise AssertionError(f"is not what it was after retarget to output stride {there} and back")


def _check_moved(moved: Head, heads: _Heads, backbone: str, stride: int) -> None:
    try:
        built = copy.deepcopy(heads.at(backbone, stride))
    except _Refused as refused:
        raise AssertionError(f"follows to output stride {stride}, where it refuses to be built: {refused}") from refused
    if _shapes(built) != _shapes(moved):
        difference = _difference(_shapes(moved), _shapes(built))
        raise AssertionError(
            f"follows to output stride {stride} with other weights than a head built there: {difference}; refuse by "
            f"ValueError in retarget"
        )
    built.load_state_dict(moved.state_dict())
    features = features_at(backbone, stride, WIDE, 1)
    logits = _run(moved, features, f"forward after retarget to output stride {stride}")
    if _apart(logits, _run(built, features)):
        raise AssertionError(
            f"gives other logits after retarget to output stride {stride} than a head built there with the same weights"
        )


def _shapes(head: Head) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in head.state_dict().items()}


def _difference(ours: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> str:
    key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
    return f"{key} is {ours.get(key, 'missing')} in place of {theirs.get(key, 'none')}"


def _check_training(head: Head, case: HeadCase) -> None:
    head.train()
    features = features_at(case.backbone, case.output_stride, case.size, case.batch)
    for level in features:
        level.requires_grad_()
    torch.manual_seed(0)  # dropout
    with _autocast(case), _no_error(f"training on a batch of {case.batch}"):
        logits = head(features)
    _check_logits(logits, features, case)
    with _no_error("the backward pass"):
        (logits.float() * torch.randn(logits.shape)).mean().backward()
    for name, parameter in head.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            raise AssertionError(f"gives the parameter {name} no gradient, which DDP refuses")
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise AssertionError(f"gives the parameter {name} a gradient that is not finite")
    if not any(level.grad is not None and level.grad.any() for level in features):
        raise AssertionError("gives no level of the backbone a gradient, which would not be trained")


def _check_image(factory: HeadFactory, case: HeadCase) -> None:
    """Pixels → network → head → one class."""
    backbone = backbone_at(case.backbone, case.output_stride)
    try:
        head = _build(factory, backbone.info, 1)
    except _Refused as refused:
        raise AssertionError(f"refuses one class, where it takes {_CLASSES}: {refused}") from refused
    model = SegmentationModel(backbone, head).eval()
    image = torch.randint(256, (1, 3, 47, 70), dtype=torch.uint8)
    with torch.no_grad(), _no_error("an image through the network and the head, to one class,"):
        logits = model(image)
    if logits.shape != (1, 1, 47, 70) or not logits.isfinite().all():
        raise AssertionError(f"gives an image of 47×70 and one class logits {tuple(logits.shape)}, or not finite ones")
