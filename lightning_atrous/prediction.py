"""``predict``: pictures in; class indices, colours and overlays out. Needs a checkpoint and nothing else."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from lightning_atrous.complaints import Complaint
from lightning_atrous.images import Mode, Reader, write_png
from lightning_atrous.inference import WHOLE, Inference
from lightning_atrous.selection import Selected, select
from lightning_atrous.task import SegmentationTask
from lightning_atrous.types import ClassInfo

__all__ = ["add_inference_options", "colourise", "inference_of", "overlay", "predict", "predict_files"]

WRITTEN = ("index", "colour", "overlay")
"""The folders in the output folder, one for each kind of picture."""

PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def predict(arguments: Sequence[str]) -> None:
    """Run the verb.

    Args:
        arguments: After ``predict``.

    Raises:
        Complaint: Exit code 2 for what was typed wrong; 1 for images that could not be read, and for a failed write.
    """
    options = _parser().parse_args(list(arguments))
    output = Path(options.output).expanduser()
    try:
        inference = inference_of(options)
        task = _task(options)
        inference.check(task.model.output_stride)
        reader = _reader(task, options.reader)
        selection = select(options.images, reader.suffixes, leave_out=[output / kind for kind in WRITTEN])
        if output.exists() and not output.is_dir():
            raise ValueError(f"--output {output} is a file, expected a folder; give another")
    except Exception as error:
        complaint = Complaint.of(error, exit_code=2)
        if complaint is None:
            raise
        raise complaint from error
    started = time.monotonic()
    failures = _with_bar(
        task,
        selection,
        output,
        reader=reader,
        precision=PRECISIONS[options.precision],
        inference=inference,
        alpha=options.alpha,
    )
    done, n = len(selection) - len(failures), len(selection)
    seconds = time.monotonic() - started
    kinds = ", ".join(f"{kind}/" for kind in WRITTEN)
    print(f"{done} image{'s' * (done != 1)} → {output}: {kinds} in {seconds:.1f} s on {task.device}")
    for reason in failures:
        print(reason, file=sys.stderr)
    if failures:
        raise Complaint(f"{len(failures)} of {n} images could not be predicted, for the reasons above", exit_code=1)


def predict_files(
    task: SegmentationTask,
    selection: Sequence[Selected],
    output: Path,
    *,
    reader: Reader,
    precision: torch.dtype = torch.float32,
    inference: Inference = WHOLE,
    alpha: float = 0.5,
) -> Iterator[str | None]:
    """Predict file after file, and write what comes out.

    ``index/`` gets class indices in one grey channel (of 16 bits for more than 256 classes), ``colour/`` the colours
    of the classes, ``overlay/`` those laid over the image; all in the size of the upright image.

    Args:
        task: On the device to compute on.
        selection: Files and the names of what is written.
        output: The folder of the three folders.
        reader: How the files are read.
        precision: Of the network; its logits are raised and compared in float32 in any case.
        inference: Whole by default, or in windows, at several scales, flipped too.
        alpha: The share of the colours in the overlay, in 0..1.

    Yields:
        For each file, nothing, or the reason why it could not be read.

    Raises:
        ValueError: A picture that cannot be written.
    """
    for selected, pending in _read_ahead(selection, reader):
        try:
            image = pending.result()
            with torch.autocast(task.device.type, precision, enabled=precision != torch.float32):
                index = task.predict(image, inference=inference).cpu().numpy()
        except ValueError as error:
            yield str(error)
            continue
        except torch.OutOfMemoryError:
            yield f"{selected.path} needs more memory than {task.device} has left; give --window, or --device cpu"
            continue
        colour = colourise(index, task.classes)
        pictures = (
            index.astype(np.uint8 if len(task.classes) <= 256 else np.uint16),
            colour,
            overlay(image, colour, alpha),
        )
        for kind, pixels in zip(WRITTEN, pictures, strict=True):
            write_png(output / kind / f"{selected.name}.png", pixels)
        yield None


def colourise(index: np.ndarray, classes: ClassInfo) -> np.ndarray:
    """Class indices ``(H, W)`` → the colours of the classes, uint8 ``(H, W, 3)``."""
    return np.array(classes.palette, np.uint8)[index]


def overlay(image: Tensor, colour: np.ndarray, alpha: float) -> np.ndarray:
    """``(1 - alpha) · image + alpha · colour``, rounded.

    Args:
        image: ``(C, H, W)``, uint8 or floating in 0..1; its first three channels are shown, or, of fewer, the first.
        colour: uint8 ``(H, W, 3)``.
        alpha: In 0..1.

    Returns:
        uint8 ``(H, W, 3)``.
    """
    shown = image[:3] if image.shape[0] >= 3 else image[:1].expand(3, -1, -1)
    base = shown.permute(1, 2, 0).numpy().astype(np.float32) * (255 if image.is_floating_point() else 1)
    return np.rint((1 - alpha) * base + alpha * colour).astype(np.uint8)


def _read_ahead(selection: Sequence[Selected], reader: Reader) -> Iterator[tuple[Selected, Future[Tensor]]]:
    """Each file with its image to come: the next is read while the present one is computed."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(reader, selection[0].path)
        for i, selected in enumerate(selection):
            pending = following
            if i + 1 < len(selection):
                following = pool.submit(reader, selection[i + 1].path)
            yield selected, pending


def _with_bar(
    task: SegmentationTask,
    selection: Sequence[Selected],
    output: Path,
    *,
    reader: Reader,
    precision: torch.dtype,
    inference: Inference,
    alpha: float,
) -> list[str]:
    """Predict all, with a bar on a terminal; the reasons of those that could not be."""
    console = Console()
    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.description}", markup=False),
    )
    failures = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(selection))
        results = predict_files(
            task, selection, output, reader=reader, precision=precision, inference=inference, alpha=alpha
        )
        for i, (selected, failure) in enumerate(zip(selection, results, strict=True)):
            if failure is not None:
                failures.append(failure)
            progress.update(bar, completed=i + 1, description=f"{i + 1}/{len(selection)}  {selected.name}")
    return failures


def add_inference_options(parser: argparse.ArgumentParser) -> None:
    """Add those from which `inference_of` makes its own."""
    parser.add_argument(
        "--window",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="of windows that are blended where they overlap, for images that are too large; multiples of the output "
        "stride; whole images by default",
    )
    parser.add_argument(
        "--overlap", type=float, default=0.5, help="of windows, in 0..1 of their size; %(default)s by default"
    )
    parser.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="S",
        help="sizes of the image, in units of its own, over which probabilities are averaged; 1 by default",
    )
    parser.add_argument("--flip", action="store_true", help="average over the flipped image too")


def inference_of(options: argparse.Namespace) -> Inference:
    """What was asked for.

    Raises:
        ValueError: Options out of range.
    """
    window = options.window and (options.window[0], options.window[1])
    return Inference(window=window, overlap=options.overlap, scales=tuple(options.scales), flip=options.flip)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-atrous predict",
        description="The class of every pixel of pictures, by a checkpoint. Writes into DIR/index the class indices, "
        "into DIR/colour the colours of the classes, into DIR/overlay those laid over the pictures.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file that a run has written")
    parser.add_argument(
        "images", metavar="IMAGES", nargs="+", help="pictures, folders, or patterns in quotes such as 'a/**/*.jpg'"
    )
    parser.add_argument("--output", metavar="DIR", default="predictions", help="where to write; %(default)s by default")
    parser.add_argument(
        "--reader", choices=get_args(Mode), help="how to read the files; by default as they were read for the training"
    )
    parser.add_argument(
        "--output_stride", type=int, metavar="N", help="of the backbone; that of the training by default"
    )
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, …; auto, the default, takes an accelerator if there is one"
    )
    parser.add_argument(
        "--precision", choices=tuple(PRECISIONS), default="32", help="of the network; bf16 is faster on most machines"
    )
    add_inference_options(parser)
    parser.add_argument(
        "--alpha", type=_share, default=0.5, help="share of the colours in the overlay, in 0..1; %(default)s by default"
    )
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="CLASS",
        help="import path of a class that the checkpoint may use",
    )
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in 0..1, got {text}")
    return value


def _task(options: argparse.Namespace) -> SegmentationTask:
    """The checkpoint's task, at the stride and on the device that were asked for."""
    task = SegmentationTask.load_from_checkpoint(options.checkpoint, trust=options.trust)
    if options.output_stride is not None:
        task.model.output_stride = options.output_stride
    device: str | torch.device = options.device
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return task.to(device)
    except (RuntimeError, AssertionError) as error:  # unknown, not there, or not compiled into torch
        reason = str(error).splitlines()[0].partition(":")[0]
        raise ValueError(f"the device {device} cannot be used ({reason}); give --device auto or cpu") from error


def _reader(task: SegmentationTask, mode: Mode | None) -> Reader:
    """The checkpoint's reader, or another that gives as many channels."""
    if mode is None or mode == task.reader.mode:
        return task.reader
    channels = task.reader.out_channels if mode == "array" else None
    reader = dataclasses.replace(task.reader, mode=mode, channels=channels)
    if reader.out_channels != task.reader.out_channels:
        raise ValueError(
            f"--reader {mode} gives images of {reader.out_channels} channels, but the checkpoint takes "
            f"{task.reader.out_channels} ({task.reader}); leave it out"
        )
    return reader
