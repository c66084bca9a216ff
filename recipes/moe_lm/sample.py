"""Text from the model."""

from __future__ import annotations

import torch
from torch import Tensor
from trainer import Trainer

PROMPT = 64
TEMPERATURE = 0.8


@torch.no_grad()
def generate(trainer: Trainer, prompt: Tensor, length: int, temperature: float = TEMPERATURE) -> bytes:
    """`prompt`, int64 [bytes], and `length` bytes that the model continues it with, at temperature 0 the likeliest; a
    collective call.

    Rank 0 writes. The other ranks come with an empty batch, and their experts serve rank 0's tokens. Returns the text on
    rank 0 and the prompt on the others.
    """
    generator = torch.Generator().manual_seed(trainer.options.seed)
    text = prompt[: trainer.options.seq].unsqueeze(0)
    trainer.model.eval()
    for _ in range(length):
        seen = text[:, -trainer.options.seq :]
        if trainer.world.rank != 0:
            trainer.logits(seen[:0])
            continue
        logits = trainer.logits(seen)[:, -1].double().cpu()
        if temperature > 0:
            following = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
        else:
            following = logits.argmax(-1, keepdim=True)
        text = torch.cat([text, following], dim=1)
    trainer.model.train()
    return bytes(text[0].tolist())
