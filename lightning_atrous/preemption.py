"""A training that is told to end saves where it is, and can be told to go on from there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, WeightAveraging

from lightning_atrous.runs import slurm_job

__all__ = ["Preemption", "Stopped"]

AT_ONCE = {
    name: handler
    for name, handler in (
        ("SIGTERM", signal.SIG_DFL),
        ("SIGINT", signal.default_int_handler),
        ("SIGUSR1", signal.SIG_DFL),
    )
    if hasattr(signal, name)
}
"""What ends a training, and what a second one does."""


class Stopped(SystemExit):
    """The end of a training by a signal, with the exit code that shells give for it: 128 and the signal's number."""


class Preemption(Callback):
    """Saves and ends after SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, at the end of the optimiser's step.

    The signal itself is only noted: whatever it interrupts is finished first, so that a checkpoint holds whole steps. A
    validation is not: it ends after the batch at hand, nothing of it is kept, and the resumed run begins it anew. Only
    the one after the last step of ``max_steps`` is finished, for the training is over then. All processes end after
    the same step, whichever of them was told. A second signal, a second later or more, ends at once.

    In a Slurm job SIGUSR1 also asks Slurm to queue the job again, which SIGTERM leaves to who sent it.

    Lightning's own handlers would save in the middle of a step, or talk to the other processes from there.

    Args:
        path: Of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._signal = 0
        self._since = 0.0
        self._speaks = False
        self._group: Any = None
        self._common_batches = 0
        self._validated_batches = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over from Lightning, which puts back what was there before it."""
        # one that came while the training was set up, and that Lightning has noted
        self._signal = signal.SIGTERM if trainer.received_sigterm else 0
        self._speaks = trainer.is_global_zero
        if trainer.world_size > 1:
            # of the CPUs: asking through the GPU would wait for all it has still to do
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            for name in AT_ONCE:
                signal.signal(getattr(signal, name), self._note)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End before this batch: all that follows on the last one is done, and nothing of this one."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._end_if_told(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the batches that every process has."""
        self._validated_batches, self._common_batches = 0, 0
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.global_step != trainer.max_steps:
            # no process may wait for the answer of one that is done
            self._common_batches = -self._greatest(-int(min(sum(trainer.num_val_batches), sys.maxsize)))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """End before this batch."""
        if self._validated_batches < self._common_batches:
            self._end_if_told(trainer, pl_module)
        self._validated_batches += 1

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget the processes."""
        self._group = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self._signal:
            self._signal, self._since = number, time.monotonic()
            if self._speaks:  # print is not for signal handlers
                os.write(2, f"\n{name}: saving after this step; a second signal ends at once\n".encode())
        elif time.monotonic() - self._since >= 1:  # what is sent to a process and to its group comes twice
            signal.signal(number, AT_ONCE[name])
            signal.raise_signal(number)

    def _greatest(self, number: int) -> int:
        """Of all processes' numbers."""
        if self._group is None:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return int(numbers)

    def _end_if_told(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (number := self._greatest(self._signal)):
            return
        if trainer.validating:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, WeightAveraging):  # which evaluates with weights of its own
                    callback.on_validation_epoch_end(trainer, pl_module)
        trainer.save_checkpoint(self.path)
        if trainer.is_global_zero:
            name, path = signal.Signals(number).name, os.path.relpath(self.path)
            print(
                f"lightning-atrous fit: stopped by {name} after step {trainer.global_step}, which is saved in {path}; "
                f"{self._go_on(trainer, name)}",
                file=sys.stderr,
                flush=True,
            )
        raise Stopped(128 + number)

    def _go_on(self, trainer: L.Trainer, name: str) -> str:
        """How; for a Slurm job after it was asked for."""
        by_hand = "--ckpt_path last goes on from there"
        environment = trainer._accelerator_connector.cluster_environment
        if name != "SIGUSR1" or not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
            return by_hand
        job = slurm_job().partition(".")[0]
        try:
            done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
            reason = done.stderr.strip() or f"exit code {done.returncode}"
            failed = done.returncode != 0
        except OSError as error:
            failed, reason = True, error.strerror or str(error)
        if failed:
            return f"Slurm could not queue job {job} again (scontrol requeue: {reason}): submit it anew, {by_hand}"
        return f"Slurm has queued job {job} again, which goes on from there"
