"""One MoELayer of stock Megatron, through this library and through Megatron's own dispatchers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import assert_same_bits, run_ranks

small = pytest.importorskip("small", reason="megatron-core is not installed", exc_type=ImportError)

from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from deepep_train import ArgumentError  # noqa: E402
from deepep_train.megatron import dispatcher  # noqa: E402

PARALLEL = {"ep 2": (1, 2), "tp 2": (2, 1), "tp 2, ep 2": (2, 2), "ep 4": (1, 4)}


def close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    """To float32 rounding: relative to the tensor's norm."""
    assert got.keys() == expected.keys(), what
    for name, a in got.items():
        b = expected[name]
        assert a.shape == b.shape, f"{what} {name}"
        assert (a - b).norm() <= 1e-6 * b.norm() + 1e-12, f"{what} {name}: {(a - b).norm() / b.norm():.1e}"


def compare(setup: Any, lengths: tuple[int, ...] = (8, 8, 8, 8), stock: tuple[str, ...] = ("alltoall",)) -> list[Any]:
    dispatchers = [small.OURS, *(small.STOCK[name] for name in stock)]
    size = setup.tp * setup.ep * setup.pp
    results = run_ranks(size, small.layer_steps, setup, dispatchers, lengths[:size], timeout=120)
    for rank, (ours, *others) in enumerate(results):
        for name, other in zip(stock, others, strict=True):
            close(ours, other, f"rank {rank}, against {name}:")
    return results


@pytest.mark.parametrize("parallel", PARALLEL.values(), ids=PARALLEL.keys())
def test_equals_alltoall_and_allgather(parallel: tuple[int, int]) -> None:
    tp, ep = parallel
    # With both, alltoall gathers uneven parts over tensor parallel ranks, which gloo does not do.
    stock = ("allgather",) if tp * ep == 4 and tp > 1 else ("alltoall", "allgather")
    compare(small.Setup(tp=tp, ep=ep, config={"moe_router_topk": 4}), stock=stock)


@pytest.mark.parametrize("ep", [2, 4])
def test_is_bit_equal_to_alltoall_at_top_2(ep: int) -> None:
    for ours, theirs in compare(small.Setup(ep=ep)):
        for name, a in ours.items():
            assert_same_bits(a, theirs[name], name)


VARIANTS: dict[str, dict[str, Any]] = {
    "capacity 0.5, dropping": {"moe_expert_capacity_factor": 0.5},
    "capacity 1.5": {"moe_expert_capacity_factor": 1.5, "moe_token_drop_policy": "position"},
    "padded to capacity": {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True},
    "router in fp32": {"moe_router_dtype": "fp32"},
    "router in fp64": {"moe_router_dtype": "fp64"},
    "sequence aux loss": {"moe_router_load_balancing_type": "seq_aux_loss"},
    "global aux loss": {"moe_router_load_balancing_type": "global_aux_loss"},
    "z loss": {"moe_z_loss_coeff": 0.1},
    "sigmoid, bias, groups": {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
    },
    "probabilities on the input": {"moe_router_topk": 1, "moe_apply_probs_on_input": True, "moe_router_pre_softmax": True},
    "shared experts": {"moe_shared_expert_intermediate_size": 24},
    "shared experts, overlapped": {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_overlap": True},
    "recomputed": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "one expert a rank": {"num_moe_experts": 2, "moe_router_topk": 1, "moe_router_pre_softmax": True},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_features_give_what_they_give_with_alltoall(variant: dict[str, Any]) -> None:
    small.skip_what_this_release_refuses(variant)
    compare(small.Setup(config=variant))


class PaddedForQuantization(small.Setup):
    """The fields are set behind Megatron's own checks, which want Transformer Engine; SequentialMLP does without it."""

    def transformer_config(self, given: dict[str, Any]) -> TransformerConfig:
        config = super().transformer_config(given)
        config.fp8, config.fp8_recipe, config.moe_router_padding_for_quantization = "e4m3", "blockwise", True
        return config


def test_padding_for_quantization_changes_nothing() -> None:
    compare(PaddedForQuantization(), (24, 24))


def test_uneven_token_counts() -> None:
    compare(small.Setup(), (3, 9))


def no_tokens(rank: int, size: int, group: Any) -> None:
    """Megatron's router refuses none, but a dispatcher need not."""
    setup = small.Setup()
    with setup.parallel():
        dispatcher = small.layer_of(setup.transformer_config(small.OURS)).token_dispatcher
        tokens = 0 if rank == 0 else 6
        x = torch.randn(tokens, 1, small.HIDDEN, requires_grad=True)
        probs = torch.rand(tokens, 8, requires_grad=True)
        routing_map = torch.zeros(tokens, 8, dtype=torch.bool).index_fill_(1, torch.tensor([5]), True)  # of the last rank
        rows, weights = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(x, routing_map, probs))
        y, counts, weights = dispatcher.dispatch_postprocess(rows, weights)
        assert counts.tolist() == ([0, 0, 0, 0] if rank == 0 else [0, 6, 0, 0])
        z = dispatcher.combine_postprocess(dispatcher.token_combine(y * weights.unsqueeze(-1)))
        torch.testing.assert_close(z, x * probs[:, 5].view(-1, 1, 1))
        z.sum().backward()
        assert x.grad is not None


def test_a_rank_without_tokens() -> None:
    run_ranks(2, no_tokens, timeout=60)


def containers(rank: int, size: int, group: Any, setup: Any, config: dict[str, Any]) -> None:
    """What Megatron's own dispatcher tests ask: dispatch and combine with weights that sum to one give the tokens back, and so
    does the gradient."""
    with setup.parallel():
        setup.seed()
        layer = small.layer_of(setup.transformer_config(small.OURS | config))
        dispatcher = layer.token_dispatcher
        x = torch.randn(16, 4, small.HIDDEN, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        _, routing_map = layer.router(x)
        uniform = routing_map.float() / setup.transformer_config(small.OURS).moe_router_topk / setup.tp
        rows, weights = dispatcher.dispatch_preprocess(x, routing_map, uniform)
        rows, weights = dispatcher.token_dispatch(rows, weights)
        rows, tokens_per_expert, weights = dispatcher.dispatch_postprocess(rows, weights)
        assert not tokens_per_expert.is_cuda
        assert tokens_per_expert.dtype == torch.int64
        assert int(tokens_per_expert.sum()) == rows.size(0) == weights.numel()
        assert not (tokens_per_expert % dispatcher.alignment).any()
        y = dispatcher.combine_preprocess(rows * weights.unsqueeze(-1))
        y = dispatcher.combine_postprocess(dispatcher.token_combine(y))
        kept = (uniform.sum(1) * setup.tp).view(16, 4, 1).detach()  # less than one where capacity dropped a pick
        torch.testing.assert_close(y, x * kept)
        y.backward(x.detach())
        torch.testing.assert_close(x.grad, x * kept)


@pytest.mark.parametrize("config", [{}, {"moe_expert_capacity_factor": 0.5}], ids=["dropless", "capacity"])
@pytest.mark.parametrize("parallel", PARALLEL.values(), ids=PARALLEL.keys())
def test_dispatch_and_combine_are_each_others_inverse(parallel: tuple[int, int], config: dict[str, Any]) -> None:
    tp, ep = parallel
    run_ranks(tp * ep, containers, small.Setup(tp=tp, ep=ep), config, timeout=90)


def padded(rank: int, size: int, group: Any) -> None:
    """Groups of rows are padded to what the FP8 recipe's grouped GEMM asks for."""
    setup = small.Setup()
    with setup.parallel():
        layer = small.layer_of(setup.transformer_config(small.OURS))
        layer.token_dispatcher.alignment = 16
        plain = small.layer_of(setup.transformer_config(small.OURS))
        plain.load_state_dict(layer.state_dict())
        x = torch.randn(5, 2, small.HIDDEN, generator=torch.Generator().manual_seed(rank))
        torch.testing.assert_close(layer(x)[0], plain(x)[0], rtol=1e-6, atol=1e-7)
        probs, routing_map = layer.router(x)
        dispatcher = layer.token_dispatcher
        rows, _ = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(x, routing_map, probs))
        assert not (dispatcher.tokens_per_expert % 16).any()
        assert int(dispatcher.tokens_per_expert.sum()) == rows.size(0)


def test_padding() -> None:
    run_ranks(2, padded, timeout=60)


def alignments(rank: int, size: int, group: Any) -> list[int]:
    from megatron.core.transformer.transformer_config import TransformerConfig

    setup, found = small.Setup(), []
    with setup.parallel():
        plain = setup.transformer_config(small.OURS)
        from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

        from deepep_train.megatron import TokenDispatcher

        for fp8, recipe in ((None, "delayed"), ("e4m3", "blockwise"), ("e4m3", "mxfp8")):
            config = object.__new__(TransformerConfig)
            vars(config).update(vars(plain) | {"fp8": fp8, "fp8_recipe": recipe})  # its own checks want Transformer Engine
            found.append(TokenDispatcher(4, list(range(4)), config, get_default_pg_collection()).alignment)
    return found


def test_alignment_comes_from_the_recipe() -> None:
    assert run_ranks(2, alignments, timeout=60) == [[1, 16, 32]] * 2


@pytest.mark.parametrize(
    ("engine", "width", "how"),
    [
        ("nvlink", 32, {}),
        ("nvlink", 8, {"moe_latent_size": 8}),
        ("collective", 0, {}),
        ("nvlink", 0, {"use_transformer_engine_op_fuser": False}),
        ("nvlink", 0, {"moe_grouped_gemm": False}),  # SequentialMLP takes no such argument; the fuser serves dense layers, too
        ("nvlink", 0, {"transformer_impl": "local"}),
    ],
)
def test_fused_experts_get_memory_that_peers_reach(engine: str, width: int, how: dict[str, Any]) -> None:
    """Their kernels need a GPU; here only what is asked of the buffer is looked at."""
    from deepep_train.megatron import TokenDispatcher

    asked: list[Any] = []
    buffer = SimpleNamespace(engine=engine, empty=lambda *given: asked.append(given) or "memory")
    fused = {"use_transformer_engine_op_fuser": True, "moe_grouped_gemm": True}
    config = SimpleNamespace(**({"hidden_size": 32, "params_dtype": torch.bfloat16} | fused | how))
    dispatcher = SimpleNamespace(config=config, buffer=buffer, handle=SimpleNamespace(plan=SimpleNamespace(num_rows=48)))
    found = TokenDispatcher.get_expert_zero_copy_buffers(dispatcher)
    assert found == (("memory", None) if width else (None, None))
    assert asked == ([((48, width), torch.bfloat16, "cuda")] if width else [])


def one_buffer(rank: int, size: int, group: Any) -> None:
    """Layers of a group share a buffer, and so do those of the next model."""
    setup = small.Setup()
    with setup.parallel():
        layers = [small.layer_of(setup.transformer_config(small.OURS)) for _ in range(3)]
        buffer = layers[0].token_dispatcher.buffer
        assert all(layer.token_dispatcher.buffer is buffer for layer in layers)
        # Two micro-batches in flight, backward in the other order.
        xs = [torch.randn(4, 2, small.HIDDEN, requires_grad=True) for _ in range(2)]
        ys = [layers[1](layers[0](x)[0])[0] for x in xs]
        for y in reversed(ys):
            y.sum().backward()
        del layers, xs, ys, y
        assert small.layer_of(setup.transformer_config(small.OURS)).token_dispatcher.buffer is buffer


def test_layers_share_a_buffer() -> None:
    run_ranks(2, one_buffer, timeout=60)


def refused(rank: int, size: int, group: Any) -> None:
    from megatron.core.transformer import enums

    is_new = hasattr(enums, "CudaGraphModule")  # from 0.18 on
    scopes, scopes_name = (
        (enums.CudaGraphModule, "cuda_graph_modules") if is_new else (enums.CudaGraphScope, "cuda_graph_scope")
    )
    setup = small.Setup()
    with setup.parallel():
        config = setup.transformer_config(small.OURS)
        graphs = [("local", []), ("transformer_engine", []), ("local", [scopes.attn, scopes.moe]), ("full_iteration", [])]
        for config.cuda_graph_impl, names in graphs:
            setattr(config, scopes_name, names)
            # By its text: before 0.18 Megatron makes another exception of the same type.
            field = "cuda_graph_impl" if config.cuda_graph_impl == "full_iteration" else scopes_name
            with pytest.raises(ArgumentError, match=f"^{field}="):
                small.layer_of(config)
        config.cuda_graph_impl = "none"  # Megatron's default, with which the names mean nothing
        setattr(config, scopes_name, [])
        small.layer_of(config)
        for config.moe_flex_dispatcher_num_sms in (0, -2, 2.5, "4"):
            with pytest.raises(ArgumentError, match=r"^moe_flex_dispatcher_num_sms "):
                small.layer_of(config)
        config.moe_flex_dispatcher_num_sms = 7
        config.cuda_graph_impl = "transformer_engine"
        setattr(config, scopes_name, [scopes.moe_router, scopes.moe_preprocess])
        layer = small.layer_of(config)
        with pytest.raises(ArgumentError, match="top_k=3 picks of 2 experts"):
            dispatcher.picks_of(torch.ones(4, 2, dtype=torch.bool), torch.ones(4, 2), 3)
        # What a graph of the preprocessing hands to the steps behind it.
        probs, routing_map = layer.router(torch.randn(4, 2, small.HIDDEN))
        layer.token_dispatcher.dispatch_preprocess(torch.randn(4, 2, small.HIDDEN), routing_map, probs)
        assert all(isinstance(getattr(layer.token_dispatcher, n), torch.Tensor) for n in layer.token_dispatcher.cudagraph_attrs)


def test_what_cannot_work_is_refused_at_construction() -> None:
    run_ranks(2, refused, timeout=60)


def sms(rank: int, size: int, group: Any) -> tuple[list[int], bool]:
    """The numbers of SMs that dispatch, combine and their backwards ask the engine for, and whether others got to know."""
    from deepep_train import Buffer

    setup = small.Setup(config={"moe_flex_dispatcher_num_sms": 7})
    with setup.parallel():
        layer = small.layer_of(setup.transformer_config(small.OURS))
        engine, asked = layer.token_dispatcher.buffer._engine, []

        def spied(stock: Any) -> Any:
            def spy(prepared: Any) -> Any:
                asked.append(prepared.require().num_sms)
                return stock(prepared)

            return spy

        for name in ("dispatch", "combine", "redispatch"):
            setattr(engine, name, spied(getattr(engine, name)))
        x = torch.randn(4, 2, small.HIDDEN, requires_grad=True)
        layer(x)[0].sum().backward()
        return asked, Buffer._sms_are_set


@pytest.mark.skipif(
    not hasattr(TransformerConfig, "moe_flex_dispatcher_num_sms"), reason="Megatron before 0.19 has no such field"
)
def test_num_sms_are_the_configurations() -> None:
    assert run_ranks(2, sms, timeout=60) == [([7, 7, 7, 7], False)] * 2
