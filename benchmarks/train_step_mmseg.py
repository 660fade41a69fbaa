"""mmsegmentation's own training step, for `train_step.py`: run by a Python that has it, and not this package."""

from __future__ import annotations

import os
import resource
import sys
import time
import types

import torch

CLASSES, SIDE, BATCH = 19, 512, 2


class Compiled(types.ModuleType):
    """In place of ``mmcv.ops``, which wants compiled code that mmcv-lite has not, and that this model does not call."""

    def __getattr__(self, name: str) -> type:
        """Any name is a class that does nothing."""
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def build() -> torch.nn.Module:
    """DeepLabV3+ on ResNet-50-D8 as its configs have it."""
    try:
        import mmcv.ops  # noqa: F401
    except ImportError:
        sys.modules["mmcv.ops"] = Compiled("mmcv.ops")
    from mmseg.models import EncoderDecoder

    norm = {"type": "BN", "requires_grad": True}
    head = {"num_classes": CLASSES, "norm_cfg": norm, "align_corners": False, "dropout_ratio": 0.1}
    loss = {"type": "CrossEntropyLoss", "use_sigmoid": False}
    return EncoderDecoder(
        backbone={
            "type": "ResNetV1c",
            "depth": 50,
            "num_stages": 4,
            "out_indices": (0, 1, 2, 3),
            "dilations": (1, 1, 2, 4),
            "strides": (1, 2, 1, 1),
            "norm_cfg": norm,
            "norm_eval": False,
            "style": "pytorch",
            "contract_dilation": True,
        },
        decode_head={
            **head,
            "type": "DepthwiseSeparableASPPHead",
            "in_channels": 2048,
            "in_index": 3,
            "channels": 512,
            "dilations": (1, 12, 24, 36),
            "c1_in_channels": 256,
            "c1_channels": 48,
            "loss_decode": {**loss, "loss_weight": 1.0},
        },
        auxiliary_head={
            **head,
            "type": "FCNHead",
            "in_channels": 1024,
            "in_index": 2,
            "channels": 256,
            "num_convs": 1,
            "concat_input": False,
            "loss_decode": {**loss, "loss_weight": 0.4},
        },
        train_cfg={},
        test_cfg={"mode": "whole"},
    )


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Do steps while they are asked for: a line in, seconds and MiB out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    torch.manual_seed(0)
    image = torch.randn(BATCH, 3, SIDE, SIDE)
    mask = torch.randint(CLASSES, (BATCH, 1, SIDE, SIDE))
    mask[torch.rand(mask.shape) < 0.1] = 255
    samples = []
    for one in mask:
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=one)
        samples.append(sample)
    before = peak()
    while sys.stdin.readline():
        begun = time.perf_counter()
        losses = model.loss(image, samples)
        total = sum(value.mean() for key, value in losses.items() if "loss" in key)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        print(time.perf_counter() - begun, peak() - before, file=answers, flush=True)


if __name__ == "__main__":
    main()
