"""A training step, from a batch to new weights: others' models in others' loops, and the same models in ours.

python benchmarks/train_step.py OUT.md [--rounds 7] [--threads 2] [--mmseg PYTHON] [--only NAME ...] [--device cpu]

Every form lives in a process of its own and does a step when it is asked; a round asks the two forms of a row in turn,
the first of them in turn too. Times are medians, the ratio is the median of the rounds' ratios. Memory: by how much
the steps raise the largest resident size of the process over that of the built model (on a GPU: torch's own count).

Ours is the whole of it, from uint8 through `Trainer.fit` with the command's callbacks and a CSV log; theirs gets
batches that are already normalised. Architectures are equal to the last weight: ours are imported from theirs.

--mmseg takes the Python of an environment in which mmsegmentation is installed, with mmengine and mmcv (or mmcv-lite).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_atrous import SegmentationTask, TimmBackbone, __version__
from lightning_atrous.callbacks import LoggedStep, RunProgress
from lightning_atrous.interop import from_smp, from_torchvision
from lightning_atrous.loggers import AppendingCSVLogger
from lightning_atrous.speed import FasterExecution
from lightning_atrous.types import ClassInfo

Step = Callable[[], object]


class Model(NamedTuple):
    """One architecture, and what it is trained on."""

    batch: int
    side: int
    classes: int
    what: str
    loop: str = "a bare loop"


MODELS = {
    "torchvision": Model(2, 480, 21, "torchvision's DeepLabV3-R50 and auxiliary FCN (OS 8)", "its reference loop"),
    "smp": Model(2, 512, 19, "SMP's DeepLabV3+-R50 (OS 16)", "a plain loop"),
    "camvid": Model(8, 320, 11, "configs/camvid.yaml: DeepLabV3+-MobileNetV2 (OS 16)"),
    "mmseg": Model(2, 512, 19, "mmsegmentation's DeepLabV3+-R50-D8 and auxiliary FCN", "its own step"),
}


class Row(NamedTuple):
    """Two forms of a step, ``model loop precision layout``, and the most that the second may take of the first."""

    theirs: str
    ours: str
    limit: float


ROWS = {
    "torchvision as run": Row("torchvision plain 32 contiguous", "torchvision trainer bf16 channels_last", 1 / 1.5),
    "torchvision, ours in fp32": Row("torchvision plain 32 contiguous", "torchvision trainer 32 channels_last", 1.0),
    "torchvision alike": Row("torchvision plain 32 contiguous", "torchvision trainer 32 contiguous", 1.0),
    "torchvision alike, bf16": Row(
        "torchvision plain bf16 channels_last", "torchvision trainer bf16 channels_last", 1.0
    ),
    "smp as run": Row("smp plain 32 contiguous", "smp trainer bf16 channels_last", 1 / 1.3),
    "smp, ours in fp32": Row("smp plain 32 contiguous", "smp trainer 32 channels_last", 1.0),
    "smp alike": Row("smp plain 32 contiguous", "smp trainer 32 contiguous", 1.0),
    "smp alike, bf16": Row("smp plain bf16 channels_last", "smp trainer bf16 channels_last", 1.0),
    "overhead": Row("camvid bare bf16 channels_last", "camvid trainer bf16 channels_last", 1.03),
    "overhead, torchvision's model": Row(
        "torchvision bare bf16 channels_last", "torchvision trainer bf16 channels_last", 1.03
    ),
    "mmseg alike": Row("mmseg plain 32 contiguous", "mmseg trainer 32 contiguous", 1.0),
    "mmseg as run": Row("mmseg plain 32 contiguous", "mmseg trainer bf16 channels_last", 1.0),
}


def images(model: Model) -> tuple[Tensor, Tensor]:
    """uint8 images and int64 masks, a tenth of them ignored."""
    torch.manual_seed(0)
    mask = torch.randint(model.classes, (model.batch, model.side, model.side))
    mask[torch.rand(mask.shape) < 0.1] = 255
    return torch.randint(256, (model.batch, 3, model.side, model.side), dtype=torch.uint8), mask


def theirs(name: str) -> nn.Module:
    """The other package's model, with fresh weights."""
    if name == "smp":
        import segmentation_models_pytorch as smp

        return smp.DeepLabV3Plus("resnet50", encoder_weights=None, classes=MODELS[name].classes)
    from torchvision.models.segmentation import deeplabv3_resnet50

    return deeplabv3_resnet50(None, num_classes=MODELS[name].classes, weights_backbone=None, aux_loss=True)


def ours(name: str, channels_last: bool) -> SegmentationTask:
    """The same as a task of ours."""
    named = ClassInfo(tuple(f"class {i}" for i in range(MODELS[name].classes)))
    if name == "torchvision":
        task = from_torchvision(theirs(name), "deeplabv3_resnet50").task
    elif name == "smp":
        task = from_smp(theirs(name), classes=named).task
    elif name == "camvid":
        # as `fit` would choose it on the first batch, so that both loops run the same
        same = {"timm_options": {"pad_type": "same"}, "execution": "split"}
        backbone = TimmBackbone("mobilenetv2_100", pretrained=False, **same)
        task = SegmentationTask(backbone, classes=named)
    else:
        task = SegmentationTask.from_spec(mmseg_spec(named))
    if not channels_last:
        task = SegmentationTask.from_spec({**task.spec, "channels_last": False})
    return task.train()


def mmseg_spec(classes: ClassInfo) -> dict[str, Any]:
    """What configs/cityscapes.yaml trains."""
    from lightning_atrous.heads import FCN, DeepLabV3Plus

    backbone = TimmBackbone("resnet50c", output_stride=8, pretrained=False)
    spec = SegmentationTask(backbone, classes=classes).spec

    def described(head: type, options: dict[str, Any]) -> dict[str, Any]:
        return {"class_path": f"{head.__module__}.{head.__qualname__}", "init_args": options}

    return {
        **spec,
        "head": described(DeepLabV3Plus, {"channels": 512, "separable": True}),
        "aux_head": described(FCN, {"level": -2}),
    }


def plain_step(name: str, bf16: bool, channels_last: bool, device: str) -> Step:
    """As people write it around the other package's model."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = theirs(name).to(device, memory_format=layout).train()  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    image, mask = images(MODELS[name])
    image = (image / 255 - 0.45) / 0.225

    def step() -> None:
        x = image.to(device).contiguous(memory_format=layout)
        y = mask.to(device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            output = model(x)
            if isinstance(output, dict):
                loss = F.cross_entropy(output["out"], y, ignore_index=255)
                loss = loss + 0.5 * F.cross_entropy(output["aux"], y, ignore_index=255)
            else:
                loss = F.cross_entropy(output, y, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def bare_step(name: str, bf16: bool, channels_last: bool, device: str) -> Step:
    """Our model, loss and optimiser without Lightning."""
    task = ours(name, channels_last).to(device)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    image, mask = images(MODELS[name])

    def step() -> None:
        x, y = image.to(device), mask.to(device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            logits, aux = task.model.forward_train(task.in_memory_format(x))
            loss = task.loss(logits, y)
            if aux is not None:
                loss = loss + task.aux_weight * task.loss(aux, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class Asked(Dataset[dict[str, Any]]):
    """A batch whenever the other process asks for a step; asking for the next one tells how long the last took."""

    def __init__(self, model: Model, protocol: Protocol) -> None:
        self.image, self.mask = images(model)
        self.protocol = protocol

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index:
            self.protocol.done()
        self.protocol.wait()
        return {"image": self.image, "mask": self.mask, "name": [""] * len(self.image)}


class Protocol:
    """Lines on the pipes: ``step`` in, seconds and MiB out."""

    def __init__(self, device: str, answers: TextIO) -> None:
        self.device, self.answers = device, answers
        self.before = self._peak()

    def wait(self) -> None:
        """Until a step is asked for; the end of the process where none will be."""
        if not sys.stdin.readline():
            os._exit(0)
        self.begun = time.perf_counter()

    def done(self) -> None:
        """Answer."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - self.begun
        print(taken, self._peak() - self.before, file=self.answers, flush=True)

    def _peak(self) -> float:
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train(name: str, bf16: bool, channels_last: bool, protocol: Protocol) -> None:
    """`Trainer.fit` over batches that are asked for."""
    task = ours(name, channels_last)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        trainer = L.Trainer(
            max_epochs=1,
            accelerator="gpu" if protocol.device == "cuda" else "cpu",
            precision="bf16-mixed" if bf16 else "32-true",
            logger=AppendingCSVLogger(folder, first_step=0),
            log_every_n_steps=10,
            callbacks=[LoggedStep(), FasterExecution(), RunProgress(), LearningRateMonitor("step")],
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        protocol.before = protocol._peak()
        trainer.fit(task, DataLoader(Asked(MODELS[name], protocol), batch_size=None))


def serve(form: str, device: str) -> None:
    """Do steps of one form while they are asked for."""
    name, loop, precision, layout = form.split()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed from here on is no answer
    protocol = Protocol(device, answers)
    bf16, channels_last = precision == "bf16", layout == "channels_last"
    if loop == "trainer":
        train(name, bf16, channels_last, protocol)
        return
    step = (plain_step if loop == "plain" else bare_step)(name, bf16, channels_last, device)
    protocol.before = protocol._peak()
    while True:
        protocol.wait()
        step()
        protocol.done()


class Worker:
    """A process that does steps of one form."""

    def __init__(self, form: str, options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "-", "--serve", form]
        if form.startswith("mmseg plain"):
            command = [options.mmseg, str(Path(__file__).with_name("train_step_mmseg.py")), form]
        self.process = subprocess.Popen(
            [*command, "--threads", str(options.threads), "--device", options.device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not options.verbose else None,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
        )

    def step(self) -> tuple[float, float]:
        """Seconds, and MiB so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a process ended before its step; run with --verbose to see why")
        seconds, memory = line.split()
        return float(seconds), float(memory)

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(row: Row, options: argparse.Namespace) -> str:
    """One line of the table."""
    workers = [Worker(form, options) for form in (row.theirs, row.ours)]
    seconds: list[list[float]] = [[], []]
    memory = [0.0, 0.0]
    for number in range(options.rounds + 2):
        for which in (0, 1) if number % 2 else (1, 0):
            taken, memory[which] = workers[which].step()
            if number > 1:  # the first two warm up
                seconds[which].append(taken)
    for worker in workers:
        worker.close()
    ratios = sorted(b / a for a, b in zip(*seconds, strict=True))
    cells = [f"{1000 * statistics.median(times):.0f} ms" for times in seconds]
    told = f"**{statistics.median(ratios):.3f}** ({ratios[0]:.2f}…{ratios[-1]:.2f})"
    sizes = [f"{x / 1024:.2f} GiB" for x in memory]
    return " | ".join([*cells, told, f"{row.limit:.2f}", *sizes, f"{memory[1] / memory[0]:.2f}"])


def table(options: argparse.Namespace) -> Iterator[str]:
    """The rows, as they come."""
    yield (
        "| theirs | ours | theirs | ours | ours / theirs | at most | theirs, memory | ours, memory | ours / theirs |\n"
        "|---|---|---:|---:|---:|---:|---:|---:|---:|"
    )
    for asked in options.only:
        row = ROWS[asked]
        if row.theirs.startswith("mmseg") and not options.mmseg:
            continue
        name, kind, *how = row.theirs.split()
        model = MODELS[name]
        loop = "a bare loop" if kind == "bare" else model.loop
        theirs, ours = f"{model.what}, {loop}; {', '.join(how)}", ", ".join(row.ours.split()[2:])
        yield f"| {theirs} | {ours} | {measure(row, options)} |"


def main() -> None:
    """Run the table, or one process of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mmseg", help="a Python that has mmsegmentation")
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.serve:
        serve(options.serve, options.device)
        return
    sizes = ", ".join(f"{name} {m.batch} × {m.side}²" for name, m in MODELS.items())
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"the CPU, {options.threads} threads"
    made = (
        f"Made by `benchmarks/train_step.py` on {datetime.date.today()} with lightning-atrous {__version__}, torch "
        f"{torch.__version__}, on {where}; {options.rounds} rounds of both in rotation; medians, and the least and the "
        f"largest ratio: less than 1 is less time than theirs. Batches: {sizes}. Memory: by how much the steps raise "
        "the peak over the built model."
    )
    shown = (
        "Other packages' loops are shown as people run them, in fp32, beside ours as the configs for real data set it "
        "(`precision: bf16-mixed`, which is not Lightning's own default; channels_last is ours), and beside ours in "
        "the same precision and memory format. The rows with *a bare loop* are our own model without Lightning: what "
        "the framework costs."
    )
    lines = ["# A training step", "", made, "", shown, ""]
    for line in table(options):
        print(line, flush=True)
        lines.append(line)
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
