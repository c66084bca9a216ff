"""DeepEP V1's `Config`. Engines here have no queues, so only `num_sms` changes anything."""

from __future__ import annotations

from dataclasses import dataclass, field

from deepep_train.errors import ArgumentError


@dataclass(frozen=True)
class Config:
    """Tuning of one call, with V1's five positional arguments.

    The chunk sizes describe V1's ring buffers; they are checked, kept and otherwise ignored.

    Attributes:
        num_sms: SMs that the call's kernels may occupy; 0: `Buffer.set_num_sms`'s number, else the engine's own.
        is_default: `num_sms` is only what V1 would say; the engine takes its own number.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256
    is_default: bool = field(default=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "is_default":
                continue
            least = 0 if name == "num_sms" else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ArgumentError(f"Config: {name} must be an int from {least} on, got {value!r}", name)
        for link in ("nvl", "rdma"):
            send, recv = (getattr(self, f"num_max_{link}_chunked_{way}_tokens") for way in ("send", "recv"))
            if send >= recv:
                name = f"num_max_{link}_chunked_send_tokens"
                raise ArgumentError(f"Config: {name}={send} must be below the recv_tokens of the same link, {recv}", name)

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to pass as `Buffer(num_nvl_bytes=)`: 0, because the library sizes its own memory."""
        return 0

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to pass as `Buffer(num_rdma_bytes=)`: 0, because the library sizes its own memory."""
        return 0
