"""One sentence for what went wrong, in place of a traceback, where the cause is what the user gave."""

from __future__ import annotations

import argparse
import errno
import importlib
import inspect
import re
import traceback
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_atrous.registry import close_matches, subclass_names

__all__ = ["Complaint", "clarify"]

_PACKAGE = Path(__file__).parent


class Complaint(Exception):
    """An error that is the user's to mend.

    Args:
        sentence: What came, what was expected, what to do.
        exit_code: 2 for what was typed wrong, 1 for the data or the run.
    """

    def __init__(self, sentence: str, *, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code

    @classmethod
    def of(cls, error: BaseException, *, exit_code: int) -> Complaint | None:
        """The complaint in an error, or None where the error is a defect that needs its traceback.

        A ValueError that this package raised on purpose is one sentence already, also where a library has caught and
        wrapped it. One that came out of a library is not.

        Args:
            error: As caught.
            exit_code: For a complaint that has none yet.
        """
        if isinstance(error, Complaint):
            return error
        if sentence := _foreign(error):
            return cls(sentence, exit_code=exit_code)
        if isinstance(error, ValueError):
            # a loader's worker sends its traceback as text
            if match := re.search(r"in DataLoader worker process.*^ValueError: (.*)", str(error), re.S | re.M):
                return cls(match[1].strip(), exit_code=exit_code)
            raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
            if raised_in.is_relative_to(_PACKAGE):
                return cls(str(error), exit_code=exit_code)
        wrapped = error.__cause__ or error.__context__
        return None if wrapped is None else cls.of(wrapped, exit_code=exit_code)


def _foreign(error: BaseException) -> str | None:
    """What to say of errors that libraries raise and that the user can mend, or None."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in _PLACES:
        where = f"{error.filename} cannot be written" if error.filename else "a file of the run cannot be written"
        return f"{where} ({error.strerror}); make room, or give --run_dir a place that can be written"
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has no memory left; give a smaller --data.batch_size, or smaller crops"
    named = f"{type(error).__module__}.{type(error).__name__}: {text}"
    for pattern, sentence in _FOREIGN.items():
        if match := re.search(pattern, named):
            return sentence.format(*match.groups())
    return text if isinstance(error, MisconfigurationException) else None


_PLACES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR, errno.EEXIST)

_FOREIGN = {
    r"No supported gpu backend found": (
        "trainer.accelerator gpu was asked for, but torch finds no GPU on this machine; give --trainer.accelerator auto"
    ),
    r"You requested gpu: (\[.*?\]) But your machine only has: (\[.*?\])": (
        "the GPUs {0} were asked for, but this machine has only {1}; give --trainer.devices auto, or as many as it has"
    ),
    r"gloo/transport|\bDist\w*Error": (
        "another process of this run has ended, and so does this one; what it said stands above, and --ckpt_path last "
        "goes on from the last checkpoint, if there is one"
    ),
    r"Early stopping conditioned on metric `(.*?)` which is not available.*?following: (.*)": (
        "the callback EarlyStopping has monitor {0}, which this run does not log; give one of {1}"
    ),
    r"invalid strategy name: `strategy='(\w+)'`": (
        "trainer.strategy: Lightning has no strategy '{0}'; give auto, ddp, or ddp_find_unused_parameters_true"
    ),
    r"InvalidCxxCompiler": (
        "model.compile was asked for, but torch.compile finds no C++ compiler on this machine; install one (g++), or "
        "give --model.compile false"
    ),
    r"`val_check_interval` \((.*?)\) must be less than or equal to the number of the training batches \((\d+)\)": (
        "trainer.val_check_interval {0} is more than an epoch's {1} batches; give at most {1}, or beside it "
        "trainer.check_val_every_n_epoch: null, to count over epochs"
    ),
    r"find_unused_parameters": (
        "some of the backbone's weights take no part in the loss, which DDP has to be told; give --trainer.strategy "
        "ddp_find_unused_parameters_true"
    ),
    r"^wandb\.errors[^ ]*: (.*)": "Weights & Biases: {0}; set WANDB_MODE=offline to record the run here",
    r"(Requirement '[^']*' not met\.(?: HINT: [^`]*`[^`]*`)?)": "{0}",  # Lightning's words, perhaps within others
}
"""What stands in an error of a library, its class included, and the sentence for it."""


def clarify(message: str, parser: argparse.ArgumentParser, classes: Mapping[str, type]) -> str:
    """A parser's message in one line: the key, what came, what was expected or what it is like.

    Args:
        message: As jsonargparse words it, over several lines.
        parser: Whose options are known.
        classes: For each option that takes a class, the class that all of them extend.
    """
    text = " ".join(re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", message).split())
    keys = re.findall(r'[Pp]arser key "([\w.]+)"', text)
    key = ".".join(keys) or "the command line"
    if match := re.search(r"unrecognized arguments: (?:--)?([^\s=]+)", text):
        return f"unknown option --{match[1]}; {_like(match[1], parser)}"
    if match := re.search(r"does not accept option '([^']+)'", text):
        return f"the config has an unknown key '{match[1]}'; {_like(match[1], parser)}"
    if match := re.search(r"argument (\S+) --> (\S+): .*not callable", text):
        return f"{match[2]} has an option of its own; give --{match[1]} instead"
    if match := re.search(r"arguments are required: (.*)", text):
        missing = re.sub(r"\b(fit|validate|test)\.", "", match[1])
        return f"{missing} is required; give it in --config or on the command line"
    if match := re.search(r"Option '([^']+)' is not accepted", text):
        known = _options_of(message)
        return f"{key} takes no option '{match[1]}'" + (f"; {close_matches(match[1], known)}" if known else "")
    if (match := re.search(r"Expected a dot import path string: (\S*\w)", text)) and key in classes:
        names = sorted(subclass_names(classes[key])) or [classes[key].__name__]
        return f"{key}: no class is named '{match[1]}'; {close_matches(match[1], names)}"
    # of options within options, what is said of the innermost
    inner = re.split(r" - Expected a NoneType Given value type: NestedArg", text.rpartition('arser key "')[2])[0]
    inner = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", inner)
    inner = re.sub(r"\. Got value: Namespace\(.*", "", inner)  # the whole class whose option it is
    if match := re.search(r"Union subtypes Subtypes: \[(.*)\] Errors: .*Given value: (.*)", inner):
        return f"{key}: expected one of {match[1].replace('NoneType', 'null')}, got {match[2]}"
    if match := re.search(r"Expected an? (.*?)\. Got value: (.*)", inner):
        return f"{key}: expected {match[1]}, got {match[2]}"
    return re.sub(r'Parser key "([\w.]+)":', r"\1:", text)


def _like(key: str, parser: argparse.ArgumentParser) -> str:
    known = sorted({action.dest for action in parser._actions if action.dest not in ("help", "print_config")})
    head, _, tail = key.partition(".")
    sections = sorted({name.partition(".")[0] for name in known})
    if tail and head not in sections:
        return close_matches(head, sections)
    return close_matches(key, [name for name in known if name.startswith(f"{head}.")] if tail else sections)


def _options_of(message: str) -> list[str]:
    """The options of the innermost class that a message names by its import path."""
    # within a list of classes, the value that was not accepted comes first
    first = re.findall(r"is not accepted\. Got value: Namespace\(class_path='([\w.]+)'", message)
    for path in [*first, *reversed(re.findall(r"class_path(?:=| )'([\w.]+)'", message))]:
        module, _, name = path.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError):
            continue
        return [
            option for option in inspect.signature(cls).parameters if option not in ("info", "num_classes", "classes")
        ]
    return []
