"""Two hops between nodes: a token crosses the network once for each destination node and is forwarded there.

Rank r is local rank r % local of node r // local. The ranks with one local rank are a *rail*: a row goes to the rank of its
sender's rail on the destination node, the *forwarder*, which sends it on to the ranks of its node. A combine comes back the
same way, so a node's parts are summed by the forwarder (float32, ascending rank, rounded once to the payload's dtype) and
the nodes' sums by the token's rank (bias first, float32, ascending node, rounded once). DeepEP V1's internode kernels route
and round like this.

Both hops are exchanges of the whole group in which a rank gives rows to its rail or to its node only. Process groups for
rails and nodes would carry the same rows, but they take their names, and NCCL its order among communicators, from what every
rank of the job has done before; one group has one order, and every rank notices a peer that died in either hop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepep_train.engines.hops import Hop, Route
from deepep_train.engines.peers import Peers
from deepep_train.errors import ArgumentError
from deepep_train.routing import send_order


class Forwarding(NamedTuple):
    """What a rank forwards.

    Attributes:
        counts: rows that come over the rail, by node.
        masks: bool [sum(counts), local], which ranks of this node each of them is for.
    """

    counts: list[int]
    masks: Tensor


def learn_forwarding(peers: Peers, is_token_in_rank: Tensor, per_node_RN: list[list[int]], local: int) -> Forwarding:
    """Exchange what every forwarder needs to know; `is_token_in_rank` bool [T, R], `per_node_RN` rows from each rank to each
    node."""
    nodes = peers.size // local
    here, rail = divmod(peers.rank, local)
    counts = [per_node_RN[node * local + rail][here] for node in range(nodes)]
    by_node = is_token_in_rank.view(-1, nodes, local)
    node, token = send_order(by_node.any(2))
    masks = by_node[token, node].to(torch.uint8)
    give = _on_rail(per_node_RN[peers.rank], peers, local)
    got = peers.all_to_all_rows(masks, give, _on_rail(counts, peers, local), "dispatch")
    return Forwarding(counts, got.to(torch.bool))


def two_level(peers: Peers, is_token_in_rank: Tensor, forwarding: Forwarding, recv_counts: list[int], local: int) -> Route:
    """The route over forwarders; `is_token_in_rank` bool [T, R], `recv_counts` rows by their source."""
    nodes = peers.size // local
    token_in_node = is_token_in_rank.view(-1, nodes, local).any(2)
    rail = Hop(
        peers,
        is_token_in_rank.size(0),
        send_order(token_in_node)[1],
        _on_rail(token_in_node.sum(0).tolist(), peers, local),
        _on_rail(forwarding.counts, peers, local),
    )
    received = torch.tensor(recv_counts).view(nodes, local)
    node = Hop(
        peers,
        forwarding.masks.size(0),
        send_order(forwarding.masks)[1],
        _on_node(forwarding.masks.sum(0).tolist(), peers, local),
        _on_node(received.sum(0).tolist(), peers, local),
    )
    return Route((rail, node), _order(received).to(is_token_in_rank.device))


def forwarding_of(tensors: tuple[Tensor, ...]) -> Forwarding:
    """From DeepEP V1's tensors of an internode handle."""
    counts = tensors[4].diff(prepend=tensors[4].new_zeros(1)).tolist()
    masks = tensors[9] >= 0
    num_rows = sum(counts)
    if min(counts) < 0 or num_rows > masks.size(0) or masks[num_rows:].any():  # with num_worst_tokens there is room for more
        raise ArgumentError(
            f"handle: recv_rdma_rank_prefix_sum {tensors[4].tolist()} does not fit send_nvl_head's {masks.size(0)} rows",
            "handle",
        )
    return Forwarding(counts, masks[:num_rows])


def _order(received_NL: Tensor) -> Tensor:
    """Rows come by (forwarder, source node, token) and are wanted by (source node, local rank, token); the sender's local rank
    is its forwarder's. `received_NL`: int64 [nodes, local], rows by source."""
    nodes, local = received_NL.shape
    wanted, coming = received_NL.flatten(), received_NL.t().flatten()
    first_wanted = wanted.cumsum(0) - wanted
    first_coming = (coming.cumsum(0) - coming).view(local, nodes).t().flatten()
    shift = (first_coming - first_wanted).repeat_interleave(wanted)
    return torch.arange(shift.numel()) + shift


def _on_rail(by_node: list[int], peers: Peers, local: int) -> list[int]:
    """Numbers by node as numbers by rank, those of other rails 0."""
    counts = [0] * peers.size
    counts[peers.rank % local :: local] = by_node
    return counts


def _on_node(by_local_rank: list[int], peers: Peers, local: int) -> list[int]:
    """Numbers by local rank as numbers by rank, those of other nodes 0."""
    counts = [0] * peers.size
    first = peers.rank // local * local
    counts[first : first + local] = by_local_rank
    return counts
