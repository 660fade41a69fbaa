"""mmsegmentation's models against what is imported of them: run by its own Python, where one is named."""

from __future__ import annotations

import os
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_atrous import ClassInfo
from lightning_atrous.data.cityscapes import CITYSCAPES
from lightning_atrous.interop import from_mmseg
from lightning_atrous.interop.base import read_file
from lightning_atrous.interop.mmseg import parse_config

pytestmark = pytest.mark.usefixtures("one_thread")

MMSEG = "MMSEG_PYTHON"
"""The environment variable that names a Python with mmsegmentation 1.x (docs/import.md says how to make one)."""


@pytest.fixture
def original(tmp_path: Path) -> Any:
    """Run mmsegmentation: a checkpoint's content, with an image and its logits."""
    python = os.environ.get(MMSEG)
    if not python:
        pytest.skip(f"{MMSEG} names no Python with mmsegmentation")

    def run(*arguments: str) -> dict[str, Any]:
        file = tmp_path / "original.pth"
        script = Path(__file__).parent / "mmseg_original.py"
        done = subprocess.run([python, script, *arguments, file], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return read_file(file)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "network", "depth", "fed", "stride", "dilated"),
    [
        ("FCN", "ResNet", "50", "rgb", "16", "contracted"),
        ("PSP", "ResNetV1c", "101", "rgb", "8", "contracted"),
        ("DeepLabV3", "ResNetV1c", "50", "bgr", "8", "plain"),
        ("DeepLabV3Plus", "ResNetV1c", "152", "rgb", "8", "contracted"),
    ],
)
def test_logits_are_mmsegmentations(
    original: Any, head: str, network: str, depth: str, fed: str, stride: str, dilated: str
) -> None:
    content = original(head, network, depth, fed, stride, dilated)
    image, logits, aux = (content.pop(key) for key in ("image", "logits", "aux"))
    imported = from_mmseg(content)
    task = imported.task.double()
    image = image[None].flip(1)  # OpenCV reads BGR
    with torch.no_grad():
        ours = task(image)
        _, our_aux = task.model.forward_train(image)
    assert float((ours - logits).abs().max() / logits.abs().max()) < 1e-7  # the normalisation is float32
    assert float((our_aux - aux).abs().max() / aux.abs().max()) < 1e-7
    assert task.model.output_stride == int(stride)
    assert task.classes.names == tuple("abcde")
    assert task.classes.palette[2] == (2, 4, 6)
    assert any("fed BGR" in remark for remark in imported.remarks) == (fed == "bgr")


def convolution(name: str, channels_out: int, channels_in: int, kernel: int = 1) -> dict[str, Tensor]:
    """A ConvModule's tensors."""
    shapes = {"conv.weight": (channels_out, channels_in, kernel, kernel)}
    shapes |= {f"bn.{key}": (channels_out,) for key in ("weight", "bias", "running_mean", "running_var")}
    tensors = {f"{name}.{key}": torch.rand(shape) for key, shape in shapes.items()}
    return tensors | {f"{name}.bn.num_batches_tracked": torch.tensor(7)}


@pytest.fixture(scope="module")
def fcn() -> dict[str, Tensor]:
    """An FCN on a plain ResNet-50, with mmsegmentation's names, of 19 classes."""
    from torchvision.models import resnet50

    tensors = {f"backbone.{k}": v for k, v in resnet50(weights=None).state_dict().items() if not k.startswith("fc.")}
    tensors |= convolution("decode_head.convs.0", 8, 2048, 3) | convolution("decode_head.convs.1", 8, 8, 3)
    tensors |= convolution("decode_head.conv_cat", 8, 2056, 3)
    return tensors | {
        "decode_head.conv_seg.weight": torch.rand(19, 8, 1, 1),
        "decode_head.conv_seg.bias": torch.rand(19),
    }


CONFIG = """
    norm_cfg = dict(type='SyncBN', requires_grad=True)
    train = [x for x in range(3)]
    model = dict(
        backbone=dict(type='ResNet', depth=50, strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1)),
        data_preprocessor=dict(mean=[10, 20, 30], std=[1.0, 2.0, 3.0], bgr_to_rgb={turned}),
        decode_head=dict(type='FCNHead', align_corners={corners}, dropout_ratio=0.3))
"""


def checkpoint(tensors: dict[str, Tensor], *, turned: bool = True, corners: bool = False) -> dict[str, Any]:
    text = textwrap.dedent(CONFIG).format(turned=turned, corners=corners)
    return {"state_dict": tensors, "meta": {"cfg": text}}


def test_a_config_is_read_and_not_run() -> None:
    text = "import os\nx = os.getcwd()\na = dict(b=[1, (2, -3.5)], c={'d': None, e: 1}, f=-x)\nb: int = 3"
    assert parse_config(text) == {"x": None, "a": {"b": [1, (2, -3.5)], "c": {"d": None}, "f": None}}
    assert parse_config("a = = 3") == {}


def test_without_a_config_the_usual_is_taken_and_said(fcn: dict[str, Tensor]) -> None:
    imported = from_mmseg(fcn)
    assert imported.remarks[0].startswith("unverified: the checkpoint has no config")
    assert imported.task.classes == CITYSCAPES
    assert imported.task.model.output_stride == 8
    assert imported.task.model.backbone.hdc is None
    assert imported.task.model.preprocess.mean == pytest.approx((0.485, 0.456, 0.406))


def test_what_the_checkpoint_says_is_taken(fcn: dict[str, Tensor]) -> None:
    content = checkpoint(fcn)
    names = tuple(f"class {i}" for i in range(19))
    content["meta"]["dataset_meta"] = {"classes": names, "palette": [[i, i, i] for i in range(19)]}
    turned = from_mmseg(content).task
    assert turned.classes.names == names
    assert turned.classes.palette[7] == (7, 7, 7)
    assert turned.model.output_stride == 32
    assert turned.model.head.dropout.p == 0.3
    assert turned.model.preprocess.mean == pytest.approx((10 / 255, 20 / 255, 30 / 255))
    # a network that was fed BGR gives the same from RGB
    own = ClassInfo(tuple(f"own {i}" for i in range(19)))
    fed_bgr = from_mmseg(checkpoint(fcn, turned=False), classes=own).task
    assert fed_bgr.classes == own
    assert fed_bgr.model.preprocess.std == pytest.approx((3 / 255, 2 / 255, 1 / 255))
    image = torch.randint(0, 256, (1, 3, 65, 97), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(fed_bgr(image.flip(1)), turned(image), rtol=1e-4, atol=1e-4)


def without(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not key.startswith(prefix)}


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("decode_head=dict(align_corners=True)", "align_corners=True"),
        ("decode_head=dict(dilation=6)", "a dilation of 6"),
        ("decode_head=[dict(), dict()]", "several of decode_head"),
        ("backbone=dict(norm_cfg=dict(type='BN', eps=0.001))", r"an eps of 0\.001"),
        ("backbone=dict(strides=(1, 2, 1, 1))", r"dilations \(1, 1, 1, 1\) and multi_grid None"),
        ("backbone=dict(multi_grid=(1, 2, 4))", r"multi_grid \(1, 2, 4\)"),
    ],
)
def test_a_config_without_counterpart_is_refused(fcn: dict[str, Tensor], model: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        from_mmseg(fcn, meta={"cfg": f"model = dict({model})"})


def test_weights_without_counterpart_are_refused(fcn: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="ResNet-50, -101 or -152"):
        from_mmseg(without(fcn, "backbone.layer3.5."))
    with pytest.raises(ValueError, match="not those of an FCN, PSPNet, DeepLabV3"):
        from_mmseg(without(fcn, "decode_head.convs"))
    with pytest.raises(ValueError, match=r"6 \(decode_head.extra.conv.weight.*left over in the file, none wanting"):
        from_mmseg(checkpoint(fcn | convolution("decode_head.extra", 3, 3)))
