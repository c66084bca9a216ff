"""How Megatron comes to know the backend, and forgets it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import run_ranks

small = pytest.importorskip("small", reason="megatron-core is not installed", exc_type=ImportError)

import megatron.core  # noqa: E402
from megatron.core.transformer.moe import moe_layer  # noqa: E402

import deepep_train.megatron as ours  # noqa: E402
from deepep_train import DeepEPError  # noqa: E402
from deepep_train.megatron import cpu  # noqa: E402
from deepep_train.megatron.install import _POLICY_MODULES, _imported  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def clean() -> Any:
    ours.uninstall()
    yield
    ours.uninstall()


def test_install_twice_and_uninstall() -> None:
    stock = moe_layer.MoEFlexTokenDispatcher
    ours.install()
    once = moe_layer.MoEFlexTokenDispatcher
    assert once is not stock
    ours.install()
    assert moe_layer.MoEFlexTokenDispatcher is once
    ours.uninstall()
    assert moe_layer.MoEFlexTokenDispatcher is stock
    ours.uninstall()


@pytest.mark.parametrize("version", ["0.15.2", "0.20.0", "1.0.0"])
def test_an_unknown_release_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(megatron.core, "__version__", version)
    with pytest.raises(DeepEPError, match=rf"knows megatron-core 0\.16 to 0\.19, this is {version}"):
        ours.install()


def test_other_backends_build_what_they_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_layer, "MoEFlexTokenDispatcher", lambda *_, **__: "stock")
    ours.install()
    config = SimpleNamespace(moe_flex_dispatcher_backend="hybridep")
    assert moe_layer.MoEFlexTokenDispatcher(1, [0], config=config, pg_collection=None) == "stock"
    ours.uninstall()


def policy() -> Any:
    """The module in which the overlapped schedule looks up what it may free."""
    (found,) = (m for m in map(_imported, _POLICY_MODULES) if m is not None and "should_free_input" in vars(m))
    return found


@pytest.mark.parametrize("fp8", [None, "e4m3"])
def test_the_overlapped_schedule_frees_nothing_that_is_needed(fp8: str | None) -> None:
    """What dispatch takes is a view of what the router's backward needs; what it gives is what the experts save."""
    config = SimpleNamespace(
        moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep_train", fp8=fp8, fp4=None, cuda_graph_modules=[],
        cuda_graph_scope=[],
    )  # fmt: skip

    def freed(name: str) -> bool:
        try:
            return policy().should_free_input(name, True, config, 4)
        except TypeError:
            return policy().should_free_input(name, True, config)  # 0.16

    assert freed("moe_dispatch"), "Megatron has learnt to keep it: the replacement may go"
    ours.install()
    assert not freed("moe_dispatch")
    assert not freed("pre_dispatch_computation")
    assert freed("moe_combine")
    assert not freed("mlp"), "under FP8, too, layers may compute in bf16"


def uninstalled_beside_a_layer(rank: int, size: int, group: Any) -> list[bool]:
    """Whether the schedule knows of this backend: before, with a layer, uninstalled, installed again, without the layer."""
    known = []

    def look() -> None:
        known.append(policy().should_free_input.__module__ == ours.install.__module__)

    ours.uninstall()
    look()
    setup = small.Setup()
    with setup.parallel():
        layer = small.layer_of(setup.transformer_config(small.OURS))
        for change in (lambda: None, ours.uninstall, ours.install):
            change()
            look()
        del layer
        gc.collect()
        ours.uninstall()
        look()
    return known


def test_layers_made_outlive_uninstall() -> None:
    """They keep their dispatchers, so the schedule must go on keeping what those need."""
    assert run_ranks(2, uninstalled_beside_a_layer, timeout=60) == [[False, True, True, True, False]] * 2


def models(rank: int, size: int, group: Any) -> list[str]:
    """The dispatchers of a GPT model with a multi-token prediction layer."""
    setup = small.Setup(config={"mtp_num_layers": 1})
    with setup.parallel():
        model = small.gpt(setup.transformer_config(small.OURS))
        return [type(m.token_dispatcher).__module__ for m in model.modules() if hasattr(m, "token_dispatcher")]


def test_every_layer_of_a_model_gets_it() -> None:
    assert run_ranks(2, models, timeout=60) == [["deepep_train.megatron.dispatcher"] * 3] * 2


def with_stock_deepep(rank: int, size: int, group: Any) -> dict[str, float]:
    """Megatron's own DeepEP backend, unmodified, on this library."""
    from deepep_train import compat

    compat.install()
    for name in [n for n in sys.modules if n.startswith("megatron")]:
        del sys.modules[name]  # Megatron looks for deep_ep when it is imported
    for name in ("small", "deepep_train.megatron.cpu", "deepep_train.megatron.install", "deepep_train.megatron"):
        sys.modules.pop(name, None)
    import small as again

    setup = again.Setup(config={"moe_router_dtype": "fp32"})
    deepep = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
    with setup.parallel():
        got, expected = (again.layer_step(setup, d, rank, (8, 8)) for d in (deepep, again.STOCK["alltoall"]))
    assert got.keys() == expected.keys()
    return {n: float((got[n] - t).norm() / t.norm()) for n, t in expected.items()}


def test_megatrons_own_deepep_backend_runs_on_this_library() -> None:
    for errors in run_ranks(2, with_stock_deepep, timeout=90, fresh=True):
        assert max(errors.values()) < 1e-6, errors


SCRIPT = """
import argparse, sys
from dataclasses import fields
import script_neighbour
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.moe import moe_layer
from typing import get_args
choices = next(get_args(f.type) for f in fields(TransformerConfig) if f.name == "moe_flex_dispatcher_backend")
parser = argparse.ArgumentParser()
group = parser.add_argument_group("moe")
group.add_argument("--moe-flex-dispatcher-backend", type=str, choices=choices, default="deepep")
print(parser.parse_args().moe_flex_dispatcher_backend, moe_layer.MoEFlexTokenDispatcher.__module__, __name__)
"""


def launch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "deepep_train.megatron", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def test_the_launcher_makes_the_flag_known(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "script_neighbour.py").write_text("")
    done = launch(str(tmp_path / "train.py"), "--moe-flex-dispatcher-backend", "deepep_train")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["deepep_train", "deepep_train.megatron.install", "__main__"]
    wrong = launch(str(tmp_path / "train.py"), "--moe-flex-dispatcher-backend", "nonsense")
    assert wrong.returncode != 0
    assert "deepep_train" in wrong.stderr


OWN_ARGUMENTS = """
import argparse
from megatron.training.arguments import add_megatron_arguments
parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
a = parser.parse_args()
print(a.moe_flex_dispatcher_backend, a.moe_flex_dispatcher_num_sms)
"""


def test_the_launcher_takes_megatrons_own_arguments(tmp_path: Path) -> None:
    pytest.importorskip("megatron.training.arguments", reason="this release brings no training package", exc_type=ImportError)
    (tmp_path / "train.py").write_text(OWN_ARGUMENTS)
    flags = ("--moe-flex-dispatcher-backend", "deepep_train", "--moe-flex-dispatcher-num-sms", "8")
    done = launch(str(tmp_path / "train.py"), *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-2:] == ["deepep_train", "8"]


def test_the_launcher_takes_the_megatron_beside_the_script(tmp_path: Path) -> None:
    """As `python pretrain_gpt.py` does in a checkout of Megatron-LM, whatever else is installed."""
    core = tmp_path / "megatron" / "core" / "__init__.py"
    core.parent.mkdir(parents=True)
    core.write_text("__version__ = '9.8.7'")
    (tmp_path / "train.py").write_text("")
    done = launch(str(tmp_path / "train.py"))
    assert done.returncode != 0
    assert f"this is 9.8.7 ({core})" in done.stderr, done.stderr


def test_a_missing_script_is_named() -> None:
    done = launch("/nonexistent/train.py")
    assert done.returncode != 0
    assert "/nonexistent/train.py" in done.stderr


def test_cpu_stand_ins_come_and_go() -> None:
    import torch

    stock = torch.zeros, torch.cuda.current_stream, torch.Tensor.to
    cpu.enable()
    cpu.enable()
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2).cuda().to("cuda:0").device.type == "cpu"
    cpu.disable()
    cpu.disable()
    assert (torch.zeros, torch.cuda.current_stream, torch.Tensor.to) == stock
