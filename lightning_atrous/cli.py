"""The command ``lightning-atrous``: a verb a function."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

from lightning_atrous import __version__
from lightning_atrous.comparison import evaluate
from lightning_atrous.complaints import Complaint
from lightning_atrous.interop.command import import_checkpoint
from lightning_atrous.listing import tell_list
from lightning_atrous.prediction import predict
from lightning_atrous.registry import close_matches
from lightning_atrous.support import tell_support
from lightning_atrous.training import TrainingCLI

__all__ = ["main"]

TRACEBACK = "LIGHTNING_ATROUS_TRACEBACK"
"""Set this environment variable to see where an error was raised."""


def _train(arguments: Sequence[str]) -> None:
    TrainingCLI(arguments)


def _predict(arguments: Sequence[str]) -> None:
    predict(arguments[1:])


def _evaluate(arguments: Sequence[str]) -> None:
    evaluate(arguments[1:])


def _import(arguments: Sequence[str]) -> None:
    import_checkpoint(arguments[1:])


def _support(arguments: Sequence[str]) -> None:
    tell_support(arguments[1:])


def _list(arguments: Sequence[str]) -> None:
    tell_list(arguments[1:])


VERBS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {
    "fit": ("train from a config; --ckpt_path last goes on with the newest run", _train),
    "validate": ("score a checkpoint on the validation images", _train),
    "test": ("score a checkpoint on the test images", _train),
    "evaluate": ("CHECKPOINT [--grid]: scores at several output strides, scales and flips, in a table", _evaluate),
    "predict": ("CHECKPOINT IMAGES...: class indices, colours and overlays of pictures", _predict),
    "import": ("SOURCE ...: checkpoints of torchvision, SMP and mmsegmentation into ours", _import),
    "support": ("NETWORK...: which output strides a backbone takes, how exactly, and why not others", _support),
    "list": ("heads [NAME] | backbones [PATTERN]: what can be put into a config, and its options", _list),
}


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10} {what}" for verb, (what, _) in VERBS.items())
    return (
        "usage: lightning-atrous VERB [OPTIONS]\n\n"
        "Semantic segmentation with exact atrous backbones.\n\n"
        f"{verbs}\n\n"
        "`lightning-atrous VERB --help` tells the options of a verb.\n"
        "Start with: lightning-atrous fit --config configs/quickstart.yaml"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 something about the data or the run, 2 something typed wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return
    if arguments[0] == "--version":
        print(f"lightning-atrous {__version__}")
        return
    verb = arguments[0]
    if verb not in VERBS:
        print(f"lightning-atrous: error: no verb '{verb}'; {close_matches(verb, list(VERBS))}", file=sys.stderr)
        sys.exit(2)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning's own use of torch's tree functions; nothing that a user could change
            warnings.filterwarnings("ignore", message="`isinstance\\(treespec, LeafSpec\\)`", category=FutureWarning)
            # what is meant when a run is resumed
            warnings.filterwarnings("ignore", message=r"Checkpoint directory .* exists and is not empty")
            warnings.filterwarnings("ignore", message=r"The dirpath has changed")
            VERBS[verb][1](arguments)
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning ends with a code of its own after it has shut a run down
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        print(f"lightning-atrous {verb}: stopped; what was written up to here is whole", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        complaint = Complaint.of(error, exit_code=1)
        if complaint is None:
            traceback.print_exc()
            sys.exit(1)
        print(f"lightning-atrous {verb}: error: {complaint}", file=sys.stderr)
        sys.exit(complaint.exit_code)
