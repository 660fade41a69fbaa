"""A training that goes on from a checkpoint as if it had never stopped."""

from __future__ import annotations

import copy
import sys
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, WeightAveraging

from lightning_atrous.data import SegmentationData
from lightning_atrous.randomness import random_state, set_random_state

__all__ = ["ExactResume"]

KEY = "lightning_atrous_resume"
"""Where in a checkpoint it stands: the place in the epoch, and the random number generators of every process."""


class ExactResume(Callback):
    """Keeps in checkpoints what Lightning leaves out, so that the following losses are those of a run never stopped.

    That is the place in the epoch, whether the validation that was due there is done, and the state of every random
    number generator on every process. It holds for checkpoints saved at any time in a training: in the middle of an
    epoch, before or after a validation, at its end. A checkpoint between two batches of one gradient accumulation
    goes on from the optimiser's last step; batch norm has then seen those batches before.

    The place is kept in images. With another ``batch_size`` the epoch goes on at the last whole batch before it; with
    another number of images its order is another, and the epoch begins anew. The order and the augmentation go by the
    seed of the checkpoint, whatever the new run was seeded with. On another number of processes each one's generators
    are the new run's.

    It takes `SegmentationData`; with other data only the generators are kept.
    """

    def __init__(self) -> None:
        self._validated_at = -1  # the batches that were done, over all epochs, when a validation last ended
        self._restored: dict[str, Any] | None = None
        self._mid_epoch = False

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know it, before checkpoints are saved at the end of the validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated_at = _loops(trainer).epoch_loop.batch_progress.total.processed

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add place and generators; called on every process."""
        states = [random_state(trainer.strategy.root_device)]
        if trainer.world_size > 1:
            states *= trainer.world_size
            dist.all_gather_object(states, states[trainer.global_rank])
        checkpoint[KEY] = {"random": states}
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, SegmentationData):
            checkpoint[KEY] |= self._place(trainer, data)

    def _place(self, trainer: L.Trainer, data: SegmentationData) -> dict[str, Any]:
        """After which batch, as of the optimiser's last step."""
        epochs, batches = _loops(trainer).epoch_progress.current, _loops(trainer).epoch_loop.batch_progress
        done, total = batches.current.processed, batches.total.processed
        whole = done >= trainer.num_training_batches
        # a run that ends within an epoch counts it as processed
        ended = epochs.processed == epochs.ready > 0
        epoch = epochs.processed - ended
        validated = self._validated_at == total
        if ended and whole:
            epoch, done = epoch + 1, 0
        elif not whole and (since := done % trainer.accumulate_grad_batches):
            # to where the gradients were zero; a validation that was due there is over
            done, total, validated = done - since, total - since, True
        place = {"epoch": epoch, "images": done * data.batch_size, "batch_size": data.batch_size, "total": total}
        return place | {"whole": whole, "validated": validated, **data.order()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go to the place, before the order of the images is made."""
        if trainer.state.fn != "fit":
            return
        averages = any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if "averaging_state" in checkpoint and not averages:
            raise ValueError(
                "the checkpoint's weights are averages, from which a training cannot go on as from its own; give the "
                "callback by which it averaged again, such as --trainer.callbacks+=EMA"
            )
        if KEY not in checkpoint:
            return
        state = checkpoint[KEY]
        self._restored = state
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, SegmentationData) or "images" not in state:
            return
        batches = state["images"] // data.batch_size
        if (length := data.order()["length"]) != state["length"]:
            if batches and trainer.is_global_zero:
                print(
                    f"the training split has {length} images, and had {state['length']} when the checkpoint was saved: "
                    f"epoch {state['epoch'] + 1} begins anew",
                    file=sys.stderr,
                )
            batches = 0
        data.resume_at(seed=state["seed"], epoch=state["epoch"], batches=batches)
        self._mid_epoch = batches > 0
        self._validated_at = state["total"] if state["validated"] else -1
        loops = checkpoint["loops"]
        loops["fit_loop"] = _progress(loops["fit_loop"], state, batches, step=checkpoint["global_step"])
        # Lightning asks the order for its first batches before it restores the loops, and with sharded weights before
        # it calls this: then the loader is made anew
        _loops(trainer).epoch_progress.current.processed = state["epoch"]
        _loops(trainer)._combined_loader = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the generators, after what draws from them while a run is set up."""
        state, self._restored = self._restored, None
        if state is not None and len(state["random"]) == trainer.world_size:
            set_random_state(state["random"][trainer.global_rank], trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Know that nothing is left to begin."""
        self._mid_epoch = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin the epoch that Lightning goes on in the middle of, with all that others make ready for it."""
        if self._mid_epoch:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_train_epoch_start(trainer, pl_module)
            pl_module.on_train_epoch_start()


def _loops(trainer: L.Trainer) -> Any:
    """Whose counters Lightning declares with fewer fields than they have."""
    return trainer.fit_loop


def _progress(loops: dict[str, Any], state: dict[str, Any], batches: int, *, step: int) -> dict[str, Any]:
    """Lightning's counters for a place, the same whichever hook saved the checkpoint.

    Left as they were saved they differ by that hook, and Lightning goes on by guesses from them: it leaves out a
    validation that was due, counts an epoch that was cut short as done, and logs under a step too few or too many.

    Args:
        loops: The checkpoint's state of the fit loop.
        state: Its place.
        batches: Done in the epoch, in this run's batches.
        step: Of the optimiser.
    """
    loops = copy.deepcopy(loops)
    epoch = state["epoch"]
    begun, ended = (epoch + 1, epoch) if batches else (epoch, epoch)
    loops["epoch_progress"] = _both(ready=begun, started=begun, processed=ended, completed=ended)
    done = _counted(batches)
    last = state["whole"] and batches * state["batch_size"] == state["images"] > 0
    loops["epoch_loop.batch_progress"] = {
        "total": _counted(state["total"]),
        "current": done,
        "is_last_batch": last,
    }
    # one batch begun and not ended: Lightning's sign for a validation that is to be run
    due = batches > 0 and not state["validated"]
    begun_validation = {"ready": int(due), "started": int(due), "processed": 0, "completed": 0}
    loops["epoch_loop.val_loop.batch_progress"] = {
        "total": begun_validation,
        "current": _counted(0),
        "is_last_batch": False,
    }
    loops["epoch_loop.state_dict"] = {"_batches_that_stepped": step - due}
    loops["state_dict"] = {}
    return loops


def _counted(number: int) -> dict[str, int]:
    return {"ready": number, "started": number, "processed": number, "completed": number}


def _both(**counters: int) -> dict[str, dict[str, int]]:
    return {"total": dict(counters), "current": dict(counters)}
