"""What a dispatch or combine must move at least, and the time limits set for it: arithmetic on a routing, no GPU needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepep_train.engines.arena_sizes import bytes_to_receive
from deepep_train.engines.sms import most_sms

ALIGNMENT = 16
# A graph holds few calls and is replayed often: what it captured stays in the arena as long as the buffer.
GRAPH_CALLS = 2


@dataclass(frozen=True)
class Shape:
    """What every rank sends; rows are bfloat16 unless a line of the table says otherwise."""

    num_tokens: int
    hidden: int
    num_experts: int
    num_topk: int


LARGE = Shape(4096, 7168, 256, 8)
SMALL = Shape(4096, 2048, 64, 8)

# Milliseconds, set for 8 ranks that share one H100 under MPS: (case, SMs a rank, shape) -> at most.
LIMIT_RANKS, LIMIT_GPU = 8, "H100"
LIMITS: dict[tuple[str, int, Shape], float] = {
    ("dispatch", 16, LARGE): 1.25,
    ("dispatch", 4, LARGE): 1.75,
    ("dispatch fresh", 16, LARGE): 1.45,
    ("dispatch fp8", 16, LARGE): 0.65,
    ("combine", 16, LARGE): 1.20,
    ("combine any", 16, LARGE): 3.0,
    ("expert dispatch", 16, LARGE): 2.2,
    ("expert combine", 16, LARGE): 2.6,
    ("expert combine any", 16, LARGE): 3.5,
    ("layout", 0, LARGE): 0.040,
    ("dispatch", 16, SMALL): 0.42,
    ("combine", 16, SMALL): 0.40,
    ("2x4 dispatch", 16, LARGE): 2.2,
    ("2x4 dispatch fp8", 16, LARGE): 1.2,
    ("2x4 combine", 16, LARGE): 2.2,
}


def limit_ms(key: str, sms: int, shape: Shape, num_ranks: int) -> float | None:
    """The limit of exactly this work, None if none was set for it."""
    return LIMITS.get((key, sms, shape)) if num_ranks == LIMIT_RANKS else None


@dataclass(frozen=True)
class Traffic:
    """Rows that a routing moves, int64; [R] by rank, [R, R] from rank to rank.

    Attributes:
        sent: tokens of the rank.
        from_to: rows of a dispatch, a token once for each destination rank.
        received: rows that arrive, in rank layout.
        expert_rows: rows of the expert layout without its padding.
        several, grouped: of the received tokens those with more than one expert here, and these tokens' expert rows.
        own_single: of the received tokens the rank's own with one expert here.
    """

    sent: Tensor
    from_to: Tensor
    received: Tensor
    expert_rows: Tensor
    several: Tensor
    grouped: Tensor
    own_single: Tensor


def traffic(topk_idx: Sequence[Tensor], num_experts: int) -> Traffic:
    """Count the rows of a routing; `topk_idx[r]` is rank r's, -1 where a pick goes nowhere."""
    size = len(topk_idx)
    from_to = torch.zeros(size, size, dtype=torch.int64)
    expert_rows, several, grouped, own_single = (torch.zeros(size, dtype=torch.int64) for _ in range(4))
    for source, idx in enumerate(topk_idx):
        owner = torch.where(idx >= 0, idx // (num_experts // size), size)
        picks = torch.zeros(idx.size(0), size + 1, dtype=torch.int64)
        picks = picks.scatter_add_(1, owner, torch.ones_like(owner))[:, :size]
        from_to[source] = (picks > 0).sum(0)
        expert_rows += picks.sum(0)
        several += (picks > 1).sum(0)
        grouped += (picks * (picks > 1)).sum(0)
        own_single[source] = (picks[:, source] == 1).sum()
    sent = torch.tensor([idx.size(0) for idx in topk_idx])
    return Traffic(sent, from_to, from_to.sum(0), expert_rows, several, grouped, own_single)


def rows_moved(t: Traffic) -> dict[str, Tensor]:
    """Rows read plus rows written in each rank's own memory, [R]: every input read once, every output written once.

    A sender reads its tokens and the rows land in the receiver's memory; a combine's receiver pulls rows out of theirs, so
    each row counts where it lies.
    """
    once = t.sent + t.received
    copies = t.expert_rows - t.received
    return {
        "dispatch": once,
        "combine": once,
        "combine any": once + 2 * t.received,  # first copied to where peers can read it
        "expert dispatch": once + 2 * copies,  # a row crosses once; each further one is a copy of it
        # Tokens with several rows are summed first, to one row each; the others are pulled from where they are.
        "expert combine": once + t.grouped + t.several,
        # A single row is copied to where peers can read it, if peers do.
        "expert combine any": once + t.expert_rows + t.received - 2 * t.own_single,
    }


def tokens_to_nodes(topk_idx: Sequence[Tensor], num_experts: int, local: int) -> Tensor:
    """How many tokens each rank has for each node of `local` ranks: int64 [R, nodes]."""
    per_node = num_experts // len(topk_idx) * local
    nodes = range(len(topk_idx) // local)
    return torch.tensor(
        [[int(((idx >= n * per_node) & (idx < (n + 1) * per_node)).any(1).sum()) for n in nodes] for idx in topk_idx]
    )


def rows_moved_across(t: Traffic, to_node: Tensor, local: int) -> dict[str, Tensor]:
    """`rows_moved` where rows cross between nodes of `local` ranks in memory that a network card can read and write: those that
    leave are read and written by the packing, read by the card, and written by it where they come, then read by the forwarder
    and written at every rank that they are for; a combine's go the same way back, as sums that are made where they leave from.
    """
    rank = torch.arange(t.sent.numel())
    own = to_node[rank, rank // local]
    leave = to_node.sum(1) - own
    came = torch.stack([to_node[r % local :: local, r // local].sum() for r in range(t.sent.numel())]) - own
    back = t.received + (came + own) + came + leave + (leave + own) + t.sent
    return {
        "dispatch": 3 * leave + came + (came + own) + t.received,
        "combine": back,
        "combine any": back + 2 * t.received,
        # Each row that came is copied to its experts' rows; and these are summed to one, wherever they lie.
        "expert dispatch": 3 * leave + came + (came + own) + 2 * t.received + t.expert_rows,
        "expert combine": back + t.expert_rows + t.received,
        "expert combine any": back + t.expert_rows + t.received,
    }


def by_device(per_rank: Tensor, num_devices: int) -> Tensor:
    """[R] -> [D] sums; rank r has GPU r modulo their number."""
    device = torch.arange(per_rank.size(0)) % num_devices
    return torch.zeros(num_devices, *per_rank.shape[1:], dtype=per_rank.dtype).index_add_(0, device, per_rank)


def floor_ms(moved: Tensor, crossing: Tensor, num_devices: int, copy_rate: float, link_rate: float | None) -> float:
    """The time of the busiest GPU's memory or, if that is longer, of the busiest link.

    Args:
        moved: bytes read plus bytes written in each rank's memory, [R].
        crossing: bytes from rank to rank, [R, R].
        copy_rate: bytes a second of a device copy, reads and writes counted.
        link_rate: bytes a second from one GPU to another; None with one GPU, where nothing crosses a link.
    """
    memory = int(by_device(moved, num_devices).max()) / copy_rate
    if link_rate is None:
        return 1e3 * memory
    between = by_device(by_device(crossing, num_devices).t(), num_devices).t()
    between = between - between.diagonal().diag()
    busiest = max(int(between.sum(0).max()), int(between.sum(1).max()))
    return 1e3 * max(memory, busiest / link_rate)


def bytes_to_others(crossing: Tensor) -> float:
    """Bytes that a rank sends to other ranks, the mean over ranks, from [R, R]."""
    return float((crossing.sum(1) - crossing.diagonal()).double().mean())


def arena_bytes(t: Traffic, shape: Shape) -> int:
    """Peer-visible memory for all that the cases keep and make, without counting on any of it being used twice: a result
    that had to be staged would be copied, and the time wrong."""
    row = shape.hidden * torch.bfloat16.itemsize
    padded = int(t.expert_rows.max()) + ALIGNMENT * (shape.num_experts // t.sent.numel())
    heap = ((5 + GRAPH_CALLS) * int(t.received.max()) + 4 * padded) * row + (256 << 20)
    return bytes_to_receive(heap)


def routing(shape: Shape, rank: int) -> tuple[Tensor, Tensor]:
    """topk_idx and topk_weights of `rank` on the CPU, from its number alone: so every rank can count what all send."""
    generator = torch.Generator().manual_seed(1000 + rank)
    scores = torch.rand(shape.num_tokens, shape.num_experts, generator=generator)
    return scores.topk(shape.num_topk, dim=1).indices, torch.rand(shape.num_tokens, shape.num_topk, generator=generator)


def traffic_of(shape: Shape, num_ranks: int) -> Traffic:
    return traffic([routing(shape, rank)[0] for rank in range(num_ranks)], shape.num_experts)


def resident_sms(wanted: Iterable[int], sm_count: int, ranks_per_device: int) -> list[int]:
    """Even numbers of SMs, largest first, that the ranks of one GPU can have at the same time: the engine's own cap."""
    most = max(2, most_sms(sm_count, ranks_per_device) // 2 * 2)
    return sorted({min(n, most) for n in wanted}, reverse=True)
