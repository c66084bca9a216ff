"""The other ranks of a group, as a library that must never hang sees them: collectives with a deadline, and agreement
before data moves."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from deepep_train.engines import outboxes
from deepep_train.engines.base import Prepared
from deepep_train.engines.outboxes import Outboxes
from deepep_train.engines.scratch import Scratch
from deepep_train.errors import ArgumentError, DeepEPError, PeerTimeoutError

_TEXT_BYTES = 4096
# 31 years: gloo counts nanoseconds in 64 bits, and beyond them waits for ever or not at all.
_LONGEST_SECONDS = 1e9
# How long survivors of a failure wait for each other's sign of life before they name who gave none.
_ROLL_CALL_SECONDS = 2.0


def backends_of(group: dist.ProcessGroup) -> dict[str, str]:
    """Device type -> backend name, e.g. {"cpu": "gloo", "cuda": "nccl"}."""
    pairs = (entry.split(":") for entry in str(dist.get_backend_config(group)).split(","))
    return {p[0]: p[-1] for p in pairs}


class Peers:
    """One group of ranks.

    Args:
        group: any process group; None stands for this process alone.
        timeout: seconds that others may be late.
        number: of the buffer that this serves, the same on all ranks; a rank that uses another buffer of the group is told so.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float, number: int = 0) -> None:
        self.group = group
        self.number = number
        self.timeout = min(timeout, _LONGEST_SECONDS)
        self.rank = 0 if group is None else group.rank()
        self.size = 1 if group is None else group.size()
        self.backends = {"cpu": "local", "cuda": "local"} if group is None else backends_of(group)
        self.header_device = torch.device("cpu")
        if "cpu" not in self.backends:
            self.header_device = torch.device("cuda", torch.cuda.current_device())
        self.failure: DeepEPError | None = None
        self.scratch = Scratch()  # what exchanges need only until they return
        self.outboxes: Outboxes | None = None
        self._calls = 0

    @property
    def calls(self) -> int:
        """How often this group has been asked to agree; the same number on every rank."""
        return self._calls

    # Collectives -------------------------------------------------------------------------------------------------------

    def all_gather(self, mine: Tensor, operation: str) -> Tensor:
        """[…] -> [R, …], on any device that the group's backends serve."""
        if self.size == 1:
            return mine.unsqueeze(0)
        out = mine.new_empty(self.size * mine.numel())
        self._wait(
            lambda: dist.all_gather_into_tensor(out, mine.reshape(-1), group=self.group, async_op=True), operation, mine.device
        )
        return out.view(self.size, *mine.shape)

    def connect(self) -> None:
        """Let CPU tensors go from rank to rank through shared memory, if all ranks are processes of one machine; collective."""
        if self.size > 1 and "cpu" in self.backends:
            self.outboxes = outboxes.connect(self.rank, lambda mine: self.gather_objects(mine, "Buffer"))

    def outgoing(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialized tensor of `like`'s dtype and device for `all_to_all_rows` to send, which comes next."""
        if self.outboxes is None or like.device.type != "cpu":
            return self.scratch.empty("sent", shape, like)
        room = self.outboxes.room(math.prod(shape) * like.element_size())
        return room.view(like.dtype).view(tuple(shape))

    def all_to_all_rows(
        self,
        rows: Tensor,
        give: Sequence[int],
        take: Sequence[int],
        operation: str,
        spare: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        """Send `rows` [sum(give), …], ordered by destination; get [sum(take) + spare, …], ordered by source, zeros at the end.

        Bits travel as bytes, so every dtype works on every backend. The result is `out` if that is given, unless there is but
        one rank, whose rows may come back as they are.
        """
        rows = rows.contiguous()
        if self.size == 1 and not spare:
            return rows
        received = sum(take)
        if out is None:
            out = torch.empty(received + spare, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        out[received:] = 0
        if self.size == 1:
            out[:received] = rows
            return out
        width = rows[0].nbytes if rows.size(0) else out[:1].nbytes
        flat_out, flat_in = _as_bytes(out[:received]), _as_bytes(rows)
        take, give = [n * width for n in take], [n * width for n in give]
        if self.outboxes is not None and rows.device.type == "cpu":
            self.outboxes.exchange(flat_in, give, take, flat_out, lambda mine: self._all_to_all(mine, operation))
        else:
            self._all_to_all(flat_in, operation, flat_out, take, give)
        return out

    def _all_to_all(
        self,
        rows: Tensor,
        operation: str,
        out: Tensor | None = None,
        take: list[int] | None = None,
        give: list[int] | None = None,
    ) -> Tensor:
        """torch's exchange, by default of one row with each rank. Every rank talks to every other, so all see at once if one
        dies, which in a ring only its neighbours do."""
        got = torch.empty_like(rows) if out is None else out
        self._wait(
            lambda: dist.all_to_all_single(got, rows, take, give, group=self.group, async_op=True), operation, rows.device
        )
        return got

    def gather_objects(self, mine: Any, operation: str) -> list[Any]:
        """Any JSON-able object of every rank, whatever its size."""
        if self.size == 1:
            return [mine]
        data = json.dumps(mine).encode()
        sizes = self.all_gather(torch.tensor([len(data)], device=self.header_device), operation).flatten().tolist()
        buffer = torch.zeros(max(sizes), dtype=torch.uint8)
        buffer[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        everyone = self.all_gather(buffer.to(self.header_device), operation).cpu()
        return [json.loads(bytes(row[:n].tolist())) for row, n in zip(everyone, sizes, strict=True)]

    # Agreement ---------------------------------------------------------------------------------------------------------

    def agree(self, operation: str, prepared: Prepared[Any], numbers: Sequence[int]) -> list[list[int]]:
        """Exchange up to R + 1 `numbers` if every rank is in the same call with matching, valid arguments.

        Returns every rank's numbers, padded with zeros: headers of one size meet even when the ranks' calls do not match
        (gloo aborts the process when sizes differ). Raises the same on every rank otherwise, naming the ranks and what is
        wrong there.
        """
        description = self.describe(operation, prepared)
        digest = hashlib.blake2b(json.dumps(description).encode(), digest_size=7).digest()
        mine = [int(prepared.error is not None), int.from_bytes(digest, "big"), *numbers]
        mine += [0] * (self.size + 3 - len(mine))
        table = self.all_gather(torch.tensor(mine, dtype=torch.int64, device=self.header_device), operation).tolist()
        if any(row[0] for row in table) or len({row[1] for row in table}) > 1:
            self.raise_disagreement(operation, description, prepared.error)
        return [row[2:] for row in table]

    def describe(self, operation: str, prepared: Prepared[Any]) -> dict[str, object]:
        """What the ranks must agree on in the next call, which is counted."""
        self._calls += 1
        fields = {} if prepared.request is None else prepared.request.signature()
        return {"operation": operation, "buffer": self.number, "call number": self._calls} | fields

    def raise_disagreement(self, operation: str, description: Mapping[str, object], error: Exception | None) -> None:
        argument = getattr(error, "argument", "")
        text = "" if error is None else str(error) if isinstance(error, DeepEPError) else f"{type(error).__name__}: {error}"
        mine = {"error": text[: _TEXT_BYTES // 2], "argument": argument, "description": description}
        everyone = self.gather_objects(mine, operation)
        broken = [r for r, other in enumerate(everyone) if other["error"]]
        if broken:
            if error is not None and not isinstance(error, DeepEPError):
                raise error
            what = "; ".join(f"rank {r}: {everyone[r]['error']}" for r in broken)
            raise ArgumentError(f"{operation}: {what}", everyone[broken[0]]["argument"], broken) from error
        raise_if_different(operation, [other["description"] for other in everyone])

    # Deadlines ---------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise the failure that broke this group, if one has."""
        if self.failure is not None:
            raise self.failure

    def _wait(self, start: Any, operation: str, device: torch.device) -> None:
        self.check()
        try:
            work = start()
            if self.backends.get(device.type) != "nccl":
                work.wait(timedelta(seconds=self.timeout))
            else:
                work.wait()  # only the stream waits; NCCL's own watchdog holds the deadline
        except RuntimeError as error:
            missing = self.roll_call() or [r for r in range(self.size) if r != self.rank]
            self.failure = PeerTimeoutError(
                f"{operation} on rank {self.rank}: rank{'s' if len(missing) != 1 else ''} "
                f"{', '.join(map(str, missing)) or 'unknown'} did not take part within {self.timeout:g} s or died; "
                f"this buffer can no longer be used ({str(error).splitlines()[0]})",
                missing,
                operation,
            )
            raise self.failure from error

    def say_here(self) -> None:
        """For the roll calls of other ranks: this one has seen a failure, too, or caused it knowingly."""
        with suppress(Exception):  # the store may have died with its rank
            self._store().set(f"{self._roll}{self.rank}", "here")

    def roll_call(self) -> list[int]:
        """Ranks that do not say within two seconds that they, too, saw the failure."""
        others = [r for r in range(self.size) if r != self.rank]
        self.say_here()
        try:
            store = self._store()
            deadline = time.monotonic() + _ROLL_CALL_SECONDS
            missing = set(others)
            while missing and time.monotonic() < deadline:
                missing = {r for r in missing if not store.check([f"{self._roll}{r}"])}
                time.sleep(0.02)
            return sorted(missing)
        except Exception:  # noqa: BLE001 - the store may have died with its rank; then all others are suspects
            return others

    @property
    def _roll(self) -> str:
        # A failure is the buffer's end, so one roll call is all there is; ranks notice it in different calls.
        return f"deepep_train/roll_call/{self.number}/"

    def _store(self) -> Any:
        assert self.group is not None
        return distributed_c10d._get_process_group_store(self.group)  # torch < 2.9 has no public way to it


def _as_bytes(t: Tensor) -> Tensor:
    """The bytes of a contiguous tensor; a view, except where a lone element has an odd stride."""
    flat = t.reshape(-1)
    return (flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)


def raise_if_broken(everyone: Sequence[Mapping[str, Any]], operation: str = "Buffer") -> None:
    """Raise what any rank has said of its "error"."""
    broken = [f"rank {r}: {other['error']}" for r, other in enumerate(everyone) if other["error"]]
    if broken:
        raise DeepEPError(f"{operation}: " + "; ".join(broken))


def raise_if_different(operation: str, descriptions: Sequence[Mapping[str, object]]) -> None:
    """Raise `ArgumentError` for the first field on which the ranks' descriptions differ: two ranks in different calls differ
    in everything, and the first field says so."""
    for key in dict.fromkeys(k for d in descriptions for k in d):
        values: dict[str, list[int]] = {}
        for rank, description in enumerate(descriptions):
            values.setdefault(str(description.get(key, "absent")), []).append(rank)
        if len(values) > 1:
            majority = max(values, key=lambda v: len(values[v]))
            odd = [r for v, ranks in values.items() if v != majority for r in ranks]
            text = "; ".join(f"{v} on rank {', '.join(map(str, ranks))}" for v, ranks in values.items())
            raise ArgumentError(f"{operation}: the ranks disagree on {key}: {text}", key, odd)
