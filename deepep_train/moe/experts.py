"""Feed-forward experts over rows grouped by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepep_train import fp8
from deepep_train.errors import ArgumentError

ACTIVATIONS = ("swiglu", "gelu")


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class GroupedExperts(nn.Module):
    """This rank's experts, their weights stacked: L experts, H hidden, F feed-forward.

    Args:
        num_local_experts, hidden_size, ffn_hidden_size: L, H, F.
        first_expert: global number of local expert 0. An expert's initial weights depend on torch's seed and its global
            number alone, so a model starts the same on any number of ranks.
        activation: "swiglu" (weights [L, H, 2F] and [L, F, H]) or "gelu" ([L, H, F] and [L, F, H]).
    """

    w1: nn.Parameter
    w2: nn.Parameter
    delayed: list[Callable[[], None]] | None = None  # see `fp8.grouped_linear`

    def __init__(
        self,
        num_local_experts: int,
        hidden_size: int,
        ffn_hidden_size: int,
        *,
        first_expert: int = 0,
        activation: str = "swiglu",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ArgumentError(f"activation must be one of {ACTIVATIONS}, got {activation!r}", "activation")
        self.activation, self.first_expert = activation, first_expert
        wide = ffn_hidden_size * (2 if activation == "swiglu" else 1)
        self.w1 = nn.Parameter(torch.empty(num_local_experts, hidden_size, wide, dtype=dtype, device=device))
        self.w2 = nn.Parameter(torch.empty(num_local_experts, ffn_hidden_size, hidden_size, dtype=dtype, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(fan in), as nn.Linear's."""
        seed = int(torch.randint(2**62, ()).item())
        if self.w1.is_meta:
            return
        for local in range(self.w1.size(0)):
            generator = torch.Generator(self.w1.device).manual_seed((seed + self.first_expert + local) % 2**63)
            for w in (self.w1[local], self.w2[local]):
                bound = w.size(0) ** -0.5
                w.uniform_(-bound, bound, generator=generator)

    def forward(self, x_MH: Tensor | fp8.Quantized, tokens_per_expert: Tensor, weights_M: Tensor | None = None) -> Tensor:
        """[M, H] -> [M, H].

        Args:
            x_MH: rows grouped by expert; quantized ones keep both linears in FP8.
            tokens_per_expert: int64 [L], rows of each group; the sum is M.
            weights_M: float32 [M], multiplies each row's result. It is applied to the activations, which are narrower than
                the result and give the same product.
        """
        matmul: Callable[..., Tensor] = _grouped_matmul if isinstance(x_MH, Tensor) else self._matmul_in_fp8(x_MH.recipe)
        h = matmul(x_MH, self.w1, tokens_per_expert)
        h = swiglu(h) if self.activation == "swiglu" else F.gelu(h)
        if weights_M is not None:
            h = (h * weights_M.unsqueeze(1)).to(h.dtype)
        return matmul(h, self.w2, tokens_per_expert)

    def _matmul_in_fp8(self, recipe: fp8.Recipe) -> Callable[[Any, Tensor, Tensor], Tensor]:
        def matmul(x: Any, w: Tensor, tokens_per_expert: Tensor) -> Tensor:
            splits = tokens_per_expert.tolist() if isinstance(x, Tensor) else None
            return fp8.grouped_linear(x, w, splits, recipe=recipe, is_transposed=True, delayed=self.delayed)

        return matmul


def _grouped_matmul(x: Tensor, w: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Rows of group e times w[e]; a rank may have none at all, as in decoding."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w = x.to(dtype), w.to(dtype)
    if x.size(0) and _grouped_mm_runs(x, w):
        offsets = tokens_per_expert.cumsum(0).to(device=x.device, dtype=torch.int32, non_blocking=True)
        return F.grouped_mm(x, w, offs=offsets)
    # split and unbind: each has one gradient, put together at the end; slices would add up as many full-sized ones as experts.
    groups = [x_e @ w_e for x_e, w_e in zip(x.split(tokens_per_expert.tolist()), w.unbind(0), strict=True)]
    return torch.cat(groups)


def _grouped_mm_runs(x: Tensor, w: Tensor) -> bool:
    """torch's grouped matmul wants bf16, 16-byte strides and an SM90 or later; elsewhere it is absent or loops anyway."""
    if not (x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")):
        return False
    return x.size(1) % 8 == 0 and w.size(2) % 8 == 0 and torch.cuda.get_device_capability(x.device) >= (9, 0)
