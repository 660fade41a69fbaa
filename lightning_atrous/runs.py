"""Where a run writes: one directory with its config, its metrics and its checkpoints.

runs/camvid/            the first run of configs/camvid.yaml
    config.yaml         every option as it was resolved
    metrics.csv
    checkpoints/best.ckpt, checkpoints/last.ckpt
    slurm_job           which job writes here, where one does
runs/camvid-2/          the second
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightning_atrous.files import whole_file

__all__ = ["claim", "find_checkpoint", "find_requeued", "fresh_directory", "run_of", "slurm_job"]

CHECKPOINTS = "checkpoints"

JOB = "slurm_job"


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


def run_of(checkpoint: Path) -> Path:
    """The directory of the run that goes on from a checkpoint."""
    parent = checkpoint.absolute().parent
    return parent.parent if parent.name == CHECKPOINTS else parent


def slurm_job() -> str:
    """The Slurm job and step that this process is of, the same after it was queued again; empty outside of Slurm."""
    job, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    name = f"{job}_{task}" if job and task else os.environ.get("SLURM_JOB_ID")
    return f"{name}.{os.environ.get('SLURM_STEP_ID', '0')}" if name else ""


def claim(directory: Path) -> None:
    """Note in a run's directory that this process's Slurm job writes there; outside of Slurm do nothing."""
    if job := slurm_job():
        with whole_file(directory / JOB) as file:
            file.write(f"{job}\n".encode())


def find_requeued(base: Path, wanted: str | None) -> Path | None:
    """The last checkpoint of this process's Slurm job, where Slurm has queued the job again.

    Args:
        base: The first of the numbered run directories.
        wanted: What the job's command line gives as ``--ckpt_path``, from which it went on the first time.

    Returns:
        None in a job's first life, and where it has saved nothing.
    """
    if not slurm_job() or os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    directories = [found for _, found in sorted(_numbered(base), reverse=True)]
    if wanted is not None and Path(wanted).is_file():
        directories.append(run_of(Path(wanted)))
    for directory in directories:
        path, note = directory / CHECKPOINTS / "last.ckpt", directory / JOB
        if path.is_file() and note.is_file() and note.read_text().strip() == slurm_job():
            return path
    return None


def _numbered(base: Path) -> list[tuple[int, Path]]:
    runs = [(1, base)] if base.is_dir() else []
    pattern = re.compile(rf"{re.escape(base.name)}-(\d+)")
    if base.parent.is_dir():
        for sibling in base.parent.iterdir():
            if match := pattern.fullmatch(sibling.name):
                runs.append((int(match[1]), sibling))
    return runs
