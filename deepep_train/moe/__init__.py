"""Mixture-of-Experts layers for plain PyTorch models, and what training them in parallel takes besides."""

from deepep_train.moe.checkpoint import load_checkpoint, save_checkpoint
from deepep_train.moe.experts import GroupedExperts
from deepep_train.moe.layer import LoadBalance, MoELayer
from deepep_train.moe.parallel import (
    clip_grad_norm_,
    dense_parameters,
    expert_parameter_names,
    expert_parameters,
    ignore_experts_in_ddp,
    reduce_expert_gradients,
    reduce_gradients,
    update_expert_biases,
)
from deepep_train.moe.router import Routing, TopKRouter

__all__ = [
    "GroupedExperts",
    "LoadBalance",
    "MoELayer",
    "Routing",
    "TopKRouter",
    "clip_grad_norm_",
    "dense_parameters",
    "expert_parameter_names",
    "expert_parameters",
    "ignore_experts_in_ddp",
    "load_checkpoint",
    "reduce_expert_gradients",
    "reduce_gradients",
    "save_checkpoint",
    "update_expert_biases",
]
