"""The router: scores every expert for every token and picks top-k.

Scoring and group-limited choice follow DeepSeek-V3 (arXiv:2412.19437, section 2.1.2), the auxiliary loss follows Switch
Transformer (arXiv:2101.03961, section 2.2), the bias that balances without a loss follows arXiv:2408.15664.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepep_train.errors import ArgumentError

SCORE_FUNCTIONS = ("softmax", "sigmoid")


class Routing(NamedTuple):
    """T tokens, K picks, E experts.

    Attributes:
        topk_idx: int64 [T, K].
        topk_weights: float32 [T, K], differentiable.
        aux_loss: the balance loss before its coefficient, a scalar; 1 when balanced, up to E / K when not.
    """

    topk_idx: Tensor
    topk_weights: Tensor
    aux_loss: Tensor


class TopKRouter(nn.Module):
    """Linear scores in float32 (float64 for float64 inputs), top-k choice.

    Args:
        hidden_size, num_experts, top_k: H, E, K.
        score_function: "softmax" over all experts, or "sigmoid" of each.
        normalize_weights: divide a token's K weights by their sum.
        scaling_factor: multiplies the weights, after normalization.
        num_groups, num_limited_groups: experts are split into `num_groups` equal groups, and a token's picks come from the
            `num_limited_groups` groups whose two best scores have the largest sum. Groups that follow the ranks or nodes
            bound how many of them a token travels to.
        use_bias: keep a bias per expert that takes part in the choice but not in the weights.
    """

    weight: nn.Parameter
    expert_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score_function: str = "softmax",
        normalize_weights: bool = True,
        scaling_factor: float = 1.0,
        num_groups: int = 1,
        num_limited_groups: int | None = None,
        use_bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        limited = num_groups if num_limited_groups is None else num_limited_groups
        if score_function not in SCORE_FUNCTIONS:
            raise ArgumentError(f"score_function must be one of {SCORE_FUNCTIONS}, got {score_function!r}", "score_function")
        if not 1 <= top_k <= num_experts:
            raise ArgumentError(f"top_k={top_k} must lie in [1, num_experts={num_experts}]", "top_k")
        if num_groups < 1 or num_experts % num_groups:
            raise ArgumentError(f"num_groups={num_groups} must divide num_experts={num_experts}", "num_groups")
        if not 1 <= limited <= num_groups or top_k > limited * (num_experts // num_groups):
            raise ArgumentError(
                f"num_limited_groups={limited} must lie in [1, num_groups={num_groups}] and hold top_k={top_k} experts",
                "num_limited_groups",
            )
        self.num_experts, self.top_k = num_experts, top_k
        self.score_function, self.normalize_weights, self.scaling_factor = score_function, normalize_weights, scaling_factor
        self.num_groups, self.num_limited_groups = num_groups, limited
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32, device=device))
        bias = torch.zeros(num_experts, dtype=torch.float32, device=device) if use_bias else None
        self.register_buffer("expert_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.size(1) ** -0.5)
        if self.expert_bias is not None:
            nn.init.zeros_(self.expert_bias)

    def forward(self, x_TH: Tensor) -> Routing:
        dtype = torch.float64 if x_TH.dtype == torch.float64 else torch.float32
        with torch.autocast(x_TH.device.type, enabled=False):  # bf16 scores would change which experts win
            logits_TE = F.linear(x_TH.to(dtype), self.weight.to(dtype))
            scores_TE = logits_TE.softmax(-1) if self.score_function == "softmax" else logits_TE.sigmoid()
            topk_idx = self._choose(scores_TE.detach())
            weights = scores_TE.gather(1, topk_idx)
            if self.normalize_weights:
                weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
            weights = (weights * self.scaling_factor).to(torch.float32)
            return Routing(topk_idx, weights, self._balance_loss(scores_TE, topk_idx))

    def _choose(self, scores_TE: Tensor) -> Tensor:
        if self.expert_bias is not None:
            scores_TE = scores_TE + self.expert_bias
        if self.num_limited_groups < self.num_groups:
            grouped = scores_TE.view(-1, self.num_groups, self.num_experts // self.num_groups)
            group_score = grouped.topk(min(2, grouped.size(2)), dim=2).values.sum(2)
            closed = torch.ones_like(group_score, dtype=torch.bool)
            closed.scatter_(1, group_score.topk(self.num_limited_groups, dim=1).indices, False)
            scores_TE = grouped.masked_fill(closed.unsqueeze(2), float("-inf")).flatten(1)
        return scores_TE.topk(self.top_k, dim=1, sorted=True).indices

    def _balance_loss(self, scores_TE: Tensor, topk_idx: Tensor) -> Tensor:
        """E * sum over experts of (share of picks) * (mean score share); picks carry no gradient."""
        num_tokens = max(scores_TE.size(0), 1)
        share = scores_TE / (scores_TE.sum(-1, keepdim=True) + 1e-20) if self.score_function == "sigmoid" else scores_TE
        picks = picks_per_expert(topk_idx, self.num_experts).to(scores_TE.dtype) / (num_tokens * self.top_k)
        return self.num_experts * (picks * share.sum(0) / num_tokens).sum()


def picks_per_expert(topk_idx: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: how often each expert was picked; waits for no GPU."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=topk_idx.device)
    flat = topk_idx.flatten()
    return counts.scatter_add_(0, flat, torch.ones_like(flat))
