"""The verb `support`, and what stands behind it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from lightning_atrous.support import EXACT, support

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_what_networks_take() -> None:
    resnet = support("test_resnet")
    assert resnet.native == 32
    assert resnet.methods == {16: "dilate", 8: "dilate"}
    assert max(resnet.errors.values()) <= EXACT
    net = support("test_efficientnet")
    assert net.methods == {16: "phases", 8: "phases"}
    assert max(net.errors.values()) <= EXACT
    dense = support("test_efficientnet", (8,), method="dilate")
    assert dense.methods == {8: "dilate, dense statistics"}
    assert dense.errors[8] > EXACT
    vit = support("test_vit", (16, 8))
    assert (vit.word(16), vit.word(8)) == ("its own", "phases, whole network")
    assert vit.errors[8] <= EXACT
    refused = support("levit_128s")
    assert refused.word(8) == "phases, whole network, one size"
    assert "images of one size alone" in refused.refusals[0]
    assert support("twins").word(8) == "refused"


def test_the_verb(command: Command) -> None:
    done = command("support", "test_resnet", "resnest14d", "--method", "dilate", "--output_stride", "8")
    lines = [line for line in done.stdout.splitlines() if "test_resnet" in line or "resnest14d" in line]
    assert "dilate" in lines[0]
    assert "refused" in lines[1]
    assert "resnest14d: output stride 8 is not exact for this network, by dilate" in lines[-1]
    done = command("support", "resnest14d", "--method", "dilate", "--output_stride", "8", code=1)
    assert "none of these networks takes" in done.stderr
    assert "resnet" in command("support", "resnet5o", code=1).stdout
    assert "no network like 'zzz*'" in command("support", "zzz*", code=2).stderr
