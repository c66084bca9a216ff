"""`dispatch` and `combine`: differentiable, each the other's backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepep_train import checks, fp8
from deepep_train.buffer import Buffer, PayloadArgument
from deepep_train.derivatives import differentiable_once
from deepep_train.engines.base import Payload
from deepep_train.errors import ArgumentError
from deepep_train.fp8 import te
from deepep_train.handle import Handle
from deepep_train.scale_blocks import ScaleBlocks


class Dispatched(NamedTuple):
    """What arrived. N rows received, K top-k, M expert rows with padding, L local experts.

    Attributes:
        x: rank layout [N, hidden], by (source rank, token); expert layout [M, hidden], one row per (token, local expert),
            grouped by expert, each group by (source rank, token) and padded with zero rows. A pair if a pair was sent, an
            `fp8.Quantized` (a group of rows for each local expert in expert layout) if one was sent; of a Transformer Engine
            tensor one of its class in rank layout, a list with one for each local expert in expert layout.
        topk_idx: rank layout int64 [N, K] local expert numbers, -1 where the expert lives elsewhere; expert layout None.
        topk_weights: float32 [N, K], 0.0 where the expert lives elsewhere; expert layout [M], 0.0 on padding; None if none
            were sent.
        tokens_per_expert: int64 [L] on the CPU, rounded up to the alignment; with `num_worst_tokens` on x's device.
        handle: for `combine`, and for dispatching again along the same routing.
    """

    x: Any
    topk_idx: Tensor | None
    topk_weights: Tensor | None
    tokens_per_expert: Tensor
    handle: Handle


@torch._disable_dynamo  # collectives with data-dependent shapes: torch.compile breaks the graph here and compiles around it
def dispatch(
    x: PayloadArgument | fp8.Quantized,
    topk_idx: Tensor | None = None,
    topk_weights: Tensor | None = None,
    *,
    buffer: Buffer,
    num_experts: int | None = None,
    layout: str = "rank",
    alignment: int = 1,
    num_worst_tokens: int = 0,
    handle: Handle | None = None,
    num_sms: int = 0,
) -> Dispatched:
    """Send every token to the ranks of its experts; a collective call of the buffer's group.

    A row crosses to each rank once, bit for bit. Differentiable in `x` and `topk_weights`: the backward is `combine` of the
    gradients, and like it a collective call, so every rank must run it. The gradient comes in `x`'s dtype, summed in
    float32.

    Args:
        x: [T, hidden], bfloat16, float16, float32 or float64; an FP8 pair (data [T, hidden], scales [T, n] float32 or int32;
            uint8 on the collective engine only); what `fp8.quantize` made; a `fp8.Payload`, such a pair with the
            `fp8.ScaleBlocks` to put its scales into; or a Transformer Engine tensor: 1x128 block scaling, MXFP8, or
            per-tensor scaling with one scale on all ranks. T may differ between ranks and be 0. Quantized values have
            gradients in the dtype that was quantized.
        topk_idx: int64 [T, K] in [-1, num_experts); -1 is not routed. Expert e lives on rank e // (num_experts / ranks).
        topk_weights: float32 [T, K], or None.
        buffer: the group's buffer.
        num_experts: of all ranks together, divisible by their number.
        layout: "rank" or "expert", see `Dispatched`.
        alignment: each expert's count is rounded up to a multiple of it; in expert layout its group of rows is, too.
        num_worst_tokens: if not 0, `x` has exactly that many rows, zero rows at the end. Not in expert layout for what
            `fp8.quantize` or Transformer Engine made: where its scales stand depends on the counts.
        handle: of an earlier dispatch, whose routing and layout are used again; the top-k and `num_experts` stay None and so
            do the result's `topk_idx` and `topk_weights`.
        num_sms: SMs that this call and its backward may occupy; 0: `Buffer.set_num_sms`'s number, else the engine's own.

    Raises:
        ArgumentError: on every rank, if an argument is wrong on any of them or they disagree; names rank and argument.
        PeerTimeoutError: if a rank does not come.
    """
    if not isinstance(buffer, Buffer):
        raise ArgumentError(f"buffer must be a deepep_train.Buffer, got {checks.shown(buffer)}", "buffer")
    call = _DispatchCall(buffer, topk_idx, num_experts, layout, alignment, num_worst_tokens, handle, num_sms)
    if isinstance(x, fp8.Quantized) or te.is_te(x):
        rows, weights = _dispatch_quantized(x, topk_weights, call)
    else:
        is_pair = isinstance(x, Payload) or (isinstance(x, (tuple, list)) and len(x) == 2)
        data, scales = x[:2] if is_pair else (x, None)
        call.is_pair, call.blocks = is_pair, x.blocks if isinstance(x, Payload) else None
        data, scales, weights, _ = _Dispatch.apply(data, scales, topk_weights, call)
        rows = data if scales is None else (data, scales)
    assert call.handle is not None
    tokens_per_expert = call.handle.plan.tokens_per_expert.clone()  # the caller may do with it what he likes
    return Dispatched(rows, call.recv_topk_idx, weights, tokens_per_expert, call.handle)


def _dispatch_quantized(x: Any, topk_weights: Tensor | None, call: _DispatchCall) -> tuple[Any, Tensor | None]:
    source = None
    try:
        q = x if isinstance(x, fp8.Quantized) else te.from_te(x)
        q.check("x")
        checks.need(len(q.splits) == 1, "x", "one group of rows", q.splits)
        call.wire, call.recipe = q.to_wire(), q.agreement()
        call.quantized, source = q, q.rows
    except Exception as error:  # noqa: BLE001 - whatever it is, the peers must hear of it
        call.refused = error
    rows, scales, weights, data = _Dispatch.apply(source, None, topk_weights, call)
    assert call.quantized is not None and call.handle is not None
    plan = call.handle.plan
    splits = plan.tokens_per_expert.tolist() if plan.layout == "expert" else [plan.num_rows]
    got = call.quantized.arrived(Payload(data, scales), tuple(splits), rows)
    if isinstance(x, fp8.Quantized):
        return got, weights
    tensors = te.to_te(got, x)
    return tensors if plan.layout == "expert" else tensors[0], weights


@torch._disable_dynamo
def combine(
    y: Tensor,
    handle: Handle,
    *,
    bias: Tensor | tuple[Tensor, Tensor] | None = None,
    grad_dtype: torch.dtype | None = None,
    num_sms: int = 0,
) -> Tensor:
    """Bring every token's rows back to its rank and sum them, unweighted; a collective call of the group.

    Additions are in float32 (float64 for float64) from +0.0: the bias, then by ascending rank, rounded once to `y`'s dtype.
    In expert layout each rank first adds a token's rows by ascending local expert and rounds that sum to `y`'s dtype. With
    `buffer.two_level` each node's ranks are added and rounded first, then, after the bias, the nodes.
    Differentiable in `y` and `bias`; the backward is a dispatch of the gradient along the handle's routing.

    Args:
        y: [rows of the dispatch, any hidden size], bfloat16, float16, float32 or float64.
        handle: `Dispatched.handle`.
        bias: one or two tensors [T, hidden] of y's dtype.
        grad_dtype: what the backward sends: None the gradient as it is; torch.float8_e4m3fn or float8_e5m2 the gradient
            quantized once, in 1x128 blocks with power-of-two scales, so that `y`'s gradient has FP8's error (docs/fp8.md); what
            is infinite arrives finite, NaN as NaN. A recipe's own choice is `fp8.Recipe.grad_dtype`.
            Wants a hidden size that is a multiple of 128. The same on all ranks.
        num_sms: as in `dispatch`.

    Returns:
        z: [T, hidden] in y's dtype, zeros for a token that was routed nowhere.

    Raises:
        ArgumentError: if an argument is wrong; on every rank where the engine can tell them in time.
        PeerTimeoutError: if a rank does not come.
    """
    if not isinstance(handle, Handle):
        raise ArgumentError(f"handle must be what deepep_train.dispatch returned, got {checks.shown(handle)}", "handle")
    biases = bias if isinstance(bias, (tuple, list)) else (bias,)
    return _Combine.apply(y, handle, grad_dtype, num_sms, *biases)


@dataclass
class _DispatchCall:
    """The arguments that carry no gradient, and what comes back besides differentiable tensors."""

    buffer: Buffer
    topk_idx: Tensor | None
    num_experts: int | None
    layout: str
    alignment: int
    num_worst_tokens: int
    handle: Handle | None
    num_sms: int
    recv_topk_idx: Tensor | None = None
    quantized: fp8.Quantized | None = None
    wire: Payload | None = None  # of `quantized`
    recipe: str = ""  # its agreement
    is_pair: bool = False
    blocks: ScaleBlocks | None = None  # asked for by a pair
    refused: Exception | None = None  # why a quantized `x` cannot be sent: raised where the peers hear of it

    @property
    def has_blocks(self) -> bool:
        return self.quantized is not None or self.blocks is not None

    def check_quantized(self, layout: Any, num_worst_tokens: Any) -> None:
        if self.refused is None and self.has_blocks and layout == "expert":
            what = "0 in expert layout where scales go into experts' blocks"
            checks.need(num_worst_tokens == 0, "num_worst_tokens", what, num_worst_tokens)
        if self.refused is not None:
            raise self.refused

    def check_against_handle(self) -> None:
        """A handle fixes the layout: other arguments may be left out or repeat it."""
        if not isinstance(self.handle, Handle):
            return  # refused elsewhere
        plan = self.handle.plan
        given = (
            ("layout", self.layout, "rank", plan.layout),
            ("alignment", self.alignment, 1, plan.alignment),
            ("num_worst_tokens", self.num_worst_tokens, 0, plan.num_rows),
        )
        for name, value, default, fixed in given:
            checks.need(value in (default, fixed), name, f"left out or the handle's own, {fixed!r}", value)
        self.check_quantized("rank", 0)
        if self.has_blocks and plan.layout == "expert":
            fits = int(plan.tokens_per_expert.sum()) == plan.num_rows
            checks.need(
                fits, "handle", "without num_worst_tokens in expert layout where scales go into experts' blocks", self.handle
            )


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, data: Any, scales: Any, topk_weights: Any, call: _DispatchCall) -> tuple:
        quantized = call.quantized
        x = call.wire if call.wire is not None else Payload(data, scales, call.blocks) if call.is_pair else data
        call.wire = None
        if call.handle is not None:
            payload = call.buffer.redispatch(
                x,
                call.handle,
                call.topk_idx,
                topk_weights,
                call.num_experts,
                also=call.check_against_handle,
                num_sms=call.num_sms,
                recipe=call.recipe,
            )
            weights = None
        else:
            payload, weights = _dispatch_fresh(x, topk_weights, call)
        assert call.handle is not None
        ctx.handle, ctx.num_sms = call.handle, call.num_sms
        if weights is not None and call.handle.plan.layout == "rank":
            # The caller has it, too: saved so, autograd notices if it is written to before the backward pass reads it.
            assert call.handle.plan.recv_topk_idx is not None
            ctx.save_for_backward(call.handle.plan.recv_topk_idx)
        if payload.scales is not None:
            ctx.mark_non_differentiable(payload.scales)
        if quantized is None:
            return payload.data, payload.scales, weights, None
        ctx.mark_non_differentiable(payload.data, payload.scales)
        rows = fp8.placeholder(payload.data.size(0), payload.data.size(1), quantized.dtype, payload.data.device)
        return rows, payload.scales, weights, payload.data

    @staticmethod
    def backward(ctx: Any, grad_data: Tensor, _: Any, grad_weights: Tensor | None, __: Any) -> tuple:
        handle: Handle = ctx.handle
        with torch.no_grad():
            if grad_weights is not None and handle.plan.layout == "rank":
                # The weights of experts that live elsewhere are constants, whatever the caller did with them.
                (recv_topk_idx,) = ctx.saved_tensors
                grad_weights = grad_weights.masked_fill(recv_topk_idx < 0, 0.0)
            grad_x, grad_w = handle.buffer.combine_rows(grad_data, handle, grad_weights, num_sms=ctx.num_sms)
        return (
            differentiable_once("dispatch", grad_x, grad_data),
            None,
            differentiable_once("dispatch", grad_w, grad_data),
            None,
        )


def _dispatch_fresh(x: Any, topk_weights: Any, call: _DispatchCall) -> tuple[Payload, Tensor | None]:
    try:
        call.check_quantized(call.layout, call.num_worst_tokens)
    except Exception as error:  # noqa: BLE001 - whatever it is, the peers must hear of it
        call.buffer.refuse_dispatch(error)
    got = call.buffer.route_and_dispatch(
        x,
        call.topk_idx,
        topk_weights,
        call.num_experts,
        call.layout,
        call.alignment,
        call.num_worst_tokens,
        call.recipe,
        call.num_sms,
    )
    call.handle, call.recv_topk_idx = Handle(got.tensors, got.plan, call.buffer), got.topk_idx
    return got.payload, got.topk_weights


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Any, handle: Handle, grad_dtype: torch.dtype | None, num_sms: int, *biases: Any) -> Tensor:
        ctx.handle, ctx.grad_dtype, ctx.num_sms = handle, grad_dtype, num_sms
        given = tuple(b for b in biases if b is not None)

        def check() -> None:
            if grad_dtype is not None:
                is_fp8 = grad_dtype in fp8.DTYPES
                checks.need(is_fp8, "grad_dtype", "None, torch.float8_e4m3fn or torch.float8_e5m2", grad_dtype)
                fits = isinstance(y, Tensor) and y.dim() == 2 and y.size(1) % fp8.HIDDEN_MULTIPLE == 0
                checks.need(fits, "y", f"[rows, a multiple of {fp8.HIDDEN_MULTIPLE}] with grad_dtype", y)

        return handle.buffer.combine_rows(y, handle, None, given or None, argument="y", also=check, num_sms=num_sms)[0]

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple:
        with torch.no_grad():
            grad_y = _send_gradient(grad_z, ctx.handle, ctx.grad_dtype, ctx.num_sms)
        biases = [grad_z if needed else None for needed in ctx.needs_input_grad[4:]]
        return differentiable_once("combine", grad_y, grad_z), None, None, None, *biases


def _send_gradient(grad: Tensor, handle: Handle, grad_dtype: torch.dtype | None, num_sms: int) -> Tensor:
    """Dispatch a gradient along the handle's routing, by way of FP8 if asked to."""
    if grad_dtype is None:
        return handle.buffer.redispatch(grad, handle, num_sms=num_sms).data
    q = fp8.quantize(grad.to(torch.float32), fp8.Recipe.BLOCK, fp8_dtype=grad_dtype)
    data, scales = handle.buffer.redispatch(Payload(*q.to_wire()[:2]), handle, num_sms=num_sms, recipe=q.agreement())[:2]
    assert scales is not None
    return fp8.dequantize_blocks(data, scales, grad.dtype)  # by rows as they came: nothing but this reads the scales
