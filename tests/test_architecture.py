"""The house's plan as a test: imports go strictly downward, and each library lives in its rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_atrous"

LAYERS = [
    {"types", "registry", "files", "arrays", "signatures", "analysis", "randomness", "colours"},
    {
        "layers",
        "dilation.ops",
        "dilation.grids",
        "names",
        "spec",
        "transforms",
        "runs",
        "accumulation",
        "data.labels",
        "images",
        "selection",
    },
    {"dilation.proof", "dilation.rewrite", "dilation.phases", "switches", "argmax"},
    {"dilation.probe", "dilation.layout", "dilation.statistics", "depths", "recompute", "optim.patterns"},
    {"dilation.blocks", "dilation.forms"},
    {"dilation.network"},
    {"dilation.timing", "dilation.stride"},
    {"losses.base"},
    {"losses.pixel_mean", "losses.raised"},
    {"losses.cross_entropy", "losses.ohem", "losses.smp", "losses.weighted"},
    {"inference"},
    {"backbone", "context", "metrics", "complaints", "data.base"},
    {"optim.groups", "optim.freezing", "optim.build", "optim.schedule"},
    {"data.shapes", "data.folder", "data.camvid", "data.cityscapes", "heads.base", "testing.cases", "boundaries"},
    {"heads.smp_base"},
    {
        "heads.fcn",
        "heads.fcn_skips",
        "heads.deeplabv1",
        "heads.deeplabv2",
        "heads.deeplabv3",
        "heads.deeplabv3plus",
        "heads.denseaspp",
        "heads.duc",
        "heads.lraspp",
        "heads.psp",
        "heads.rfb",
        "heads.segnet",
        "heads.smp_skips",
        "heads.smp_pyramids",
    },
    {"model", "checkpoint"},
    {"evaluation"},
    {"task", "testing.contract"},
    {"callbacks", "ema", "image_scores", "loggers", "plugins", "preemption", "resume", "speed", "interop.base"},
    {"interop.torchvision", "interop.smp", "interop.mmseg"},
    {"training", "prediction", "support", "listing", "interop.command"},
    {"comparison"},
    {"cli"},
    {"__main__"},
]
"""Each file may import from the layers above it in this list, never from its own or one below."""

WALLS = {
    "timm": {"backbone", "depths", "optim.build"},
    "torchmetrics": {"metrics", "boundaries"},
    "lightning": {
        "data.base",
        "data.shapes",
        "data.folder",
        "data.camvid",
        "data.cityscapes",
        "task",
        "callbacks",
        "ema",
        "image_scores",
        "loggers",
        "plugins",
        "preemption",
        "resume",
        "speed",
        "comparison",
        "complaints",
        "training",
    },
    "jsonargparse": {"training"},
    "wandb": {"loggers"},
    "segmentation_models_pytorch": {
        "heads.smp_base",
        "heads.smp_skips",
        "heads.smp_pyramids",
        "losses.smp",
        "interop.smp",
    },
    "docstring_parser": {"signatures"},
    "rich": {"callbacks", "comparison", "image_scores", "listing", "prediction", "support"},
    "pyarrow": {"image_scores"},
    "PIL": {"arrays", "images", "task"},
    "tifffile": {"arrays"},
}

PACKAGES = {"dilation", "losses", "heads", "data", "testing", "interop", "optim"}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            # `from lightning_atrous import x` imports the module x
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "lightning_atrous"}
    return found


def own(path: Path) -> set[str]:
    return {
        name.removeprefix("lightning_atrous.")
        for name in imports(path)
        if name.startswith("lightning_atrous.") and name != "lightning_atrous.__version__"
    }


def layer_of(module: str) -> int:
    # a package stands where its own files end
    names = {module} | ({m for m in modules() if m.startswith(f"{module}.")} if module in PACKAGES else set())
    found = [i for i, layer in enumerate(LAYERS) if names & layer]
    assert found, f"{module} has no place in LAYERS"
    return max(found)


def test_every_module_has_its_place() -> None:
    assert sorted(modules()) == sorted(set().union(*LAYERS))


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_downward(module: str) -> None:
    here = next(i for i, layer in enumerate(LAYERS) if module in layer)
    wrong = [name for name in own(modules()[module]) if layer_of(name) >= here]
    assert not wrong, f"{module} imports {wrong}, which are not below it"


@pytest.mark.parametrize("library", sorted(WALLS))
def test_a_library_stays_in_its_rooms(library: str) -> None:
    outside = {
        module
        for module, path in modules().items()
        if any(name == library or name.startswith(f"{library}.") for name in imports(path))
    }
    assert outside <= WALLS[library]


def test_only_layers_interpolates() -> None:
    callers = {
        module
        for module, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("interpolate", "Upsample", "UpsamplingBilinear2d")
    }
    assert callers == {"layers"}


def test_package_files_only_re_export() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            assert isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)), (
                f"{path}: {ast.dump(node)[:80]}"
            )


def test_no_file_has_grown_out_of_one_sitting() -> None:
    long = {module: n for module, path in modules().items() if (n := len(path.read_text().splitlines())) > 400}
    assert not long
