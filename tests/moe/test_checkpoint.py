"""Checkpoints: whole, bit-equal, and re-sharded by torch.distributed.checkpoint on another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from deepep_train import DeepEPError, moe

HIDDEN, EXPERTS = 8, 12


def _model() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(4)
    layer = moe.MoELayer(HIDDEN, 16, EXPERTS, 2, bias_update_rate=0.01)
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), layer)
    return model, torch.optim.AdamW(model.parameters(), 0.01)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> float:
    optimizer.zero_grad()
    x = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(10 * step + rank))
    loss = model(x).square().mean()
    loss.backward()
    moe.reduce_gradients(model)
    optimizer.step()
    moe.update_expert_biases(model)
    return loss.item()


def _contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {f"model.{n}": t.clone() for n, t in model.state_dict().items()}
    for n, p in model.named_parameters():
        found |= {f"optimizer.{n}.{k}": v.clone() for k, v in optimizer.state[p].items()}
    return found


def _save(rank: int, size: int, group: dist.ProcessGroup, path: Path) -> dict[str, Any]:
    model, optimizer = _model()
    for step in range(3):
        _step(model, optimizer, rank, step)
    for _ in range(2):  # the second replaces the first
        moe.save_checkpoint(path, model, optimizer, shared={"step": 3, "list": [1, {"a": None}]}, own=("rank", rank))
    saved = _contents(model, optimizer)
    return {"saved": saved, "later": [_step(model, optimizer, rank, step) for step in range(3, 6)]}


def _load(rank: int, size: int, group: dist.ProcessGroup, path: Path) -> dict[str, Any]:
    model, _ = _model()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    optimizer = torch.optim.AdamW(model.parameters(), 123.0)
    loaded = moe.load_checkpoint(path, model, optimizer)
    found = _contents(model, optimizer)
    later = [_step(model, optimizer, rank, step) for step in range(3, 6)]
    return {"loaded": tuple(loaded), "found": found, "lr": optimizer.param_groups[0]["lr"], "later": later}


def _joined(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The global tensors: experts joined over ranks, the others checked to be alike."""
    joined = {}
    for name, t in ranks[0].items():
        if "experts.w" in name and t.dim():
            joined[name] = torch.cat([r[name] for r in ranks])
        else:
            assert all(torch.equal(t, r[name]) for r in ranks), name
            joined[name] = t
    return joined


@pytest.mark.parametrize("writers,readers", [(2, 2), (2, 4), (4, 2), (3, 2)])
def test_round_trip(tmp_path: Path, writers: int, readers: int) -> None:
    path = tmp_path / "checkpoint"
    written = run_ranks(writers, _save, path)
    read = run_ranks(readers, _load, path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]  # nothing partial is left
    expected, found = _joined([r["saved"] for r in written]), _joined([r["found"] for r in read])
    assert expected.keys() == found.keys()
    for name, t in expected.items():
        assert torch.equal(t, found[name]), name
    for rank, r in enumerate(read):
        own = ("rank", rank) if writers == readers else None
        assert r["loaded"] == ({"step": 3, "list": [1, {"a": None}]}, own)
        assert r["lr"] == 0.01
        if writers == readers:
            assert r["later"] == written[rank]["later"]  # resumes to the bit


def test_one_process_reads_what_ranks_wrote(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    written = run_ranks(2, _save, path)
    found = _load(0, 1, None, path)["found"]  # type: ignore[arg-type]
    for name, t in _joined([r["saved"] for r in written]).items():
        assert torch.equal(t, found[name]), name


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    model, optimizer = _model()
    with pytest.raises(DeepEPError, match=r"nothing here holds no checkpoint|holds no checkpoint"):
        moe.load_checkpoint(tmp_path / "nothing here", model, optimizer)


def _wrapped(rank: int, size: int, group: dist.ProcessGroup, path: Path) -> list[bool]:
    """Experts are found under whatever stands between them and the model."""

    def layer() -> moe.MoELayer:
        return moe.MoELayer(HIDDEN, 16, 2 * size, 2)

    def holder() -> nn.Module:
        outer = nn.Module()
        outer.module = layer()
        return outer

    kept = []
    for number, make in enumerate(
        [lambda: nn.Sequential(checkpoint_wrapper(layer())), holder, lambda: torch.compile(nn.Sequential(layer()))]
    ):
        model = make()
        own = moe.expert_parameters(model)
        assert own
        for p in own:
            nn.init.constant_(p, rank + 1)
        moe.save_checkpoint(path / str(number), model)
        for p in own:
            nn.init.zeros_(p)
        moe.load_checkpoint(path / str(number), model)
        kept += [bool((p == rank + 1).all()) for p in own]
    return kept


def test_wrappers_do_not_hide_experts(tmp_path: Path) -> None:
    assert all(all(kept) for kept in run_ranks(2, _wrapped, tmp_path))
