"""FP8 payloads: pairs with DeepEP's numerics (deepep.py), and tensors with Transformer Engine's numerics and layouts
(quantized.py), which become Transformer Engine's own classes where it is installed (te.py)."""

from deepep_train.engines.base import Payload
from deepep_train.fp8.deepep import (
    BLOCK,
    E4M3_MAX,
    MIN_AMAX,
    dequantize_blocks,
    pack_ue8m0,
    quantize_blocks,
    unpack_ue8m0,
)
from deepep_train.fp8.grouped import grouped_linear
from deepep_train.fp8.quantized import DTYPES, FLOATS, HIDDEN_MULTIPLE, Quantized, Recipe, is_placeholder, placeholder, quantize
from deepep_train.scale_blocks import ScaleBlocks

__all__ = [
    "BLOCK",
    "DTYPES",
    "E4M3_MAX",
    "FLOATS",
    "HIDDEN_MULTIPLE",
    "MIN_AMAX",
    "Payload",
    "Quantized",
    "Recipe",
    "ScaleBlocks",
    "dequantize_blocks",
    "grouped_linear",
    "is_placeholder",
    "pack_ue8m0",
    "placeholder",
    "quantize",
    "quantize_blocks",
    "unpack_ue8m0",
]
