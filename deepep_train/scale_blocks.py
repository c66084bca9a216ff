"""Where the scales of grouped rows stand so that (grouped) GEMMs read them in place: the same for every engine.

Shape letters: M rows, M_e those of group e, padding included, n 32-bit words of scales per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepep_train.routing import round_up


class ScaleBlocks(NamedTuple):
    """The scales of each group of rows in one contiguous block, the blocks one after the other.

    Attributes:
        tokens_innermost: a block is [n, W], else [W, n], W being M_e rounded up.
        multiple: what W is a multiple of.
        padding_word: bits of the words of rows that hold no token. What is left of a block between M_e and W is 0.
    """

    tokens_innermost: bool
    multiple: int
    padding_word: int

    def shape(self, num_rows: int, num_words: int) -> tuple[int, int]:
        """Of one group's block."""
        width = round_up(num_rows, self.multiple)
        return (num_words, width) if self.tokens_innermost else (width, num_words)

    def size(self, splits: Sequence[int], num_words: int) -> int:
        """Words of all blocks; `splits` are the groups' rows."""
        return sum(round_up(m, self.multiple) for m in splits) * num_words

    def by_row(self, flat: Tensor, splits: Sequence[int], num_words: int) -> list[Tensor]:
        """Each group's words [M_e, n]: views of the blocks."""
        parts = flat.split([self.size([m], num_words) for m in splits])
        shaped = [part.view(self.shape(m, num_words)) for part, m in zip(parts, splits, strict=True)]
        return [(s.t() if self.tokens_innermost else s)[:m] for s, m in zip(shaped, splits, strict=True)]

    def put(self, row_scales: Tensor, splits: Sequence[int], is_padding: Tensor | None = None) -> Tensor:
        """Words by row [M, n] -> the blocks, flat. `is_padding` bool [M]: rows that hold no token; None: there are none."""
        words = row_scales.contiguous().view(torch.int32)
        if is_padding is not None:
            words = words.masked_fill(is_padding.unsqueeze(1), self.padding_word)
        flat = words.new_zeros(self.size(splits, words.size(1)))
        for place, group in zip(self.by_row(flat, splits, words.size(1)), words.split(list(splits)), strict=True):
            place.copy_(group)
        return flat.view(row_scales.dtype)


# Transformer Engine 2.20's, not swizzled: 1x128 blocks, a float32 each; 1x32 blocks, four E8M0 to a word. Rows of zeros have
# the scales that its quantizers give them.
BLOCK_SCALING = ScaleBlocks(True, 4, 0x3F800000)
MXFP8 = ScaleBlocks(False, 128, 0)
