from __future__ import annotations

import functools
import json

import pytest
import torch

from lightning_atrous.heads import FCN, HEADS, DeepLabV3Plus
from lightning_atrous.spec import build, describe
from lightning_atrous.types import FeatureInfo

INFO = (FeatureInfo(8, 4), FeatureInfo(16, 16))


def test_round_trip_of_nested_partials() -> None:
    factory = functools.partial(functools.partial(DeepLabV3Plus, rates=(1, 2), separable=True), rates=(3,))
    spec = describe(factory)
    assert spec == {
        "class_path": "lightning_atrous.heads.deeplabv3plus.DeepLabV3Plus",
        "init_args": {"rates": (3,), "separable": True},
    }
    head = build(spec)(INFO, 5)
    assert isinstance(head, DeepLabV3Plus)
    assert head.rates == (3,)
    # through YAML or JSON tuples come back as lists
    assert build(json.loads(json.dumps(spec)))(INFO, 5).rates == (3,)


@pytest.mark.parametrize("factory", [lambda info, k: None, print, functools.partial(lambda: 1)])
def test_what_has_no_import_path_is_refused(factory: object) -> None:
    with pytest.raises(ValueError, match=r"expected a class, or a functools\.partial of one"):
        describe(factory)


def test_options_that_are_no_plain_values_are_refused() -> None:
    with pytest.raises(ValueError, match=r"option channels of .*FCN is tensor"):
        describe(functools.partial(FCN, channels=torch.tensor(3)))


def test_only_known_classes_are_imported() -> None:
    with pytest.raises(ValueError, match=r"asks for os\.system, which no installed package registers"):
        build({"class_path": "os.system", "init_args": {}})
    with pytest.raises(ValueError, match="cannot be imported"):
        build({"class_path": "lightning_atrous.heads.gone.Head", "init_args": {}})
    assert build(
        {"class_path": "collections.OrderedDict", "init_args": {"a": 1}}, trust=["collections.OrderedDict"]
    )() == {"a": 1}
    assert isinstance(build(describe(FCN), registry=HEADS)(INFO, 2), FCN)
