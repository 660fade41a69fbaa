"""Where a run writes: one directory with its config, its metrics and its checkpoints.

runs/camvid/            the first run of configs/camvid.yaml
    config.yaml         every option as it was resolved
    metrics.csv
    checkpoints/best.ckpt, checkpoints/last.ckpt
runs/camvid-2/          the second
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["find_checkpoint", "fresh_directory"]

CHECKPOINTS = "checkpoints"


def fresh_directory(base: Path) -> Path:
    """The first of ``base``, ``base-2``, ``base-3``, … that holds nothing yet."""
    number = 1
    while True:
        candidate = base if number == 1 else base.with_name(f"{base.name}-{number}")
        if not candidate.exists() or (candidate.is_dir() and not any(candidate.iterdir())):
            return candidate
        number += 1


def find_checkpoint(wanted: str, base: Path) -> Path:
    """The file that ``--ckpt_path`` means.

    Args:
        wanted: A path, or ``last`` or ``best`` of the newest run.
        base: The first of the numbered run directories.

    Raises:
        ValueError: No such file, with the places that were searched.
    """
    if wanted not in ("last", "best"):
        path = Path(wanted)
        if not path.is_file():
            raise ValueError(f"there is no checkpoint at {wanted}; give a .ckpt file, or 'last' or 'best'")
        return path
    for directory in sorted(_numbered(base), key=lambda found: found[0], reverse=True):
        path = directory[1] / CHECKPOINTS / f"{wanted}.ckpt"
        if path.is_file():
            return path
    raise ValueError(
        f"no run at {base} has a checkpoint {wanted}.ckpt yet; start one without --ckpt_path, or give --run_dir"
    )


def _numbered(base: Path) -> list[tuple[int, Path]]:
    runs = [(1, base)] if base.is_dir() else []
    pattern = re.compile(rf"{re.escape(base.name)}-(\d+)")
    if base.parent.is_dir():
        for sibling in base.parent.iterdir():
            if match := pattern.fullmatch(sibling.name):
                runs.append((int(match[1]), sibling))
    return runs
