"""`MoELayer` on several ranks against dense arithmetic on one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from harness import run_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import deepep_train as dt
from deepep_train import ArgumentError, engines, moe

HIDDEN, FFN, EXPERTS, TOP_K = 12, 20, 12, 3


@dataclass(frozen=True)
class Case:
    tokens: tuple[int, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def inputs(self, rank: int) -> Tensor:
        return torch.randn(self.tokens[rank], HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


CASES = {
    "plain": Case((7, 4, 9, 5)),
    "uneven, one rank empty": Case((0, 11, 3, 1)),
    "gelu, shared experts": Case((6, 6, 2, 8), {"activation": "gelu", "num_shared_experts": 2}),
    "deepseek": Case(
        (9, 5, 7, 3),
        {
            "score_function": "sigmoid",
            "num_groups": 4,
            "num_limited_groups": 2,
            "scaling_factor": 2.5,
            "bias_update_rate": 0.1,
            "num_shared_experts": 1,
        },
    ),
    "aligned": Case((5, 5, 5, 5), {"alignment": 8}),
}


def _layer(kwargs: dict[str, Any]) -> moe.MoELayer:
    torch.manual_seed(11)
    return moe.MoELayer(HIDDEN, FFN, EXPERTS, TOP_K, dtype=torch.float64, **kwargs)


def _train_step(rank: int, size: int, group: dist.ProcessGroup, case: Case) -> dict[str, Any]:
    layer = _layer(case.kwargs)
    x = case.inputs(rank).requires_grad_()
    y = layer(x.view(1, *x.shape))[0]
    y.square().sum().backward()
    return {
        "x": x.detach(),
        "y": y.detach(),
        "x_grad": x.grad,
        "parameters": {n: p.detach() for n, p in layer.named_parameters()},
        "grads": {n: p.grad for n, p in layer.named_parameters()},
        "picks": layer.load_balance().picks_per_expert,
    }


def _dense(layer_kwargs: dict[str, Any], parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """Every expert on every token, weighted by the router's choice: needs no dispatch."""
    p = parameters
    keys = ("score_function", "scaling_factor", "num_groups", "num_limited_groups")
    router = moe.TopKRouter(HIDDEN, EXPERTS, TOP_K, **{k: v for k, v in layer_kwargs.items() if k in keys})
    del router.weight
    router.weight = p["router.weight"]
    routing = router(x)
    gates = torch.zeros(x.size(0), EXPERTS, dtype=x.dtype).scatter(1, routing.topk_idx, routing.topk_weights.to(x.dtype))

    def feed_forward(up: Tensor, down: Tensor) -> Tensor:
        h = x @ up
        if layer_kwargs.get("activation") == "gelu":
            return F.gelu(h) @ down
        gate, value = h.chunk(2, -1)
        return (F.silu(gate) * value) @ down

    y = sum(gates[:, e : e + 1] * feed_forward(p["experts.w1"][e], p["experts.w2"][e]) for e in range(EXPERTS))
    if "shared_experts.up.weight" in p:
        y = y + feed_forward(p["shared_experts.up.weight"].T, p["shared_experts.down.weight"].T)
    return y


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_arithmetic(size: int, name: str) -> None:
    case = CASES[name]
    ranks = run_ranks(size, _train_step, case)
    shared = {n: p for n, p in ranks[0]["parameters"].items() if not n.startswith("experts.")}
    everything = shared | {n: torch.cat([r["parameters"][n] for r in ranks]) for n in ("experts.w1", "experts.w2")}
    leaves = {n: p.clone().requires_grad_() for n, p in everything.items()}
    xs = [r["x"].clone().requires_grad_() for r in ranks]
    ys = [_dense(case.kwargs, leaves, x) for x in xs]
    torch.stack([y.square().sum() for y in ys]).sum().backward()
    for rank, x, y in zip(ranks, xs, ys, strict=True):
        # Router weights travel as float32, which bounds the agreement.
        torch.testing.assert_close(rank["y"], y.detach(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(rank["x_grad"], x.grad, rtol=1e-5, atol=1e-7)
    for n, leaf in leaves.items():
        own = n.startswith("experts.")
        got = torch.cat([r["grads"][n] for r in ranks]) if own else torch.stack([r["grads"][n] for r in ranks]).sum(0)
        torch.testing.assert_close(got, leaf.grad.to(got.dtype), rtol=1e-5, atol=1e-6)
    assert sum(int(r["picks"].sum()) for r in ranks) == TOP_K * sum(case.tokens[:size])


def _variants(rank: int, size: int, group: dist.ProcessGroup) -> dict[str, list[Tensor]]:
    """One step in several dresses that must not change a bit."""
    x = torch.randn(6 + rank, HIDDEN, generator=torch.Generator().manual_seed(rank))

    def step(run: Any) -> list[Tensor]:
        torch.manual_seed(5)
        layer = moe.MoELayer(HIDDEN, FFN, EXPERTS, TOP_K, aux_loss_coeff=0.1, alignment=4)
        leaf = x.clone().requires_grad_()
        y = run(layer, leaf)
        y.sin().sum().backward()
        return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]

    compiled = torch.compile(lambda layer, x: layer(x) * 1.0, backend="eager")
    return {
        "plain": step(lambda layer, x: layer(x)),
        "reentrant": step(lambda layer, x: checkpoint(layer, x, use_reentrant=True)),
        "non-reentrant": step(lambda layer, x: checkpoint(layer, x, use_reentrant=False)),
        "copied": step(lambda layer, x: (layer(x) + 0 * copy.deepcopy(layer)(x)) * 1.0),
        "compiled": step(compiled),
    }


def test_checkpointing_and_compile_change_no_bit() -> None:
    for result in run_ranks(2, _variants, timeout=120):
        for name, tensors in result.items():
            for i, (a, b) in enumerate(zip(result["plain"], tensors, strict=True)):
                if name != "copied" or i == 0:  # the copy's graph adds a zero gradient
                    assert torch.equal(a, b), (name, i)


def _balance(rank: int, size: int, group: dist.ProcessGroup) -> tuple[float, float, Tensor]:
    torch.manual_seed(1)
    layer = moe.MoELayer(HIDDEN, FFN, EXPERTS, TOP_K, bias_update_rate=0.02, score_function="sigmoid")
    x = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(rank)) + 1.0
    layer(x)
    before = layer.load_balance(group, reset=True).max_over_mean
    for _ in range(60):
        layer(x)
        layer.update_expert_bias()
    layer.load_balance(reset=True)
    layer(x)
    after = layer.load_balance(group).max_over_mean
    assert layer.router.expert_bias is not None
    return before, after, layer.router.expert_bias


def test_bias_balances_without_a_loss() -> None:
    results = run_ranks(2, _balance)
    before, after, bias = results[0]
    assert after < 1.2 < before
    assert torch.equal(bias, results[1][2])  # every rank keeps the same


def _autocast(rank: int, size: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    layer = moe.MoELayer(HIDDEN, FFN, EXPERTS, TOP_K)
    x = torch.randn(16, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    low.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    return layer(x).detach(), low.detach()


def test_autocast_computes_in_bfloat16() -> None:
    for full, low in run_ranks(2, _autocast):
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), full, rtol=0.05, atol=0.05)


def test_one_process_without_distributed() -> None:
    assert not dist.is_initialized()
    layer = _layer({"num_shared_experts": 1})
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    p = dict(layer.named_parameters())
    torch.testing.assert_close(layer(x), _dense({}, p, x.view(10, HIDDEN)).view(2, 5, HIDDEN), rtol=1e-6, atol=1e-8)
    assert moe.MoELayer(HIDDEN, FFN, EXPERTS, TOP_K).buffer is layer.buffer  # one buffer a group


@pytest.mark.parametrize(
    "kwargs,argument",
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"ffn_hidden_size": -1}, "ffn_hidden_size"),
        ({"top_k": True}, "top_k"),
        ({"top_k": 99}, "top_k"),
        ({"activation": "relu"}, "activation"),
        ({"num_shared_experts": -1}, "num_shared_experts"),
        ({"alignment": 0}, "alignment"),
        ({"num_experts": 0}, "num_experts"),
        ({"aux_loss_coeff": "x"}, "aux_loss_coeff"),
        ({"aux_loss_coeff": float("nan")}, "aux_loss_coeff"),
        ({"bias_update_rate": -1.0}, "bias_update_rate"),
        ({"scaling_factor": "a"}, "scaling_factor"),
        ({"num_groups": 2.0}, "num_groups"),
        ({"dtype": torch.int64}, "dtype"),
    ],
)
def test_bad_arguments(kwargs: dict, argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        moe.MoELayer(**{"hidden_size": 8, "ffn_hidden_size": 8, "num_experts": 4, "top_k": 2} | kwargs)
    assert caught.value.argument == argument


def test_wrong_width_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"hidden_size=12.*\[3, 5\]"):
        _layer({})(torch.zeros(3, 5, dtype=torch.float64))


def _one_wrong_input(rank: int, size: int, group: dist.ProcessGroup) -> list[str]:
    layer = moe.MoELayer(HIDDEN, FFN, EXPERTS, TOP_K)
    right, said = torch.randn(3, HIDDEN), []
    for wrong in (torch.randn(3, HIDDEN + 1), right.tolist(), torch.tensor(1.0), right.double()):
        with pytest.raises(ArgumentError) as caught:
            layer(wrong if rank == 1 else right)
        assert caught.value.ranks == (1,) and caught.value.argument == "x"
        said.append(str(caught.value))
        layer(right)  # the buffer still works
    return said


def test_a_wrong_input_on_one_rank_raises_on_all() -> None:
    first, second = run_ranks(2, _one_wrong_input)
    assert first == second


def _hurried(rank: int, size: int, group: dist.ProcessGroup) -> dict[str, Any]:
    torch.manual_seed(11)
    layer = moe.MoELayer(128, FFN, EXPERTS, TOP_K, low_latency=True, low_latency_tokens=6).eval()
    x = torch.randn((5, 0, 6)[rank], 128, generator=torch.Generator().manual_seed(rank))
    used: list[str] = []
    calls = layer.buffer.low_latency_dispatch
    layer.buffer.low_latency_dispatch = lambda *a, **k: (used.append("low latency"), calls(*a, **k))[1]  # type: ignore
    with torch.no_grad():
        fast = layer(x)
        with pytest.raises(ArgumentError, match="num_max_dispatch_tokens_per_rank=6"):
            layer(torch.zeros(7 if rank else 6, 128))
        with pytest.raises(ArgumentError, match="hidden_size=128"):
            layer(torch.zeros(1, 100 if rank == 2 else 128))
    calls_so_far = len(used)
    normal = layer(x)  # gradients are wanted, so it is not used
    assert len(used) == calls_so_far
    del layer.buffer.low_latency_dispatch
    return {"fast": fast, "normal": normal.detach(), "used": calls_so_far}


def test_low_latency_in_eval_mode_differs_by_bfloat16s_rounding() -> None:
    for result in run_ranks(3, _hurried):
        assert result["used"] >= 1 and result["fast"].dtype == torch.float32
        # Three rows and the input are rounded to bfloat16, each to 2**-9 of its size.
        torch.testing.assert_close(result["fast"], result["normal"], rtol=2**-5, atol=2**-7)


@pytest.mark.parametrize(
    "argument, value, text",
    [
        ("hidden_size", 100, "hidden_size that is a multiple of 128, got 100"),
        ("hidden_size", 16512, "hidden_size up to 16384, got 16512"),
        ("top_k", 17, "top_k up to 16, got 17"),
        ("num_experts", 1025, "num_experts up to 1024, got 1025"),
        ("low_latency_tokens", 65537, "low_latency_tokens up to 65536, got 65537"),
    ],
)
def test_limits_of_low_latency_kernels_are_told_at_construction(argument: str, value: int, text: str) -> None:
    given = {"hidden_size": 128, "ffn_hidden_size": 4, "num_experts": 32, "top_k": 2} | {argument: value}
    buffer = dt.Buffer()
    moe.MoELayer(**given, buffer=buffer, low_latency=True)  # the calls without kernels have no limits
    buffer._engine.low_latency = object()
    with pytest.raises(ArgumentError, match=text) as caught:
        moe.MoELayer(**given, buffer=buffer, low_latency=True)
    assert caught.value.argument == argument
    moe.MoELayer(**given, buffer=buffer)


def _sharing(rank: int, size: int, group: dist.ProcessGroup, local: int) -> dict[str, Any]:
    """Layers of both kinds, in both orders; every `local` ranks seem to be a machine. No GPU is needed to choose: what is asked
    for is noted, and the collective engine taken."""
    create, asked = engines.create, []

    def noted(name: str, *how: Any) -> Any:
        asked.append((name, how[-1]))
        return create("collective", *how)

    def layer(low_latency: bool) -> moe.MoELayer:
        torch.manual_seed(11)
        return moe.MoELayer(128, FFN, EXPERTS, TOP_K, low_latency=low_latency).eval()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "create", noted)
        patch.setattr(engines, "host_name", lambda: f"machine {rank // local}")
        patch.setattr(engines, "_survey_rdma", lambda _: engines.Surveyed("rdma", True, "NVSHMEM is here"))
        layers = [layer(low_latency) for low_latency in (False, True, True, False)]
        names = [made.buffer.engine for made in layers]
        which = [[made.buffer for made in layers].index(made.buffer) for made in layers]
        for made in layers:
            made.buffer.destroy()
        layers = [layer(low_latency) for low_latency in (True, False)]
        which += [[made.buffer for made in layers].index(made.buffer) for made in layers]
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        fast, normal = (made(x) for made in layers)
    return {"names": names, "which": which, "asked": asked, "fast": fast, "normal": normal}


def test_layers_with_low_latency_share_a_buffer_of_their_own_across_nodes() -> None:
    for result in run_ranks(4, _sharing, 2, fresh=True, timeout=120):
        assert result["names"] == ["collective", "rdma", "rdma", "collective"]
        assert result["which"] == [0, 1, 1, 0, 0, 1]
        assert result["asked"] == [("collective", False), ("rdma", True), ("rdma", True), ("collective", False)]
        torch.testing.assert_close(result["fast"], result["normal"], rtol=2**-5, atol=2**-7)


def test_layers_of_one_node_share_one_buffer() -> None:
    for result in run_ranks(2, _sharing, 2, fresh=True, timeout=120):
        assert result["which"] == [0, 0, 0, 0, 0, 0] and set(result["names"]) == {"collective"}
        assert result["asked"] == [("collective", False), ("collective", True)]
        torch.testing.assert_close(result["fast"], result["normal"], rtol=2**-5, atol=2**-7)
