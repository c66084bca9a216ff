"""Megatron's token dispatcher on this library's expert layout.

Rows arrive grouped by expert and padded, so nothing is permuted before the experts, and combine takes their output as it is.

Shape letters: T tokens of this rank, E experts, K picks of a token, H hidden, M received rows with padding.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor

from deepep_train import checks, fp8, ops
from deepep_train.errors import ArgumentError
from deepep_train.group_buffers import buffer_of
from deepep_train.handle import Handle
from deepep_train.megatron import quantized_experts
from deepep_train.megatron.switches import gradient_dtype, wants_fp8_dispatch


class TokenDispatcher(MoETokenDispatcher):
    """What `MoELayer` calls between its router and its experts; `install()` makes Megatron build it.

    Expert tensor parallelism is folded into the group, as in Megatron's flex dispatcher: the ranks of an expert's tensor
    parallel group each get its tokens, and combine adds up their partial outputs.

    Args:
        num_local_experts, local_expert_indices, config, pg_collection: as Megatron passes them.

    Raises:
        ArgumentError: if the configuration asks for what cannot work, naming the field.
    """

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: Any,
        pg_collection: Any = None,
        **_: Any,  # of later releases
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        _check(config)
        self.num_local_experts = num_local_experts
        self.local_expert_indices = local_expert_indices
        # Before 0.18 Megatron names a size even where nothing is quantized.
        is_padded = config.fp8 or config.fp4 or getattr(config, "use_transformer_engine_op_fuser", False)
        self.alignment = get_align_size_for_quantization(config) if is_padded else 1
        self.num_sms: int = getattr(config, "moe_flex_dispatcher_num_sms", None) or 0  # from 0.19 on
        self.buffer = buffer_of(self.tp_ep_group)
        self.may_send_fp8 = _may_send_fp8(config)
        self.fp8_gradient_dtype = gradient_dtype(config)
        # What a forward pass leaves for its later steps.
        self.hidden_shape: torch.Size | None = None
        self.topk_idx: Tensor | None = None
        self.tokens_per_expert: Tensor | None = None
        self.handle: Handle | None = None
        self.received: fp8.Quantized | None = None
        self.grad_dtype: torch.dtype | None = None
        self.cudagraph_attrs = ["topk_idx"]

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """hidden_states [..., H], routing_map bool [T, E], probs [T, E] -> rows [T, H], weights float32 [T, K * expert TP]."""
        self.hidden_shape = hidden_states.shape
        if self.config.moe_pad_expert_input_to_capacity:
            routing_map = routing_map.bool() & (probs != 0)  # picks that only fill experts up; dispatch pads by itself
        idx, weights = picks_of(routing_map, probs, self.config.moe_router_topk)
        self.topk_idx = _on_every_tp_rank(idx, self.num_local_experts, self.tp_size)
        return hidden_states.reshape(-1, hidden_states.size(-1)), weights.float().repeat(1, self.tp_size)

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H], [T, K] -> rows by expert [M, H] and their weights float32 [M]. Under an FP8 recipe with scales by blocks the
        rows cross in FP8; what is returned then only stands for them, until `dispatch_postprocess`."""
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        # Asked again each time: without what `install` puts in place, experts would compute with what stands for the rows.
        may_send_fp8 = self.may_send_fp8 and quantized_experts.is_installed()
        how = quantized_experts.settings() if may_send_fp8 else None
        sent = hidden_states if how is None else fp8.quantize(hidden_states, **how._asdict())
        out = ops.dispatch(
            sent,
            self.topk_idx,
            probs,
            buffer=self.buffer,
            num_experts=self.buffer.group_size * self.num_local_experts,
            layout="expert",
            alignment=self.alignment,
            num_sms=self.num_sms,
        )
        self.topk_idx, self.handle, self.tokens_per_expert = None, out.handle, out.tokens_per_expert
        self.received = None if how is None else out.x
        self.grad_dtype = None if how is None else self.fp8_gradient_dtype
        rows = out.x if how is None else out.x.rows
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states, wait_current_stream=False)
            self.shared_experts.linear_fc1_forward_and_act(rows)
        assert out.topk_weights is not None
        return rows, out.topk_weights

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rows as they are, tokens per local expert (int64, on the CPU, padding counted in), the weights as they are."""
        assert self.tokens_per_expert is not None
        if self.config.moe_router_dtype == "fp64":
            probs = probs.double()
        if self.received is not None:
            hidden_states, self.received = quantized_experts.carry(hidden_states, self.received), None
        return hidden_states, self.tokens_per_expert, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The experts' output [M, H] as it is."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """[M, H] -> the sums of every token's rows [T, H]."""
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        handle, self.handle = self.handle, None  # kept by autograd as long as a backward needs it
        assert handle is not None, "token_combine without a token_dispatch before it"
        return ops.combine(hidden_states, handle, grad_dtype=self.grad_dtype, num_sms=self.num_sms)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """[T, H] -> the shape that came, the overlapped shared experts' output added."""
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(hidden_states)
            self.shared_experts.post_forward_comm()
            hidden_states = hidden_states + self.shared_experts.get_output()
        assert self.hidden_shape is not None
        return hidden_states.view(self.hidden_shape)

    def get_expert_zero_copy_buffers(self) -> tuple[Tensor | None, Tensor | None]:
        """Memory that peers read from, for the output of experts that can write to a given place: Transformer Engine's fused
        ones. (The gradient of their input would have to be kept from the forward pass on, for one copy saved.)"""
        is_fused = getattr(self.config, "use_transformer_engine_op_fuser", False) and _has_te_experts(self.config)
        if self.handle is None or not is_fused or self.buffer.engine == "collective":
            return None, None
        width = getattr(self.config, "moe_latent_size", None) or self.config.hidden_size
        return self.buffer.empty((self.handle.plan.num_rows, width), self.config.params_dtype, "cuda"), None


def picks_of(routing_map: Tensor, probs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Megatron's dense routing as picks.

    Args:
        routing_map: bool [T, E], at most `top_k` per row.
        probs: [T, E].

    Returns:
        topk_idx int64 [T, K], experts ascending, -1 behind the last; their probabilities [T, K], 0 there, differentiable.
    """
    num_experts = routing_map.size(1)
    if num_experts < top_k:
        raise ArgumentError(f"top_k={top_k} picks of {num_experts} experts", "top_k")
    # The lower an expert, the larger its number here, so that the largest come in ascending order of experts.
    falling = torch.arange(num_experts, 0, -1, device=routing_map.device)
    found = torch.where(routing_map.bool(), falling, 0).topk(top_k, dim=1).values
    idx = torch.where(found > 0, num_experts - found, -1)
    return idx, probs.gather(1, idx.clamp(min=0)).masked_fill(idx < 0, 0.0)


def _on_every_tp_rank(idx: Tensor, num_local_experts: int, tp_size: int) -> Tensor:
    """Picks of experts as picks of their shards: the group's rank is (expert-parallel rank, tensor-parallel rank)."""
    if tp_size == 1:
        return idx
    first = idx // num_local_experts * tp_size * num_local_experts + idx % num_local_experts
    shards = [torch.where(idx < 0, -1, first + tp * num_local_experts) for tp in range(tp_size)]
    return torch.cat(shards, dim=1)


def _has_te_experts(config: Any) -> bool:
    """Whether the configuration asks for Megatron's TEGroupedMLP, as far as it says: specifications of layers may differ."""
    is_grouped = config.moe_grouped_gemm and not getattr(config, "moe_use_legacy_grouped_gemm", False)
    return is_grouped and getattr(config, "transformer_impl", "transformer_engine") == "transformer_engine"


def _may_send_fp8(config: Any) -> bool:
    """Whether the experts are Transformer Engine's GroupedLinear, fed with the rows as they come, when a recipe quantizes."""
    is_fused = getattr(config, "use_transformer_engine_op_fuser", False)
    # Megatron then passes the rows through functions of its own, which return tensors that carry nothing.
    offloads = getattr(config, "fine_grained_activation_offloading", False)
    is_offloaded = offloads and "expert_fc1" in (getattr(config, "offload_modules", None) or [])
    width = getattr(config, "moe_latent_size", None) or config.hidden_size
    return bool(
        config.fp8
        and wants_fp8_dispatch(config)
        and _has_te_experts(config)
        and not (is_fused or is_offloaded or config.moe_apply_probs_on_input)
        and width % fp8.HIDDEN_MULTIPLE == 0
    )


def _check(config: Any) -> None:
    """Refuse what cannot work, naming the field."""
    num_sms = getattr(config, "moe_flex_dispatcher_num_sms", None)
    if num_sms is not None:
        checks.integer(num_sms, "moe_flex_dispatcher_num_sms", 1)
    how = getattr(config, "cuda_graph_impl", None) or "none"
    if how == "none":
        return
    # A graph needs shapes that no routing changes; this dispatcher's rows are as many as were routed here.
    served = 'the deepep_train backend serves graphs of parts of a layer: of "moe_router" and "moe_preprocess", not of'
    if how == "full_iteration":
        raise ArgumentError(f'cuda_graph_impl="full_iteration": {served} the full iteration', "cuda_graph_impl")
    field = "cuda_graph_modules" if hasattr(config, "cuda_graph_modules") else "cuda_graph_scope"  # before 0.18
    scopes = getattr(config, field, None) or []
    names = [getattr(scope, "name", scope) for scope in (scopes if isinstance(scopes, (list, tuple)) else [scopes])]
    if not names or {"full", "moe", "full_iteration"} & set(names):
        raise ArgumentError(
            f'{field}={names} with cuda_graph_impl="{how}" captures the whole MoE layer (no name means all of it); {served} '
            "what changes its shape with the routing",
            field,
        )
