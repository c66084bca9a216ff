"""`Buffer`: picks an engine, checks arguments, and speaks DeepEP V1's API."""

from __future__ import annotations

import math
import secrets
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train import checks, engines
from deepep_train.buffer_calls import CheckedCalls
from deepep_train.buffer_low_latency import LowLatencyCalls, PayloadArgument
from deepep_train.config import Config
from deepep_train.engines.base import DispatchRequest, Payload, Prepared, wrong_counts
from deepep_train.engines.peers import Peers, raise_if_different
from deepep_train.errors import ArgumentError, DeepEPError
from deepep_train.events import EventHandle, EventOverlap
from deepep_train.handle import Handle
from deepep_train.routing import count_picks
from deepep_train.streams import CommStream

V1_SMS = 20  # what its attribute is before anybody has chosen


class Buffer(CheckedCalls, LowLatencyCalls):
    """What a group of ranks shares to exchange tokens: DeepEP V1's class, over any engine.

    Making one is a collective call of the group. So is every dispatch and combine; all ranks make them in the same order.

    Args:
        group: any `ProcessGroup`, gloo included. None takes the default group, or, where torch.distributed is not
            initialized, this process alone.
        num_nvl_bytes, num_rdma_bytes: a minimum for the memory held, never a cap; 0 leaves the size to the library. They
            read back as passed.
        engine: "auto", "collective", "nvlink", "rdma" or "low_latency"; `buffer.engine` names the one taken and
            `buffer.engine_reasons` says why.
        timeout: seconds that a peer may be late before `PeerTimeoutError` is raised.
        num_local_ranks: ranks per node; None finds it from the host names.
        two_level: whether a token crosses the network once for each node, to be forwarded there, with combines that first
            sum within each node (docs/architecture.md, "Across nodes"), on the collective engine. None: with at least two
            nodes of at least two ranks. True needs at least two nodes.
        low_latency_mode: with engine "auto", take what has kernels for the low-latency calls: nvlink within a node, and rdma
            across nodes where every rank has NVSHMEM. `num_rdma_bytes` are then for what these calls keep, on top of the
            rest: `get_low_latency_rdma_size_hint` says how many one shape needs.

    The other arguments are DeepEP V1's and tune hardware that the chosen engine may not use. V1 wants
    `explicitly_destroy=True` before `destroy()`; here `destroy()` always works and is never needed to exit cleanly.

    Raises:
        ArgumentError: on every rank, if an argument is wrong on any or differs between them.

    Attributes:
        num_sms: class attribute, see `set_num_sms`.
        rank, group_size, group: this rank's number, the number of ranks, and the group.
        num_nodes: groups of ranks that V1 calls RDMA ranks; with more than one, handles take V1's internode form.
        two_level: whether rows are forwarded, and sums are therefore by node.
    """

    num_sms: int = V1_SMS
    _sms_are_set = False

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        engine: str = "auto",
        timeout: float = 100.0,
        num_local_ranks: int | None = None,
        two_level: bool | None = None,
    ) -> None:
        self._destroyed = True  # until the end of this constructor
        if comm is not None:
            raise ArgumentError("comm: MPI communicators are not supported; pass a torch ProcessGroup as group", "comm")
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        if group is not None and not isinstance(group, dist.ProcessGroup):
            what = "this rank is not a member of it" if group is dist.GroupMember.NON_GROUP_MEMBER else checks.shown(group)
            raise ArgumentError(f"group must be a ProcessGroup that this rank belongs to, got {what}", "group")
        self.group = group
        self.rank = 0 if group is None else group.rank()
        self.group_size = 1 if group is None else group.size()
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink

        error, choice = None, engines.Choice("", [])
        try:
            checks.integer(num_nvl_bytes, "num_nvl_bytes")
            checks.integer(num_rdma_bytes, "num_rdma_bytes")
            checks.integer(num_qps_per_rank, "num_qps_per_rank", 1)
            is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
            checks.need(is_number and 0 < timeout < math.inf, "timeout", "a finite number of seconds above 0", timeout)
            checks.flag(low_latency_mode, "low_latency_mode")
            if num_local_ranks is not None:
                checks.integer(num_local_ranks, "num_local_ranks", 1)
                even = self.group_size % num_local_ranks == 0
                checks.need(even, "num_local_ranks", f"a divisor of the group's {self.group_size} ranks", num_local_ranks)
            if two_level is not None:
                checks.flag(two_level, "two_level")
            choice = engines.choose(engine)
        except DeepEPError as caught:
            error = caught
        # Of the arguments only what has passed its check can be compared, and sent.
        agreed = {"engine": engine, "low_latency_mode": low_latency_mode, "num_local_ranks": num_local_ranks}
        agreed["two_level"] = two_level
        mine = {"error": str(error or ""), "argument": getattr(error, "argument", "")} | engines.whereabouts()
        mine |= {"agreed": agreed if error is None else {}, "made": secrets.randbits(62)}
        everyone = Peers(group, timeout if error is None else 100.0).gather_objects(mine, "Buffer")
        broken = [r for r, other in enumerate(everyone) if other["error"]]
        if broken:
            what = "; ".join(f"rank {r}: {everyone[r]['error']}" for r in broken)
            if all(everyone[r]["argument"] for r in broken):
                raise ArgumentError(f"Buffer: {what}", everyone[broken[0]]["argument"], broken) from error
            raise DeepEPError(f"Buffer: {what}") from error
        raise_if_different("Buffer", [other["agreed"] for other in everyone])

        hosts = [other["host"] for other in everyone]
        local = num_local_ranks or engines.num_local_ranks(hosts)
        self.num_nodes = self.group_size // local
        if engine == "auto":
            choice = self._agree_on_engine(choice, everyone, timeout, local, two_level)
            if low_latency_mode and self.num_nodes > 1 and two_level is not False:
                choice = engines.low_latency_across_nodes(everyone, choice)
            if choice.name == "nvlink" and low_latency_mode:
                choice = engines.Choice("low_latency", choice.reasons)
        how = (group, timeout, local, two_level, num_nvl_bytes, num_rdma_bytes, Buffer._chosen_sms)
        number = everyone[0]["made"]
        try:
            if choice.name == "rdma" and (why := engines.mesh_obstacle(hosts, local)):
                raise ArgumentError(f"Buffer: {why}", "num_local_ranks")
            self._engine = engines.create(choice.name, *how, number, low_latency_mode)
        except DeepEPError as obstacle:
            if engine != "auto" or not (choice.name == "rdma" or isinstance(obstacle, engines.NoPeerAccess)):
                raise
            choice = engines.Choice("collective", [f"{'rdma' if choice.name == 'rdma' else 'nvlink'}: {obstacle}"])
            # Another number: ranks may have held a roll call for the engine that could not be made.
            self._engine = engines.create(choice.name, *how, number + 1, low_latency_mode)
        self.engine = choice.name
        self.two_level = self._engine.forwards
        self.engine_reasons = choice.reasons
        self._comm = CommStream(self._engine.check, self._engine.device)
        self._local_bytes: dict[bool, Tensor] = {}
        self._destroyed = False

    def _agree_on_engine(
        self, choice: engines.Choice, everyone: list[dict], timeout: float, local_ranks: int, two_level: bool | None
    ) -> engines.Choice:
        """nvlink if no rank knows of an obstacle; else the same of rdma between nodes."""
        if not any(other["gpu"] for other in everyone):
            return choice
        mine = [engines.obstacle(everyone), engines.obstacle_across(everyone, self.rank, local_ranks, two_level)]
        found = Peers(self.group, timeout).gather_objects(mine, "Buffer")
        nvlink, rdma = (
            [f"{name} on rank {r}: {texts[i]}" for r, texts in enumerate(found) if texts[i]]
            for i, name in enumerate(("nvlink", "rdma"))
        )
        if not nvlink:
            return engines.Choice("nvlink", choice.reasons)
        return engines.Choice("collective", nvlink + rdma) if rdma else engines.Choice("rdma", nvlink)

    def __repr__(self) -> str:
        state = ", destroyed" if self._destroyed else ""
        return f"Buffer(rank {self.rank} of {self.group_size}, engine={getattr(self, 'engine', None)!r}{state})"

    def __deepcopy__(self, _: Any) -> Buffer:
        """A copied model talks through the same buffer: a copy would be a collective call."""
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Buffer cannot be pickled: it belongs to a process group; save state dicts, not modules")

    # Life --------------------------------------------------------------------------------------------------------------

    @property
    def destroyed(self) -> bool:
        """Whether `destroy` has been called."""
        return self._destroyed

    def destroy(self) -> None:
        """Give back what the buffer holds; raises what has failed and was not raised yet. Later calls raise.

        Asks no other rank. Memory that other ranks write to is kept until they have destroyed theirs, and then goes back when
        this process makes or destroys another buffer, or a tensor of one dies. What tensors, expert-layout handles and
        low-latency handles and hooks hold, they hold until they die.
        """
        if self._destroyed:
            return
        self._destroyed = True
        self._local_bytes.clear()
        try:
            self._engine.check()
        finally:
            self._engine.destroy()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        """An uninitialized tensor in the memory from which this buffer's combine reads fastest.

        Args:
            device: the engine's (the GPU's) or, for engines that serve any, torch's default one, if None.
        """
        self.check()
        fits = isinstance(shape, (tuple, list)) and all(type(n) is int and n >= 0 for n in shape)
        checks.need(fits and math.prod(shape) <= checks.LARGEST, "shape", "a sequence of ints from 0 on, at most 2**48", shape)
        checks.need(isinstance(dtype, torch.dtype), "dtype", "a torch.dtype", dtype)
        try:
            where = None if device is None else torch.device(device)
        except (RuntimeError, TypeError):
            raise ArgumentError(f"device must name a device, got {checks.shown(device)}", "device") from None
        if where is not None and where.type == "cuda" and not torch.cuda.is_available():
            raise ArgumentError(f"device: this machine has no CUDA device, got {checks.shown(device)}", "device")
        return self._engine.empty(shape, dtype, where)

    def empty_like(self, t: Tensor) -> Tensor:
        """`empty` with the shape, dtype and device of `t`."""
        checks.need(isinstance(t, torch.Tensor), "t", "a tensor", t)
        return self.empty(tuple(t.shape), t.dtype, t.device)

    def memory_stats(self) -> dict[str, int]:
        """Bytes that the buffer holds for communication, by purpose."""
        self.check()
        return self._engine.memory_stats()

    # Static settings ---------------------------------------------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether FP8 pairs can be sent: always, here."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set how many SMs the kernels of later calls that move rows, or wait for other ranks, may occupy; even, as in V1.

        Small kernels that wait for nobody take what they need for some microseconds, whatever this says (docs/kernels.md).
        """
        checks.integer(new_num_sms, "new_num_sms", 2)
        checks.need(new_num_sms % 2 == 0, "new_num_sms", "even", new_num_sms)
        Buffer.num_sms = new_num_sms
        Buffer._sms_are_set = True

    @staticmethod
    def _chosen_sms() -> int:
        """0 if the user has not chosen; V1's users may have assigned the attribute."""
        return Buffer.num_sms if Buffer._sms_are_set or Buffer.num_sms != V1_SMS else 0

    @staticmethod
    def capture() -> EventOverlap:
        """An event of the current stream's work so far, to pass as `previous_event`."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The configuration that dispatch uses by default on any number of ranks."""
        checks.integer(num_ranks, "num_ranks", 1)
        return Config(Buffer.num_sms, is_default=not Buffer._chosen_sms())

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The configuration that combine uses by default on any number of ranks."""
        checks.integer(num_ranks, "num_ranks", 1)
        return Config(Buffer.num_sms, is_default=not Buffer._chosen_sms())

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The CUDA stream on which this buffer works."""
        self.check()
        return self._comm.stream

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> Tensor:
        """This rank's raw buffer of `num_nvl_bytes` (or `num_rdma_bytes`) bytes from byte `offset` on, as a tensor.

        The memory is the caller's to use: no operation of this library reads or writes it.
        """
        self.check()
        checks.integer(offset, "offset")
        checks.need(isinstance(dtype, torch.dtype), "dtype", "a torch.dtype", dtype)
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        if use_rdma_buffer not in self._local_bytes:
            self._local_bytes[use_rdma_buffer] = torch.zeros(num_bytes, dtype=torch.uint8)
        usable = (num_bytes - offset) // dtype.itemsize * dtype.itemsize
        checks.need(usable >= 0 and offset % dtype.itemsize == 0, "offset", f"aligned and at most {num_bytes}", offset)
        flat = self._local_bytes[use_rdma_buffer][offset : offset + usable].view(dtype)
        if size is None:
            return flat
        count = torch.Size(size).numel()
        checks.need(count <= flat.numel(), "size", f"at most {flat.numel()} elements", size)
        return flat[:count].view(size)

    # DeepEP V1's normal kernels ----------------------------------------------------------------------------------------

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, EventOverlap]:
        """Count where tokens go; asks no other rank.

        Args:
            topk_idx: int64 [T, K] in [-1, num_experts), -1 meaning not routed.

        Returns:
            num_tokens_per_rank int32 [R], num_tokens_per_rdma_rank int32 [nodes] or None with one node,
            num_tokens_per_expert int32 [E], is_token_in_rank bool [T, R], event.
        """
        self.check()
        checks.stream_arguments(previous_event, async_finish, allocate_on_comm_stream)
        checks.experts(num_experts, self.group_size)
        self._check_topk_idx(topk_idx, None, num_experts, None)
        if previous_event is None and not async_finish:  # what `run` would do, in half the time
            return *self._engine.layout(topk_idx, num_experts), self._comm.finished
        layout, event = self._comm.run(
            lambda: self._engine.layout(topk_idx, num_experts),
            [topk_idx],
            previous_event,
            async_finish,
        )
        return *layout, event

    def dispatch(
        self,
        x: PayloadArgument,
        handle: tuple | None = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[PayloadArgument, Tensor | None, Tensor | None, list[int] | None, Handle | None, EventOverlap]:
        """Send tokens to the ranks of their experts, in rank layout. Not differentiable: see `deepep_train.dispatch`.

        Args:
            x: [T, hidden] of any floating dtype, or an FP8 pair (data [T, hidden], scales [T, n]).
            handle: of an earlier dispatch, whose routing is used again; the counts and top-k must then be None.
            num_tokens_per_rank … num_tokens_per_expert: what `get_dispatch_layout` gave.
            topk_idx, topk_weights: int64 and float32 [T, K], travel with the tokens; None sends none.
            expert_alignment: rounds up the counts returned (rows are not padded).
            num_worst_tokens: if not 0, results have that many rows, padded with zeros, -1 and 0.0.

        Returns:
            recv_x, recv_topk_idx (local expert numbers, -1 elsewhere), recv_topk_weights (0.0 elsewhere),
            num_recv_tokens_per_expert_list (empty with `num_worst_tokens`), handle, event. With a handle given:
            (recv_x, None, None, None, None, event). Rows come ordered by (source rank, token).
        """
        self.check()
        inputs = [*(x if isinstance(x, (tuple, list)) else (x,)), topk_idx, topk_weights, *_tensors_of(handle)]
        inputs += [is_token_in_rank, num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert]

        def check_streams() -> None:
            checks.stream_arguments(previous_event, async_finish, allocate_on_comm_stream, config)

        def check_beside() -> None:
            check_streams()
            counts = (num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert)
            names = ("num_tokens_per_rank", "num_tokens_per_rdma_rank", "is_token_in_rank", "num_tokens_per_expert")
            for name, value in zip(names, counts, strict=True):
                checks.need(value is None, name, "None with a handle", value)
            checks.integer(num_worst_tokens, "num_worst_tokens")  # neither means anything here, but V1's callers pass them
            checks.integer(expert_alignment, "expert_alignment", 1)

        if handle is not None:
            again, event = self._comm.run(
                lambda: self.redispatch(x, handle, topk_idx, topk_weights, also=check_beside, num_sms=_sms_of(config)),
                inputs,
                previous_event,
                async_finish,
            )
            return _unwrap(again), None, None, None, None, event

        def make() -> DispatchRequest:
            check_streams()
            payload = checks.payload(x)
            self._engine.check_payload(payload)
            layout = self._given_layout(
                payload, num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank
            )
            num_experts = layout.num_tokens_per_expert.numel()
            if topk_idx is not None:
                self._check_topk_idx(topk_idx, payload.data.size(0), num_experts, payload.data.device)
                if not self._engine.checks_layout:
                    counted = count_picks(topk_idx, num_experts)
                    if not torch.equal(counted, layout.num_tokens_per_expert):
                        raise wrong_counts(layout.num_tokens_per_expert, counted, "num_tokens_per_expert", "topk_idx")
            self._check_topk_weights(topk_idx, topk_weights)
            return DispatchRequest(
                payload,
                layout,
                topk_idx,
                topk_weights,
                num_experts,
                alignment=checks.integer(expert_alignment, "expert_alignment", 1),
                num_worst_tokens=checks.integer(num_worst_tokens, "num_worst_tokens"),
                num_sms=_sms_of(config),
            )

        got, event = self._comm.run(lambda: self._engine.dispatch(Prepared(make)), inputs, previous_event, async_finish)
        counts = [] if num_worst_tokens else got.plan.tokens_per_expert.tolist()
        new_handle = Handle(got.tensors, got.plan, self)
        return _unwrap(got.payload), got.topk_idx, got.topk_weights, counts, new_handle, event

    def combine(
        self,
        x: Tensor,
        handle: tuple,
        topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Bring rows back to their tokens' ranks and sum them, unweighted. Not differentiable: see `deepep_train.combine`.

        Args:
            x: [rows of the dispatch, hidden], bfloat16, float16, float32 or float64.
            handle: what the dispatch returned.
            topk_weights: float32 [rows, K]; summed alongside, in float32 and the same order.
            bias: one or two tensors [T, hidden] that the sum starts from.

        Returns:
            combined_x [T, hidden], combined_topk_weights float32 [T, K] or None, event. Additions are in float32 (float64
            for float64), the bias first, then by ascending rank, rounded once; with `two_level` each node's ranks are added
            first, rounded once, and then, after the bias, the nodes.
        """
        self.check()
        inputs = [x, topk_weights, *(bias if isinstance(bias, (tuple, list)) else (bias,)), *_tensors_of(handle)]

        def check_streams() -> None:
            checks.stream_arguments(previous_event, async_finish, allocate_on_comm_stream, config)

        (z, weights), event = self._comm.run(
            lambda: self.combine_rows(x, handle, topk_weights, bias, also=check_streams, num_sms=_sms_of(config)),
            inputs,
            previous_event,
            async_finish,
        )
        return z, weights, event

    def internode_dispatch(self, *args: Any, **kwargs: Any) -> tuple:
        """`dispatch`, by the name V1 uses across nodes."""
        return self.dispatch(*args, **kwargs)

    def internode_combine(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """`combine`, by the name V1 uses across nodes."""
        return self.combine(*args, **kwargs)


def _tensors_of(handle: Any) -> tuple:
    """What is no handle is refused where the peers hear of it."""
    return tuple(handle) if isinstance(handle, (tuple, list)) else ()


def _sms_of(config: Any) -> int:
    """What is no `Config` is refused where the peers hear of it."""
    return config.num_sms if isinstance(config, Config) and not config.is_default else 0


def _unwrap(payload: Payload) -> PayloadArgument:
    return payload.data if payload.scales is None else (payload.data, payload.scales)
