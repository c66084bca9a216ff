"""Small Megatron models, and what their ranks do with them: on a GPU where there is one (all ranks share the first), else on
the CPU through `deepep_train.megatron.cpu`."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import megatron.core
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import num_microbatches_calculator, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from deepep_train.megatron import cpu, install

OURS = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep_train"}
STOCK = {name: {"moe_token_dispatcher_type": name} for name in ("alltoall", "allgather")}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS_BEFORE_CAPTURE = 2  # of CUDA graphs, when a configuration asks for them
HIDDEN, HEADS, FFN, VOCABULARY, SEQUENCE = 32, 4, 48, 64, 16


@dataclass(frozen=True)
class Setup:
    """How the ranks share a model, and what the model is."""

    tp: int = 1
    ep: int = 2
    pp: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    use_distributed_optimizer: bool = False
    micro_batches: int = 1
    micro_batch_size: int = 2
    vpp: int | None = None  # model chunks of a pipeline stage
    in_bf16: bool = False
    learning_rate: float = 3e-3
    hybrid: str = ""  # a pattern of layers, "*" attention and "E" experts, makes it a HybridModel
    with_te: bool = False  # Transformer Engine's layers, experts in one grouped GEMM; they compute on GPUs only

    def transformer_config(self, dispatcher: dict[str, Any]) -> TransformerConfig:
        given = {
            "num_layers": 2,
            "hidden_size": HIDDEN,
            "num_attention_heads": HEADS,
            "num_moe_experts": 8,
            "moe_router_topk": 2,
            "moe_ffn_hidden_size": FFN,
            "add_bias_linear": False,
            "gated_linear_unit": True,
            "activation_func": F.silu,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": 0.01,
            "tensor_model_parallel_size": self.tp,
            "expert_tensor_parallel_size": self.tp,
            "expert_model_parallel_size": self.ep,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": self.vpp,
            "bf16": self.in_bf16,
            "params_dtype": torch.bfloat16 if self.in_bf16 else torch.float32,
            "pipeline_dtype": torch.bfloat16 if self.in_bf16 else torch.float32,
            "sequence_parallel": self.tp > 1,
            "moe_grouped_gemm": self.with_te,
        }
        if self.vpp:
            # As Megatron's command line insists for two stages: they are each other's next and previous, and in a batch of
            # sends and receives between the same two ranks an activation would be taken for a gradient.
            given |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        return TransformerConfig(**(cpu.CONFIG | given | self.config | dispatcher))

    @contextmanager
    def parallel(self) -> Iterator[None]:
        """Megatron's process groups, and the random state that every model starts from."""
        with set_up():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=self.tp,
                pipeline_model_parallel_size=self.pp,
                virtual_pipeline_model_parallel_size=self.vpp,
                expert_model_parallel_size=self.ep,
                expert_tensor_parallel_size=self.tp,
            )
            yield

    def seed(self, into_graphs: bool = False) -> None:
        """`into_graphs`: with random states that CUDA graphs can hold."""
        torch.manual_seed(3)
        tensor_parallel.model_parallel_cuda_manual_seed(1, te_rng_tracker=into_graphs, force_reset_rng=True)


@contextmanager
def set_up() -> Iterator[None]:
    """Where Megatron's own groups and models may be made; they are taken down at the end."""
    if DEVICE == "cuda":
        torch.cuda.set_device(0)
    else:
        cpu.enable()
    install()
    before = set(_groups())
    forget_metrics()
    moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None  # of shape [] after a lone layer, [1] in training
    try:
        with torch.compiler.set_stance("force_eager"):  # compiling Megatron's small functions takes longer than the tests
            yield
    finally:
        parallel_state.destroy_model_parallel()
        gc.collect()  # buffers hold groups, too
        for made in [group for group in _groups() if group not in before]:
            dist.destroy_process_group(made)  # gloo keeps several threads for each, and Megatron makes some thirty


def _groups() -> list[Any]:
    return list(dist.distributed_c10d._world.pg_map)


def skip_what_this_release_refuses(config: dict[str, Any]) -> None:
    if config.get("moe_shared_expert_overlap") and version() < (0, 18):
        pytest.skip("before 0.18 Megatron takes overlapped shared experts with alltoall only")


def version() -> tuple[int, ...]:
    return tuple(int(part) for part in megatron.core.__version__.split(".")[:2])


def forget_metrics() -> None:
    """They have the number of layers of the first model of the process."""
    if importlib.util.find_spec("megatron.core.transformer.moe.moe_logging") is not None:
        from megatron.core.transformer.moe import moe_logging

        moe_logging.destroy_moe_metrics_tracker()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()


# One layer ----------------------------------------------------------------------------------------------------------------


def layer_of(config: TransformerConfig) -> Any:
    from megatron.core.transformer.spec_utils import build_module

    spec = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False).submodules.mlp
    layer = spec(config=config) if callable(spec) else build_module(spec, config=config)  # by release
    layer.set_layer_number(1)
    return layer


def layer_step(
    setup: Setup, dispatcher: dict[str, Any], rank: int, lengths: tuple[int, ...], batch: int = 2
) -> dict[str, Tensor]:
    """Output and gradients of one MoELayer; rank r holds `lengths[r]` x `batch` tokens."""
    setup.seed()
    layer = layer_of(setup.transformer_config(dispatcher))
    g = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(lengths[rank], batch, HIDDEN, generator=g).requires_grad_()
    y, _ = layer(x)
    (y * torch.randn(y.shape, generator=g)).sum().backward()
    assert x.grad is not None
    found = {"y": y.detach(), "x.grad": x.grad}
    found |= {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {n: t.clone() for n, t in found.items()}


def layer_steps(
    rank: int, size: int, group: Any, setup: Setup, dispatchers: list[dict[str, Any]], lengths: tuple[int, ...]
) -> list[dict[str, Tensor]]:
    with setup.parallel():
        return [layer_step(setup, d, rank, lengths) for d in dispatchers]


# Training -----------------------------------------------------------------------------------------------------------------


def batches(step: int, setup: Setup) -> Iterator[Tensor]:
    rank = parallel_state.get_data_parallel_rank()
    for i in range(setup.micro_batches):
        g = torch.Generator().manual_seed(10_000 * rank + 100 * step + i)
        start = torch.randint(VOCABULARY, (setup.micro_batch_size, 1), generator=g)
        stride = torch.randint(1, 4, (setup.micro_batch_size, 1), generator=g)
        yield ((start + stride * torch.arange(SEQUENCE + 1)) % VOCABULARY).to(DEVICE)


def forward_step(data: Iterator[Tensor], model: Any, return_schedule_plan: bool = False) -> tuple[Any, Any]:
    tokens = next(data)
    positions = torch.arange(SEQUENCE, device=DEVICE).expand(tokens.size(0), -1)
    given, labels = (tokens[:, :-1].contiguous(), positions, None), tokens[:, 1:].contiguous()
    if return_schedule_plan:  # what the overlapping schedule takes instead
        return get_attr_wrapped_model(model, "build_schedule_plan")(*given, labels=labels), _mean
    return model(*given, labels=labels), _mean


def _mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = losses.float().mean()
    return loss, {"loss": loss.detach()}


def gpt(config: TransformerConfig, chunk: int | None = None) -> GPTModel:
    with_te = config.moe_grouped_gemm
    make = get_gpt_layer_with_transformer_engine_spec if with_te else get_gpt_layer_local_spec
    spec = make(num_experts=config.num_moe_experts, moe_grouped_gemm=with_te)
    mtp = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=with_te) if config.mtp_num_layers else None
    how: dict[str, Any] = {} if chunk is None else {"ignore_virtual": False, "vp_stage": chunk}
    first, last = parallel_state.is_pipeline_first_stage(**how), parallel_state.is_pipeline_last_stage(**how)
    return GPTModel(
        config, spec, VOCABULARY, SEQUENCE, pre_process=first, post_process=last, mtp_block_spec=mtp,
        share_embeddings_and_output_weights=False, vp_stage=chunk,
    ).to(DEVICE)  # fmt: skip


def hybrid_model(config: TransformerConfig, pattern: str) -> Any:
    """Its layers are either attention or experts; here they are parts of the local GPT layer. (Mamba's need CUDA.)"""
    if version() >= (0, 18):
        from megatron.core.models.hybrid.hybrid_block import HybridStack as Stack
        from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules as Submodules
        from megatron.core.models.hybrid.hybrid_model import HybridModel as Model
    else:
        from megatron.core.models.mamba import MambaModel as Model
        from megatron.core.ssm.mamba_block import MambaStack as Stack
        from megatron.core.ssm.mamba_block import MambaStackSubmodules as Submodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    parts = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, moe_grouped_gemm=False).submodules
    names = (("input_layernorm", "self_attention", "self_attn_bda"), ("pre_mlp_layernorm", "mlp", "mlp_bda"))
    attention, experts = (
        ModuleSpec(TransformerLayer, submodules=TransformerLayerSubmodules(**{n: getattr(parts, n) for n in layer}))
        for layer in names
    )
    stack = ModuleSpec(Stack, submodules=Submodules(attention_layer=attention, moe_layer=experts))
    names = "hybrid_layer_pattern" if version() >= (0, 17) else "hybrid_override_pattern"
    return Model(config, stack, VOCABULARY, SEQUENCE, **{names: pattern}, position_embedding_type="rope")


def train(setup: Setup, dispatcher: dict[str, Any], steps: int) -> list[list[float]]:
    """Per step: the mean loss of this rank's micro-batches (on the last pipeline stage) and the gradient's norm."""
    config = setup.transformer_config(dispatcher)
    has_graphs = config.cuda_graph_impl == "transformer_engine"
    setup.seed(into_graphs=has_graphs)
    make = partial(hybrid_model, pattern=setup.hybrid) if setup.hybrid else gpt
    chunks: list[Any] = [make(config, chunk) for chunk in range(setup.vpp)] if setup.vpp else [make(config)]
    if setup.in_bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    how = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=setup.use_distributed_optimizer, overlap_grad_reduce=False,
        delay_wgrad_compute=config.delay_wgrad_compute,
    )  # fmt: skip
    # Graphs of parameters' gradients may not depend on the default stream: on a stream aside, as Megatron's own training does.
    with torch.cuda.stream(torch.cuda.Stream() if has_graphs else None):
        chunks = [DistributedDataParallel(config, how, chunk) for chunk in chunks]
    if has_graphs:
        torch.cuda.synchronize()
    for chunk in chunks:
        chunk.broadcast_params()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=setup.learning_rate, clip_grad=1.0, use_distributed_optimizer=setup.use_distributed_optimizer,
            bf16=setup.in_bf16, params_dtype=config.params_dtype,
        ),
        chunks,
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    if has_graphs:  # the helper asks for the number of micro-batches
        ranks = parallel_state.get_data_parallel_world_size()
        num_microbatches_calculator.destroy_num_microbatches_calculator()
        num_microbatches_calculator.init_num_microbatches_calculator(
            rank=dist.get_rank(), rampup_batch_size=None, micro_batch_size=setup.micro_batch_size,
            global_batch_size=setup.micro_batch_size * setup.micro_batches * ranks, data_parallel_size=ranks,
        )  # fmt: skip
    run = get_forward_backward_func()
    found = []
    for step in range(steps):
        if has_graphs and step == STEPS_BEFORE_CAPTURE:
            from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

            TECudaGraphHelper(chunks, config, SEQUENCE, setup.micro_batch_size, [optimizer]).create_cudagraphs()
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        data = [batches(step, setup) for _ in chunks]
        results = run(
            forward_step_func=forward_step,
            data_iterator=data if len(data) > 1 else data[0],
            model=chunks,
            num_microbatches=setup.micro_batches,
            seq_length=SEQUENCE,
            micro_batch_size=setup.micro_batch_size,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        found.append([sum(float(r["loss"]) for r in results) / max(1, len(results)), float(norm)])
    return found


def trainings(
    rank: int, size: int, group: Any, setup: Setup, dispatchers: list[dict[str, Any]], steps: int
) -> list[list[list[float]]]:
    with setup.parallel():
        return [train(setup, d, steps) for d in dispatchers]
