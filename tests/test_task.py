"""Model and task without the command line: shapes, steps, checkpoints."""

from __future__ import annotations

import functools
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_atrous
from lightning_atrous import ClassInfo, SegmentationModel, SegmentationTask, TimmBackbone
from lightning_atrous.checkpoint import SPEC_KEY, read_checkpoint
from lightning_atrous.data import Shapes
from lightning_atrous.heads import FCN, DeepLabV3, DeepLabV3Plus
from lightning_atrous.images import Reader
from lightning_atrous.optim import Poly
from lightning_atrous.types import Preprocess

CLASSES = ClassInfo(("a", "b", "c"))


def backbone(output_stride: int = 16, **options) -> TimmBackbone:
    return TimmBackbone("test_resnet", pretrained=False, output_stride=output_stride, **options)


def task(**options) -> SegmentationTask:
    torch.manual_seed(0)
    head = options.pop("head", functools.partial(DeepLabV3Plus, channels=16))
    return SegmentationTask(backbone(), head, **{"classes": CLASSES, **options})


def batch(b: int = 2, height: int = 48, width: int = 64, k: int = 3) -> dict:
    return {
        "image": torch.randint(0, 256, (b, 3, height, width), dtype=torch.uint8),
        "mask": torch.randint(0, k, (b, height, width)),
        "name": [str(i) for i in range(b)],
    }


@pytest.mark.parametrize("size", [(48, 64), (47, 65), (31, 200), (8, 8)])
def test_logits_have_the_images_size(size: tuple[int, int]) -> None:
    model = task().model.eval()
    image = batch(1, *size)["image"]
    assert model(image).shape == (1, 3, *size)
    assert model.predict(image).shape == (1, *size)
    assert model.predict(image).dtype == torch.int64


def test_no_image_is_normalised_twice_or_never() -> None:
    model = SegmentationModel(
        backbone(), FCN(backbone().info, 3), preprocess=Preprocess((0.2, 0.3, 0.4), (0.5, 0.6, 0.7))
    )
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    image = batch(1)["image"]
    mean, std = torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1), torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    expected = (image / 255 - mean) / std
    for call in (model.eval(), model.forward_train, model.logits, model.predict):
        call(image)
        torch.testing.assert_close(seen.pop(), expected)
    model(image / 255)
    torch.testing.assert_close(seen.pop(), expected)
    with pytest.raises(ValueError, match=r"mean and std for 1 channels, but the backbone takes images of 3"):
        SegmentationModel(backbone(), FCN(backbone().info, 3), preprocess=Preprocess((0.5,), (0.5,)))


def test_the_stride_takes_the_heads_along_and_comes_back() -> None:
    model = task(aux_head=functools.partial(FCN, level=-2)).model.eval()
    image = batch(1)["image"]
    before, keys = model(image), list(model.state_dict())
    model.output_stride = 8
    assert model.head.aspp.rates == (12, 24, 36)
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(image), before)
    model.output_stride = 16
    assert torch.equal(model(image), before)


def test_another_output_stride_for_evaluation_alone(tmp_path: Path) -> None:
    """Scores are those of the model at that stride, training and checkpoints those of its own."""
    seen: dict[str, set[int]] = {"train": set(), "val": set()}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            seen["train"].add(pl_module.model.output_stride)

        def on_validation_batch_end(self, trainer, pl_module, *_) -> None:
            seen["val"].add(pl_module.model.output_stride)

    data = Shapes(size=64, train_length=8, val_length=4, batch_size=4, num_workers=0)

    def trainer(**options: object) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return L.Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, **quiet, **options)

    fitted = task(classes=data.classes, eval_output_stride=8)
    fit = trainer(callbacks=[Watch(), ModelCheckpoint(tmp_path, "best", monitor="val/miou", mode="max")])
    fit.fit(fitted, data)
    assert seen == {"train": {16}, "val": {8}}
    assert fitted.model.output_stride == 16
    loaded = lightning_atrous.load(tmp_path / "best.ckpt")  # saved while a validation ended
    assert loaded.model.output_stride == 16
    assert loaded.spec["backbone"] == task().spec["backbone"] | {"method": "dilate"}

    confusions = {}
    for stride in (None, 16, 8):
        evaluated = lightning_atrous.load(tmp_path / "best.ckpt")
        evaluated.evaluation.output_stride = stride
        trainer().validate(evaluated, data, verbose=False)
        confusions[stride] = evaluated.confusion
    loaded.model.output_stride = 8
    trainer().validate(loaded, data, verbose=False)
    assert torch.equal(confusions[None], confusions[16])
    assert torch.equal(confusions[8], loaded.confusion)
    assert not torch.equal(confusions[8], confusions[16])
    with pytest.raises(ValueError, match="no output stride 12; choose one of"):
        task(eval_output_stride=12)


def test_a_head_that_cannot_follow_leaves_everything_as_it_was() -> None:
    model = task(head=functools.partial(DeepLabV3, rates=(1,), rates_at=16, channels=8)).model.eval()
    image = batch(1)["image"]
    before = model(image)
    with pytest.raises(ValueError, match="atrous rate 1"):
        model.output_stride = 32
    assert model.output_stride == 16
    assert torch.equal(model(image), before)


@pytest.mark.parametrize("b", [1, 3])
def test_a_step_is_the_textbook_loss_and_trains_everything(b: int, monkeypatch: pytest.MonkeyPatch) -> None:
    this = task(aux_head=functools.partial(FCN, level=-2), aux_weight=0.3).train()
    monkeypatch.setattr(this, "log", lambda *_, **__: None)  # no trainer here
    this.model.eval()  # two forward passes are compared
    sample = batch(b)
    logits, aux = this.model.forward_train(sample["image"])
    expected = [
        F.cross_entropy(F.interpolate(x, sample["mask"].shape[1:], mode="bilinear"), sample["mask"], ignore_index=255)
        for x in (logits, aux)
    ]
    loss = this.training_step(sample, 0)
    torch.testing.assert_close(loss, expected[0] + 0.3 * expected[1])
    this.train()
    this.training_step(sample, 0).backward()
    missing = [name for name, p in this.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    # with one image the pooled branch has no batch to normalise over and uses its running statistics
    assert not missing


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_masks_come_in_any_whole_numbers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SegmentationTask, "log", lambda *_, **__: None)
    given = batch()
    given["mask"][0, :4] = 255 if dtype == torch.uint8 else -1
    this = task(classes=ClassInfo(("a", "b", "c"), ignore_index=int(given["mask"][0, 0, 0]))).eval()
    narrow = {**given, "mask": given["mask"].to(dtype)}
    assert torch.equal(this.training_step(narrow, 0), this.training_step(given, 0))
    assert torch.equal(this.validation_step(narrow, 0)["confusion"], this.validation_step(given, 0)["confusion"])


def test_memory_format_changes_no_number() -> None:
    sample = batch()["image"]
    one, other = task(channels_last=True).eval(), task(channels_last=False).eval()
    assert next(p for p in one.parameters() if p.ndim == 4).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(one(sample), other(sample), rtol=1e-4, atol=1e-5)


def fit(this: SegmentationTask, folder: Path, **options) -> L.Trainer:
    trainer = L.Trainer(
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    )
    trainer.fit(this, Shapes(size=32, train_length=4, val_length=3, batch_size=2))
    return trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_built_trained_saved_and_loaded_from_python(tmp_path: Path) -> None:
    data = Shapes(size=32)
    this = task(
        classes=data.classes,
        aux_head=functools.partial(FCN, level=-2, channels=8),
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, betas=(0.8, 0.9)),
        schedule=Poly(power=0.5, warmup_steps=1),
        backbone_lr_factor=0.1,
        decay_norm_and_bias=True,
        preprocess=Preprocess((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    )
    trainer = fit(this, tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    loaded = lightning_atrous.load(tmp_path / "a.ckpt")
    assert loaded.spec == this.spec
    assert loaded.classes == data.classes
    assert not loaded.training
    image = batch(1)["image"]
    assert torch.equal(loaded(image), this.eval()(image))
    # and through Lightning's own name for it
    assert torch.equal(SegmentationTask.load_from_checkpoint(tmp_path / "a.ckpt")(image), loaded(image))
    lrs = {group["name"]: group["initial_lr"] for group in trainer.optimizers[0].param_groups}
    assert lrs == {"backbone": 1e-4, "head": 1e-3}


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_a_checkpoint_of_another_model_or_other_classes_is_refused(tmp_path: Path) -> None:
    data = Shapes(size=32)
    this = task(classes=data.classes)
    fit(this, tmp_path, max_epochs=1).save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = read_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint's head is .*DeepLabV3Plus, but this run builds .*FCN"):
        task(classes=data.classes, head=FCN).on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"trained on the classes background, disk.* but the data has a, b, c"):
        task().on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="not written by lightning-atrous"):
        task().on_load_checkpoint({"state_dict": {}})
    # what is not registered is not imported
    checkpoint[SPEC_KEY]["head"]["class_path"] = "my_package.MyHead"
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"asks for my_package\.MyHead, which no installed package registers"):
        lightning_atrous.load(tmp_path / "b.ckpt")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no checkpoint at"):
        lightning_atrous.load(tmp_path / "none.ckpt")
    (tmp_path / "half.ckpt").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(ValueError, match=r"half\.ckpt cannot be read as a checkpoint"):
        lightning_atrous.load(tmp_path / "half.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt was not written by lightning-atrous"):
        lightning_atrous.load(tmp_path / "other.ckpt")


def test_a_run_without_an_end_has_no_poly_schedule(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give trainer\.max_epochs or max_steps"):
        fit(task(classes=Shapes(size=32).classes), tmp_path, max_epochs=-1)


def test_other_channels_than_three() -> None:
    this = SegmentationTask(backbone(in_channels=5), FCN, classes=CLASSES, reader=Reader("array", 5))
    assert this(torch.randint(0, 256, (1, 5, 40, 40), dtype=torch.uint8)).shape == (1, 3, 40, 40)
