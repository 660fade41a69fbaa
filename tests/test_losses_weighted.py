"""Sums of losses: their value and weight, their description, and a run from YAML that goes on from its checkpoint."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY
from torch import Tensor

import lightning_atrous
from lightning_atrous.checkpoint import SPEC_KEY, read_checkpoint
from lightning_atrous.cli import main
from lightning_atrous.losses import OHEM, CrossEntropy, Dice, Focal, WeightedSum
from lightning_atrous.spec import build, describe
from lightning_atrous.types import ClassInfo

CLASSES = ClassInfo(("road", "car", "tree", "sky"))
WEIGHTS = (0.5, 1.0, 2.0, 0.0)

SUM = {
    "class_path": "WeightedSum",
    "init_args": {
        "losses": [{"class_path": "CrossEntropy", "init_args": {"label_smoothing": 0.1}}, {"class_path": "Dice"}],
        "weights": [1.0, 0.5],
    },
}


def pair() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 4, generator=rng, dtype=torch.float64)
    target = torch.randint(4, (2, 9, 12), generator=rng)
    target[torch.rand(target.shape, generator=rng) < 1 / 3] = 255
    return logits.requires_grad_(), target


@pytest.mark.parametrize("weights", [(2.0, 0.5, 3.0), None])
def test_is_the_sum_of_its_parts(weights: tuple[float, ...] | None) -> None:
    logits, target = pair()
    parts = [partial(CrossEntropy, label_smoothing=0.1), Dice, partial(OHEM, min_kept=10)]
    value = WeightedSum(CLASSES, losses=parts, weights=weights)(logits, target)
    first, second, third = (part(CLASSES)(logits, target) for part in parts)
    expected = 2 * first + 0.5 * second + 3 * third if weights else first + second + third
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (value, expected)))


@pytest.mark.parametrize(
    ("losses", "divided_by"),
    [
        ([CrossEntropy, partial(CrossEntropy, label_smoothing=0.1), Focal], CrossEntropy(CLASSES)),
        ([partial(CrossEntropy, class_weights=WEIGHTS)] * 2, CrossEntropy(CLASSES, class_weights=WEIGHTS)),
        ([CrossEntropy, partial(CrossEntropy, class_weights=WEIGHTS)], None),
        ([partial(CrossEntropy, class_weights=(1, 1, 1, 2)), partial(CrossEntropy, class_weights=WEIGHTS)], None),
        ([CrossEntropy, Dice], None),
        ([Dice, Dice], None),
    ],
)
def test_is_a_mean_over_pixels_where_its_parts_are_of_the_same(losses: list[Any], divided_by: Any) -> None:
    _, target = pair()
    weight = WeightedSum(CLASSES, losses=losses).weight(target)
    assert weight == (divided_by and divided_by.weight(target))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": []}, "WeightedSum got no losses; give one at least"),
        ({"losses": [Dice], "weights": [1.0, 2.0]}, "WeightedSum got 2 weights for 1 losses; give one each"),
        ({"losses": [Dice, Dice], "weights": [1.0, -1.0]}, "none negative"),
        ({"losses": [Dice, Dice], "weights": [0.0, 0.0]}, "not all 0"),
        ({"losses": [Dice], "weights": [float("inf")]}, "must be finite"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightedSum(CLASSES, **options)


def test_factories_within_options_are_described_and_built_again() -> None:
    parts = [partial(CrossEntropy, class_weights=WEIGHTS), Dice, partial(WeightedSum, losses=[Focal])]
    spec = describe(partial(WeightedSum, losses=parts, weights=(1.0, 0.5, 2.0)))
    name = "lightning_atrous.losses.{}".format
    assert spec["init_args"]["losses"] == [
        {"class_path": name("cross_entropy.CrossEntropy"), "init_args": {"class_weights": WEIGHTS}},
        {"class_path": name("smp.Dice"), "init_args": {}},
        {
            "class_path": name("weighted.WeightedSum"),
            "init_args": {"losses": [{"class_path": name("smp.Focal"), "init_args": {}}]},
        },
    ]
    logits, target = pair()
    expected = WeightedSum(CLASSES, losses=parts, weights=(1.0, 0.5, 2.0))(logits, target)
    for described in (spec, json.loads(json.dumps(spec))):
        assert build(described)(CLASSES)(logits, target) == expected
        assert describe(build(described)) == described


def test_the_public_path_of_a_loss_is_built_too() -> None:
    built = build({"class_path": "lightning_atrous.losses.CrossEntropy", "init_args": {"label_smoothing": 0.1}})
    assert describe(built) == describe(partial(CrossEntropy, label_smoothing=0.1))


def test_what_is_nested_is_imported_by_the_same_rules() -> None:
    foreign = {"class_path": "collections.OrderedDict", "init_args": {"losses": [{"a": 1}]}}
    spec: Any = describe(partial(WeightedSum, losses=[Dice]))
    spec["init_args"]["losses"].append({**SUM, "class_path": describe(WeightedSum)["class_path"]})
    spec["init_args"]["losses"][1]["init_args"] = {"losses": [foreign]}
    with pytest.raises(ValueError, match=r"asks for collections\.OrderedDict, which no installed package registers"):
        build(spec)
    trusted = build(spec, trust=["collections.OrderedDict"])
    (nested,) = trusted.keywords["losses"][1].keywords["losses"]
    assert nested() == foreign["init_args"]
    with pytest.raises(ValueError, match=r"expected a class, or a functools\.partial of one"):
        describe(partial(WeightedSum, losses=[partial(lambda classes: Dice(classes))]))


@pytest.mark.filterwarnings("default")  # Lightning's, of small data
def test_a_run_from_yaml_and_on_from_its_checkpoint(workdir: Path) -> None:
    config = yaml.safe_load(TINY)
    config["trainer"] |= {"max_epochs": 1, "accelerator": "cpu"}
    config["model"] = {"backbone": {"name": "test_resnet", "output_stride": 32, "pretrained": False}, "head": "fcn"}
    config["data"]["init_args"] |= {"train_length": 4, "val_length": 2}
    (workdir / "plain.yaml").write_text(yaml.safe_dump(config))
    config["model"]["loss"] = SUM
    (workdir / "sum.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "sum.yaml"])
    path = workdir / "runs/sum/checkpoints/last.ckpt"
    described = read_checkpoint(path)[SPEC_KEY]["loss"]
    assert described["class_path"] == "lightning_atrous.losses.weighted.WeightedSum"
    ours = lightning_atrous.load(path).loss
    assert isinstance(ours, WeightedSum)
    assert [type(part) for part in ours.parts] == [CrossEntropy, Dice]
    assert ours.parts[0].label_smoothing == 0.1
    assert ours.weights == (1.0, 0.5)
    # without a word of the loss, the checkpoint's own goes on
    main(["validate", "--config", "plain.yaml", "--ckpt_path", str(path)])
    main(["fit", "--config", "plain.yaml", "--ckpt_path", str(path), "--trainer.max_epochs", "2"])
    assert read_checkpoint(path)["epoch"] == 1
    assert read_checkpoint(path)[SPEC_KEY]["loss"] == described
