"""What mmsegmentation itself makes of an image: run by the Python of an environment of its own, not by pytest.

    python tests/mmseg_original.py HEAD ResNet|ResNetV1c DEPTH bgr|rgb 8|16 contracted|plain FILE

Writes a checkpoint as mmengine writes one (weights drawn at random, batch statistics too, the config as text, the data
set's description), with an image as OpenCV reads it and the original's logits.
"""

from __future__ import annotations

import sys
import types

import torch


class Compiled(types.ModuleType):
    """In place of ``mmcv.ops``, which wants compiled code that mmcv-lite has not, and that these models do not call."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


sys.modules["mmcv.ops"] = Compiled("mmcv.ops")

from mmengine import Config  # noqa: E402
from mmseg.models import EncoderDecoder, SegDataPreProcessor  # noqa: E402

K = 5
NORM = {"type": "BN", "requires_grad": True}
SHARED = {"num_classes": K, "norm_cfg": NORM, "align_corners": False, "dropout_ratio": 0.1}
LAST = {**SHARED, "in_channels": 2048, "in_index": 3, "channels": 24}
PYRAMID = {**LAST, "dilations": (1, 3, 6, 9)}
HEADS = {
    "FCN": {"type": "FCNHead", **LAST, "num_convs": 2, "concat_input": True},
    "PSP": {"type": "PSPHead", **LAST, "pool_scales": (1, 2, 3, 6)},
    "DeepLabV3": {"type": "ASPPHead", **PYRAMID},
    "DeepLabV3Plus": {
        "type": "DepthwiseSeparableASPPHead",
        **PYRAMID,
        "c1_in_channels": 256,
        "c1_channels": 6,
    },
}


def config(head: str, network: str, depth: str, fed: str, stride: str, dilated: str) -> Config:
    return Config(
        {
            "norm_cfg": NORM,
            "model": {
                "type": "EncoderDecoder",
                "data_preprocessor": {
                    "type": "SegDataPreProcessor",
                    "mean": [120.0, 110.0, 100.0],
                    "std": [60.0, 55.0, 50.0],
                    "bgr_to_rgb": fed == "rgb",
                },
                "backbone": {
                    "type": network,
                    "depth": int(depth),
                    "strides": (1, 2, 1, 1) if stride == "8" else (1, 2, 2, 1),
                    "dilations": (1, 1, 2, 4) if stride == "8" else (1, 1, 1, 2),
                    "norm_cfg": NORM,
                    "contract_dilation": dilated == "contracted",
                },
                "decode_head": HEADS[head],
                "auxiliary_head": {
                    "type": "FCNHead",
                    **SHARED,
                    "in_channels": 1024,
                    "in_index": 2,
                    "channels": 16,
                    "num_convs": 1,
                    "concat_input": False,
                },
                "train_cfg": {},
                "test_cfg": {"mode": "whole"},
            },
        }
    )


def main(*described: str) -> None:
    *described, path = described
    torch.manual_seed(0)
    whole = config(*described)
    parts = {name: part for name, part in whole.model.items() if name not in ("type", "data_preprocessor")}
    model = EncoderDecoder(**parts).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            for drawn in (module.bias, module.running_mean):
                torch.nn.init.normal_(drawn, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    said = {name: value for name, value in whole.model.data_preprocessor.items() if name != "type"}
    image = torch.randint(0, 256, (3, 65, 97), dtype=torch.uint8)
    inputs = SegDataPreProcessor(**said)({"inputs": [image], "data_samples": None}, False)["inputs"]
    checkpoint = {
        "state_dict": model.state_dict(),
        "meta": {
            "cfg": whole.pretty_text,
            "dataset_meta": {"classes": tuple("abcde"), "palette": [[i, 2 * i, 3 * i] for i in range(K)]},
        },
    }
    with torch.no_grad():
        maps = model.double().extract_feat(inputs.double())
        logits = model.encode_decode(inputs.double(), [{"img_shape": (65, 97)}])
        aux = model.auxiliary_head.forward(maps)
    torch.save({**checkpoint, "image": image, "logits": logits, "aux": aux}, path)


main(*sys.argv[1:])
