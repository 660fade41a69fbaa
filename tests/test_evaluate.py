"""The verb ``evaluate``, the scores of single images, and the loss of a whole data set."""

from __future__ import annotations

import contextlib
import csv
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score
from torch import Tensor

import lightning_atrous
from lightning_atrous import ClassInfo, SegmentationTask, TimmBackbone
from lightning_atrous.boundaries import BoundaryScore
from lightning_atrous.cli import main
from lightning_atrous.comparison import SCALES, grid
from lightning_atrous.data import Shapes
from lightning_atrous.evaluation import Evaluation
from lightning_atrous.heads import DeepLabV3Plus
from lightning_atrous.image_scores import ImageScores, image_scores, write_table
from lightning_atrous.inference import Inference
from lightning_atrous.losses import CrossEntropy, Dice
from lightning_atrous.metrics import SegmentationScore, confusion_matrix

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = ClassInfo(("a", "b", "c"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seconds that has learnt enough for its numbers to differ."""
    here = tmp_path_factory.mktemp("run")
    (here / "tiny.yaml").write_text(TINY)
    options = (
        "--trainer.max_epochs=8",
        "--model.optimizer.lr=0.1",
        "--trainer.accelerator=cpu",
        "--data.num_workers=0",
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(here), warnings.catch_warnings(action="ignore"):
        main(["fit", "--config", "tiny.yaml", *options])
    torch.set_num_threads(threads)
    return here


@pytest.fixture
def here(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return trained / "runs/tiny/checkpoints/last.ckpt"


def score(checkpoint: Path, stride: int | None, inference: Inference, **options: Any) -> Any:
    """By the trainer and the data, without the command."""
    task = lightning_atrous.load(checkpoint)
    task.evaluation.output_stride, task.evaluation.inference = stride, inference
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **options)
    trainer.validate(task, Shapes(size=48, val_length=6, num_workers=0), verbose=False)
    return task, trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_every_row_is_the_evaluation_that_it_names(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The data of the run, not named again; a stride that the network has not is a row too."""
    strides = ("--output_stride", "32", "12", "8")
    main(
        ["evaluate", str(here), "--grid", *strides, "--scales", "0.5", "1", "--window", "32", "32", "--json", "a.json"]
    )
    rows = json.loads(Path("a.json").read_text())["rows"]
    assert [(row["output_stride"], row["scales"], row["flip"]) for row in rows] == [
        (stride, scales, flip) for stride in (32, 12, 8) for scales in ([1.0], [0.5, 1.0]) for flip in (False, True)
    ]
    assert all("no output stride 12; choose one of" in row["refused"] for row in rows[4:8])
    ran = rows[:4] + rows[8:]
    assert len({row["miou"] for row in ran}) > 4
    for row in (ran[3], ran[6]):
        inference = Inference(window=(32, 32), scales=tuple(row["scales"]), flip=row["flip"])
        task, trainer = score(here, row["output_stride"], inference)
        assert row["miou"] == pytest.approx(trainer.callback_metrics["val/miou"].item(), abs=1e-6)
        assert row["iou"].keys() == set(task.classes.names)
    printed = capsys.readouterr().out
    assert printed.count("refused") == 4
    assert printed.count("- test_resnet cannot run at output stride 12") == 1
    assert f"{100 * rows[0]['miou']:.2f}" in printed
    assert "lowest mIoU" not in printed


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_boundaries_are_scored_where_they_are_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--model.boundaries", "BoundaryScore", "--model.boundaries.bands", "[2, 5]")
    main(["evaluate", str(here), "--output_stride", "16", "8", "--json", "b.json", *asked])
    rows = json.loads(Path("b.json").read_text())["rows"]
    data = Shapes(size=48, val_length=6, num_workers=0)
    for row in rows:
        task = lightning_atrous.load(here)
        task.model.output_stride = row["output_stride"]
        expected = BoundaryScore(task.classes, bands=(2, 5))
        for sample in data.val_dataloader():
            expected.update(task.predict(sample["image"]), sample["mask"])
        found = expected.compute()
        assert row["boundary_miou"] == pytest.approx(found.boundary_miou.item())
        assert row["trimap_pixels"] == [2, 5]
        assert row["trimap_miou"] == pytest.approx(found.trimap_miou.tolist())
        for k, name in enumerate(task.classes.names):
            pairs = [(row["boundary_iou"][name], found.boundary_iou[k].item())]
            pairs += zip(row["trimap_iou"][name], found.trimap_iou[:, k].tolist(), strict=True)
            for written, own in pairs:
                assert written is None if np.isnan(own) else written == pytest.approx(own)
    assert rows[0]["boundary_miou"] != rows[1]["boundary_miou"]
    printed = capsys.readouterr().out
    assert f"{100 * rows[0]['boundary_miou']:.2f}" in printed
    main(["evaluate", str(here), *asked])
    printed = capsys.readouterr().out
    assert f"{100 * rows[0]['trimap_miou'][0]:.2f} within 2, " in printed
    assert "boundary IoU" in printed


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_one_evaluation_is_shown_as_validate_shows_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def table(*arguments: str) -> list[str]:
        main(list(arguments))
        return [line for line in capsys.readouterr().out.splitlines() if "│" in line or "lowest" in line]

    data = ("--data", "Shapes", "--data.size", "48", "--data.num_workers", "0", "--data.val_length", "7")
    inference = ("--model.inference.window=[32,32]", "--model.inference.flip=true", "--eval_output_stride=8")
    asked = ("--output_stride", "8", "--window", "32", "32", "--flip")
    # of the run's data all stays but what is given
    one = table("evaluate", str(here), *asked, "--data.val_length", "7", "--per_image", "seven.csv")
    assert one == table("validate", *data, "--ckpt_path", str(here), *inference)
    assert any("lowest mIoU: val_" in line for line in one)
    assert len(Path("seven.csv").read_text().splitlines()) == 1 + 7
    test = table("evaluate", str(here), *asked, "--split", "test", *data)
    assert any("lowest mIoU: test_" in line for line in test)


def test_the_grid_is_that_of_the_paper() -> None:
    rows = grid((16, 8), Inference())
    assert len(rows) == 8
    assert {row.inference.scales for row in rows} == {(1.0,), SCALES}
    assert [row.output_stride for row in rows] == [16] * 4 + [8] * 4


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_images_are_scored_as_scikit_learn_scores_them(here: Path) -> None:
    scores = ImageScores(Path("scores.csv"))
    task, _ = score(here, None, Inference(), callbacks=[scores])
    dataset = Shapes(size=48, val_length=6).dataset("val")
    with Path("scores.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["name"] for row in table] == [dataset[i]["name"] for i in range(6)]
    for i, row in enumerate(table):
        target = dataset[i]["mask"].long()
        valid = target != 255
        prediction = task.eval().predict(dataset[i]["image"].as_subclass(Tensor))
        labels = sorted({*prediction[valid].tolist(), *target[valid].tolist()})
        found, truth = prediction[valid].numpy(), target[valid].numpy()
        ious = jaccard_score(truth, found, labels=labels, average=None)
        assert float(row["miou"]) == pytest.approx(ious.mean())
        assert float(row["pixel_accuracy"]) == pytest.approx(accuracy_score(truth, found))
        assert int(row["valid_pixels"]) == valid.sum()
        named = {k: row[f"iou/{name}"] for k, name in enumerate(task.classes.names)}
        assert {k for k, iou in named.items() if iou} == set(labels)
        assert [float(named[k]) for k in labels] == pytest.approx(ious)
    assert sum(row.valid_pixels for row in scores.rows) == task.confusion.sum()


def test_an_image_without_a_label_has_no_score(tmp_path: Path) -> None:
    counts = torch.stack([torch.zeros(3, 3, dtype=torch.int64), torch.eye(3, dtype=torch.int64)])
    rows = image_scores(["none", "all"], counts)
    write_table(tmp_path / "deep/a.csv", rows, CLASSES.names)
    assert (tmp_path / "deep/a.csv").read_text().splitlines() == [
        "name,miou,pixel_accuracy,valid_pixels,iou/a,iou/b,iou/c",
        "none,,,0,,,",
        "all,1.0,1.0,3,1.0,1.0,1.0",
    ]


def test_parquet_holds_what_csv_holds(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = image_scores(["a", "b"], torch.arange(18).reshape(2, 3, 3))
    write_table(tmp_path / "a.parquet", rows, CLASSES.names)
    table = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    assert table["name"] == ["a", "b"]
    assert table["miou"] == [row.miou for row in rows]
    assert table["iou/c"] == [row.iou[2] for row in rows]


def make_task(**options: Any) -> SegmentationTask:
    torch.manual_seed(0)
    head = functools.partial(DeepLabV3Plus, channels=8)
    return SegmentationTask(TimmBackbone("test_resnet", pretrained=False), head, **{"classes": CLASSES, **options})


def evaluation(**options: Any) -> Evaluation:
    return make_task(**options).double().eval().evaluation


def batches() -> list[tuple[Tensor, Tensor]]:
    """Of one and of two images, with more and fewer valid pixels; the last of none."""
    made = []
    for b, ignored in [(1, 0.1), (2, 0.9), (1, 1.0)]:
        mask = torch.randint(0, 3, (b, 48, 64))
        made.append(
            (torch.rand(b, 3, 48, 64, dtype=torch.float64), mask.masked_fill(torch.rand(mask.shape) < ignored, 255))
        )
    return made


def run(this: Evaluation, data: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    this.begin()
    for image, mask in data:
        this.step(image, mask)
    return this.end()


def test_the_loss_is_the_mean_over_all_valid_pixels() -> None:
    torch.manual_seed(1)
    data, weights = batches(), (1.0, 0.2, 3.0)
    this = evaluation(loss=functools.partial(CrossEntropy, class_weights=weights))
    image, mask = (torch.cat(parts) for parts in zip(*data, strict=True))
    logits = F.interpolate(this.model.logits(image), mask.shape[1:], mode="bilinear")
    expected = F.cross_entropy(logits, mask, weight=torch.tensor(weights, dtype=torch.float64), ignore_index=255)
    confusion, results = run(this, data)
    torch.testing.assert_close(results["loss"].double(), expected.detach(), rtol=1e-6, atol=0)
    assert torch.equal(confusion, confusion_matrix(logits, mask, CLASSES))
    assert torch.equal(run(this, data)[1]["loss"], results["loss"])  # nothing is left of the first
    assert run(this, data[2:])[1]["loss"] == 0


def test_a_loss_that_is_no_mean_over_pixels_counts_images() -> None:
    torch.manual_seed(1)
    data, this = batches()[:2], evaluation(loss=Dice)
    with torch.no_grad():
        one, two = (this.loss(this.model.logits(image), mask) for image, mask in data)
    torch.testing.assert_close(run(this, data)[1]["loss"].double(), (one + 2 * two) / 3, rtol=1e-6, atol=0)


def test_what_a_step_gives_to_callbacks() -> None:
    torch.manual_seed(1)
    this = evaluation(inference=Inference(window=(32, 32), flip=True), eval_output_stride=8)
    image, mask = batches()[1]
    this.begin()
    given = this.step(image, mask)
    expected = this.model.predict(image, inference=this.inference)
    assert torch.equal(given["prediction"], expected)
    for i in range(2):
        assert torch.equal(given["confusion"][i], confusion_matrix(expected[i : i + 1], mask[i : i + 1], CLASSES))
    assert torch.equal(this.end()[0], given["confusion"].sum(0))


def test_of_one_class_the_matrix_stays_one() -> None:
    task = make_task(classes=ClassInfo(("all",))).eval()
    assert isinstance(task.score, SegmentationScore)
    image, mask = torch.rand(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    task.evaluation.begin()
    assert task.evaluation.step(image, mask)["confusion"].tolist() == [[[1024]], [[1024]]]
    assert task.evaluation.end()[0].tolist() == [[2048]]


def test_the_checkpoint_does_not_tell_how_it_was_scored() -> None:
    plain, other = (make_task(**options) for options in ({}, {"inference": Inference(window=(64, 64))}))
    assert plain.spec == other.spec
    assert SegmentationTask.from_spec(other.spec).evaluation.inference == Inference()
    with pytest.raises(ValueError, match="windows of 40×64 pixels do not lie on the grid of output stride 16"):
        make_task(inference=Inference(window=(40, 64)))


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_predict_takes_windows_scales_and_flips(here: Path) -> None:
    picture = Shapes(size=48).dataset("val")[0]["image"].as_subclass(Tensor)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save("a.png")
    main(["predict", str(here), "a.png", "--device", "cpu", "--window", "32", "32", "--scales", "0.5", "1", "--flip"])
    inference = Inference(window=(32, 32), scales=(0.5, 1.0), flip=True)
    task = lightning_atrous.load(here)
    expected = task.predict(picture, inference=inference)
    assert np.array_equal(np.array(Image.open("predictions/index/a.png")), expected.numpy())
    assert not torch.equal(expected, task.predict(picture))
