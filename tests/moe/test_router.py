"""The router against a loop over tokens that follows the papers' words."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepep_train import ArgumentError
from deepep_train.moe import TopKRouter


def _by_hand(router: TopKRouter, x: Tensor, limited: int) -> tuple[list[set[int]], list[dict[int, float]]]:
    """Chosen experts and their weights, token by token."""
    chosen, weights = [], []
    groups = router.num_groups
    per_group = router.num_experts // groups
    for row in x:
        logits = router.weight @ row
        scores = logits.softmax(0) if router.score_function == "softmax" else logits.sigmoid()
        choice = scores if router.expert_bias is None else scores + router.expert_bias
        best = []
        for g in range(groups):
            members = sorted(choice[g * per_group : (g + 1) * per_group].tolist(), reverse=True)
            best.append(sum(members[:2]))
        open_groups = sorted(range(groups), key=lambda g: -best[g])[:limited]
        experts = [g * per_group + i for g in open_groups for i in range(per_group)]
        top = sorted(experts, key=lambda e: -choice[e].item())[: router.top_k]
        total = sum(scores[e].item() for e in top) if router.normalize_weights else 1.0
        chosen.append(set(top))
        weights.append({e: router.scaling_factor * scores[e].item() / total for e in top})
    return chosen, weights


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups,limited", [(1, 1), (4, 2), (4, 3), (12, 5)])
@pytest.mark.parametrize("normalize,use_bias", [(True, True), (False, False)])
def test_choice_and_weights(score_function: str, groups: int, limited: int, normalize: bool, use_bias: bool) -> None:
    torch.manual_seed(3)
    router = TopKRouter(
        16,
        12,
        3,
        score_function=score_function,
        normalize_weights=normalize,
        scaling_factor=2.5,
        num_groups=groups,
        num_limited_groups=limited,
        use_bias=use_bias,
    )
    if router.expert_bias is not None:
        router.expert_bias.normal_(std=0.2)
    x = torch.randn(40, 16)
    routing = router(x)
    chosen, weights = _by_hand(router, x, limited)
    assert routing.topk_idx.dtype == torch.int64 and routing.topk_weights.dtype == torch.float32
    for t in range(40):
        assert set(routing.topk_idx[t].tolist()) == chosen[t]
        for e, w in zip(routing.topk_idx[t].tolist(), routing.topk_weights[t].tolist(), strict=True):
            assert w == pytest.approx(weights[t][e], rel=1e-5)


def test_balance_loss_is_one_when_balanced_and_falls_under_descent() -> None:
    router = TopKRouter(8, 8, 2)
    with torch.no_grad():
        router.weight.copy_(torch.eye(8) * 4)
    assert float(router(torch.eye(8).repeat(4, 1)).aux_loss) == pytest.approx(1.0, rel=1e-5)
    skewed = router(torch.eye(8)[:1].repeat(32, 1))  # two experts take everything, one of them nearly all of the score
    assert 3.0 < float(skewed.aux_loss) <= 8 / 2
    x = torch.randn(64, 8) + 1.0
    optimizer = torch.optim.SGD(router.parameters(), 0.5)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = router(x).aux_loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] and losses[-1] < 1.1


def test_scores_do_not_feel_autocast() -> None:
    router = TopKRouter(64, 16, 4)
    x = torch.randn(32, 64)
    plain = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    assert torch.equal(plain.topk_weights, cast.topk_weights) and torch.equal(plain.topk_idx, cast.topk_idx)


@pytest.mark.parametrize(
    "kwargs,argument",
    [
        ({"score_function": "tanh"}, "score_function"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 9}, "top_k"),
        ({"num_groups": 3}, "num_groups"),
        ({"num_groups": 4, "num_limited_groups": 5}, "num_limited_groups"),
        ({"num_groups": 4, "num_limited_groups": 1, "top_k": 3}, "num_limited_groups"),
    ],
)
def test_bad_arguments(kwargs: dict, argument: str) -> None:
    with pytest.raises(ArgumentError, match=argument) as caught:
        TopKRouter(**{"hidden_size": 8, "num_experts": 8, "top_k": 2} | kwargs)
    assert caught.value.argument == argument
