"""Where the numbers of a run go: a CSV file, TensorBoard, Weights & Biases, each in the run's directory."""

from __future__ import annotations

import csv
import importlib
import netrc
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from lightning_atrous.registry import Registry

__all__ = ["LOGGERS", "AppendingCSVLogger", "RunTensorBoardLogger", "complete", "has_wandb_account"]

LOGGERS: Registry[Logger] = Registry("logger", "lightning_atrous.loggers")
"""Loggers by the short names that a config may use; any other of Lightning's goes by its class name."""

LOGGERS.register("wandb")(WandbLogger)


@LOGGERS.register("csv")
class AppendingCSVLogger(CSVLogger):
    """Lightning's CSV logger, going on in the file of a run that is resumed instead of deleting it.

    Args:
        save_dir: Where ``metrics.csv`` is; the run's directory where not given.
        first_step: The first that this run does; earlier rows of later steps are dropped, for they are done again.
    """

    def __init__(self, save_dir: str = ".", *, first_step: int = 0) -> None:
        super().__init__(save_dir, name="", version="")
        path = os.path.join(self.log_dir, ExperimentWriter.NAME_METRICS_FILE)
        self._earlier = [row for row in _read_rows(path) if int(row["step"]) < first_step]

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """Lightning's writer, with the earlier rows written back as soon as it has deleted them."""
        if self._experiment is None:
            with warnings.catch_warnings(action="ignore"):  # that it deletes them
                writer = super().experiment
            writer.metrics.extend(self._earlier)
            writer.save()
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment

    def log_hyperparams(self, params: Any | None = None) -> None:
        """Nothing: every option is in the run's ``config.yaml`` already."""


@LOGGERS.register("tensorboard")
class RunTensorBoardLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger, with its events right in one folder; a run that is resumed adds to them.

    Args:
        save_dir: The folder; ``tensorboard`` in the run's directory where not given.
        log_graph: Whether to add the network's graph.
        prefix: Before the names of all metrics.
    """

    def __init__(self, save_dir: str = ".", *, log_graph: bool = False, prefix: str = "") -> None:
        super().__init__(save_dir, name="", version="", log_graph=log_graph, prefix=prefix, default_hp_metric=False)


def complete(logger: Any, *, run_dir: Path, first_step: int = 0, wandb_run: Mapping[str, str] | None = None) -> Any:
    """A logger's configuration, with what it leaves open filled in for one run.

    Args:
        logger: As parsed: ``class_path`` and ``init_args``, a list of such, a boolean or None.
        run_dir: Of the run; loggers that name no place of their own write there.
        first_step: The first step that is done.
        wandb_run: What identifies the W&B run to go on in, for what the configuration leaves open.
    """
    if isinstance(logger, list):
        return [complete(each, run_dir=run_dir, first_step=first_step, wandb_run=wandb_run) for each in logger]
    if logger is None or isinstance(logger, bool):
        return logger
    logger = logger.clone()
    options = logger.init_args
    module, _, name = logger.class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    first_rank = getattr(rank_zero_only, "rank", 0) == 0  # set as an attribute by Lightning
    here = options.get("save_dir") in (None, ".")
    if issubclass(cls, AppendingCSVLogger):
        options.first_step = first_step
        options.save_dir = str(run_dir) if here else options.save_dir
    elif issubclass(cls, RunTensorBoardLogger):
        options.save_dir = str(run_dir / "tensorboard") if here else options.save_dir
    elif issubclass(cls, WandbLogger):
        if here and options.get("dir") is None:
            options.save_dir = str(run_dir)
        if first_rank:  # else wandb takes a temporary folder
            Path(options.get("dir") or options.save_dir).mkdir(parents=True, exist_ok=True)
        for key, value in (wandb_run or {}).items():
            if options.get(key) is None and not (key == "id" and options.version):
                options[key] = value
        options.name = options.name or run_dir.name
        if not options.offline and first_rank and not has_wandb_account():
            options.offline, options.log_model = True, False
            print("no Weights & Biases account on this machine: the run is recorded offline", file=sys.stderr)
    return logger


def has_wandb_account() -> bool:
    """Whether W&B can go online, or not as it was told, without asking anybody for a key."""
    import wandb

    try:
        settings = wandb.setup().settings
    except Exception as error:  # of pydantic, about the environment
        raise ValueError(
            f"Weights & Biases cannot be set up ({' '.join(str(error).split())[:200]}); check the environment "
            "variables WANDB_*"
        ) from error
    wandb.teardown()  # so that what is set from here on counts
    if settings.mode != "online" or settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = {urlsplit(settings.base_url).netloc}
    if "WANDB_BASE_URL" not in os.environ:
        hosts.add("api.wandb.ai")  # its name for many years, under which keys are kept
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(known.authenticators(host) for host in hosts)


def _read_rows(path: str) -> list[dict[str, Any]]:
    if not os.path.isfile(path):
        return []
    with open(path, newline="") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
