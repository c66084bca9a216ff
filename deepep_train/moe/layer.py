"""`MoELayer`: router, dispatch, experts, combine."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from deepep_train import checks, fp8
from deepep_train.buffer import Buffer
from deepep_train.engines.low_latency_arguments import Shape
from deepep_train.errors import ArgumentError
from deepep_train.group_buffers import buffer_of
from deepep_train.moe.experts import GroupedExperts, swiglu
from deepep_train.moe.router import TopKRouter, picks_per_expert
from deepep_train.ops import combine, dispatch

_FP8_ALIGNMENT = {fp8.Recipe.BLOCK: 16, fp8.Recipe.MXFP8: 32}


class LoadBalance(NamedTuple):
    """How evenly experts were picked.

    Attributes:
        picks_per_expert: int64 [E], since the last reset.
        max_over_mean: the busiest expert's picks over the mean; 1.0 is perfect.
        aux_loss: the balance loss of the last forward pass, before its coefficient.
    """

    picks_per_expert: Tensor
    max_over_mean: float
    aux_loss: float


class MoELayer(nn.Module):
    """A Mixture-of-Experts feed-forward layer whose experts are spread over the ranks of a group.

    Every rank calls it with its own tokens; tokens travel to their experts' ranks and back. It replaces a transformer's
    feed-forward block: [..., hidden_size] -> [..., hidden_size]. Construction is a collective call of the group.

    The gradients of expert parameters are sums over the group's tokens, those of the other parameters are local: see
    `deepep_train.moe.reduce_gradients`.

    Args:
        hidden_size, ffn_hidden_size: of each expert.
        num_experts: of all ranks together; divisible by the group's size.
        top_k: experts per token.
        group: the expert-parallel group; None for the default group, or this process alone without torch.distributed.
        buffer: the `Buffer` to use; None shares one among all layers of the group, or, across nodes, among those that are
            `low_latency` and among those that are not.
        score_function, normalize_weights, scaling_factor, num_groups, num_limited_groups: see `TopKRouter`.
        aux_loss_coeff: weight of the balance loss. Its gradient is added during the backward pass, so it needs no place in
            the training loss and survives activation checkpointing; multiply it through `aux_loss_scale`.
        bias_update_rate: step of the loss-free balancing bias, applied by `update_expert_bias`; 0.0 for no bias.
        activation: "swiglu" or "gelu".
        num_shared_experts: experts that every token visits besides, held by every rank, as wide as so many routed ones.
        low_latency: in `eval()` without gradients, exchange tokens by DeepEP V1's low-latency calls, for small batches such as
            decoding's; rows then travel as bfloat16. All ranks must be in eval mode together. Where the group has low-latency
            kernels, their limits hold: `hidden_size` a multiple of 128 up to 16384, `top_k` up to 16, `num_experts` up to 1024,
            `low_latency_tokens` up to 65536.
        low_latency_tokens: the most tokens of a rank in such a pass; the same on all ranks, memory grows with it.
        alignment: groups of rows are padded to a multiple of it; None takes what grouped matmul wants (16 on CUDA, else 1; 16
            with `fp8_recipe` BLOCK, 32 with MXFP8).
        fp8_recipe: BLOCK or MXFP8: tokens are quantized before the dispatch and the experts compute in FP8; both sizes must
            be multiples of 128. None: neither.
        grad_dtype: what combine's backward sends, see `deepep_train.combine`; "recipe" with `fp8_recipe`: its `grad_dtype`.
        delay_wgrad: with `fp8_recipe`, the experts' weight gradients wait for `backward_dw`.
        dtype, device: of the experts; the router stays in float32.

    Attributes:
        aux_loss_scale: multiplies the balance loss's gradient. Set it to 1 / accumulation steps, times the loss scale if a
            GradScaler is used.
    """

    _picks: Tensor
    _picks_at_update: Tensor

    def __init__(
        self,
        hidden_size: int,
        ffn_hidden_size: int,
        num_experts: int,
        top_k: int,
        group: dist.ProcessGroup | None = None,
        *,
        buffer: Buffer | None = None,
        score_function: str = "softmax",
        normalize_weights: bool = True,
        scaling_factor: float = 1.0,
        num_groups: int = 1,
        num_limited_groups: int | None = None,
        aux_loss_coeff: float = 0.0,
        bias_update_rate: float = 0.0,
        activation: str = "swiglu",
        num_shared_experts: int = 0,
        low_latency: bool = False,
        low_latency_tokens: int = 128,
        alignment: int | None = None,
        fp8_recipe: fp8.Recipe | None = None,
        grad_dtype: torch.dtype | Literal["recipe"] | None = None,
        delay_wgrad: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("hidden_size", hidden_size, 1),
            ("ffn_hidden_size", ffn_hidden_size, 1),
            ("top_k", top_k, 1),
            ("num_shared_experts", num_shared_experts, 0),
            ("low_latency_tokens", low_latency_tokens, 1),
            ("num_groups", num_groups, 1),
            ("num_limited_groups", num_groups if num_limited_groups is None else num_limited_groups, 1),
            ("alignment", 1 if alignment is None else alignment, 1),
        ):
            checks.integer(value, name, least)
        for name, weight in (("aux_loss_coeff", aux_loss_coeff), ("bias_update_rate", bias_update_rate)):
            checks.number(weight, name)
        checks.number(scaling_factor, "scaling_factor")
        checks.flag(low_latency, "low_latency")
        checks.need(fp8_recipe is None or not low_latency, "low_latency", "False with fp8_recipe", low_latency)
        checks.need(dtype is None or dtype.is_floating_point, "dtype", "a floating dtype", dtype)
        if fp8_recipe is not None:
            is_served = fp8_recipe in _FP8_ALIGNMENT
            checks.need(is_served, "fp8_recipe", "None, fp8.Recipe.BLOCK or fp8.Recipe.MXFP8", fp8_recipe)
            for name, value in (("hidden_size", hidden_size), ("ffn_hidden_size", ffn_hidden_size)):
                checks.need(value % fp8.HIDDEN_MULTIPLE == 0, name, f"a multiple of {fp8.HIDDEN_MULTIPLE} in FP8", value)
            least = _FP8_ALIGNMENT[fp8_recipe]
            alignment = least if alignment is None else alignment
            checks.need(alignment % least == 0, "alignment", f"a multiple of {least} under {fp8_recipe}", alignment)
            params = torch.get_default_dtype() if dtype is None else dtype
            checks.need(params in fp8.FLOATS, "dtype", "bfloat16, float16 or float32 with fp8_recipe", params)
        checks.need(fp8_recipe is not None or not delay_wgrad, "delay_wgrad", "False without fp8_recipe", delay_wgrad)
        choices = (None, *fp8.DTYPES) if fp8_recipe is None else (None, *fp8.DTYPES, "recipe")
        checks.need(grad_dtype in choices, "grad_dtype", f"one of {', '.join(map(str, choices))}", grad_dtype)
        if grad_dtype == "recipe":
            assert fp8_recipe is not None
            grad_dtype = fp8_recipe.grad_dtype
        if buffer is not None and group is not None and buffer.group is not group:
            raise ArgumentError("buffer belongs to another group than the group given", "buffer")
        self.buffer = buffer if buffer is not None else buffer_of(group, low_latency)
        checks.experts(num_experts, self.buffer.group_size)
        if low_latency:
            names = ("low_latency_tokens", "hidden_size", "num_experts", "top_k")
            self.buffer.check_low_latency_limits(Shape(low_latency_tokens, hidden_size, num_experts, top_k), names)
        num_local_experts = num_experts // self.buffer.group_size
        self.num_experts, self.top_k, self.alignment = num_experts, top_k, alignment
        self.hidden_size = hidden_size
        self.low_latency, self.low_latency_tokens = low_latency, low_latency_tokens
        self.fp8_recipe, self.grad_dtype = fp8_recipe, grad_dtype
        self.aux_loss_coeff, self.aux_loss_scale = aux_loss_coeff, 1.0
        self.bias_update_rate = bias_update_rate
        self.router = TopKRouter(
            hidden_size,
            num_experts,
            top_k,
            score_function=score_function,
            normalize_weights=normalize_weights,
            scaling_factor=scaling_factor,
            num_groups=num_groups,
            num_limited_groups=num_limited_groups,
            use_bias=bias_update_rate > 0,
            device=device,
        )
        self.experts = GroupedExperts(
            num_local_experts,
            hidden_size,
            ffn_hidden_size,
            first_expert=self.buffer.rank * num_local_experts,
            activation=activation,
            dtype=dtype,
            device=device,
        )
        self.experts.delayed = [] if delay_wgrad else None
        self.shared_experts: nn.Module | None = None
        if num_shared_experts:
            width = ffn_hidden_size * num_shared_experts
            self.shared_experts = _SharedExperts(hidden_size, width, activation, dtype, device)
        for name in ("_picks", "_picks_at_update"):
            self.register_buffer(name, torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)
        self._last_aux_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]; a collective call of the group, any number of tokens, none included."""
        hurries = self.low_latency and not self.training and not torch.is_grad_enabled()
        try:
            self._check_input(x)
        except ArgumentError as error:
            if hurries:
                self.buffer.refuse_low_latency_dispatch(error)
            self.buffer.refuse_dispatch(error)  # where the other ranks wait for this one
        x_TH = x.reshape(-1, self.hidden_size)
        topk_idx, weights_TK, aux_loss = self.router(x_TH)
        if self.training:
            with torch.no_grad():
                self._picks += picks_per_expert(topk_idx, self.num_experts)
        self._last_aux_loss = aux_loss.detach()
        if self.aux_loss_coeff and self.training and torch.is_grad_enabled():
            weights_TK = _AttachLoss.apply(weights_TK, aux_loss, self.aux_loss_coeff * self.aux_loss_scale)
        z_TH = (self._exchange_hurriedly if hurries else self._exchange)(x_TH, topk_idx, weights_TK)
        if self.shared_experts is not None:
            z_TH = z_TH + self.shared_experts(x_TH)
        return z_TH.view(x.shape)

    def _exchange(self, x_TH: Tensor, topk_idx: Tensor, weights_TK: Tensor) -> Tensor:
        """What the experts make of the tokens."""
        alignment = self.alignment or (16 if x_TH.is_cuda else 1)
        sent: Tensor | fp8.Quantized = x_TH
        if self.fp8_recipe is not None:
            try:
                sent = fp8.quantize(self._in_experts_dtype(x_TH), self.fp8_recipe)
            except Exception as error:  # noqa: BLE001 - out of memory, too
                self.buffer.refuse_dispatch(error)  # where the other ranks wait for this one
        got = dispatch(
            sent, topk_idx, weights_TK, buffer=self.buffer, num_experts=self.num_experts, layout="expert", alignment=alignment
        )
        y_MH = self.experts(got.x, got.tokens_per_expert, got.topk_weights)
        return combine(y_MH, got.handle, grad_dtype=self.grad_dtype)

    def _exchange_hurriedly(self, x_TH: Tensor, topk_idx: Tensor, weights_TK: Tensor) -> Tensor:
        """The same by the low-latency calls. The CPU waits for the counts, so that the experts see the rows alone."""
        most, dtype = self.low_latency_tokens, x_TH.dtype
        got = self.buffer.low_latency_dispatch(x_TH.to(torch.bfloat16), topk_idx, most, self.num_experts, use_fp8=False)
        recv, recv_count, handle = got[:3]
        assert isinstance(recv, Tensor)
        counts = recv_count.tolist()
        rows = torch.cat([recv[e, :n] for e, n in enumerate(counts)]).to(self.experts.w1.dtype)
        results = self.experts(rows, torch.tensor(counts)).to(torch.bfloat16)
        y = self.buffer.get_next_low_latency_combine_buffer(handle)
        for e, group in enumerate(results.split(counts)):
            y[e, : len(group)] = group
        return self.buffer.low_latency_combine(y, topk_idx, weights_TK.float(), handle, zero_copy=True)[0].to(dtype)

    def backward_dw(self) -> None:
        """Compute the experts' weight gradients that `delay_wgrad` put off, in the order of the backward passes."""
        waiting = self.experts.delayed or []
        while waiting:
            waiting.pop(0)()

    @staticmethod
    def _in_experts_dtype(x: Tensor) -> Tensor:
        is_autocast = torch.is_autocast_enabled(x.device.type)
        return x.to(torch.get_autocast_dtype(x.device.type)) if is_autocast else x

    def _check_input(self, x: Any) -> None:
        fits = isinstance(x, Tensor) and x.dim() >= 1 and x.size(-1) == self.hidden_size
        checks.need(fits, "x", f"a tensor [..., hidden_size={self.hidden_size}]", x)
        weights = self.experts.w1
        checks.need(x.device == weights.device, "x", f"on {weights.device}, as the experts", x)
        checks.need(
            torch.is_autocast_enabled(x.device.type) or x.dtype == weights.dtype,
            "x",
            f"in the experts' dtype, {weights.dtype}, or under autocast",
            x,
        )

    def load_balance(self, group: dist.ProcessGroup | None = None, reset: bool = False) -> LoadBalance:
        """Picks of the training forward passes since the last reset: this rank's, or summed over `group` (a collective).

        A pass that activation checkpointing repeats counts again.
        """
        picks = self._picks.clone()
        if group is not None:
            dist.all_reduce(picks, group=group)
        if reset:
            self._picks_at_update -= self._picks
            self._picks.zero_()
        mean = max(picks.sum().item() / self.num_experts, 1e-9)
        aux = float(self._last_aux_loss) if self._last_aux_loss is not None else float("nan")
        return LoadBalance(picks, picks.max().item() / mean, aux)

    @torch.no_grad()
    def update_expert_bias(self, group: dist.ProcessGroup | None = None) -> None:
        """After an optimizer step: raise the bias of experts picked less than the mean, lower that of the others.

        Counts picks since the last update, over `group`: the ranks that share this router, None for the default group.
        """
        bias = self.router.expert_bias
        if bias is None:
            return
        picks = self._picks - self._picks_at_update
        self._picks_at_update.copy_(self._picks)
        if self.buffer.group is not None:
            dist.all_reduce(picks, group=group)
        picks = picks.to(torch.float32)
        bias += self.bias_update_rate * torch.sign(picks.mean() - picks)

    def extra_repr(self) -> str:
        b = self.buffer
        return f"{self.num_experts} experts, top-{self.top_k}, rank {b.rank} of {b.group_size}, engine={b.engine!r}"


class _SharedExperts(nn.Module):
    def __init__(self, hidden: int, width: int, activation: str, dtype: Any, device: Any) -> None:
        super().__init__()
        self.activation = activation
        wide = width * (2 if activation == "swiglu" else 1)
        self.up = nn.Linear(hidden, wide, bias=False, dtype=dtype, device=device)
        self.down = nn.Linear(width, hidden, bias=False, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(swiglu(h) if self.activation == "swiglu" else F.gelu(h))


class _AttachLoss(torch.autograd.Function):
    """The identity on `weights` that sends `scale` into the loss's gradient whenever the weights' gradient is computed."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.loss_dtype = scale, loss.dtype
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, torch.full((), ctx.scale, dtype=ctx.loss_dtype, device=grad.device), None
