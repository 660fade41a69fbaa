"""torch's optimisers and timm's by name, through a training that is stopped and goes on; what cannot train is said."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import lightning as L
import pytest
import timm.optim
import torch
from conftest import ROOT
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from lightning_atrous import ClassInfo, SegmentationTask, TimmBackbone
from lightning_atrous.checkpoint import SPEC_KEY
from lightning_atrous.cli import main
from lightning_atrous.data import Shapes
from lightning_atrous.heads import FCN
from lightning_atrous.optim import OPTIMIZERS, check_optimizer
from lightning_atrous.spec import build, describe

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ("--data.num_workers=0", "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0")


@pytest.mark.parametrize(
    ("name", "cls", "lr"),
    [
        ("timm.optim.Lion", timm.optim.Lion, 1e-3),
        ("RAdam", torch.optim.RAdam, 1e-2),
        pytest.param("Lamb", timm.optim.Lamb, 1e-2, marks=pytest.mark.slow),
        pytest.param("NAdamW", timm.optim.NAdamW, 1e-2, marks=pytest.mark.slow),
    ],
)
def test_by_name_and_resumed_exactly(name: str, cls: type, lr: float, workdir: Path) -> None:
    groups = '[{match: "head", lr_factor: 2.0}]'
    model = ("--model.optimizer", name, f"--model.optimizer.lr={lr}", "--model.parameter_groups", groups)
    model += ("--model.layer_decay=0.8", "--model.freeze_stages=1", "--model.freeze_norm=true")
    model += ("--model.schedule.floor=1.0",)  # a curve that has nothing to do with the length of the run
    fit = ("fit", "--config", "tiny.yaml", *FAST)
    main([*fit, *model, "--run_dir=whole"])
    main([*fit, *model, "--run_dir=cut", "--trainer.max_epochs=1"])
    # the checkpoint alone brings the model and all that is said of its training
    main([*fit, "--ckpt_path=last", "--run_dir=cut"])
    whole, cut = (torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("whole", "cut"))
    assert whole["global_step"] == cut["global_step"] == 6
    assert build(cut[SPEC_KEY]["optimizer"]).func is cls
    rates = [[group["initial_lr"] for group in run["optimizer_states"][0]["param_groups"]] for run in (whole, cut)]
    assert rates[0] == rates[1] == pytest.approx([lr * 0.8**i for i in (4, 3, 2, 1)] + [2 * lr] * (len(rates[0]) - 4))
    torch.testing.assert_close(cut["state_dict"], whole["state_dict"], rtol=0, atol=0)
    main(["validate", "--config=tiny.yaml", *FAST, "--ckpt_path=last", "--run_dir=cut"])


def test_the_page_is_true(workdir: Path) -> None:
    """What it shows is run, on a smaller network."""
    page = (ROOT / "docs" / "optimisation.md").read_text()
    match = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert match
    Path("page.yaml").write_text(match[1].replace("resnet50", "test_resnet"))
    main(["fit", "--config=tiny.yaml", "--config=page.yaml", "--trainer.max_epochs=1", "--run_dir=page", *FAST])
    groups = torch.load("page/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    rates = {group["name"]: group["initial_lr"] for group in groups}
    assert rates["head_x10"] == pytest.approx(3e-3)
    assert rates["backbone_x1.5"] == pytest.approx(3e-4 * 0.3 * 0.75 * 2)
    assert {"head_decay0.01", "head_x10_no_decay", "backbone_x0.5625"} <= rates.keys()


def test_names_are_those_of_both_packages() -> None:
    assert OPTIMIZERS["Lion"] is timm.optim.Lion
    assert OPTIMIZERS["AdamW"] is torch.optim.AdamW
    assert OPTIMIZERS["Adafactor"] is torch.optim.Adafactor  # and not timm's of that name
    for cls in (timm.optim.Lion, timm.optim.Adafactor, torch.optim.NAdam):
        assert build(describe(cls)).func is cls
    # json: what a checkpoint lays beneath the arguments
    assert build(json.loads(json.dumps(describe(functools.partial(timm.optim.NAdamW, lr=0.1))))).keywords == {"lr": 0.1}


@pytest.mark.parametrize("path", ["timm.optim.create_optimizer", "torch.optim.lr_scheduler.LambdaLR"])
def test_a_checkpoint_names_optimisers_alone(path: str) -> None:
    with pytest.raises(ValueError, match=f"asks for {path} as an optimiser, which it is not"):
        build({"class_path": path, "init_args": {}})


def test_another_optimiser_cannot_take_a_state_over(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit = ["fit", "--config=tiny.yaml", *FAST]
    main([*fit, "--trainer.max_epochs=1"])
    for option, sentence in {
        "--model.optimizer=Lion": "optimiser is torch.optim.sgd.SGD, but this run's is Lion, which cannot go on",
        "--model.freeze_stages=1": "in the groups backbone (15), backbone_no_decay (30), head (",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main([*fit, "--ckpt_path=last", option])
        error = capsys.readouterr().err
        assert sentence in error, error
        assert stop.value.code == 1


class ScheduleFree(SGD):
    """Has other weights in validation than in training."""

    def eval(self) -> None: ...


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (torch.optim.LBFGS, "LBFGS doesn't support per-parameter options"),
        (torch.optim.SparseAdam, "SparseAdam makes no step in this training: .*; take another"),
        (timm.optim.Adahessian, "Adahessian makes no step in this training: .*; take another"),
        (timm.optim.Adafactor, "Adafactor sets its learning rates itself; give it an lr"),
        (timm.optim.Lookahead, r"model\.optimizer: Lookahead is not built over parameters .*; take another$"),
        (functools.partial(Adam, lr=-1), "Invalid learning rate: -1"),
        (ScheduleFree, "ScheduleFree is free of a schedule, .*, and the callback EMA"),
    ],
)
def test_what_cannot_train_is_said_before_it_runs(factory: type[Optimizer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_optimizer(factory)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="on an accelerator they may hold")
def test_options_for_a_device_are_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"capturable.*leave that option out on the CPU"):
        check_optimizer(functools.partial(Adam, capturable=True))


def test_what_no_schedule_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Rprop takes its steps' sizes from the learning rate once"):
        check_optimizer(functools.partial(torch.optim.Rprop, lr=0.01))
    with pytest.raises(ValueError, match=r"model.optimizer: .*fused.*foreach.*; correct its options"):
        check_optimizer(functools.partial(Adam, fused=True, foreach=True))


def steps(batches: int, accumulate: int, folder: Path) -> dict[str, torch.Tensor]:
    """The weights after a training by SGD on clipped gradients, without a norm that looks at its batch."""
    torch.manual_seed(0)
    data = Shapes(size=32, train_length=8, val_length=2, batch_size=8 // batches, num_workers=0)
    this = SegmentationTask(
        TimmBackbone("test_resnet", pretrained=False),
        functools.partial(FCN, channels=8, dropout=0.0),
        classes=data.classes,
        optimizer=functools.partial(SGD, lr=1.0),
    ).double()
    for module in this.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats, module.training = True, False
            module.train = lambda mode=True, norm=module: norm
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        limit_val_batches=0,
        enable_checkpointing=False,
        gradient_clip_val=0.01,
        accumulate_grad_batches=accumulate,
        **quiet,
    )
    before = {name: parameter.detach().clone() for name, parameter in this.named_parameters()}
    trainer.fit(this, data)
    assert trainer.global_step == 1
    return {name: parameter.detach() - before[name] for name, parameter in this.named_parameters()}


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")
def test_clipping_is_of_the_accumulated_gradient(tmp_path: Path) -> None:
    """As of one large batch, and of the norm that was asked for."""
    whole, parts = steps(1, 1, tmp_path), steps(4, 4, tmp_path)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-9)
    norm = torch.stack([change.square().sum() for change in whole.values()]).sum().sqrt()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


CLASSES = ClassInfo(("a", "b", "c"))


def twins(**options) -> tuple[SegmentationTask, SegmentationTask, torch.Tensor]:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        backbone = TimmBackbone("test_resnet", pretrained=False)
        found.append(SegmentationTask(backbone, functools.partial(FCN, channels=8, dropout=0.0), classes=CLASSES))
    return found[0], found[1], torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)


def assert_compiled_is_the_same(tolerance: float, strides: tuple[int, ...]) -> None:
    plain, compiled, image = twins()
    keys = list(compiled.state_dict())
    compiled.compiles = True
    compiled.on_fit_start()
    losses = [this.train().model.forward_train(image)[0].square().mean() for this in (plain, compiled)]
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)
    for loss in losses:
        loss.backward()
    gradients = [torch.cat([p.grad.flatten() for p in this.parameters()]) for this in (plain, compiled)]
    assert (gradients[1] - gradients[0]).norm() <= 10 * tolerance * gradients[0].norm()
    assert list(compiled.state_dict()) == keys
    for stride in strides:
        maps = []
        for this in (plain, compiled):
            this.model.output_stride = stride
            maps.append(this.eval()(image).detach())
        torch.testing.assert_close(maps[1], maps[0], rtol=tolerance, atol=tolerance)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, of itself
def test_what_is_compiled_is_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch's tracing sees it, run by torch's usual kernels: at every stride, with the same names."""
    seen = []

    def compile_by_nothing(graph: torch.fx.GraphModule, inputs: list) -> object:
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compile_by_nothing))
    assert_compiled_is_the_same(1e-5, (8,))
    assert seen


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_what_is_compiled_by_the_compiler_is_the_same_function() -> None:
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1))
    except Exception as error:
        pytest.skip(f"there is no compiler here ({type(error).__name__})")
    assert_compiled_is_the_same(1e-4, (16, 8, 16))


def test_compiling_and_computing_again_exclude_each_other() -> None:
    backbone = TimmBackbone("test_resnet", pretrained=False, gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"compile and backbone\.gradient_checkpointing exclude each other"):
        SegmentationTask(backbone, functools.partial(FCN, channels=8), classes=CLASSES, compile=True)
