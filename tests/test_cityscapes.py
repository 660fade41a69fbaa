"""Cityscapes: the official table, either kind of label file, what is refused, and the shipped command."""

from __future__ import annotations

import csv
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from made import make_cityscapes
from PIL import Image

from lightning_atrous.data import Cityscapes
from lightning_atrous.data.base import FileDataset
from lightning_atrous.data.cityscapes import CITYSCAPES, LABEL_IDS
from lightning_atrous.data.labels import LabelTable
from lightning_atrous.types import ClassInfo

OFFICIAL = """\
unlabeled 0 255, ego vehicle 1 255, rectification border 2 255, out of roi 3 255, static 4 255, dynamic 5 255,
ground 6 255, road 7 0, sidewalk 8 1, parking 9 255, rail track 10 255, building 11 2, wall 12 3, fence 13 4,
guard rail 14 255, bridge 15 255, tunnel 16 255, pole 17 5, polegroup 18 255, traffic light 19 6, traffic sign 20 7,
vegetation 21 8, terrain 22 9, sky 23 10, person 24 11, rider 25 12, car 26 13, truck 27 14, bus 28 15,
caravan 29 255, trailer 30 255, train 31 16, motorcycle 32 17, bicycle 33 18"""
"""Name, id and trainId of the benchmark's labels, but the licence plate."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_cityscapes(tmp_path / "cityscapes")


def label_files(root: Path, kind: str, split: str = "train") -> list[Path]:
    return sorted((root / "gtFine" / split).glob(f"*/*_gtFine_{kind}.png"))


def test_the_table_is_the_official_one() -> None:
    rows = [row.strip().rsplit(" ", 2) for row in OFFICIAL.replace("\n", " ").split(",")]
    assert {int(label): int(train) for _, label, train in rows} | {-1: 255} == LABEL_IDS
    scored = sorted((int(train), name) for name, _, train in rows if train != "255")
    assert [name for _, name in scored] == list(CITYSCAPES.names)
    palette = dict(zip(CITYSCAPES.names, CITYSCAPES.palette, strict=True))
    assert palette["road"] == (128, 64, 128)
    assert palette["traffic sign"] == (220, 220, 0)
    assert palette["sky"] == (70, 130, 180)
    assert palette["car"] == (0, 0, 142)
    assert palette["bicycle"] == (119, 11, 32)
    assert len(set(palette.values())) == 19


def test_both_kinds_of_labels_give_the_same_masks(root: Path) -> None:
    samples = {}
    for kind in ("labelIds", "labelTrainIds"):
        dataset = Cityscapes(root).dataset("train")
        assert isinstance(dataset, FileDataset)
        assert all(pair.mask.name.endswith(f"_gtFine_{kind}.png") for pair in dataset.pairs)
        samples[kind] = [dataset[i] for i in range(4)]
        _remove(root, "labelIds", number=4)
    for one, other in zip(*samples.values(), strict=True):
        assert one["name"] == other["name"]
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["mask"], other["mask"])
        assert set(one["mask"].unique().tolist()) == {*range(19), 255}


def test_samples_are_named_by_city_in_order_and_testing_validates(root: Path) -> None:
    data = Cityscapes(root, num_workers=0)
    (root / "leftImg8bit/val/frankfurt/._frankfurt_000000_000019_leftImg8bit.png").write_bytes(b"of a Mac")
    names = {split: [data.dataset(split)[i]["name"] for i in range(2)] for split in ("train", "val", "test")}
    assert names["train"] == ["aachen/aachen_000000_000019", "aachen/aachen_000001_000019"]
    assert names["val"] == names["test"] == ["frankfurt/frankfurt_000000_000019", "frankfurt/frankfurt_000001_000019"]
    assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, 512, 1024)


def _relabel(root: Path, kind: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = label_files(root, kind)[0]
    Image.fromarray(change(np.array(Image.open(path)))).save(path)


def _misname(root: Path, kind: str, other: str) -> None:
    for path in label_files(root, kind):
        path.unlink()
    for path in label_files(root, other):
        path.rename(path.with_name(path.name.replace(other, kind)))


def _remove(root: Path, *kinds: str, number: int) -> None:
    for kind in kinds:
        for path in label_files(root, kind)[:number]:
            path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda r: _misname(r, "labelIds", "labelTrainIds"),
            ["_gtFine_labelIds.png has labels 255, so it holds trainIds", "rename it to *_gtFine_labelTrainIds.png"],
        ),
        (
            lambda r: _misname(r, "labelTrainIds", "labelIds"),
            ["labelTrainIds.png has labels 19, 20, 21", "so it holds labelIds", "rename it to *_gtFine_labelIds.png"],
        ),
        (
            lambda r: _relabel(r, "labelIds", lambda m: m + 10),
            ["_gtFine_labelIds.png has labels 34, 35", "expected -1..33", "correct"],
        ),
        (lambda r: _remove(r, "labelIds", "labelTrainIds", number=4), ["has no mask", "_gtFine_labelIds.png", "add"]),
        (lambda r: _remove(r, "labelIds", "labelTrainIds", number=1), ["has no mask", "_gtFine_labelIds.png", "add"]),
        (
            lambda r: (_remove(r, "labelIds", number=2), _remove(r, "labelTrainIds", number=1)),
            ["has no mask", "aachen_000000_000019_gtFine_labelTrainIds.png"],
        ),
        (
            lambda r: (r / "leftImg8bit/train").rename(r / "leftImg8bit/training"),
            ["train split is empty", "leftImg8bit/train has no <city>", "unpack"],
        ),
        (lambda r: (r / "gtFine").rename(r / "gt"), ["no folder", "gtFine;", "unpack gtFine_trainvaltest.zip"]),
    ],
)
def test_what_is_wrong_with_the_files_is_said_in_a_sentence(
    root: Path, damage: Callable[[Path], object], words: list[str]
) -> None:
    damage(root)
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        Cityscapes(root).build("train")[0]
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_a_root_that_is_one_step_off_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no folder .*nowhere; pass as root what holds leftImg8bit/ and gtFine/"):
        Cityscapes(root / "nowhere")
    for off in (root.parent, root / "leftImg8bit", root / "gtFine"):
        with pytest.raises(ValueError, match=rf"no folder .*leftImg8bit; {root} has it, pass that as root"):
            Cityscapes(off)
    monkeypatch.chdir(root / "leftImg8bit")
    with pytest.raises(ValueError, match=f"{root} has it"):
        Cityscapes(".")
    (root / "leftImg8bit").rename(root / "left")
    with pytest.raises(ValueError, match="as they are unpacked"):
        Cityscapes(root)


@pytest.mark.skipif("CITYSCAPES_SAMPLE" not in os.environ, reason="CITYSCAPES_SAMPLE names no folder of the layout")
def test_real_label_ids_map_to_real_train_ids() -> None:
    """Each raw label to the trainId that stands in its place; single pixels differ in a frame that was scaled down.

    There the two files disagree at borders between classes (77 of 32768 pixels of frankfurt_000000_000294 at
    256×128), where the file of instances sides with labelIds: no table of labels could give both.
    """
    dataset = Cityscapes(os.environ["CITYSCAPES_SAMPLE"]).dataset("val")
    assert isinstance(dataset, FileDataset)
    for i, pair in enumerate(dataset.pairs):
        raw, mask = np.array(Image.open(pair.mask)), dataset[i]["mask"].numpy()
        theirs = np.array(Image.open(str(pair.mask).replace("labelIds", "labelTrainIds")))
        assert (mask != theirs).mean() < 0.005
        assert len(np.unique(mask)) > 5
        for label in np.unique(raw):
            assert np.bincount(theirs[raw == label]).argmax() == LABEL_IDS[int(label)]
            assert set(mask[raw == label]) == {LABEL_IDS[int(label)]}


# --- the table of any labels


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_a_table_maps_every_integer_type(dtype: type) -> None:
    labels = np.arange(34).reshape(2, 17)
    table = LabelTable(CITYSCAPES, LABEL_IDS)
    expected = [[LABEL_IDS[int(label)] for label in row] for row in labels]
    assert table(labels.astype(dtype), "it").tolist() == expected
    assert table(labels.astype(dtype), "it").dtype == np.uint8


def test_far_labels_are_mapped_without_a_table_as_far() -> None:
    classes = ClassInfo(("a", "b"), ignore_index=-100)
    far = {-(2**31): 0, 2**31 - 1: 1, -1: -100, 65536: 1, 65535: 0}
    table = LabelTable(classes, far)
    assert table(np.array([list(far)], np.int32), "it").tolist() == [list(far.values())]
    assert len(table._values) == 65536
    assert LabelTable(classes)(np.array([[0, 1, -100]], np.int32), "it").tolist() == [[0, 1, -100]]
    assert LabelTable(ClassInfo(("a",), ignore_index=10**9))(np.array([[10**9]]), "it").tolist() == [[10**9]]


@pytest.mark.parametrize(
    ("dtype", "label"),
    [(np.uint8, 34), (np.uint16, 256), (np.uint16, 65535), (np.int32, -2), (np.int32, 256 + 7), (np.int32, -(2**31))],
)
def test_a_label_that_the_map_lacks_is_refused_and_never_wraps(dtype: type, label: int) -> None:
    labels = np.array([[7, label]], dtype)
    with pytest.raises(
        ValueError, match=rf"^it has labels {label}, expected -1\.\.33, as its label map knows; correct"
    ):
        LabelTable(CITYSCAPES, LABEL_IDS)(labels, "it")
    with pytest.raises(ValueError, match=rf"it has labels {label}, expected 0\.\.18 or the ignore index 255"):
        LabelTable(CITYSCAPES)(labels, "it")


def test_labels_that_seem_to_count_from_one_are_said_to() -> None:
    table = LabelTable(ClassInfo(("a", "b", "c")))
    with pytest.raises(ValueError, match=r"labels 3, expected 0\.\.2 .*seem to count from 1; subtract 1"):
        table(np.array([[1, 2, 3, 255]], np.uint8), "it")
    for other in ([0, 1, 3], [1, 3, 4], [4]):  # none of these says so
        with pytest.raises(ValueError, match="correct the mask, the class names or the ignore index"):
            table(np.array([other], np.uint8), "it")


def test_a_map_leads_to_classes() -> None:
    with pytest.raises(ValueError, match=r"leads to 2\.\.3, 9, expected a class of 0\.\.1 or the ignore index 255"):
        LabelTable(ClassInfo(("a", "b")), {0: 0, 1: 2, 2: 3, 3: 9})


# --- the shipped configs


def test_the_shipped_command_trains_and_validates_at_its_end(
    tmp_path: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    root = make_cityscapes(tmp_path / "made", images=3)
    small = "--trainer.devices 1 --trainer.accelerator cpu --trainer.max_steps 2 --trainer.logger false"
    small += " --model.backbone.name test_resnet --model.backbone.pretrained false --model.head.channels 8"
    small += " --data.batch_size 2 --data.num_workers 0 --data.augment.crop [32,64]"
    config = str(ROOT / "configs/cityscapes.yaml")
    out = command("fit", "--config", config, "--data.root", str(root), *small.split()).stdout
    assert "test_resnet at output stride 8 → DeepLabV3Plus → 19 classes" in out
    assert "step     2" in out
    assert "motorcycle" in out
    assert {p.name for p in (tmp_path / "runs/cityscapes/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.parametrize(("every", "steps", "validated"), [(4, 6, [3, 5]), (3, 6, [2, 5])])
def test_a_run_by_steps_is_validated_where_it_ends_and_once(
    workdir: Path,
    command: Callable[..., subprocess.CompletedProcess[str]],
    every: int,
    steps: int,
    validated: list[int],
) -> None:
    options = f"--trainer.max_epochs -1 --trainer.max_steps {steps} --trainer.val_check_interval {every}"
    command("fit", "--config", "tiny.yaml", *options.split(), "--trainer.check_val_every_n_epoch", "null")
    with (workdir / "runs/tiny/metrics.csv").open(newline="") as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row.get("val/miou")] == validated


def test_a_run_by_steps_goes_on_at_the_next_step(
    workdir: Path, command: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Also from a checkpoint of a validation, where Lightning has not yet counted the step as logged."""
    by_steps = ("--trainer.max_epochs", "-1", "--trainer.val_check_interval", "3", "--trainer.check_val_every_n_epoch")
    # after a validation of its own, then after one of the interval
    for steps, more in ((4, ()), (6, ("--ckpt_path", "last")), (7, ("--ckpt_path", "last"))):
        command("fit", "--config", "tiny.yaml", *by_steps, "null", "--trainer.max_steps", str(steps), *more)
    with (workdir / "runs/tiny/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row.get("train/loss")] == list(range(7))
    assert [int(row["step"]) for row in rows if row.get("lr-SGD/head")] == list(range(7))
    assert [int(row["step"]) for row in rows if row.get("val/miou")] == [2, 3, 5, 6]


def test_kinds_of_labels_that_are_mixed_are_named(tmp_path: Path) -> None:
    root = make_cityscapes(tmp_path, {"train": ["aachen"], "val": ["lindau"]}, kinds=["labelIds"])
    mask = sorted((root / "gtFine/train/aachen").iterdir())[1]
    mask.rename(mask.with_name(mask.name.replace("labelIds", "labelTrainIds")))
    with pytest.raises(
        ValueError, match=r"train split has labelIds for some .* labelTrainIds for others, such as .*aachen"
    ):
        Cityscapes(root).build("train")


def test_zips_unpacked_apart_are_told_to_be_put_together(tmp_path: Path) -> None:
    make_cityscapes(tmp_path / "one", images=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "one/gtFine").rename(tmp_path / "other/gtFine")
    with pytest.raises(ValueError, match=r"move it here from .*one, and gtFine from .*other"):
        Cityscapes(tmp_path)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ([], None),
        (["job7/config.yaml", "job77/checkpoints/last.ckpt"], None),
        (["job7/checkpoints/last.ckpt"], "job7/checkpoints/last.ckpt"),
        (["job7/checkpoints/last.ckpt", "job7/hpc_ckpt_1.ckpt"], "job7/hpc_ckpt_1.ckpt"),
        (
            ["job7/config.yaml", "job7-2/hpc_ckpt_1.ckpt", "job7-2/checkpoints/last.ckpt"],
            "job7-2/checkpoints/last.ckpt",
        ),
    ],
)
def test_a_requeued_job_goes_on_from_its_newest_checkpoint(
    tmp_path: Path, files: list[str], wanted: str | None
) -> None:
    for age, name in enumerate(files):
        path = tmp_path / f"runs/cityscapes-{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (age, age))
    srun = tmp_path / "bin/srun"
    srun.parent.mkdir()
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    environment = {"PATH": f"{srun.parent}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    script = ["bash", str(ROOT / "configs/cityscapes/slurm.sh"), "/data", "--seed_everything", "2"]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    tail = done.stdout.split("_slurm.yaml ")[1].split()
    resume = ["--ckpt_path", f"runs/cityscapes-{wanted}"] if wanted else []
    assert tail == ["--data.root", "/data", "--run_dir", "runs/cityscapes-job7", *resume, "--seed_everything", "2"]
