"""Stock DeepEP imports, in processes of their own because modules are the process's."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_stock_imports() -> None:
    _python(
        """
        import importlib.util
        import deepep_train as dt
        from deepep_train import compat
        compat.install(); compat.install()
        import deep_ep, deep_ep_cpp, deep_ep.utils
        from deep_ep import Buffer, Config, EventOverlap, topk_idx_t
        from deep_ep.utils import EventHandle, EventOverlap as other
        from deep_ep.buffer import Buffer as again
        import torch
        assert Buffer is dt.Buffer is again and Config is dt.Config is deep_ep_cpp.Config
        assert EventOverlap is other is dt.EventOverlap and EventHandle is dt.EventHandle is deep_ep_cpp.EventHandle
        assert topk_idx_t is torch.int64
        assert importlib.util.find_spec("deep_ep") is not None
        compat.uninstall()
        assert importlib.util.find_spec("deep_ep") is None
        """
    )


def test_refuses_when_the_real_one_is_loaded() -> None:
    out = _python(
        """
        import sys, types
        sys.modules["deep_ep"] = types.ModuleType("deep_ep")
        from deepep_train import DeepEPError, compat
        try:
            compat.install()
        except DeepEPError as error:
            print(error)
        """
    )
    assert "deep_ep" in out and "before" in out


def test_v1_code_runs() -> None:
    """The calls of DeepEP's README, on one rank."""
    _python(
        """
        from deepep_train import compat
        compat.install()
        import torch
        from deep_ep import Buffer
        buffer = Buffer(None, 0, 0, low_latency_mode=False, num_qps_per_rank=24, allow_mnnvl=False, use_fabric=False,
                        explicitly_destroy=True, enable_shrink=False)
        Buffer.set_num_sms(24)
        config = Buffer.get_dispatch_config(8)
        assert max(config.get_nvl_buffer_size_hint(14336, 8), buffer.num_nvl_bytes) == 0
        x, idx = torch.randn(5, 16).bfloat16(), torch.tensor([[0, 1], [2, -1], [3, 0], [-1, -1], [1, 2]])
        w = torch.ones(5, 2)
        per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, 4)
        previous = Buffer.capture()
        got = buffer.dispatch(x, topk_idx=idx, topk_weights=w, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank,
                              num_tokens_per_rdma_rank=per_node, num_tokens_per_expert=per_expert, previous_event=previous,
                              async_finish=True, allocate_on_comm_stream=True)
        recv_x, recv_idx, recv_w, counts, handle, event = got
        event.current_stream_wait()
        assert counts == [2, 2, 2, 1] and recv_x.shape == (4, 16)
        z, zw, event = buffer.combine(recv_x, handle, topk_weights=recv_w)
        assert torch.equal(z, torch.where((idx >= 0).any(1, keepdim=True), x, 0))
        buffer.destroy()
        """
    )
