"""What the GPU measurement finds out without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepep_train.cli import bench_gpu as b


def test_without_mps_control_its_pipe_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    assert not b.mps_is_running()
    (tmp_path / "control").touch()
    assert b.mps_is_running()
    program = tmp_path / "nvidia-cuda-mps-control"
    program.write_text("#!/bin/sh\necho Cannot find MPS control daemon process\nexit 1\n")
    program.chmod(0o755)
    assert not b.mps_is_running()
    program.write_text("#!/bin/sh\nexit 1\n")
    assert b.mps_is_running(), "a daemon whose first client has not come"
