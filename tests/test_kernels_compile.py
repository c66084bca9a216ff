"""What has been built holds code for every GPU that setup.py names, without spills; a debug build compiles, too. No GPU is
needed. What the code must hold besides is in test_machine_code.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from needs import ROOT, need, need_built, need_cuobjdump, need_nvcc, need_nvshmem, setup_py

CSRC = ROOT / "csrc"
# What includes NVSHMEM's headers. Functions of those use the stack and spill a little, so our kernels are looked at by name.
OVER_NVSHMEM = ("rdma/low_latency.cu", "rdma/rail.cu")
KERNELS = sorted(p.relative_to(CSRC).as_posix() for p in CSRC.rglob("*.cu"))


def stacks(file: str) -> dict[str, dict[str, int]]:
    """By architecture and function: the bytes of stack that it uses, where registers are spilled to, and of local memory."""
    command = [need_cuobjdump(), "--dump-resource-usage", file]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[str, int]] = {}
    for part in told.split("\narch = ")[1:]:
        functions = re.findall(r"Function (?!__cuda_sm)(\S+):\n.* STACK:(\d+) .*LOCAL:(\d+)", part)  # nvcc's own arithmetic
        if functions:  # else it is the CUDA runtime's own
            found.setdefault(part.split()[0], {}).update((name, int(stack) + int(local)) for name, stack, local in functions)
    return found


def over_nvshmem(function: str) -> bool:
    """Whether a function of `_rdma` is NVSHMEM's, or of a file that includes its headers."""
    return "deepep_train" not in function or any(f"_{Path(file).stem}_cu_" in function for file in OVER_NVSHMEM)


@pytest.mark.parametrize("extension", ["_C", "_rdma"])
def test_no_kernel_that_was_built_spills(extension: str) -> None:
    """What calls NVSHMEM has the stack of what it calls; it is compiled below, where ptxas tells spills apart."""
    by_architecture = stacks(need_built(extension))
    assert by_architecture
    for architecture, functions in by_architecture.items():
        looked_at = {name: size for name, size in functions.items() if extension == "_C" or not over_nvshmem(name)}
        assert looked_at, architecture
        assert not {name: size for name, size in looked_at.items() if size}, architecture


def test_that_test_sees_a_spill(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text("""__global__ void f(float* p) {
        float a[64];
        for (int i = 0; i < 64; ++i) a[i] = p[i];
        __syncthreads();
        for (int i = 0; i < 64; ++i) p[63 - i] = a[i] * a[63 - i];
    }""")
    for more, spills in (((), False), (("-maxrregcount=24",), True)):
        command = [need_nvcc(), "-arch=sm_90", *more, "-c", "a.cu", "-o", "a.o"]
        subprocess.run(command, cwd=tmp_path, check=True)
        (functions,) = stacks(str(tmp_path / "a.o")).values()
        assert any(functions.values()) == spills


@pytest.mark.parametrize("extension", ["_C", "_rdma"])
def test_every_gpu_is_built_for(extension: str) -> None:
    need(not os.environ.get("TORCH_CUDA_ARCH_LIST"), "TORCH_CUDA_ARCH_LIST may have left some out")
    built, setup = stacks(need_built(extension)), setup_py()
    wanted = {f"sm_{a}" for a in setup.architectures(need_nvcc()) if extension == "_C" or int(a) >= setup.RDMA_FROM}
    assert built.keys() == wanted
    assert len({sum("_kernel" in name for name in functions) for functions in built.values()}) == 1


def test_the_rdma_extension_is_linked_and_imported() -> None:
    """Which resolves every symbol of NVSHMEM's host library; starting it takes a GPU."""
    need_built("_rdma")
    need_nvshmem()
    code = "import torch; from deepep_train.engines import nvshmem; nvshmem.extension().start"  # torch loads its own NVSHMEM
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Compiled here -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str]]]:
    """By file: what nvcc and ptxas tell of it, of a debug build or, where NVSHMEM is included, of a release build for all
    that it is built for; a file a CPU at a time."""
    setup, nvcc, folder = setup_py(), need_nvcc(), tmp_path_factory.mktemp("objects")

    def told(name: str) -> str:
        architectures, flags = ["90"], ["-DDEEPEP_TRAIN_DEBUG"]
        if name in OVER_NVSHMEM:
            architectures = [a for a in setup.DEFAULT_ARCHITECTURES if int(a) >= setup.RDMA_FROM]
            flags = setup.with_nvshmem(nvcc, need_nvshmem())
        generated = [setup.gencode(a) for a in architectures]
        command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", *generated, *flags, "-c", str(CSRC / name)]
        command += ["-o", str(folder / f"{name.replace('/', '_')}.o")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stderr

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(told, name) for name in KERNELS}


def test_the_debug_build_compiles_without_spills(reports: dict[str, Future[str]]) -> None:
    for name in KERNELS:
        if name not in OVER_NVSHMEM:
            report = reports[name].result()
            spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
            assert spills or "global" not in (CSRC / name).read_text(), f"{name}: ptxas reported nothing"
            assert all(int(n) == 0 for sizes in spills for n in sizes), f"{name}: {report}"


@pytest.mark.parametrize("name", OVER_NVSHMEM)
def test_no_kernel_over_nvshmem_spills(name: str, reports: dict[str, Future[str]]) -> None:
    need_nvshmem()
    report = reports[name].result()
    ours = re.findall(
        r"Function properties for \S*deepep_train\S*_kernel\S*\n.*?(\d+) bytes spill stores, (\d+) bytes spill", report
    )
    architectures = [a for a in setup_py().DEFAULT_ARCHITECTURES if int(a) >= setup_py().RDMA_FROM]
    assert ours and len(ours) % len(architectures) == 0, "ptxas did not report everything"
    assert all(n == "0" for sizes in ours for n in sizes), report
