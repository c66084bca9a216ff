"""Gradients when experts are spread over ranks and everything else is replicated.

With a mean loss over each rank's tokens, data parallelism averages gradients over all D ranks. An expert's gradient already
is a sum: tokens of its whole expert-parallel group reached it. So expert gradients are divided by D and summed over the
ranks that hold the same experts (the replicas, if the group is smaller than D), and all others are averaged over D.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from deepep_train.moe.experts import GroupedExperts
from deepep_train.moe.layer import MoELayer

_BUCKET_ELEMENTS = 1 << 24


def expert_parameter_names(model: nn.Module) -> set[str]:
    """Names, as in `model.named_parameters()`, of parameters that differ between ranks."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        if isinstance(module, GroupedExperts)
        for name, _ in module.named_parameters()
    }


def expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that differ between ranks, in order."""
    names = expert_parameter_names(model)
    return [p for n, p in model.named_parameters() if n in names]


def dense_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that every rank holds alike, in order."""
    names = expert_parameter_names(model)
    return [p for n, p in model.named_parameters() if n not in names]


def ignore_experts_in_ddp(model: nn.Module) -> None:
    """Call before `DistributedDataParallel(model)`, which then leaves expert parameters to `reduce_expert_gradients`.

    For FSDP2 pass `ignored_params=set(expert_parameters(model))` to `fully_shard` instead; that of torch 2.8 does not divide
    gradients by the number of ranks over gloo.
    """
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(expert_parameter_names(model)))


def reduce_expert_gradients(
    model: nn.Module, group: dist.ProcessGroup | None = None, replicas: dist.ProcessGroup | None = None
) -> None:
    """Make expert gradients those of the mean loss over `group`; the dense ones are DDP's or FSDP's business.

    Args:
        group: all data-parallel ranks; None for the default group.
        replicas: ranks that hold the same experts; None if no two ranks do.
    """
    parameters = expert_parameters(model)
    _fill_missing(parameters)
    for bucket in _buckets(p.grad for p in parameters):
        torch._foreach_div_(bucket, _world_size(group))
        if replicas is not None:
            _all_reduce(bucket, replicas)


def reduce_gradients(
    model: nn.Module, group: dist.ProcessGroup | None = None, replicas: dist.ProcessGroup | None = None
) -> None:
    """Average dense gradients over `group` and do `reduce_expert_gradients`: data parallelism without DDP.

    Buckets are the same in every run, so a resumed run adds in the order of the first (DDP rebuilds its buckets after the
    first step, which can change the last bit).
    """
    reduce_expert_gradients(model, group, replicas)
    parameters = [p for p in dense_parameters(model) if p.requires_grad]
    _fill_missing(parameters)
    for bucket in _buckets(p.grad for p in parameters):
        _all_reduce(bucket, group)
        torch._foreach_div_(bucket, _world_size(group))


def clip_grad_norm_(
    model: nn.Module, max_norm: float, group: dist.ProcessGroup | None = None, norm_type: float = 2.0
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` over dense parameters and the experts of all ranks together.

    Call it after gradients are reduced. `group` is the expert-parallel group; None for the default group. Dense parameters
    may be DTensors of FSDP2. Returns the total norm before clipping, the same on every rank.
    """
    dense = [p.grad for p in dense_parameters(model) if p.grad is not None]
    experts = [p.grad for p in expert_parameters(model) if p.grad is not None]
    # torch's norm takes either DTensors or plain tensors, and FSDP2 may have left some of the dense parameters plain.
    sharded = [g for g in dense if isinstance(g, DTensor)]
    plain = [g for g in dense if not isinstance(g, DTensor)]
    norms = [_norm(sharded, norm_type), _norm(plain, norm_type), _norm(experts, norm_type)]
    device = next((g.device for g in (*plain, *experts, *sharded)), torch.device("cpu"))
    sharded_norm, plain_norm, expert_norm = (n.to(device) for n in norms)
    is_max = norm_type == float("inf")
    shared = expert_norm if is_max else expert_norm**norm_type
    if _distributed():
        dist.all_reduce(shared, dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM, group=group)
    if is_max:
        total = torch.stack([sharded_norm, plain_norm, shared]).amax()
    else:
        total = (sharded_norm**norm_type + plain_norm**norm_type + shared) ** (1 / norm_type)
    coefficient = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for grad in (*dense, *experts):
        (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(coefficient.to(grad.device))
    return total


def _norm(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    norm = torch.nn.utils.get_total_norm(list(grads), norm_type)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def update_expert_biases(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """`MoELayer.update_expert_bias` of every layer; after each optimizer step."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            module.update_expert_bias(group)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _world_size(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if _distributed() else 1


def _fill_missing(parameters: Iterable[nn.Parameter]) -> None:
    """A rank without tokens has no gradient, but all ranks must reduce the same buckets."""
    for p in parameters:
        if p.grad is None and p.requires_grad:
            p.grad = torch.zeros_like(p)


def _buckets(grads: Iterable[Tensor | None]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for grad in grads:
        if grad is None:
            continue
        if bucket and (grad.dtype != bucket[0].dtype or sum(g.numel() for g in bucket) + grad.numel() > _BUCKET_ELEMENTS):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket


def _all_reduce(bucket: list[Tensor], group: dist.ProcessGroup | None) -> None:
    if not _distributed():
        return
    flat = torch.cat([g.reshape(-1) for g in bucket])
    dist.all_reduce(flat, group=group)
    for grad, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
        grad.copy_(part.view_as(grad))
