"""What setup.py reads from the environment."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from needs import setup_py

pytest.importorskip("setuptools")


@pytest.fixture
def setup() -> ModuleType:
    return setup_py()


@pytest.mark.parametrize(
    ("wanted", "compiled"),
    [
        ("9.0", ["90"]),
        ("8.0;9.0a 10.0f", ["80", "90a", "100f"]),
        ("9.0, 12.0a+PTX;", ["90", "120a+PTX"]),
        ("7.0 7.5 8.0 9.0+PTX", ["80", "90+PTX"]),  # as containers set it
    ],
)
def test_architectures(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, wanted: str, compiled: list[str]) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    assert setup.architectures("no nvcc is asked") == compiled


@pytest.mark.parametrize("wanted", ["Rubin", "8.0;nine"])
def test_architectures_that_would_be_lost_are_refused(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wanted)
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST"):
        setup.architectures("no nvcc is asked")


def test_ptx_is_kept_where_it_was_asked_for(setup: ModuleType) -> None:
    assert setup.gencode("90") == "-gencode=arch=compute_90,code=sm_90"
    assert setup.gencode("90+PTX") == "-gencode=arch=compute_90,code=[sm_90,compute_90]"


@pytest.mark.parametrize("blank", ["", " ", ";", " ; "])
def test_a_blank_list_is_none(setup: ModuleType, monkeypatch: pytest.MonkeyPatch, blank: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", blank)
    monkeypatch.setattr(setup.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="sm_80\nsm_90\n"))
    assert setup.architectures("nvcc") == ["80", "90"]


def test_torchs_names_and_old_gpus(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere;Hopper+PTX")
    assert setup.architectures("no nvcc is asked") == ["80", "90+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Volta;Turing;Hopper")
    assert setup.architectures("no nvcc is asked") == ["90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    with pytest.raises(ValueError, match=r"need 8\.0 or later, not \['7\.5'\]"):
        setup.architectures("no nvcc is asked")


def test_the_wheels_runtime_is_found(setup: ModuleType, tmp_path: Path) -> None:
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    assert setup.library_folders(str(nvcc)) == []
    library = nvcc.parent.parent / "lib"
    library.mkdir(parents=True)
    (library / "libcudart_static.a").touch()
    assert setup.library_folders(str(nvcc)) == [f"-L{library}"]
