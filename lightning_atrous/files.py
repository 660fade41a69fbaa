"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["whole_file"]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its place only when all of it is written.

    Until then an older file of that name stays as it was, whatever happens: a full disk, a kill, an error in between.

    Args:
        path: The file; folders above it are made.
        durable: Whether to wait until the disk has it, so that not even a loss of power can cut it short.

    Raises:
        ValueError: The place cannot be written, with the system's reason.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # in the same folder, hence on the same disk: only there is a rename one step
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # what `open` would have given it
        os.replace(temporary, path)
    except OSError as error:
        _discard(temporary)
        raise ValueError(
            f"{path} cannot be written ({error.strerror or error}); make room or give a place that can be written"
        ) from error
    except BaseException:
        _discard(temporary)
        raise


def _discard(temporary: str | None) -> None:
    if temporary is not None:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _umask() -> int:
    """The process's, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
