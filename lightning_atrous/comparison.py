"""``evaluate``: one checkpoint at several output strides, with and without scales and flips, as papers compare them."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.live import Live
from rich.table import Table

from lightning_atrous.boundaries import BoundaryScores
from lightning_atrous.complaints import Complaint
from lightning_atrous.files import whole_file
from lightning_atrous.inference import Inference
from lightning_atrous.metrics import class_iou, scores
from lightning_atrous.prediction import add_inference_options, inference_of
from lightning_atrous.runs import CHECKPOINTS
from lightning_atrous.training import TrainingCLI

__all__ = ["Row", "Setting", "evaluate", "grid"]

STRIDES = (32, 16, 8)
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
"""Those of the DeepLab papers."""

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


@dataclass(frozen=True)
class Setting:
    """One way to evaluate: the backbone's output stride, that of the training where it is None, and the inference."""

    output_stride: int | None
    inference: Inference


@dataclass
class Row:
    """What came of a setting: scores in 0..1, or why there are none."""

    setting: Setting
    output_stride: int
    scores: dict[str, float] = field(default_factory=dict)
    """``miou``, ``pixel_accuracy``, ``mean_accuracy``; nan where nothing was counted."""
    iou: dict[str, float] = field(default_factory=dict)
    """By class."""
    near: BoundaryScores | None = None
    """Near the boundaries, where the task takes those scores."""
    seconds: float = 0.0
    """With the reading of the images."""
    refused: str = ""


def grid(output_strides: Sequence[int | None], inference: Inference) -> list[Setting]:
    """The rows of table 3 of DeepLabV3+: every output stride, at one scale and at several, as it is and flipped too.

    Args:
        output_strides: From the first row to the last.
        inference: Gives the windows, and the scales where it has any but the image's own; else those of the papers.
    """
    several = SCALES if inference.scales == (1.0,) else inference.scales
    return [
        Setting(stride, dataclasses.replace(inference, scales=scales, flip=flip))
        for stride in output_strides
        for scales in ((1.0,), several)
        for flip in (False, True)
    ]


def evaluate(arguments: Sequence[str]) -> None:
    """Run the verb.

    Args:
        arguments: After ``evaluate``.

    Raises:
        Complaint: Exit code 2 for what was typed wrong; 1 for the data.
    """
    parser = _parser()
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help"):
        parser.error(f"the checkpoint comes first, got {arguments[0]}")
    options, others = parser.parse_known_args(list(arguments))
    try:
        inference = inference_of(options)
    except ValueError as error:
        raise Complaint(str(error), exit_code=2) from error
    if options.grid:
        settings = grid(options.output_stride or STRIDES, inference)
    else:
        settings = [Setting(stride, inference) for stride in options.output_stride or (None,)]
    if len(settings) > 1 and any(other.partition("=")[0] == "--per_image" for other in others):
        raise Complaint("--per_image is of one evaluation, not of several; leave out --grid", exit_code=2)
    checkpoint = Path(options.checkpoint)
    run = ComparisonCLI(
        [
            {"val": "validate", "test": "test"}[options.split],
            *_options_of_run(checkpoint, others),
            *(() if options.precision is None else ("--trainer.precision", PRECISIONS[options.precision])),
            *others,
            "--ckpt_path",
            str(checkpoint),
        ],
        settings,
    )
    if not any(row.scores for row in run.rows):
        raise Complaint(run.rows[0].refused, exit_code=2)
    if options.json and run.trainer.is_global_zero:
        found = {"checkpoint": str(checkpoint), "split": options.split, "rows": [_plain(row) for row in run.rows]}
        with whole_file(options.json) as file:
            file.write(json.dumps(found, indent=1).encode() + b"\n")


class ComparisonCLI(TrainingCLI):
    """``validate`` or ``test``, once for every setting, with the same model and the same data.

    Args:
        arguments: The verb and its options.
        settings: At least one. Of one, the scores of every class are shown as the verb does it; of several, a table.
    """

    def __init__(self, arguments: Sequence[str], settings: Sequence[Setting]) -> None:
        self.settings = settings
        self.rows: list[Row] = []
        self.console = Console()
        super().__init__(arguments)

    def before_instantiate_classes(self) -> None:
        """No bar of Lightning's own beside the table."""
        super().before_instantiate_classes()
        if len(self.settings) > 1:
            self.config[self.subcommand].trainer.enable_progress_bar = False

    def reports(self) -> list[Callback]:
        """Those of the verb; none where the table is what is shown."""
        return super().reports() if len(self.settings) == 1 else []

    def validate(self, **arguments: Any) -> None:
        """Score the validation images once for every setting."""
        self._compare(super().validate, arguments)

    def test(self, **arguments: Any) -> None:
        """Score the test images once for every setting."""
        self._compare(super().test, arguments)

    def _compare(self, run: Callable[..., None], arguments: dict[str, Any]) -> None:
        shown = len(self.settings) > 1 and self.trainer.is_global_zero
        live = Live(self._table(), console=self.console, transient=True) if shown else None
        with live or contextlib.nullcontext():
            for setting in self.settings:
                self.rows.append(self._row(setting, run, arguments))
                if live is not None:
                    live.update(self._table())
        if shown:
            self.console.print(self._table())
            # of one stride all rows have one reason
            for reason in dict.fromkeys(row.refused for row in self.rows if row.refused):
                self.console.print(f"- {reason}", markup=False, highlight=False, soft_wrap=True)

    def _row(self, setting: Setting, run: Callable[..., None], arguments: dict[str, Any]) -> Row:
        evaluation = self.model.evaluation
        evaluation.output_stride, evaluation.inference = setting.output_stride, setting.inference
        row = Row(setting, setting.output_stride or self.model.model.output_stride)
        try:
            evaluation.check()
        except ValueError as error:
            row.refused = str(error)
            return row
        started = time.monotonic()
        run(**arguments)
        row.seconds = time.monotonic() - started
        row.scores = {name: value.item() for name, value in scores(self.model.confusion).items()}
        row.iou = dict(zip(self.model.classes.names, class_iou(self.model.confusion).tolist(), strict=True))
        row.near = evaluation.boundary_scores
        return row

    def _table(self) -> Table:
        table = Table(title="validation" if self.subcommand == "validate" else "test", title_justify="left")
        for name in ("output stride", "scales", "flip"):
            table.add_column(name)
        near = self.model.boundaries is not None
        for name in ("mIoU", *["boundary mIoU"] * near, "pixel accuracy", "seconds"):
            table.add_column(name, justify="right")
        for row in self.rows:
            inference = row.setting.inference
            scales = ", ".join(f"{scale:g}" for scale in inference.scales)
            if len(inference.scales) > 3:
                scales = f"{len(inference.scales)} of {min(inference.scales):g} to {max(inference.scales):g}"
            found = ["refused"]
            if row.scores:
                shares = [row.scores["miou"], row.scores["pixel_accuracy"]]
                if row.near is not None:
                    shares.insert(1, row.near.boundary_miou.item())
                found = [*(f"{100 * share:.2f}" for share in shares), f"{row.seconds:.1f}"]
            table.add_row(str(row.output_stride), scales, "yes" if inference.flip else "", *found)
        return table


def _options_of_run(checkpoint: Path, others: Sequence[str]) -> list[str]:
    """The data and the precision with which a checkpoint's own run was validated, where nothing else is asked for."""
    given = {other.partition("=")[0] for other in others}
    if given & {"--config", "-c", "--data", "--data.class_path"} or checkpoint.absolute().parent.name != CHECKPOINTS:
        return []
    configs = {
        int(match[1] or 1): path
        for path in checkpoint.absolute().parent.parent.iterdir()
        if (match := re.fullmatch(r"config(?:-(\d+))?\.yaml", path.name))
    }
    if not configs:
        return []
    written = yaml.safe_load(configs[max(configs)].read_text(encoding="utf-8"))
    precision = written.get("trainer", {}).get("precision")
    return [
        "--data",
        json.dumps(written["data"]),
        *(() if precision is None else ("--trainer.precision", str(precision))),
    ]


def _plain(row: Row) -> dict[str, Any]:
    """A row in values of JSON, which has no nan."""
    told = dataclasses.asdict(row.setting.inference) | {"output_stride": row.output_stride}
    if row.refused:
        return told | {"refused": row.refused}
    found = {**row.scores, "iou": row.iou, "seconds": row.seconds}
    if row.near is not None:
        names, bands = list(row.iou), row.near.bands
        curves = row.near.trimap_iou.reshape(len(bands), len(names)).T.tolist()
        found |= {
            "boundary_miou": row.near.boundary_miou.item(),
            "boundary_iou": dict(zip(names, row.near.boundary_iou.reshape(-1).tolist(), strict=True)),
            "trimap_pixels": bands,
            "trimap_miou": row.near.trimap_miou.reshape(-1).tolist(),
            "trimap_iou": dict(zip(names, curves, strict=True)),
        }
    return told | {name: _known(value) for name, value in found.items()}


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _known(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-atrous evaluate",
        usage="lightning-atrous evaluate CHECKPOINT [OPTIONS] [options of validate: --config, --data, --trainer, ...]",
        description="Scores a checkpoint on the images of its own run and in its precision, or by --config and "
        "--data; at one output stride or at several, whole or in windows, at several scales, flipped too. What is not "
        "said here is not done, whatever the run itself did: the output stride is that of the training, an image is "
        "seen whole.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a .ckpt file that a run has written")
    parser.add_argument(
        "--grid",
        action="store_true",
        help="a table: every output stride, at one scale and at several (--scales, 0.5 to 1.75 by default), as it is "
        "and flipped too",
    )
    parser.add_argument(
        "--output_stride",
        type=int,
        nargs="+",
        metavar="N",
        help="of the backbone, one or more; that of the training by default, 32 16 8 with --grid",
    )
    add_inference_options(parser)
    parser.add_argument("--split", choices=("val", "test"), default="val", help="%(default)s by default")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="of the network; that of the run by default")
    parser.add_argument("--json", metavar="FILE", help="where to write all numbers, of every class too")
    return parser
