"""The model, in Megatron's data parallelism, and its optimizer."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from deepep_train.fp8 import te_present
from deepep_train.megatron import DISPATCHERS, cpu

VOCABULARY = 256  # bytes
# Transformer Engine's layers: experts in one grouped GEMM, and alltoall's permutations in fused kernels.
WITH_TE = torch.cuda.is_available() and te_present.is_installed()
_KERNELS: dict[str, Any] = {"moe_grouped_gemm": True, "moe_permute_fusion": True} if WITH_TE else cpu.CONFIG


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def build(given: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its optimizer."""
    torch.manual_seed(given.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(given.seed)
    in_bf16 = given.precision == "bf16"
    fields: dict[str, Any] = {
        "num_layers": given.layers,
        "hidden_size": given.hidden,
        "num_attention_heads": given.heads,
        "num_moe_experts": given.experts,
        "moe_router_topk": given.top_k,
        "moe_ffn_hidden_size": given.ffn,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "moe_router_dtype": "fp32",
        "expert_model_parallel_size": dist.get_world_size(),
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": in_bf16,
        "params_dtype": torch.bfloat16 if in_bf16 else torch.float32,
    }
    config = TransformerConfig(**(_KERNELS | fields | DISPATCHERS[given.dispatcher]))
    config.finalize_model_grads_func = finalize_model_grads
    make = get_gpt_layer_with_transformer_engine_spec if WITH_TE else get_gpt_layer_local_spec
    spec = make(num_experts=given.experts, moe_grouped_gemm=WITH_TE)
    model: Any = GPTModel(config, spec, VOCABULARY, given.sequence, position_embedding_type="rope").to(device())
    if in_bf16:
        model = Float16Module(config, model)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    model.broadcast_params()
    how = OptimizerConfig(optimizer="adam", lr=given.lr, clip_grad=1.0, bf16=in_bf16, params_dtype=config.params_dtype)
    return model, get_megatron_optimizer(how, [model])
