"""`bench --megatron`: a Megatron MoE layer's step, forward and backward, with Megatron's alltoall and with this library."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepep_train.megatron import DISPATCHERS, cpu, install

ITERATIONS, QUICK_ITERATIONS = 15, 3


@dataclass(frozen=True)
class Layer:
    """What is timed; routing follows from random weights and tokens of a fixed seed."""

    num_tokens: int = 2048
    hidden: int = 1024
    num_experts: int = 16
    num_topk: int = 4
    ffn_hidden: int = 64


ON_GPUS = Layer(num_tokens=4096, hidden=4096, num_experts=32, num_topk=8, ffn_hidden=1024)


def measure(layer: Layer, iterations: int, out: Path) -> None:
    """One rank's part. The dispatchers take turns within each iteration, so that a disturbance hits both."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.spec_utils import build_module
    from megatron.core.transformer.transformer_config import TransformerConfig
    from tqdm import tqdm

    from deepep_train.fp8 import te_present

    on_gpus = "nccl" in dist.get_backend_config()  # then every rank has a GPU
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpus else (torch.device("cpu"), torch.float32)
    if not on_gpus:
        cpu.enable()
    # Transformer Engine's experts are one grouped GEMM, and alltoall's permutations fused kernels.
    with_te = on_gpus and te_present.is_installed()
    kernels: dict[str, Any] = {"moe_grouped_gemm": True, "moe_permute_fusion": True} if with_te else cpu.CONFIG
    install()
    size, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=size)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    layers: dict[str, Any] = {}
    for name, dispatcher in DISPATCHERS.items():
        torch.manual_seed(1)
        given: dict[str, Any] = {
            "num_layers": 1,
            "hidden_size": layer.hidden,
            "num_attention_heads": 8,
            "num_moe_experts": layer.num_experts,
            "moe_router_topk": layer.num_topk,
            "moe_ffn_hidden_size": layer.ffn_hidden,
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": torch.nn.functional.silu,
            "expert_model_parallel_size": size,
            "params_dtype": dtype,
            "bf16": on_gpus,
        }
        config = TransformerConfig(**kernels, **given, **dispatcher)
        make = get_gpt_layer_with_transformer_engine_spec if with_te else get_gpt_layer_local_spec
        spec = make(num_experts=layer.num_experts, moe_grouped_gemm=with_te).submodules.mlp
        layers[name] = spec(config=config) if callable(spec) else build_module(spec, config=config)
        layers[name].set_layer_number(1)
        layers[name].to(device, dtype)
    drawn = torch.randn(2, layer.num_tokens, 1, layer.hidden, generator=torch.Generator().manual_seed(rank))
    x, grad = drawn.to(device, dtype).unbind()
    x = x.clone().requires_grad_()
    times: dict[str, list[float]] = {name: [] for name in layers}
    for iteration in tqdm(range(iterations + 2), desc="bench", disable=rank != 0, file=sys.stderr):
        for name, module in layers.items():
            dist.barrier()
            start = time.perf_counter()
            module(x)[0].backward(grad)
            if on_gpus:
                torch.cuda.synchronize()
            slowest = torch.tensor(1e3 * (time.perf_counter() - start), device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if iteration >= 2:  # the first two warm up
                times[name].append(float(slowest))
    if rank == 0:
        kind = torch.cuda.get_device_name() if on_gpus else platform.processor() or platform.machine()
        machine = {"device": kind, "torch": torch.__version__, "experts": "Transformer Engine" if with_te else "local"}
        _report(layer, {name: statistics.median(t) for name, t in times.items()}, size, machine, iterations, out)


def _report(layer: Layer, medians: dict[str, float], size: int, machine: dict[str, str], iterations: int, out: Path) -> None:
    import megatron.core

    medians = {name: round(ms, 2) for name, ms in medians.items()}  # what is printed and written must be one number
    base = medians["alltoall"]
    print(
        f"Megatron-Core {megatron.core.__version__}, {size} ranks, {machine['device']}, {machine['experts']} experts; {layer}"
    )
    for name, ms in medians.items():
        print(f"{name:14s}{ms:10.1f} ms{ms / base:8.2f}")
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m deepep_train", *sys.argv[1:]]),
        "machine": machine,
        "megatron": megatron.core.__version__,
        "ranks": size,
        "iterations": iterations,
        "layer": asdict(layer),
        "step_ms": medians,
        "ratio": round(medians["deepep_train"] / base, 4),
    }
    (out / "bench_megatron.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {out}/bench_megatron.json")
