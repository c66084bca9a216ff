"""DeepEP V1 beside this library in `bench --peer FOLDER`: the same rows in the same run. It is no part of this package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepep_train import fp8

RANKS = (2, 4, 8)


def load(folder: Path) -> Any:
    """The module `deep_ep` in `folder`, which also holds what it was built to. Raises ValueError if that is not there."""
    sys.path.insert(0, str(folder.resolve()))
    try:
        module = importlib.import_module("deep_ep")
    except ImportError as error:
        raise ValueError(f"--peer {folder}: DeepEP cannot be imported from there: {error}") from error
    finally:
        sys.path.pop(0)
    found = getattr(module, "__file__", None) or "deepep_train.compat"
    if Path(found).resolve().parent.parent != folder.resolve():
        raise ValueError(f"--peer {folder}: `import deep_ep` gave {found} instead")
    return module


class Peer:
    """V1's buffer over the default group, large enough for bf16 rows of `hidden` with any of the numbers of SMs."""

    def __init__(self, folder: Path, hidden: int, sms: Sequence[int]) -> None:
        size = dist.get_world_size()
        if size not in RANKS:
            raise ValueError(f"--peer: DeepEP V1 serves {', '.join(map(str, RANKS))} ranks of a node, not {size}")
        self._module = load(folder)
        configs = [config for n in sms for config in self._configs(n)]
        num_bytes = max(config.get_nvl_buffer_size_hint(2 * hidden, size) for config in configs)
        self._buffer = self._module.Buffer(dist.group.WORLD, num_nvl_bytes=num_bytes, explicitly_destroy=True)

    def _configs(self, sms: int) -> tuple[Any, Any]:
        """For dispatch and combine: its own, with this number of SMs."""
        self._module.Buffer.set_num_sms(sms)
        size = dist.get_world_size()
        return self._module.Buffer.get_dispatch_config(size), self._module.Buffer.get_combine_config(size)

    def calls(self, x: Tensor, idx: Tensor, weights: Tensor, num_experts: int, sms: int) -> dict[str, Callable[[], Any]]:
        """What `bench` times, by its keys. A handle of V1's belongs to one number of SMs."""
        buffer = self._buffer
        for_dispatch, for_combine = self._configs(sms)

        def fresh() -> Any:
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, num_experts)
            how: dict[str, Any] = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert}
            how |= {"is_token_in_rank": in_rank, "topk_idx": idx, "topk_weights": weights}
            return buffer.dispatch(x, **how, config=for_dispatch)

        rows, _, _, _, handle, _ = fresh()
        calls: dict[str, Callable[[], Any]] = {
            "dispatch": lambda: buffer.dispatch(x, handle=handle, config=for_dispatch),
            "dispatch fresh": fresh,
            "combine": lambda: buffer.combine(rows, handle, config=for_combine),
            "layout": lambda: buffer.get_dispatch_layout(idx, num_experts),
        }
        if x.size(1) % fp8.BLOCK == 0:
            pair = fp8.quantize_blocks(x)
            calls["dispatch fp8"] = lambda: buffer.dispatch(pair, handle=handle, config=for_dispatch)
        return calls

    def destroy(self) -> None:
        torch.cuda.synchronize()
        self._buffer.destroy()
