"""The engine of one NVLink domain: kernels that store every row once, straight into its final place in a peer's memory.

docs/kernels.md explains the protocol; csrc/nvlink holds the kernels, csrc/nvlink/params.hpp the names used here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train import _C  # type: ignore[attr-defined]
from deepep_train.engines.base import (
    CombineRequest,
    DispatchRequest,
    Engine,
    Payload,
    Prepared,
    Received,
    RedispatchRequest,
)
from deepep_train.engines.expert_layout import extend, sum_by_token, weights_by_pick, weights_by_row
from deepep_train.engines.peers import Peers
from deepep_train.errors import ArgumentError, DeepEPError, PeerTimeoutError
from deepep_train.handle import Plan
from deepep_train.routing import ExpertRows, RankLayout, expert_rows

MAX_RANKS, MAX_EXPERTS, MAX_TOP_K = 64, 4096, 32
_DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@dataclass(frozen=True)
class NvlinkPlan(Plan):
    """Attributes:
    send_index: int32 [T, R], which of this rank's rows for that rank the token is; -1 where it does not go.
    send_base: int32 [R], the first of this rank's rows at each destination.
    experts: the expert-major arrangement, None in rank layout.
    """

    send_index: Tensor
    send_base: Tensor
    experts: ExpertRows | None


class NvlinkLayout(RankLayout):
    """A `RankLayout` that carries `send_index` and the range check's result along."""

    send_index: Tensor
    out_of_range: Tensor


class NvlinkEngine(Engine):
    """See the module.

    Args:
        group: bootstraps, and carries the texts of errors; its ranks must reach each other's memory.
        timeout: seconds that kernels wait for a peer.
        arena_bytes: memory that peers can reach; received tensors live in it.
        num_sms: gives the SMs that a call may occupy.
    """

    name = "nvlink"
    checks_range = True

    def __init__(self, group: dist.ProcessGroup | None, timeout: float, arena_bytes: int, num_sms: Any) -> None:
        self.peers = Peers(group, timeout)
        self.rank = self.peers.rank
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._num_sms = num_sms
        size = self.peers.size
        if size > MAX_RANKS:
            raise ArgumentError(f"engine='nvlink' serves up to {MAX_RANKS} ranks, the group has {size}", "engine")
        total = _C.Communicator.control_bytes() + arena_bytes
        self._comm = _C.Communicator(self.device.index, self.rank, size, total, float(timeout))
        handle = self._comm.ipc_handle().hex() if size > 1 else ""
        mine = {"process": f"{os.uname().nodename}/{os.getpid()}", "handle": handle, "base": self._comm.base}
        everyone = self.peers.gather_objects(mine, "Buffer")
        self._comm.open([(b"" if o["process"] == mine["process"] else bytes.fromhex(o["handle"]), o["base"]) for o in everyone])
        self.peers.gather_objects(None, "Buffer")  # nobody starts before all have mapped all
        allocator = torch.cuda.memory.CUDAPluggableAllocator(_C.__file__, "deepep_train_allocate", "deepep_train_release")
        self._allocator = allocator
        self._pool = torch.cuda.MemPool(allocator.allocator())

    # Memory ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def _in_arena(self) -> Iterator[None]:
        self._comm.enter_pool()
        try:
            with torch.cuda.use_mem_pool(self._pool, self.device):
                yield
        except torch.OutOfMemoryError as error:
            raise DeepEPError(
                f"the arena of rank {self.rank} is full: {self._comm.used} of {self._comm.bytes} bytes are taken; "
                f"pass a larger num_nvl_bytes to Buffer ({error})"
            ) from error
        finally:
            self._comm.leave_pool()

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        with self._in_arena():
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def memory_stats(self) -> dict[str, int]:
        return {"arena": self._comm.bytes, "arena used": self._comm.used, "arena peak": self._comm.peak}

    def _offset(self, t: Tensor | None) -> int:
        return 0 if t is None or not t.numel() else t.data_ptr() - self._comm.base

    def _visible(self, t: Tensor) -> Tensor:
        """`t` where peers can read it: itself if it lies in the arena, else a copy."""
        inside = self._comm.base <= t.data_ptr() < self._comm.base + self._comm.bytes
        if t.is_contiguous() and (inside or not t.numel()):
            return t
        copy = self.empty(t.shape, t.dtype, self.device)
        return copy.copy_(t)

    # Checks ------------------------------------------------------------------------------------------------------------

    def check_payload(self, payload: Payload, argument: str = "x") -> None:
        data = payload.data
        if data.device != self.device:
            raise ArgumentError(f"{argument} must lie on {self.device}, this engine's device, got {data.device}", argument)
        if data.dtype.itemsize != 1 and data.dtype not in _DTYPES:
            raise ArgumentError(
                f"{argument} in {data.dtype} needs engine='collective'; nvlink moves bf16, fp16, fp32 and FP8", argument
            )
        if data.size(1) * data.element_size() % 16:
            raise ArgumentError(
                f"{argument} must have rows of a multiple of 16 bytes on the nvlink engine, got {data.size(1)} elements of "
                f"{data.element_size()}",
                argument,
            )

    def layout(self, topk_idx: Tensor, num_experts: int) -> RankLayout:
        if num_experts > MAX_EXPERTS or topk_idx.size(1) > MAX_TOP_K:
            raise ArgumentError(
                f"the nvlink engine serves up to {MAX_EXPERTS} experts and top-{MAX_TOP_K}, got num_experts={num_experts} and "
                f"topk_idx {list(topk_idx.shape)}",
                "num_experts" if num_experts > MAX_EXPERTS else "topk_idx",
            )
        idx = topk_idx.contiguous()
        num_tokens, size = idx.size(0), self.peers.size
        ints = torch.empty(size + num_experts + 1 + num_tokens * size, dtype=torch.int32, device=idx.device)
        per_rank, per_expert, out_of_range, send_index = ints.split([size, num_experts, 1, num_tokens * size])
        in_rank = torch.empty(num_tokens, size, dtype=torch.bool, device=idx.device)
        p = _C.LayoutParams()
        p.topk_idx, p.num_tokens, p.top_k = idx.data_ptr(), num_tokens, idx.size(1)
        p.num_experts, p.num_ranks = num_experts, size
        p.num_tokens_per_rank, p.num_tokens_per_expert = per_rank.data_ptr(), per_expert.data_ptr()
        p.is_token_in_rank, p.send_index, p.out_of_range = in_rank.data_ptr(), send_index.data_ptr(), out_of_range.data_ptr()
        self._comm.layout(p, _stream())
        layout = NvlinkLayout(per_rank, None, per_expert, in_rank)
        layout.send_index, layout.out_of_range = send_index.view(num_tokens, size), out_of_range
        return layout

    # Dispatch ----------------------------------------------------------------------------------------------------------

    def dispatch(self, prepared: Prepared[DispatchRequest]) -> Received:
        self.check()
        size, rank = self.peers.size, self.rank
        request = prepared.request
        prefix_RR = torch.empty(size, size, dtype=torch.int32, device=self.device)
        send_base = torch.empty(size, dtype=torch.int32, device=self.device)
        p = _C.CountParams()
        p.rank_prefix_matrix, p.send_base = prefix_RR.data_ptr(), send_base.data_ptr()
        p.status = int(request is None)
        out_of_range = None
        if request is not None:
            layout = request.layout
            out_of_range = getattr(layout, "out_of_range", None)
            p.num_tokens_per_rank, p.num_tokens_per_expert = (
                layout.num_tokens_per_rank.data_ptr(),
                layout.num_tokens_per_expert.data_ptr(),
            )
            p.out_of_range = 0 if out_of_range is None else out_of_range.data_ptr()
            p.num_experts, p.bound = request.num_experts, request.num_worst_tokens
            p.signature = _signature("dispatch", request.signature())
        ticket = self._comm.count(p, _stream())
        counts = self._comm.wait_counts(ticket, p.num_experts // size)
        if counts is None:
            self.check()
        if counts.bad:
            self._explain(prepared, out_of_range)
        assert request is not None
        recv_counts = [row[rank] for row in counts.per_rank]
        num_received = sum(recv_counts)
        aligned = [-(-n // request.alignment) * request.alignment for n in counts.per_expert]
        self._check_bounds(request, counts)

        send_index = getattr(request.layout, "send_index", None)
        if send_index is None:
            send_index = _send_index(request.layout.is_token_in_rank)
        top_k = 0 if request.topk_idx is None else request.topk_idx.size(1)
        idx = weights = None
        source = self.empty((num_received,), torch.int32, self.device)
        if request.topk_idx is not None:
            idx = self.empty((num_received, top_k), torch.int64, self.device)
        if request.topk_weights is not None:
            weights = self.empty((num_received, top_k), torch.float32, self.device)
        payload = self._scatter(
            request.payload,
            send_index,
            send_base,
            num_received,
            request.signature(),
            request.topk_idx,
            request.topk_weights,
            idx,
            weights,
            source,
            request.num_experts // size,
        )
        experts = None
        if request.arrangement == "expert":
            assert idx is not None
            experts = expert_rows(idx, request.num_experts // size, request.alignment)
        num_rows = request.num_worst_tokens or (num_received if experts is None else experts.num_rows)
        tokens_per_expert = torch.tensor(aligned, dtype=torch.int64)
        plan = NvlinkPlan(
            number=ticket,
            num_tokens=request.payload.data.size(0),
            num_received=num_received,
            num_rows=num_rows,
            num_experts=request.num_experts,
            top_k=top_k,
            layout=request.arrangement,
            alignment=request.alignment,
            tokens_per_expert=tokens_per_expert.to(self.device) if request.num_worst_tokens else tokens_per_expert,
            recv_topk_idx=idx if experts is not None or idx is None else extend(idx, num_rows, -1),
            send_index=send_index,
            send_base=send_base,
            experts=experts,
        )
        if weights is not None:
            weights = extend(weights if experts is None else weights_by_row(weights, experts), num_rows, 0.0)
        return Received(
            payload=_arranged(payload, plan),
            topk_idx=None if experts is not None else plan.recv_topk_idx,
            topk_weights=weights,
            plan=plan,
            tensors=self._handle_tensors(prefix_RR, request.layout, source, send_index),
        )

    def redispatch(self, prepared: Prepared[RedispatchRequest]) -> Payload:
        self.check()
        request = _request_of(prepared)
        plan = request.plan
        assert isinstance(plan, NvlinkPlan)
        return _arranged(
            self._scatter(request.payload, plan.send_index, plan.send_base, plan.num_received, request.signature()), plan
        )

    def _scatter(
        self,
        payload: Payload,
        send_index: Tensor,
        send_base: Tensor,
        num_received: int,
        signature: dict[str, object],
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        recv_idx: Tensor | None = None,
        recv_weights: Tensor | None = None,
        recv_source: Tensor | None = None,
        num_local_experts: int = 0,
    ) -> Payload:
        """Rank layout, exactly the rows received."""
        data = _aligned(payload.data)
        recv = self.empty((num_received, data.size(1)), data.dtype, self.device)
        recv_scales = None
        p = _C.DispatchParams()
        if payload.scales is not None:
            scales = payload.scales
            if scales.element_size() != 4:
                raise ArgumentError(f"scales must be float32 or int32 on the nvlink engine, got {scales.dtype}", "x[1]")
            recv_scales = self.empty((num_received, scales.size(1)), scales.dtype, self.device)
            p.scales, p.scale_words = scales.data_ptr(), scales.size(1)
            p.scale_row_stride, p.scale_word_stride = scales.stride(0), scales.stride(1)
        idx = None if topk_idx is None else topk_idx.contiguous()
        weights = None if topk_weights is None else topk_weights.contiguous()
        p.x, p.row_bytes, p.num_tokens = data.data_ptr(), data.size(1) * data.element_size(), data.size(0)
        p.send_index, p.send_base = send_index.data_ptr(), send_base.data_ptr()
        p.send_sources = int(recv_source is not None)
        if idx is not None:
            p.topk_idx, p.top_k, p.num_local_experts = idx.data_ptr(), idx.size(1), num_local_experts
        if weights is not None:
            p.topk_weights = weights.data_ptr()
        p.offsets = [self._offset(t) for t in (recv, recv_scales, recv_idx, recv_weights, recv_source)]
        p.signature = _signature("rows", signature) % 2**63
        p.num_sms = self._num_sms()
        self._comm.dispatch(p, _stream())
        return Payload(recv, recv_scales)

    # Combine -----------------------------------------------------------------------------------------------------------

    def combine(self, prepared: Prepared[CombineRequest]) -> tuple[Tensor, Tensor | None]:
        self.check()
        request = _request_of(prepared)
        plan = request.plan
        assert isinstance(plan, NvlinkPlan)
        self.check_payload(Payload(request.rows))
        rows, weights = request.rows[: plan.num_received], request.weights
        if plan.experts is not None:
            rows = sum_by_token(request.rows, plan.experts, plan.num_received)
            if weights is not None:
                weights = weights_by_pick(weights, plan.experts, plan.num_received, plan.top_k)
        rows = self._visible(rows)
        weights = None if weights is None else self._visible(weights[: plan.num_received])
        bias = [_aligned(b) for b in request.bias]
        out = torch.empty(plan.num_tokens, rows.size(1), dtype=rows.dtype, device=self.device)
        out_weights = None
        p = _C.CombineParams()
        if weights is not None:
            out_weights = torch.empty(plan.num_tokens, weights.size(1), dtype=torch.float32, device=self.device)
            p.out_weights, p.top_k = out_weights.data_ptr(), weights.size(1)
        p.out, p.row_bytes, p.num_tokens = out.data_ptr(), rows.size(1) * rows.element_size(), plan.num_tokens
        p.bias_0 = bias[0].data_ptr() if bias else 0
        p.bias_1 = bias[1].data_ptr() if len(bias) > 1 else 0
        p.send_index, p.send_base = plan.send_index.data_ptr(), plan.send_base.data_ptr()
        p.offsets = [self._offset(rows), 0, 0, self._offset(weights), 0]
        p.signature = _signature("combine", request.signature()) % 2**63
        p.dtype, p.num_sms = _DTYPES[rows.dtype], self._num_sms()
        self._comm.combine(p, _stream())
        return out, out_weights

    # Handles and life --------------------------------------------------------------------------------------------------

    def _handle_tensors(self, prefix_RR: Tensor, layout: RankLayout, source: Tensor, send_index: Tensor) -> tuple[Tensor, ...]:
        """DeepEP V1's six tensors; V1's channels are one here."""
        sent_R1 = layout.num_tokens_per_rank.unsqueeze(1)
        return prefix_RR, sent_R1, torch.zeros_like(sent_R1), source, layout.is_token_in_rank, send_index

    def plan_of(self, tensors: tuple[Tensor, ...]) -> Plan:
        prefix_RR, _, _, source, in_rank, send_index = tensors
        before = prefix_RR[self.rank - 1] if self.rank else torch.zeros_like(prefix_RR[0])
        return NvlinkPlan(
            number=0,
            num_tokens=in_rank.size(0),
            num_received=source.size(0),
            num_rows=source.size(0),
            num_experts=0,
            top_k=0,
            layout="rank",
            alignment=1,
            tokens_per_expert=torch.empty(0, dtype=torch.int64),
            recv_topk_idx=None,
            send_index=send_index,
            send_base=before.contiguous(),
            experts=None,
        )

    def _check_bounds(self, request: DispatchRequest, counts: Any) -> None:
        rows = [sum(column) for column in zip(*counts.per_rank, strict=True)]
        short = [r for r, bound in enumerate(counts.bounds) if bound and rows[r] > bound]
        if short:
            what = "; ".join(f"rank {r}: num_worst_tokens={counts.bounds[r]} but {rows[r]} rows arrive" for r in short)
            raise ArgumentError(f"dispatch: {what}", "num_worst_tokens", short)

    def _explain(self, prepared: Prepared[DispatchRequest], out_of_range: Tensor | None) -> None:
        """Some rank's arguments are wrong or differ: exchange texts, raise the same everywhere."""
        if prepared.error is None and out_of_range is not None and out_of_range.item():
            request = prepared.request
            assert request is not None and request.topk_idx is not None
            low, high = (int(v) for v in torch.aminmax(request.topk_idx))
            prepared.error = ArgumentError(
                f"topk_idx must lie in [-1, {request.num_experts}) (num_experts={request.num_experts}), "
                f"got values from {low} to {high}",
                "topk_idx",
            )
        fields = {} if prepared.request is None else prepared.request.signature()
        self.peers.raise_disagreement("dispatch", {"operation": "dispatch"} | fields, prepared.error)

    def check(self) -> None:
        self.peers.check()
        failure = self._comm.failure()
        if failure is None:
            return
        where = f"{failure.operation} {failure.epoch} on rank {self.rank}"
        if failure.missing:
            who = ", ".join(map(str, failure.missing))
            raise PeerTimeoutError(
                f"{where}: waited {self.peers.timeout:g} s in vain for {failure.meeting} of rank {who}; "
                "this buffer can no longer be used",
                failure.missing,
                failure.operation,
            )
        if failure.mismatched:
            raise DeepEPError(f"{where}: ranks {failure.mismatched} are in another call, or its shapes differ")
        raise DeepEPError(f"{where}: ranks {failure.refused} could not take part")

    def destroy(self) -> None:
        self._comm.close()


def _arranged(payload: Payload, plan: NvlinkPlan) -> Payload:
    """Rank layout -> the plan's layout and number of rows."""

    def one(rows: Tensor) -> Tensor:
        dtype = rows.dtype
        bits = rows.view(torch.uint8) if dtype.itemsize == 1 else rows
        if plan.experts is not None:
            zero = bits.new_zeros(1, bits.size(1))
            bits = torch.cat([bits, zero]).index_select(0, plan.experts.source_row)
        return extend(bits, plan.num_rows, 0).view(dtype)

    return Payload(one(payload.data), None if payload.scales is None else one(payload.scales))


def _send_index(in_rank_TR: Tensor) -> Tensor:
    position = in_rank_TR.cumsum(0, dtype=torch.int32) - 1
    return torch.where(in_rank_TR, position, -1).to(torch.int32)


def _aligned(t: Tensor) -> Tensor:
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _signature(operation: str, fields: dict[str, object]) -> int:
    text = json.dumps({"operation": operation} | fields)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _request_of(prepared: Prepared) -> Any:
    if prepared.request is None:
        assert prepared.error is not None
        raise prepared.error
    return prepared.request


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream
