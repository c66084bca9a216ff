"""What dispatch and combine take on a cluster: arithmetic on expected copies and link rates, no GPU needed.

The model, with its sources and its errors against published tables, is described in docs/plan.md. Units are bytes and
seconds; everything is per GPU and one way, and by symmetry a GPU receives what it sends. What the rdma engine sends beside
rows is asked of the functions that it uses itself (engines/rail_rows.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil

from deepep_train.engines import DEFAULT_ARENA_BYTES
from deepep_train.engines.base import MAX_EXPERTS, MAX_NODES, MAX_NVLINK_RANKS
from deepep_train.engines.rail_rows import counts_bytes, padded, words_bytes
from deepep_train.engines.rail_stages import stages_of
from deepep_train.engines.sms import BYTES_PER_SM, MOST_SMS
from deepep_train.routing import round_up

FP8_BLOCK = 128  # elements for each float32 scale
DTYPES = ("fp8", "bf16")

# NVLink, nominal, one way; by the name of the GPU. H800's is an H100's with fewer links.
NVLINK_RATES = {"h800": 200e9, "h100": 450e9, "h200": 450e9, "b200": 900e9}
NIC_RATE = 50e9  # a 400 Gb/s card for each GPU
# Fitted to DeepEP V1's published H800 numbers: NVLINK_SHARE to its one-node rows, NIC_SHARE to EP32 and EP64.
NVLINK_SHARE = 0.70
NIC_SHARE = 0.90
# Assumed, not fitted: no published row depends on them by more than 5%.
CALL_SECONDS = 50e-6  # launches, flags there and back, the pipeline's start
STAGE_SECONDS = 20e-6  # of each stage but the first: it is a whole exchange, and a whole operation within the node
MESSAGE_SECONDS = 3e-9  # a card that sends 330 million messages a second
PACKET_BYTES, PACKET_HEADER = 4096, 66  # RoCE v2: Ethernet, IP, UDP, BTH, CRCs


@dataclass(frozen=True)
class Work:
    """What every rank does.

    Attributes:
        nodes, gpus_per_node: R = nodes * gpus_per_node ranks in the group.
        num_groups, num_topk_groups: a token's experts lie in the best `num_topk_groups` of `num_groups` equal groups of
            consecutive experts, as DeepSeek-V3's router limits them; 0 and 0 without a limit.
        dispatch_dtype: of the rows sent by dispatch; combine's are bf16.
        stages: of an exchange along the rail, at most: docs/rdma.md.
    """

    nodes: int
    gpus_per_node: int = 8
    num_tokens: int = 4096
    hidden: int = 7168
    num_experts: int = 256
    num_topk: int = 8
    num_groups: int = 0
    num_topk_groups: int = 0
    dispatch_dtype: str = "fp8"
    stages: int = 1

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "num_tokens", "hidden", "num_experts", "num_topk", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must be at least 1")
        if self.num_experts % self.ranks:
            raise ValueError(f"--num-experts {self.num_experts} must be divisible by the {self.ranks} GPUs")
        if (self.num_groups == 0) != (self.num_topk_groups == 0):
            raise ValueError("--num-groups and --num-topk-groups go together")
        groups, chosen = self.groups
        if chosen < 1 or groups < chosen or self.num_experts % groups:
            raise ValueError(f"--num-topk-groups {chosen} of --num-groups {groups} must fit --num-experts {self.num_experts}")
        if self.num_topk > self.num_experts // groups * chosen:
            raise ValueError(f"--num-topk {self.num_topk} exceeds the experts that a token may choose from")
        if self.dispatch_dtype not in DTYPES:
            raise ValueError(f"--dispatch-dtype {self.dispatch_dtype} must be one of {', '.join(DTYPES)}")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def groups(self) -> tuple[int, int]:
        return (self.num_groups, self.num_topk_groups) if self.num_groups else (1, 1)


@dataclass(frozen=True)
class Hardware:
    """Rates that rows can reach, and the SMs' share of moving them.

    Attributes:
        nvlink_rate, nic_rate: bytes a second of one GPU, one way, as reached.
    """

    nvlink_rate: float = NVLINK_RATES["h100"] * NVLINK_SHARE
    nic_rate: float = NIC_RATE * NIC_SHARE


def units_reached(work: Work, units: int) -> float:
    """Of `units` equal, consecutive shares of the experts, how many a token's picks are expected to lie on.

    Scores are taken as independent and alike; the groups are those with the best experts. In descending order of scores the
    first picks then come from all experts, and once the last group that may be chosen has appeared, from the chosen groups
    alone. So the picks are drawn one after another without replacement, and all that matters of those before is how many
    groups and how many shares they lie on.
    """
    groups, chosen = work.groups
    share, group = work.num_experts // units, work.num_experts // groups
    if share % group and group % share:
        raise ValueError(f"{share} experts a node or GPU and {group} a group must divide one another")
    states = {(0, 0): 1.0}  # probability of (groups, shares) reached so far
    for drawn in range(work.num_topk):
        later: dict[tuple[int, int], float] = {}
        for (g, u), probability in states.items():
            new_groups = groups - g if g < chosen else 0
            # Experts that the next pick may be, by whether their group or their share is new.
            if share <= group:
                old_group_new_share = g * group - u * share
                new_group_old_share = 0
            else:
                old_group_new_share = 0
                new_group_old_share = min(new_groups, u * (share // group) - g) * group
            ways = {
                (g, u): g * group - drawn - old_group_new_share,
                (g, u + 1): old_group_new_share,
                (g + 1, u): new_group_old_share,
                (g + 1, u + 1): new_groups * group - new_group_old_share,
            }
            for state, count in ways.items():
                if count:
                    later[state] = later.get(state, 0.0) + probability * count / sum(ways.values())
        states = later
    return sum(u * probability for (_, u), probability in states.items())


def row_bytes(work: Work, operation: str) -> int:
    """Of one row as it travels: its elements, and with FP8 its scales."""
    if operation == "combine" or work.dispatch_dtype == "bf16":
        return padded(2 * work.hidden)
    return padded(work.hidden) + padded(4 * ceil(work.hidden / FP8_BLOCK))


def meta_bytes(work: Work, operation: str) -> int:
    """What travels with a row, over either link, where there is most of it: in a fresh dispatch of tokens with router weights,
    and in a combine that brings back their gradients. Nothing does in a cached dispatch and in other combines."""
    if work.nodes == 1:  # nvlink: the token's number, indices of int64 and weights (engines/nvlink.py)
        return 4 + 12 * work.num_topk if operation == "dispatch" else 4 * work.num_topk
    return words_bytes(work.num_topk, True, work.gpus_per_node) if operation == "dispatch" else padded(4 * work.num_topk)


def beyond_limits(work: Work) -> list[str]:
    """What of it the engines with kernels do not serve."""
    limits = (
        (work.nodes, MAX_NODES, "nodes"),
        (work.gpus_per_node, MAX_NVLINK_RANKS, "GPUs a node"),
        (work.num_experts, MAX_EXPERTS, "experts"),
    )
    return [f"{number} {what}, above the engines' limit of {most}" for number, most, what in limits if number > most]


def row_of_counts(work: Work, operation: str) -> int:
    """Bytes that each rank tells every other before a fresh dispatch between nodes, by the way of the rows."""
    return counts_bytes(work.ranks, work.nodes) if operation == "dispatch" and work.nodes > 1 else 0


@dataclass(frozen=True)
class Prediction:
    """Of one operation, per GPU.

    Attributes:
        rdma_rows, nvlink_rows: rows that leave the GPU over each link; one for every node, and for every GPU of a node.
        rdma_bytes, nvlink_bytes: with metadata and counts, without packet headers.
        metadata_share: of the network, metadata's and counts' bytes over the rows' own; 0 where no row crosses it.
        rdma_seconds, nvlink_seconds: that each link is busy.
        seconds: the time of the operation.
        bound: the link that is busy longer ("local" where nothing crosses).
        sms: SMs that keep either link busy in its own time.
    """

    rdma_rows: float
    nvlink_rows: float
    rdma_bytes: float
    nvlink_bytes: float
    metadata_share: float
    rdma_seconds: float
    nvlink_seconds: float
    seconds: float
    bound: str
    sms: int


def predict(work: Work, hardware: Hardware, operation: str) -> Prediction:
    """`operation` "dispatch" or "combine", which is the same way back: a node's rows are summed by the forwarder."""
    return _predict(work, hardware, operation, _in_stages(work, operation))


def num_stages(work: Work) -> int:
    """Those that there are, of `work.stages` at most."""
    return len(stages_of(work.nodes, work.stages).dispatch)


def _in_stages(work: Work, operation: str) -> Callable[[float, float], float]:
    """The seconds of a call by those of the network and of NVLink: each moves a stage while the other moves the one before, or
    behind. All turns are taken to have as many rows."""
    stages = getattr(stages_of(work.nodes, work.stages), operation)

    def seconds(rdma: float, nvlink: float) -> float:
        first_done = all_done = 0.0
        for first, end in stages:
            crossing = len(range(max(1, first), min(end, work.nodes))) / max(1, work.nodes - 1)
            parts = (rdma * crossing, nvlink * (end - first) / work.nodes)
            before, behind = parts if operation == "dispatch" else parts[::-1]
            first_done += before
            all_done = max(first_done, all_done) + behind
        return CALL_SECONDS + STAGE_SECONDS * (len(stages) - 1) + all_done

    return seconds


def _predict(work: Work, hardware: Hardware, operation: str, seconds: Callable[[float, float], float]) -> Prediction:
    nodes_reached = units_reached(work, work.nodes)
    ranks_reached = units_reached(work, work.ranks)
    rdma_rows = work.num_tokens * nodes_reached * (work.nodes - 1) / work.nodes
    # A row is forwarded by the GPU on the sender's rail, which is one of the node's: what is for itself crosses no link.
    nvlink_rows = work.num_tokens * ranks_reached * (work.gpus_per_node - 1) / work.gpus_per_node
    row, meta, counts = row_bytes(work, operation), meta_bytes(work, operation), row_of_counts(work, operation)
    # A GPU puts its own counts to its rail, and gives what comes, and its own, to its node.
    rdma_bytes = rdma_rows * (row + meta) + (work.nodes - 1) * counts
    nvlink_bytes = nvlink_rows * (row + meta) + work.nodes * (work.gpus_per_node - 1) * counts
    packets = rdma_rows * ceil((row + meta) / PACKET_BYTES)
    rdma = (rdma_bytes + packets * PACKET_HEADER) / hardware.nic_rate + rdma_rows * MESSAGE_SECONDS
    nvlink = nvlink_bytes / hardware.nvlink_rate
    return Prediction(
        rdma_rows,
        nvlink_rows,
        rdma_bytes,
        nvlink_bytes,
        metadata_share=rdma_bytes / (rdma_rows * row) - 1 if rdma_rows else 0.0,
        rdma_seconds=rdma,
        nvlink_seconds=nvlink,
        seconds=seconds(rdma, nvlink),
        bound="local" if rdma == nvlink == 0 else "rdma" if rdma > nvlink else "nvlink",
        sms=_sms(work, hardware, operation, rdma, nvlink),
    )


def _sms(work: Work, hardware: Hardware, operation: str, rdma: float, nvlink: float) -> int:
    """That move in each link's seconds what it waits for: rows packed for the card, and rows stored over NVLink or summed from
    there, the GPU's own included. A combine leaves its sums where the card reads them."""
    row = row_bytes(work, operation)
    packed = work.num_tokens * units_reached(work, work.nodes) * (work.nodes - 1) / work.nodes * row
    stored = work.num_tokens * units_reached(work, work.ranks) * row
    rates = [stored / nvlink if nvlink else hardware.nvlink_rate]  # GPUs without peers copy as fast as the others store
    if operation == "dispatch" and rdma:
        rates.append(packed / rdma)
    return min(MOST_SMS, round_up(ceil(max(rates) / BYTES_PER_SM[operation]), 2))


@dataclass(frozen=True)
class Buffers:
    """Bytes of a GPU's memory.

    Attributes:
        staging: what the network's slots need: a slot for every (node, token), both ways; `num_rdma_bytes` of a Buffer.
        received: expected size of one dispatch's rows in bf16, which live as long as autograd needs them.
        arena: that a Buffer with num_nvl_bytes=0 takes on GPUs that reach each other's memory.
    """

    staging: int
    received: int
    arena: int = DEFAULT_ARENA_BYTES


def buffers(work: Work) -> Buffers:
    """Sized for the worst routing: every token of every rail peer may come (docs/rdma.md)."""
    received = int(work.num_tokens * units_reached(work, work.ranks)) * 2 * work.hidden
    if work.nodes == 1:
        return Buffers(0, received)
    # What goes beside a dispatch's rows lies behind them.
    row = max(row_bytes(work, "dispatch") + meta_bytes(work, "dispatch"), row_bytes(work, "combine"))
    # A segment for every node, in multiples of 128 bytes, of what leaves and of what comes.
    return Buffers(2 * work.nodes * round_up(work.num_tokens * row, 128), received)


# Against published tables ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """GB/s that DeepEP V1's README gives for H800s with 400 Gb/s cards (4096 tokens, hidden 7168, top-8 of 256
    experts in at most 4 nodes, FP8 dispatch, bf16 combine), by V1's counting: the rows of all nodes (of all ranks on one
    node) over the time, those that cross no link included."""

    ranks: int
    dispatch: float
    combine: float


V1_ON_H800 = (Published(8, 153, 158), Published(16, 43, 43), Published(32, 58, 57), Published(64, 51, 50))


@dataclass(frozen=True)
class Compared:
    """`error` is that of the predicted time, relative to the published one."""

    ranks: int
    operation: str
    published: float
    predicted: float
    error: float


def validate() -> list[Compared]:
    """The model on the H800 table, in V1's GB/s, and with V1's pipeline, in which both links work at once: what it would say
    of this library's kernels is `predict`'s default, and slower."""
    hardware = Hardware(nvlink_rate=NVLINK_RATES["h800"] * NVLINK_SHARE)
    rows = []
    for p in V1_ON_H800:
        nodes = p.ranks // 8
        work = Work(nodes, num_groups=nodes, num_topk_groups=min(nodes, 4))
        copies = units_reached(work, work.nodes if nodes > 1 else work.ranks)
        for operation, published in (("dispatch", p.dispatch), ("combine", p.combine)):
            counted = work.num_tokens * copies * row_bytes(work, operation)
            both = _predict(work, hardware, operation, lambda rdma, nvlink: CALL_SECONDS + max(rdma, nvlink))
            predicted = counted / both.seconds / 1e9
            rows.append(Compared(p.ranks, operation, published, predicted, published / predicted - 1))
    return rows


def report(work: Work, hardware: Hardware) -> dict[str, object]:
    """Everything, JSON-able, for `plan --json`."""
    return {
        "work": asdict(work),
        "hardware": asdict(hardware),
        "nodes_per_token": units_reached(work, work.nodes),
        "ranks_per_token": units_reached(work, work.ranks),
        "dispatch": asdict(predict(work, hardware, "dispatch")),
        "combine": asdict(predict(work, hardware, "combine")),
        "buffers": asdict(buffers(work)),
    }


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
