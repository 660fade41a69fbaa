"""The real command, as a process of its own."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from made import make_camvid, make_folder

ROOT = Path(__file__).parent.parent

collect_ignore = ["mmseg_original.py"]
"""Run by another Python, in which mmsegmentation is installed."""

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several beside each other, and what it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
else:
    torch.set_num_threads(2)

# Lightning calls what newer releases of jsonargparse have renamed
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

TINY = """\
seed_everything: 3
trainer: {max_epochs: 2, log_every_n_steps: 1}
model:
  backbone: {name: test_resnet, output_stride: 16, pretrained: false}
  head: {class_path: deeplabv3plus, init_args: {channels: 16, dropout: 0.0}}
data: {class_path: Shapes, init_args: {size: 48, train_length: 12, val_length: 6, batch_size: 4}}
"""
"""A run of seconds: timm's smallest residual network on small shapes."""

PEAK_KIB = 'int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])'
"""The largest resident size of a process so far; `resource` would begin with that of the process that started it."""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small networks are faster so; and the same numbers in every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to run in, with ``tiny.yaml`` in it."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(workdir: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``lightning-atrous`` with arguments, in `workdir`."""

    def run(*arguments: str, code: int = 0, pythonpath: Path | None = None) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "lightning_atrous", *arguments],
            cwd=workdir,
            env=environment(pythonpath),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == code, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sub-folders: five training images in two folders, two for validation; three classes."""
    return make_folder(tmp_path / "folder")


@pytest.fixture
def camvid(tmp_path: Path) -> Path:
    """CamVid in the official layout, small."""
    return make_camvid(tmp_path / "camvid")


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow beyond a size. Within a test's own lines only: pytest writes to a log between them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def environment(pythonpath: Path | None = None) -> dict[str, str]:
    """What the command runs in: wide enough for its tables, offline, and nobody's W&B account."""
    paths = [str(path) for path in (pythonpath, ROOT) if path]
    ours = {"COLUMNS": "160", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths), "NETRC": os.devnull}
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | ours
