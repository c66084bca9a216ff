"""MoE expert-parallel communication for training: differentiable dispatch and combine."""

from deepep_train.buffer import Buffer
from deepep_train.config import Config
from deepep_train.errors import ArgumentError, DeepEPError, PeerTimeoutError
from deepep_train.events import EventHandle, EventOverlap
from deepep_train.handle import Handle
from deepep_train.ops import Dispatched, combine, dispatch
from deepep_train.version import __version__

__all__ = [
    "ArgumentError",
    "Buffer",
    "Config",
    "DeepEPError",
    "Dispatched",
    "EventHandle",
    "EventOverlap",
    "Handle",
    "PeerTimeoutError",
    "__version__",
    "combine",
    "dispatch",
]
