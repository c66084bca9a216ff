"""A GPT-MoE on real text under the blockwise FP8 recipe: the loss with tokens sent in FP8 beside tokens sent as they are.

    python tests/gpu/train_fp8.py --out runs/fp8_training      # one GPU, 4 ranks, 300 steps

Writes training.json and training.png. Ends with status 1 if the losses, smoothed over the last 50 steps, or at any step over
the 10 steps around it, lie further apart than the limit. Bytes of the standard library's sources are the tokens.

Training amplifies any difference, however small. How much of the distance that is, a third run tells: tokens sent as they are
and a learning rate that is 1e-6 of itself higher.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
for folder in (HERE, HERE.parent, ROOT, ROOT / "recipes" / "megatron"):
    sys.path.insert(0, str(folder))

import harness  # noqa: E402
import torch  # noqa: E402

SEQUENCE, VOCABULARY, LIMIT = 128, 256, 0.005
MODEL = {
    "num_layers": 2,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "moe_ffn_hidden_size": 256,
    "num_moe_experts": 16,
    "attention_backend": "unfused",
    "fp8": "e4m3",
    "fp8_recipe": "blockwise",
}


def ranks(
    rank: int, size: int, group: Any, steps: int, rate: float
) -> tuple[list[list[list[float]]], list[str], list[int], float]:
    """Every rank's part: the curves of the runs in bf16 and FP8 and of the third, as `megatron_ranks.fp8_trainings`."""
    import megatron_ranks
    import small
    from text import Text

    from deepep_train import engines
    from deepep_train.megatron.replacements import Replacements

    engines.DEFAULT_ARENA_BYTES = 512 << 20
    text = Text(None, SEQUENCE, seed=1)

    def batches(step: int, setup: Any) -> Iterator[torch.Tensor]:
        for tokens in text.batches(step, rank, setup.micro_batches, setup.micro_batch_size):
            yield tokens.cuda()

    ours = Replacements()
    for name, value in {"SEQUENCE": SEQUENCE, "VOCABULARY": VOCABULARY, "batches": batches}.items():
        ours.put(small, name, value)
    setup = small.Setup(config=MODEL, ep=size, in_bf16=True, with_te=True, micro_batch_size=16, learning_rate=rate)
    almost = replace(setup, learning_rate=rate * (1 + 1e-6))
    began = time.monotonic()
    try:
        curves, made, sent = megatron_ranks.fp8_trainings(rank, size, group, setup, small.OURS, steps)
        (third,), *_ = megatron_ranks.fp8_trainings(rank, size, group, almost, small.OURS, steps, ("0",))
        return [*curves, third], made, sent, time.monotonic() - began
    finally:
        ours.take_back()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rate", type=float, default=4e-4, help="the learning rate")
    parser.add_argument("--deadline", type=float, default=280.0, help="seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/fp8_training"))
    given = parser.parse_args()
    results = harness.run_ranks(given.ranks, ranks, given.steps, given.rate, timeout=given.deadline)
    harness.close_pools()
    in_bf16, in_fp8, third = (mean_over_ranks([curves[i] for curves, *_ in results]) for i in range(3))
    sent = [counts for _, _, counts, _ in results]
    assert all(none == 0 and some > 0 for none, some in sent), f"dispatches that crossed in FP8: {sent}"
    around = min(10, given.steps)
    last = min(50, given.steps)
    ends = [sum(curve[-last:]) / last for curve in (in_bf16, in_fp8, third)]
    end_distance, end_noise = (abs(end - ends[0]) / ends[0] for end in ends[1:])
    distance, noise = (furthest(in_bf16, curve, around) for curve in (in_fp8, third))
    log = {
        "command": " ".join(sys.argv),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ranks": given.ranks,
        "learning_rate": given.rate,
        "model": MODEL,
        "sequence": SEQUENCE,
        "seconds": round(results[0][3], 1),
        "loss_bf16_dispatch": in_bf16,
        "loss_fp8_dispatch": in_fp8,
        "loss_bf16_dispatch_other_rate": third,
        f"mean of the last {last}": ends,
        "apart at the end": end_distance,
        f"apart at most, means of {around} steps": distance,
        "by chance": [end_noise, noise],
        "limit": LIMIT,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    plot(in_bf16, in_fp8, given.out / "training.png")
    print(f"loss {in_bf16[0]:.3f} -> {ends[0]:.4f} (bf16 dispatch), {ends[1]:.4f} (FP8 dispatch): {end_distance:.4%} apart")
    print(f"means of {around} steps at most {distance:.4%} apart; limit {LIMIT:.1%}; {results[0][3]:.0f} s; wrote {given.out}")
    print(f"by chance, bf16 dispatch with a learning rate 1e-6 higher: {end_noise:.4%} at the end, at most {noise:.4%}")
    return 0 if max(distance, end_distance) <= LIMIT else 1


def mean_over_ranks(curves: list[list[list[float]]]) -> list[float]:
    return [sum(loss for loss, _ in step) / len(step) for step in zip(*curves, strict=True)]


def furthest(a: list[float], b: list[float], width: int) -> float:
    pairs = zip(moving_mean(a, width), moving_mean(b, width), strict=True)
    return max(abs(y - x) / x for x, y in pairs)


def moving_mean(curve: list[float], width: int) -> list[float]:
    return [sum(curve[i : i + width]) / width for i in range(len(curve) - width + 1)]


def plot(in_bf16: list[float], in_fp8: list[float], path: Path) -> None:
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(in_bf16, label="bf16 dispatch")
    axes.plot(in_fp8, label="FP8 dispatch", linestyle="--")
    axes.set(title="GPT-MoE, blockwise FP8 recipe", xlabel="step", ylabel="loss (nats per byte)")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
