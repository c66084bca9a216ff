"""Trains a small GPT with Mixture-of-Experts layers on Megatron-Core, its tokens travelling through deepep_train.

    torchrun --standalone --nproc-per-node 2 recipes/megatron/pretrain.py --steps 60          # CPUs
    torchrun --standalone --nproc-per-node 8 recipes/megatron/pretrain.py --dispatcher alltoall  # to compare

Bytes of text are the tokens. On GPUs the layers are Transformer Engine's, where that is installed. The optimizer, gradient
reduction, schedules and checkpoints are Megatron's own; only two configuration fields say that tokens travel through this
library. --help lists the options.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling Megatron's small functions takes longer than this run

import torch
import torch.distributed as dist
from gpt import WITH_TE, build, device
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from saving import load, save
from text import Text
from torch import Tensor
from tqdm import tqdm

from deepep_train.megatron import DISPATCHERS, cpu, install


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file or folder of text; default: the standard library's sources")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--dispatcher", choices=DISPATCHERS, default="deepep_train")
    for name, default in (("layers", 2), ("hidden", 128), ("heads", 4), ("experts", 8), ("top-k", 2), ("ffn", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16" if on_gpu else "fp32", help="default: %(default)s"
    )
    parser.add_argument("--sequence", type=int, default=128, help="bytes")
    parser.add_argument("--micro-batch", type=int, default=4, help="sequences a rank and micro-batch")
    parser.add_argument("--micro-batches", type=int, default=2, help="a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/megatron"), help="for checkpoints, log.json and loss_curve.png")
    parser.add_argument("--save-every", type=int, default=200, help="steps; one is saved at the end besides; 0: none at all")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    found = parser.parse_args()
    for name, value in vars(found).items():
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value < 1
            and not (name == "seed" or (name == "save_every" and value == 0))
        ):
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if found.experts % size or found.top_k > found.experts:
        parser.error(f"--experts {found.experts} must be divisible by the {size} ranks and at least --top-k {found.top_k}")
    return found


def forward_step(batches: Iterator[Tensor], model: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """What Megatron's schedules call for every micro-batch."""
    tokens = next(batches).to(device())
    positions = torch.arange(tokens.size(1) - 1, device=tokens.device).expand(tokens.size(0), -1)
    losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return losses, mean_loss


def mean_loss(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = losses.float().mean()
    return loss, {"loss": loss.detach().clone()}


def train(given: argparse.Namespace) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    text = Text(given.data, given.sequence, given.seed)
    model, optimizer = build(given)
    history: list[dict[str, float]] = load(given.out, model, optimizer) if given.resume else []
    run = get_forward_backward_func()
    progress = tqdm(
        range(len(history), given.steps), initial=len(history), total=given.steps, disable=rank != 0, file=sys.stderr
    )
    for step in progress:
        began = time.perf_counter()
        model.zero_grad_buffer()
        optimizer.zero_grad()
        results = run(
            forward_step_func=forward_step,
            data_iterator=text.batches(step, rank, given.micro_batches, given.micro_batch),
            model=[model],
            num_microbatches=given.micro_batches,
            seq_length=given.sequence,
            micro_batch_size=given.micro_batch,
            forward_only=False,
        )
        _, norm, _ = optimizer.step()
        loss = torch.stack([r["loss"] for r in results]).mean().cpu()
        dist.all_reduce(loss)
        entry = {"step": step, "loss": float(loss) / size, "grad_norm": float(norm), "seconds": time.perf_counter() - began}
        history.append(entry)
        progress.set_postfix(loss=f"{entry['loss']:.3f}")
        if given.save_every and ((step + 1) % given.save_every == 0 or step + 1 == given.steps):
            save(given.out, model, optimizer, history)
    if rank == 0 and history:
        report(given, history)


def report(given: argparse.Namespace, history: list[dict[str, float]]) -> None:
    """log.json and loss_curve.png."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    tokens = given.micro_batches * given.micro_batch * given.sequence * dist.get_world_size()
    seconds = sorted(e["seconds"] for e in history)
    speed = tokens / statistics.median(seconds)
    slow, fast = (tokens / seconds[len(seconds) * quarter // 4] for quarter in (3, 1))
    layers = "Transformer Engine" if WITH_TE else "local"
    given.out.mkdir(parents=True, exist_ok=True)
    log = {"dispatcher": given.dispatcher, "precision": given.precision, "layers": layers, "tokens_per_second": speed}
    log |= {"options": {name: str(value) for name, value in vars(given).items()}, "steps": history}
    (given.out / "log.json").write_text(json.dumps(log, indent=1) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([e["step"] for e in history], [e["loss"] for e in history])
    axes.set(title=f"GPT-MoE on Megatron-Core, {given.dispatcher}", xlabel="step", ylabel="loss (nats per byte)")
    figure.savefig(given.out / "loss_curve.png", dpi=120)
    plt.close(figure)
    first, last = history[0]["loss"], history[-1]["loss"]
    what = f"{given.dispatcher}: loss {first:.3f} -> {last:.3f} in {len(history)} steps"
    print(f"{what}, median {speed:,.0f} tokens/s, half of the steps {slow:,.0f} to {fast:,.0f}; see {given.out}")


def main() -> None:
    given = options()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    else:
        cpu.enable()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    install()
    # Ranks that share a GPU cannot use NCCL among themselves.
    shares = not torch.cuda.is_available() or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
    dist.init_process_group("gloo" if shares else "cpu:gloo,cuda:nccl")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    train(given)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
