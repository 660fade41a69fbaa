"""``fit``, ``validate`` and ``test``: LightningCLI with our task, our data, and one directory a run."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.trainer import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import SGD, Optimizer

import lightning_atrous.ema  # noqa: F401  what is imported goes by its bare name in `trainer.callbacks`
from lightning_atrous.boundaries import BoundaryScore
from lightning_atrous.callbacks import FinalValidation, LoggedStep, RunProgress, ScoreTable, WandbRun
from lightning_atrous.checkpoint import SPEC_KEY, check_classes, read_checkpoint
from lightning_atrous.complaints import Complaint, clarify
from lightning_atrous.data import SegmentationData
from lightning_atrous.heads import HEADS, DeepLabV3Plus, Head
from lightning_atrous.image_scores import ImageScores
from lightning_atrous.loggers import LOGGERS, AppendingCSVLogger, complete
from lightning_atrous.losses import CrossEntropy, Loss
from lightning_atrous.names import Slots, translate_arguments, translate_yaml
from lightning_atrous.optim import OPTIMIZERS, SGD_RECIPE
from lightning_atrous.plugins import SyncBatchNorm, WholeCheckpointIO
from lightning_atrous.preemption import Preemption, Stopped
from lightning_atrous.resume import ExactResume
from lightning_atrous.runs import CHECKPOINTS, claim, find_checkpoint, find_requeued, fresh_directory, run_of
from lightning_atrous.spec import describe
from lightning_atrous.speed import FasterExecution
from lightning_atrous.switches import class_paths, reset_replaced
from lightning_atrous.task import SegmentationTask

__all__ = ["TrainingCLI"]

SLOTS: Slots = {
    "model.head": (HEADS, Head),
    "model.aux_head": (HEADS, Head),
    "model.optimizer": (OPTIMIZERS, Optimizer),
    "trainer.logger": (LOGGERS, Logger),
}

CLASSES = {
    "data": SegmentationData,
    "model.loss": Loss,
    "model.loss.losses": Loss,
    "model.optimizer": Optimizer,
    "model.boundaries": BoundaryScore,
    "trainer.callbacks": Callback,
}

REPLACED = {"model.head": Head, "model.aux_head": Head, "model.loss": Loss, "model.optimizer": Optimizer}
"""Where options mean one class's own thing, and do not outlive it. Those of the data mean the same to all sources."""

STANDING = {"model.head": DeepLabV3Plus, "model.loss": CrossEntropy, "model.optimizer": SGD}
"""The classes that a task takes by default."""


class Parser(LightningArgumentParser):
    """Lightning's parser, with registered names in the head slots and one sentence for an error."""

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Any:
        """Parse YAML in which heads may go by their registered names."""
        try:
            return super().parse_string(translate_yaml(content, SLOTS), *args, **kwargs)
        except ValueError as error:
            # jsonargparse turns a TypeError into a message about the file
            raise TypeError(str(error)) from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with exit code 2 and say what is wrong, what it is close to, and where to read on."""
        if not self.exit_on_error:  # the parser of a part, whose error the whole one words
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        prog = parser.prog.replace(" [options]", "")
        sys.stderr.write(f"{prog}: error: {clarify(message, parser, CLASSES)}\nAll options: {prog} --help\n")
        sys.exit(2)


class ConfigSaver(SaveConfigCallback):
    """Keeps every option as it was resolved, in the run's directory and with its loggers, before the first step."""

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Write ``config.yaml``, and log it; a resumed run leaves the first one and writes ``config-2.yaml``."""
        if stage != "fit":
            return
        directory = Path(trainer.default_root_dir)
        directory.mkdir(parents=True, exist_ok=True)
        number, path = 1, directory / "config.yaml"
        while path.exists():
            number += 1
            path = directory / f"config-{number}.yaml"
        self.parser.save(self.config, str(path), skip_unset=False, multifile=False)
        claim(directory)
        for logger in trainer.loggers:
            logger.log_hyperparams(yaml.safe_load(path.read_text(encoding="utf-8")))


class TrainingCLI(LightningCLI):
    """``fit``, ``validate`` and ``test``: LightningCLI with our task, our data and one directory a run."""

    def __init__(self, arguments: Sequence[str]) -> None:
        HEADS.load_plugins()
        self.run_dir = Path()
        self.first_step = 0
        self.wandb_run: dict[str, str] = {}
        self.checkpoint: dict[str, Any] | None = None  # what it says of itself
        try:
            super().__init__(
                SegmentationTask,
                SegmentationData,
                subclass_mode_data=True,
                save_config_callback=ConfigSaver,
                save_config_kwargs={"save_to_log_dir": False},
                trainer_defaults={
                    "enable_model_summary": False,
                    "num_sanity_val_steps": 0,
                    "log_every_n_steps": 10,
                },
                seed_everything_default=0,
                parser_class=Parser,
                parser_kwargs={
                    "prog": "lightning-atrous",
                    "allow_abbrev": False,
                    **{
                        verb: {"prog": f"lightning-atrous {verb}", "allow_abbrev": False} for verb in self.subcommands()
                    },
                },
                args=list(arguments),
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
            )
        except SIGTERMException as error:  # of Lightning, which would end with exit code 0
            print("lightning-atrous: stopped by SIGTERM, with nothing to save", file=sys.stderr)
            raise Stopped(128 + signal.SIGTERM) from error

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's verbs that are ours too, without its printing of results: `ScoreTable` does that."""
        return {verb: {*skip, "verbose"} for verb, skip in LightningCLI.subcommands().items() if verb != "predict"}

    def fit(self, **arguments: Any) -> None:
        """Run the trainer's, without its astonishment at modules that stay in eval mode because they are frozen."""
        with warnings.catch_warnings():
            if self.model.model.frozen:
                warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode at the start of training")
            self.trainer.fit(**arguments)
        if self.first_step and self.trainer.global_step == self.first_step and self.trainer.is_global_zero:
            print(
                f"the checkpoint is at step {self.first_step} already, at or past the end that was asked for; to train "
                f"on give a larger trainer.max_epochs or trainer.max_steps"
            )

    def validate(self, **arguments: Any) -> None:
        """Run the trainer's, quietly."""
        self.trainer.validate(**arguments, verbose=False)

    def test(self, **arguments: Any) -> None:
        """Run the trainer's, quietly."""
        self.trainer.test(**arguments, verbose=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's directory, tie classes and reader to the data, and show the default optimiser as what it is."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Where the run writes; runs/<name of the config> where not given. A new run takes the next free "
            "number behind it, `--ckpt_path last` goes on in the newest.",
        )
        parser.add_argument(
            "--eval_output_stride",
            type=int | None,
            default=None,
            help="The backbone's output stride while it is scored, such as 8 for a training at 16; that of the "
            "training where not given.",
        )
        if not parser.prog.endswith(" fit"):
            parser.add_argument(
                "--per_image",
                type=Path | None,
                default=None,
                help="A .csv or .parquet file for the scores of every image.",
            )
        parser.link_arguments("eval_output_stride", "model.eval_output_stride")
        parser.link_arguments("data.classes", "model.classes", apply_on="instantiate")
        parser.link_arguments("data.reader", "model.reader", apply_on="instantiate")
        parser.set_defaults({"model.optimizer": describe(SGD_RECIPE)})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with the checkpoint's own model beneath what the user gives: what is typed wins."""
        try:
            arguments = translate_arguments(args, SLOTS)
            checkpoint, base = _value_of("--ckpt_path", arguments), _run_base(arguments)
            requeued = find_requeued(base, checkpoint) if arguments[:1] == ["fit"] else None
            if requeued is not None or checkpoint is not None:
                path = requeued or find_checkpoint(checkpoint or "", base)
                content = read_checkpoint(path)
                self.first_step = content["global_step"]
                self.wandb_run = content["callbacks"].get(WandbRun().state_key, {})
                self.checkpoint = content[SPEC_KEY]
                # before the parser imports them; what the user's own configs name is the user's word for it
                check_classes(self.checkpoint, trust=class_paths(arguments))
                arguments = _lay_beneath(arguments, self.checkpoint, path)
            arguments = [*arguments, *reset_replaced(arguments, REPLACED, STANDING, SLOTS)]
        except ValueError as error:
            raise Complaint(str(error), exit_code=2) from error
        self.config = parser.parse_args(arguments)
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and seed is not None and not 0 <= seed < 2**32:
            raise Complaint(f"seed_everything must be a number in 0..{2**32 - 1}, got {seed}", exit_code=2)

    def before_instantiate_classes(self) -> None:
        """Choose the run's directory, and the logger that writes there where none is given."""
        assert self.subcommand is not None
        config, trainer = self.config[self.subcommand], self.config[self.subcommand].trainer
        files = [str(path) for path in config.config or ()]
        base = Path(config.run_dir or trainer.default_root_dir or _default_base(files))
        if config.ckpt_path:
            self.run_dir = run_of(Path(config.ckpt_path))
        elif self.subcommand == "fit":
            self.run_dir = fresh_directory(base)
        else:
            raise Complaint(
                f"{self.subcommand} needs a checkpoint; give --ckpt_path best, last, or the path of a .ckpt file",
                exit_code=2,
            )
        config.run_dir, trainer.default_root_dir = str(base), str(self.run_dir)
        if trainer.logger in (None, True):
            path = describe(AppendingCSVLogger)["class_path"]
            csv = Namespace(class_path=path, init_args=Namespace(save_dir=".", first_step=0))
            trainer.logger = csv if self.subcommand == "fit" else False

    def instantiate_classes(self) -> None:
        """Build data, task and trainer; what they refuse was typed."""
        self.resolved = self.config
        self.config = self.config.clone()
        trainer = self.config[self.subcommand].trainer
        try:
            # an evaluation does no step again, and drops none from the records
            first_step = self.first_step if self.subcommand == "fit" else sys.maxsize
            trainer.logger = complete(
                trainer.logger, run_dir=self.run_dir, first_step=first_step, wandb_run=self.wandb_run
            )
            super().instantiate_classes()
            if self.checkpoint is not None:
                self.model.check_fits(self.checkpoint)
        except Exception as error:
            complaint = Complaint.of(error, exit_code=2)
            if complaint is None and isinstance(error, (TypeError, ValueError)):  # of a library, about its options
                complaint = Complaint(" ".join(str(error).split()), exit_code=2)
            if complaint is None:
                raise
            raise complaint from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer with the run's checkpoints, progress, table and plugins."""
        self.config = self.resolved  # what is kept with a run does not name the run's own places
        config = self.config[self.subcommand].trainer
        callbacks: list[Any] = [*self.reports(), LoggedStep(), WandbRun(), FinalValidation(), FasterExecution()]
        callbacks.append(ExactResume())
        if config.enable_checkpointing is not False and not config.fast_dev_run:
            directory = self.run_dir / CHECKPOINTS
            callbacks += [
                # overwritten in place: one best and one last, under names that never change
                ModelCheckpoint(directory, "best", monitor="val/miou", mode="max", enable_version_counter=False),
                ModelCheckpoint(directory, "last", enable_version_counter=False),
                Preemption(directory / "last.ckpt"),
            ]
        if self.subcommand == "fit" and config.logger is not False:
            callbacks.append(LearningRateMonitor("step"))
        trainer_config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        plugins = _listed(trainer_config["plugins"])
        plugins += [] if any(isinstance(plugin, CheckpointIO) for plugin in plugins) else [WholeCheckpointIO()]
        plugins += [SyncBatchNorm()] if config.sync_batchnorm else []
        trainer_config["plugins"] = plugins
        trainer = self._instantiate_trainer(trainer_config, callbacks)
        # before those of the user, who may log in the same hook
        trainer.callbacks.sort(key=lambda callback: not isinstance(callback, LoggedStep))  # type: ignore[attr-defined]
        if self.subcommand == "fit":
            if config.sync_batchnorm and trainer.world_size > 1 and trainer.strategy.root_device.type == "cpu":
                raise Complaint(
                    "trainer.sync_batchnorm was asked for on the CPU, where torch has none; give "
                    "--trainer.sync_batchnorm false, or --trainer.devices 1",
                    exit_code=2,
                )
            if trainer.accumulate_grad_batches < 1:
                raise Complaint(
                    f"trainer.accumulate_grad_batches must be at least 1, got {trainer.accumulate_grad_batches}",
                    exit_code=2,
                )
            if (trainer.gradient_clip_val or 0) < 0:
                raise Complaint(
                    f"trainer.gradient_clip_val must not be negative, got {trainer.gradient_clip_val}; leave it out to "
                    f"clip nothing",
                    exit_code=2,
                )
            if trainer.max_epochs == trainer.max_steps == -1:
                raise Complaint(
                    "a training needs an end; give --trainer.max_epochs or --trainer.max_steps", exit_code=2
                )
            self.datamodule.share_of(trainer.world_size)
        return trainer

    def reports(self) -> list[Callback]:
        """What shows the run on the terminal, and image by image in a file."""
        config = self.config[self.subcommand]
        reports: list[Callback] = [ScoreTable()]
        if self.subcommand != "fit":
            reports.append(ImageScores(config.per_image))
        return reports if config.trainer.enable_progress_bar is False else [*reports, RunProgress()]


def _listed(plugins: Any) -> list[Any]:
    if plugins is None:
        return []
    return list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]


def _value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The last value that the arguments give to an option."""
    value = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == option:
            value = following
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
    return value


def _run_base(arguments: Sequence[str]) -> Path:
    """The run directory that the arguments mean, before they are parsed."""
    run_dir = _value_of("--run_dir", arguments)
    config = _value_of("--config", arguments) or _value_of("-c", arguments)
    if run_dir is None and config is not None and Path(config).is_file():
        with contextlib.suppress(yaml.YAMLError, UnicodeDecodeError):  # which the parser words
            written = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
            run_dir = written.get("run_dir") if isinstance(written, dict) else None
    return Path(run_dir or _default_base([config] if config else []))


def _default_base(configs: Sequence[str]) -> Path:
    files = [Path(config) for config in configs if config.endswith((".yaml", ".yml", ".json"))]
    return Path("runs") / (files[-1].stem if files else "run")


def _lay_beneath(arguments: Sequence[str], spec: dict[str, Any], path: Path) -> list[str]:
    """Arguments with a checkpoint's model as the first config, which all others then override."""
    model = {key: value for key, value in spec.items() if key not in ("classes", "reader")}
    verb, *rest = arguments
    rest = _without("--ckpt_path", rest)
    # the checkpoint brings the weights
    weights = ["--model.backbone.pretrained", "false"]
    return [verb, "--config", json.dumps({"model": model}), *rest, *weights, "--ckpt_path", str(path)]


def _without(option: str, arguments: Sequence[str]) -> list[str]:
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == option:
            skip = True
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept
