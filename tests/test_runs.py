from __future__ import annotations

from pathlib import Path

import pytest

from lightning_atrous.runs import find_checkpoint, fresh_directory


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_a_new_run_never_writes_into_an_old_one(tmp_path: Path) -> None:
    base = tmp_path / "runs" / "camvid"
    assert fresh_directory(base) == base
    base.mkdir(parents=True)
    assert fresh_directory(base) == base  # empty
    touch(base / "checkpoints" / "last.ckpt")
    assert fresh_directory(base) == base.with_name("camvid-2")
    touch(base.with_name("camvid-2") / "checkpoints" / "last.ckpt")
    touch(base.with_name("camvid-10") / "checkpoints" / "x")
    assert fresh_directory(base) == base.with_name("camvid-3")


def test_last_is_of_the_newest_run_that_has_one(tmp_path: Path) -> None:
    base = tmp_path / "camvid"
    first = touch(base / "checkpoints" / "last.ckpt")
    assert find_checkpoint("last", base) == first
    tenth = touch(tmp_path / "camvid-10" / "checkpoints" / "last.ckpt")
    touch(tmp_path / "camvid-9" / "checkpoints" / "last.ckpt")
    (tmp_path / "camvid-11").mkdir()
    touch(tmp_path / "camvid-other" / "checkpoints" / "last.ckpt")
    assert find_checkpoint("last", base) == tenth
    assert find_checkpoint(str(first), base) == first


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run at .*camvid has a checkpoint best\.ckpt yet"):
        find_checkpoint("best", tmp_path / "camvid")
    with pytest.raises(ValueError, match=r"there is no checkpoint at a\.ckpt"):
        find_checkpoint("a.ckpt", tmp_path)
