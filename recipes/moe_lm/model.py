"""A decoder-only transformer over bytes whose feed-forward layers are MoE layers."""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import deepep_train as dt
from deepep_train import moe

VOCABULARY = 256


class Transformer(nn.Module):
    """[batch, sequence] bytes -> [batch, sequence, 256] logits of the next byte.

    A collective call of `group`, because the experts are spread over it; a rank with nothing to ask comes with batch 0.
    The first weights depend on torch's seed alone, not on the number of ranks. `engine` and `num_local_ranks`
    are `deepep_train.Buffer`'s.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(
        self,
        options: argparse.Namespace,
        group: dist.ProcessGroup | None,
        engine: str = "auto",
        num_local_ranks: int | None = None,
    ) -> None:
        super().__init__()
        buffer = dt.Buffer(group, engine=engine, num_local_ranks=num_local_ranks)
        self.embedding = nn.Embedding(VOCABULARY, options.dim)
        self.blocks = nn.ModuleList(_Block(options, buffer) for _ in range(options.layers))
        self.norm = nn.RMSNorm(options.dim)
        self.head = nn.Linear(options.dim, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.normal_(self.head.weight, std=0.02)  # the first guess is close to uniform
        cosine, sine = _rotations(options.seq, options.dim // options.heads)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        length = tokens_BS.size(1)
        rotation = (self.cosine[:length], self.sine[:length])
        x = self.embedding(tokens_BS)
        for block in self.blocks:
            x = block(x, rotation)
        return self.head(self.norm(x))


class _Block(nn.Module):
    def __init__(self, options: argparse.Namespace, buffer: dt.Buffer) -> None:
        super().__init__()
        self.heads = options.heads
        self.attention_norm = nn.RMSNorm(options.dim)
        self.qkv = nn.Linear(options.dim, 3 * options.dim, bias=False)
        self.out = nn.Linear(options.dim, options.dim, bias=False)
        self.moe_norm = nn.RMSNorm(options.dim)
        self.moe = moe.MoELayer(
            options.dim,
            options.ffn,
            options.experts,
            options.top_k,
            buffer=buffer,
            aux_loss_coeff=options.aux_loss,
            bias_update_rate=options.bias_rate,
        )

    def forward(self, x_BSH: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        attended = self._attend(self.attention_norm(x_BSH), rotation)
        x_BSH = x_BSH + attended
        # attended has the dtype of autocast's matrix products: tokens travel to their experts in bfloat16 where those are.
        return x_BSH + self.moe(self.moe_norm(x_BSH).to(attended.dtype))

    def _attend(self, x_BSH: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, hidden = x_BSH.shape
        heads = self.qkv(x_BSH).view(batch, length, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        if batch == 0:  # a rank that only serves its experts; on GPUs torch's attention does not take it
            return self.out(x_BSH)
        mixed = F.scaled_dot_product_attention(_rotate(q, rotation), _rotate(k, rotation), v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, hidden))


def _rotations(length: int, head: int) -> tuple[Tensor, Tensor]:
    """Rotary positions (arXiv:2104.09864): cosines and sines [length, head / 2]."""
    frequencies = 10000.0 ** (-torch.arange(0, head, 2) / head)
    angles = torch.outer(torch.arange(length), frequencies)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cosine - b * sine, a * sine + b * cosine), dim=-1).to(x.dtype)
