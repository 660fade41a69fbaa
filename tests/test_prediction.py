"""``predict`` as people use it: what is selected, what is written, what is refused; and the same from Python."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import lightning_atrous
from lightning_atrous import ClassInfo, Reader, SegmentationTask, TimmBackbone
from lightning_atrous.checkpoint import SPEC_KEY
from lightning_atrous.cli import main
from lightning_atrous.data import Folder
from lightning_atrous.heads import FCN
from lightning_atrous.images import RGB
from lightning_atrous.prediction import colourise, overlay
from lightning_atrous.selection import select
from lightning_atrous.transforms import Augment

CLASSES = ClassInfo(("a", "b", "c"), palette=((255, 0, 0), (0, 255, 0), (0, 0, 255)))


def make_task(reader: Reader = RGB, classes: ClassInfo = CLASSES) -> SegmentationTask:
    torch.manual_seed(0)
    backbone = TimmBackbone("test_resnet", pretrained=False, in_channels=reader.out_channels)
    task = SegmentationTask(backbone, functools.partial(FCN, channels=8), classes=classes, reader=reader).eval()
    with torch.no_grad():  # untrained, it would give one class everywhere
        logits = task(torch.rand(1, reader.out_channels, 64, 64, generator=torch.Generator().manual_seed(0)))
        task.model.head.classifier.bias -= logits.mean((0, 2, 3))
    return task


def save(task: SegmentationTask, path: Path) -> str:
    torch.save({"state_dict": task.state_dict(), SPEC_KEY: task.spec, "global_step": 0}, path)
    return str(path)


def photo(path: Path, height: int = 40, width: int = 56, *, seed: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(make_task(), tmp_path_factory.mktemp("model") / "m.ckpt")


@pytest.fixture
def here(checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command is run: a checkpoint, and photos in folders."""
    shutil.copy(checkpoint, tmp_path / "m.ckpt")
    photo(tmp_path / "photos/a.png")
    photo(tmp_path / "photos/day 1/b.x.png", 33, 71, seed=1)
    photo(tmp_path / "photos/day 1/deep/c.bmp", 1, 1)
    photo(tmp_path / "photos/.hidden/d.png")
    (tmp_path / "photos/notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, which is to end with a code; what it says on stderr."""

    def run(*arguments: str, code: int) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["predict", *arguments])
        error = capsys.readouterr().err
        assert stop.value.code == code, error
        assert "Traceback" not in error
        assert sum("error: " in line for line in error.splitlines()) == 1
        return error

    return run


NAMES = ["a.png", "day 1/b.x.png", "day 1/deep/c.png"]


def test_a_folder_becomes_three(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["predict", "m.ckpt", "photos", "--alpha", "0.25"])
    out = capsys.readouterr()
    assert out.out.startswith("3 images → predictions: index/, colour/, overlay/ in ")
    assert not out.err
    assert "\x1b" not in out.out
    assert written(here / "predictions") == [f"{kind}/{n}" for kind in ("colour", "index", "overlay") for n in NAMES]
    task = lightning_atrous.load("m.ckpt")
    palette = np.array(CLASSES.palette)
    for name, source in zip(NAMES, ("a.png", "day 1/b.x.png", "day 1/deep/c.bmp"), strict=True):
        image = read(here / "photos" / source)
        index = read(here / "predictions/index" / name)
        assert index.dtype == np.uint8
        with Image.open(here / "photos" / source) as opened:
            assert np.array_equal(index, task.predict(opened))
        colour, mixed = (read(here / "predictions" / kind / name) for kind in ("colour", "overlay"))
        assert np.array_equal(colour, palette[index])
        assert np.abs(mixed - (0.75 * image + 0.25 * palette[index])).max() <= 0.5
    # again, over what is there; nothing of it is taken as an input
    main(["predict", "m.ckpt", "."])
    assert written(here / "predictions/index") == [*NAMES, *(f"photos/{name}" for name in NAMES)]
    shutil.rmtree(here / "predictions")
    for given in ("photos", "**/*.*"):
        main(["predict", "m.ckpt", given, "--output", "."])
    assert written(here / "index") == [*NAMES, *(f"photos/{name}" for name in NAMES)]


def test_every_class_is_found(here: Path) -> None:
    """The other tests would say little of a network that gives one class everywhere."""
    assert len(np.unique(make_task().predict(read(here / "photos/a.png")))) > 1


def test_names_are_relative_to_what_was_given(here: Path) -> None:
    suffixes = (".png", ".bmp")

    def names(*arguments: str) -> list[str]:
        return [name for _, name in select(arguments, suffixes)]

    assert names("photos") == names(str(here / "photos")) == ["a", "day 1/b.x", "day 1/deep/c"]
    assert names("photos/day 1") == ["b.x", "deep/c"]
    assert names("photos/day 1/b.x.png") == ["b.x"]
    assert names("photos/notes.txt") == ["notes"]  # given by name: the reader will say what it is
    assert names("photos/*.png") == ["a"]
    assert names("photos/*") == ["a"]
    assert names("photos/**/*.png") == ["a", "day 1/b.x"]
    assert names("photos/d*/*.png") == ["day 1/b.x"]
    assert names("**/c.bm[p]") == ["photos/day 1/deep/c"]
    assert names("photos/a.png", "photos", "photos/?.png") == ["a", "day 1/b.x", "day 1/deep/c"]  # each once
    photo(here / "photos/[x].png")
    assert names("photos/[x].png") == ["[x]"]


def test_two_inputs_of_one_name_keep_their_suffixes(here: Path) -> None:
    photo(here / "photos/a.jpg")
    main(["predict", "m.ckpt", "photos"])
    names = ["a.jpg.png", "a.png.png", "day 1/b.x.png", "day 1/deep/c.png"]
    assert written(here / "predictions/index") == names


def test_inputs_that_nothing_tells_apart_are_refused(here: Path, fails: Callable[..., str]) -> None:
    photo(here / "other/a.png")
    assert "photos/a.png and other/a.png would both be" in fails("m.ckpt", "photos/*.png", "other", code=2)
    assert not (here / "predictions").exists()


def test_what_was_typed_wrong_is_one_sentence(here: Path, fails: Callable[..., str]) -> None:
    (here / "empty").mkdir()
    (here / "half.ckpt").write_bytes((here / "m.ckpt").read_bytes()[:9000])
    torch.save({"state_dict": {}}, here / "foreign.ckpt")
    content = torch.load(here / "m.ckpt", weights_only=True)
    content[SPEC_KEY]["head"]["class_path"] = "elsewhere.Head"
    torch.save(content, here / "unregistered.ckpt")
    for arguments, says in (
        (("m.ckpt", "empty"), "there is no image in 'empty'"),
        (("m.ckpt", "photos", "*.tif"), "there is no image in '*.tif'; give pictures, folders or patterns (.bmp,"),
        (("m.ckpt", "phtos"), "there is no image, folder or pattern 'phtos'"),
        (("m.ckpt", "photos/a.png", "--output", "photos/a.png"), "is a file, expected a folder"),
        (("none.ckpt", "photos"), "there is no checkpoint at none.ckpt"),
        (("half.ckpt", "photos"), "half.ckpt cannot be read as a checkpoint"),
        (("foreign.ckpt", "photos"), "was not written by lightning-atrous"),
        (("unregistered.ckpt", "photos"), "elsewhere.Head, which no installed package registers"),
        (("m.ckpt", "photos", "--output_stride", "3"), "cannot run at output stride 3"),
        (("m.ckpt", "photos", "--device", "tpv"), "the device tpv cannot be used"),
        (("m.ckpt", "photos", "--reader", "grey"), "--reader grey gives images of 1 channels, but the checkpoint"),
        (("m.ckpt", "photos", "--reader", "gray"), "invalid choice"),
        (("m.ckpt", "photos", "--alpha", "1.5"), "--alpha: expected a number in 0..1, got 1.5"),
        (("m.ckpt", "photos", "--alpha", "half"), "--alpha: expected a number in 0..1, got half"),
        (("m.ckpt",), "required: IMAGES"),
    ):
        assert says in fails(*arguments, code=2)
    assert not (here / "predictions").exists()


def test_what_cannot_be_read_is_named_and_the_rest_is_done(
    here: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = photo(here / "more/a.png", 90, 90).read_bytes()
    (here / "more/b.png").write_bytes(whole[:5000])
    Image.new("L", (40, 30), 99).save(here / "more/c.png")
    photo(here / "more/d.png")
    error = fails("m.ckpt", "more", code=1)
    assert "more/b.png cannot be decoded" in error
    assert "more/c.png is a picture of mode L, expected RGB of 8 bits; set reader.mode (--reader) to convert" in error
    assert "2 of 4 images could not be predicted" in error
    assert written(here / "predictions/index") == ["a.png", "d.png"]
    assert "more/c.png" not in fails("m.ckpt", "more", "--reader", "convert", code=1)
    assert read(here / "predictions/overlay/c.png").shape == (30, 40, 3)


def test_a_link_to_nowhere_is_named_at_the_end(here: Path, fails: Callable[..., str]) -> None:
    (here / "photos/gone.png").symlink_to(here / "nowhere.png")
    error = fails("m.ckpt", "photos", code=1)
    assert "photos/gone.png does not exist" in error
    assert "1 of 4 images could not be predicted" in error


def test_predicting_leaves_every_module_in_its_mode(here: Path) -> None:
    task = lightning_atrous.load("m.ckpt").train()
    frozen = next(module for module in task.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    inside = task.predict(np.zeros((40, 56, 3), np.uint8))
    assert task.training
    assert task.model.head.training
    assert not frozen.training
    assert (inside == task.eval().predict(np.zeros((40, 56, 3), np.uint8))).all()


@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_half_precision_is_the_networks_alone(precision: str, here: Path) -> None:
    """What is written is the class map of its logits, raised in float32: no blocks of tied scores."""
    main(["predict", "m.ckpt", "photos/a.png", "--precision", precision, "--device", "cpu"])
    picture = Image.open("photos/a.png")
    task = lightning_atrous.load("m.ckpt")
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16 if precision == "bf16" else torch.float16):
        logits = task.model.logits(image)
    assert logits.dtype in (torch.bfloat16, torch.float16)
    expected = F.interpolate(logits.float(), image.shape[-2:], mode="bilinear").argmax(1)[0]
    assert (read(here / "predictions/index/a.png") == expected.numpy()).all()


def test_a_write_that_fails_ends_it_and_leaves_no_half(
    here: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = []
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if len(done) == 4:
            raise OSError(28, "No space left on device")
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    error = fails("m.ckpt", "photos", code=1)
    assert "predictions/colour/day 1/b.x.png cannot be written (No space left on device)" in error
    assert len(written(here / "predictions")) == 4


def test_pictures_are_predicted_upright(here: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(here / "turned.jpg", 40, 56, exif=exif)
    main(["predict", "m.ckpt", "turned.jpg"])
    for kind in ("index", "colour", "overlay"):
        assert read(here / "predictions" / kind / "turned.png").shape[:2] == (56, 40)
    with Image.open(here / "turned.jpg") as image:  # from Python it lines up with np.asarray(image)
        assert lightning_atrous.load("m.ckpt").predict(image).shape == (40, 56)


def test_the_stride_is_changed(here: Path) -> None:
    task = lightning_atrous.load("m.ckpt")
    task.model.output_stride = 8
    main(["predict", "m.ckpt", "photos/a.png", "--output_stride", "8", "--device", "cpu"])
    assert np.array_equal(read(here / "predictions/index/a.png"), task.predict(read(here / "photos/a.png")))


@pytest.mark.skipif("not torch.cuda.is_available()", reason="no GPU")
def test_a_gpu_is_taken_where_there_is_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["predict", "m.ckpt", "photos/a.png"])
    assert "on cuda" in capsys.readouterr().out
    task = lightning_atrous.load("m.ckpt").cuda()
    assert task.predict(torch.zeros(3, 40, 56)).is_cuda
    assert isinstance(task.predict(read(here / "photos/a.png")), np.ndarray)


def test_overlays_show_what_images_of_other_channels_have() -> None:
    colour = colourise(np.array([[0, 2]]), CLASSES)
    assert colour.tolist() == [[[255, 0, 0], [0, 0, 255]]]
    bands = torch.arange(12, dtype=torch.uint8).reshape(6, 1, 2)
    assert overlay(bands, colour, 0).tolist() == [[[0, 2, 4], [1, 3, 5]]]
    assert overlay(bands[:2], colour, 0).tolist() == [[[0, 0, 0], [1, 1, 1]]]
    assert overlay(torch.full((1, 1, 2), 0.5), colour, 0.5).tolist() == [[[191, 64, 64], [64, 64, 191]]]
    assert np.array_equal(overlay(bands, colour, 1), colour)


# --- from Python


def test_predict_gives_back_what_it_was_given() -> None:
    task = make_task().train()
    image = torch.randint(0, 256, (2, 3, 41, 57), dtype=torch.uint8)
    batch = task.predict(image)
    assert (batch.shape, batch.dtype) == ((2, 41, 57), torch.int64)
    assert task.training  # as it was
    assert not batch.requires_grad
    assert torch.equal(batch, task.eval()(image).argmax(1))
    one = task.predict(image[0])
    assert torch.equal(one, batch[0])
    array = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    for given in (array, Image.fromarray(array), (array / 255).astype(np.float32)):
        index = task.predict(given)
        assert isinstance(index, np.ndarray)
        assert index.dtype == np.uint8
        assert np.mean(index == one.numpy()) > 0.99  # floats round
    with pytest.raises(ValueError, match="picture of mode L, expected RGB"):
        task.predict(Image.new("L", (5, 5)))


def test_more_classes_than_a_byte_counts(here: Path) -> None:
    classes = ClassInfo(tuple(map(str, range(300))), ignore_index=-1)
    task = make_task(classes=classes)
    assert task.predict(read(here / "photos/a.png")).dtype == np.int32
    torch.nn.init.constant_(task.model.head.classifier.bias, 0)
    task.model.head.classifier.bias.data[299] = 1e6
    save(task, here / "many.ckpt")
    main(["predict", "many.ckpt", "photos/a.png"])
    index = read(here / "predictions/index/a.png")
    assert index.dtype == np.uint16
    assert (index == 299).all()


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize(
    ("reader", "suffix"),
    [
        (Reader("array", 6, (0, 10000)), "npy"),
        (Reader("array", 6, (0, 10000)), "tif"),
        (Reader("grey", value_range=(0, 65535)), "png"),
        (Reader("array", 1), "npy"),
    ],
)
def test_other_images_than_rgb_from_folder_to_prediction(here: Path, reader: Reader, suffix: str) -> None:
    shape = (41, 57) if reader.out_channels == 1 else (41, 57, 6)
    for split in ("train", "val"):
        array = np.random.default_rng(0).integers(0, 255 if reader.value_range is None else 10000, shape)
        array = array.astype(np.uint8 if reader.value_range is None else np.uint16)
        path = here / f"data/images/{split}/a.{suffix}"
        path.parent.mkdir(parents=True)
        if suffix == "npy":
            np.save(path, array)
        elif suffix == "tif":
            pytest.importorskip("tifffile").imwrite(path, array, photometric="minisblack", planarconfig="contig")
        else:
            Image.fromarray(array).save(path)
        mask = here / f"data/masks/{split}/a.png"
        mask.parent.mkdir(parents=True)
        Image.fromarray((array.reshape(41, 57, -1)[..., 0] % 3).astype(np.uint8)).save(mask)
    data = Folder("data", list("abc"), batch_size=1, num_workers=0, augment=Augment((32, 48), distort=1), reader=reader)
    task = make_task(reader).train()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(
        default_root_dir=here, logger=False, accelerator="cpu", max_steps=1, log_every_n_steps=1, **quiet
    )
    trainer.fit(task, data)
    trainer.save_checkpoint(here / "other.ckpt")
    loaded = lightning_atrous.load("other.ckpt")
    assert loaded.reader == reader
    main(["predict", "other.ckpt", "data/images"])
    index = read(here / "predictions/index/val/a.png")
    assert np.array_equal(index, loaded.predict(reader(path)).numpy())
    assert np.array_equal(index, loaded.predict(array))
    assert read(here / "predictions/overlay/val/a.png").shape == (41, 57, 3)
    # data that are read another way are refused
    with pytest.raises(ValueError, match=r"trained on images read with mode: .*, but the data is read with"):
        make_task(Reader("array", reader.out_channels, (0, 7))).on_load_checkpoint(torch.load(here / "other.ckpt"))


def test_a_reader_and_a_backbone_of_different_channels_are_refused() -> None:
    backbone = TimmBackbone("test_resnet", pretrained=False)
    with pytest.raises(ValueError, match=r"set model\.backbone\.in_channels: 6, or another data\.reader"):
        SegmentationTask(backbone, FCN, classes=CLASSES, reader=Reader("array", 6))


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_the_data_tells_the_task_how_it_is_read(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line: the option, its way into the checkpoint, and the refusal of what does not fit."""
    for split in ("train", "val"):
        photo(workdir / f"images/{split}/a.png", 48, 48)
        (workdir / f"masks/{split}").mkdir(parents=True)
        Image.new("L", (48, 48)).save(workdir / f"masks/{split}/a.png")
    data = ["--data=Folder", "--data.root=.", "--data.class_names=[x]", "--data.num_workers=0", "--data.batch_size=1"]
    model = ["--model.backbone.name=test_resnet", "--model.backbone.pretrained=false", "--model.head=fcn"]
    fit = ["fit", *model, *data, "--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"]
    with pytest.raises(SystemExit) as stop:
        main([*fit, "--data.reader.mode=grey"])
    assert stop.value.code == 2
    assert "set model.backbone.in_channels: 1, or another data.reader" in capsys.readouterr().err
    main([*fit, "--data.reader.mode=convert"])
    assert lightning_atrous.load("runs/run/checkpoints/last.ckpt").reader == Reader("convert")
    with pytest.raises(SystemExit) as stop:
        main(["validate", *data, "--ckpt_path=runs/run/checkpoints/last.ckpt"])
    assert stop.value.code == 2
    assert "images read with mode: convert, channels: 3, but the data is read with mode: rgb" in capsys.readouterr().err
