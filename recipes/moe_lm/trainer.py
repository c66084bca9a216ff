"""One model and its optimizer: the step, the evaluation, and what all ranks should know about them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from model import VOCABULARY, Transformer
from torch import Tensor
from world import World

from deepep_train import moe


class Shared(NamedTuple):
    """Means and sums over all ranks.

    Attributes:
        loss: the mean.
        seconds: the mean.
        stop: whether any rank was asked to stop.
        balance: picks of the busiest expert over the mean, by layer; 1.0 is perfect.
    """

    loss: float
    seconds: float
    stop: bool
    balance: list[float]


class Trainer:
    """A model over `world`, started from the options' seed.

    Args:
        exact: compute in float64, in which two orders of the same sums agree to far more digits than are compared.

    Attributes:
        gradient_norm: of the last step, over all parameters of all ranks, before clipping.
    """

    def __init__(self, options: argparse.Namespace, world: World, exact: bool = False) -> None:
        self.options, self.world, self.exact = options, world, exact
        self.gradient_norm = 0.0
        torch.manual_seed(options.seed)
        # Made on the CPU, so that the first weights are the same on every device.
        # The kernels serve GPUs only, and no float64.
        engine = "collective" if exact or world.device.type == "cpu" else options.engine
        local = options.num_local_ranks if world.experts.size() > 1 else None
        model = Transformer(options, world.experts, engine, local)
        self.model = model.to(world.device, torch.float64 if exact else torch.float32)
        self.layers = [m for m in self.model.modules() if isinstance(m, moe.MoELayer)]
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)

    def step(self, number: int, micro_batches: Sequence[Tensor]) -> float:
        """Step `number` from 0, on the mean loss of all ranks' micro-batches, each of one size. Returns this rank's loss."""
        share = 1 / len(micro_batches)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for layer in self.layers:
            layer.aux_loss_scale = share
        for batch in micro_batches:
            loss = self._loss(batch) / (batch.size(0) * (batch.size(1) - 1)) * share
            loss.backward()
            total += loss.detach()
        moe.reduce_gradients(self.model, self.world.everyone, self.world.replicas)
        norm = moe.clip_grad_norm_(self.model, self.options.clip, self.world.experts)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        moe.update_expert_biases(self.model, self.world.everyone)
        self.gradient_norm = float(norm)
        return float(total)

    def share(self, loss: float, seconds: float, stop: bool) -> Shared:
        """What the ranks should agree on after a step, in one small message; a collective call."""
        picks = torch.stack([layer.load_balance(reset=True).picks_per_expert for layer in self.layers]).cpu()
        mine = torch.tensor([loss, seconds, float(stop)], dtype=torch.float64)
        message = torch.cat([mine, picks.flatten().to(torch.float64)])
        dist.all_reduce(message, group=self.world.everyone)
        total, picks = message[:3].tolist(), message[3:].view_as(picks)
        balance = (picks.amax(1) / picks.mean(1)).tolist()
        return Shared(total[0] / self.world.size, total[1] / self.world.size, total[2] > 0, balance)

    @torch.no_grad()
    def evaluate(self, sequences: Tensor) -> float:
        """Mean loss over sequences that are the same on every rank, shared out among them; a collective call."""
        self.model.eval()
        size, rank = self.world.size, self.world.rank
        total = torch.zeros(2, dtype=torch.float64)
        rounds = -(-sequences.size(0) // (size * self.options.batch))
        for part in sequences[rank::size].tensor_split(rounds):  # a rank may run out of sequences, but not of rounds
            total += torch.tensor([float(self._loss(part)), float(part[:, 1:].numel())], dtype=torch.float64)
        self.model.train()
        dist.all_reduce(total, group=self.world.everyone)
        return float(total[0] / total[1])

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the next byte at every position; a collective call."""
        with self._autocast():
            return self.model(tokens.to(self.world.device))

    def _loss(self, batch: Tensor) -> Tensor:
        """The sum over all positions."""
        targets = batch[:, 1:].to(self.world.device)
        logits = self.logits(batch[:, :-1])
        logits = logits if self.exact else logits.float()
        return F.cross_entropy(logits.reshape(-1, VOCABULARY), targets.reshape(-1), reduction="sum")

    def _learning_rate(self, number: int) -> float:
        """Of the step alone, not of how many are still to come: a run can be made longer and stay the same run."""
        position, warmup = number + 1, self.options.warmup
        return self.options.lr * min(position / warmup, (warmup / position) ** 0.5)

    def _autocast(self) -> AbstractContextManager[Any]:
        on_gpu = self.world.device.type == "cuda"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=on_gpu and not self.exact)
