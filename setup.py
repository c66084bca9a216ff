"""Builds the package, and with it the CUDA kernels if there is an nvcc; without one the package is pure Python.

Everything else is in pyproject.toml. Environment:
    CUDA_HOME               a toolkit to use before the nvcc on PATH
    TORCH_CUDA_ARCH_LIST    architectures to compile for, such as "9.0a;10.0"; default: all below that nvcc knows
    DEEPEP_TRAIN_DEBUG=1    kernels that delay at random wherever ranks meet, and arenas of NaN: see docs/kernels.md
    DEEPEP_TRAIN_NO_CUDA=1  build without kernels although there is an nvcc
    NVSHMEM_DIR             NVSHMEM for the rdma engine, if not the registry's package; without one that engine is left out
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# sm_80 takes the plain-load path, sm_90 and later the bulk copies; no "a" features, so that PTX, where TORCH_CUDA_ARCH_LIST
# asks for it ("9.0+PTX"), serves later GPUs.
DEFAULT_ARCHITECTURES = ("80", "90", "100")
RDMA = "deepep_train._rdma"
RDMA_FROM = 90  # older GPUs have no cards that they could drive
HINT = (
    "DEEPEP_TRAIN_NO_CUDA=1 installs without the CUDA engines. The registry's wheels make a toolkit if all of them have one "
    "version: see docs/install.md"
)
# That torch takes, too; those below 8.0 so that they can be left out.
NAMES = {"Pascal": "6.0", "Volta": "7.0", "Turing": "7.5", "Ampere": "8.0", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0"}


def find_nvcc() -> str | None:
    """CUDA_HOME, then PATH, then the registry's nvcc wheels."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [str(Path(home) / "bin" / "nvcc")] if home else []
    candidates.append("nvcc")
    for site in {*sys.path, sysconfig.get_paths()["purelib"]}:
        candidates += [str(p) for p in Path(site or ".").glob("nvidia/*/bin/nvcc")]
    return next((found for c in candidates if (found := shutil.which(c))), None)


def library_folders(nvcc: str) -> list[str]:
    """nvcc looks in its toolkit's lib64, but the registry's wheels put the runtime into lib."""
    folder = Path(nvcc).resolve().parent.parent / "lib"
    return [f"-L{folder}"] if (folder / "libcudart_static.a").is_file() else []


def architectures(nvcc: str) -> list[str]:
    """As nvcc spells them: 80, 90, …, with +PTX behind those whose PTX is to be kept for later GPUs.

    Lists made for torch (NVIDIA's containers set one) name GPUs that are too old for these kernels: those are left out.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(" ;,")
    if wanted:
        split = [entry.partition("+") for entry in re.split(r"[;,\s]+", wanted)]
        entries = [NAMES.get(name, name) + plus + ptx for name, plus, ptx in split]
        found = {entry: re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry) for entry in entries}
        if unknown := [entry for entry, match in found.items() if match is None]:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST={wanted!r}: {unknown} must look like 9.0, 9.0a, 10.0f or 9.0+PTX")
        matches = [m for m in found.values() if m]
        if old := [m[0] for m in matches if int(m[1]) < 8]:
            if len(old) == len(matches):
                raise ValueError(f"TORCH_CUDA_ARCH_LIST={wanted!r}: the kernels need 8.0 or later, not {old}")
            print(f"deepep_train: no code for {', '.join(old)}: the kernels need 8.0 or later")
        return [f"{m[1]}{m[2]}{m[3]}{m[4] or ''}" for m in matches if int(m[1]) >= 8]
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return [a for a in DEFAULT_ARCHITECTURES if f"sm_{a}" in known.split()]


def nvshmem() -> Path | None:
    """The folder of an NVSHMEM to compile with; says why if there is none."""
    spec = importlib.util.spec_from_file_location("nvshmem_present", ROOT / "deepep_train" / "engines" / "nvshmem_present.py")
    assert spec is not None and spec.loader is not None
    present = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = present  # which its NamedTuples look for
    spec.loader.exec_module(present)
    found = present.find()
    if why := present.obstacle(found, to_build=True):
        print(f"deepep_train: the rdma engine is left out: {why}")
        return None
    return Path(found.folder)


def with_nvshmem(nvcc: str, folder: Path) -> list[str]:
    """nvcc's flags for what includes NVSHMEM's headers, which include <cuda/std/tuple>."""
    toolkit = Path(nvcc).resolve().parents[1]
    return ["-rdc=true", f"-I{folder / 'include'}", f"-I{toolkit / 'include' / 'cccl'}"]


def gencode(architecture: str) -> str:
    number = architecture.removesuffix("+PTX")
    kept = f"[sm_{number},compute_{number}]" if architecture.endswith("+PTX") else f"sm_{number}"
    return f"-gencode=arch=compute_{number},code={kept}"


class BuildKernels(build_ext):
    """Compiles csrc with nvcc, a file a CPU at a time, and links one extension that needs the driver alone."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        assert nvcc is not None
        import pybind11

        out = Path(self.get_ext_fullpath(ext.name))
        objects = Path(self.build_temp).resolve()
        objects.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        includes = [pybind11.get_include(), sysconfig.get_paths()["include"]]
        archs = architectures(nvcc)
        folder = nvshmem() if ext.name == RDMA else None
        if folder is not None:
            archs = [a for a in archs if int(re.sub(r"\D.*", "", a)) >= RDMA_FROM]
        flags = ["-std=c++17", "-O3", "-Xptxas", "-v,-warn-spills", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        flags += [f"-I{path}" for path in includes]
        if os.environ.get("DEEPEP_TRAIN_DEBUG") == "1":
            flags.append("-DDEEPEP_TRAIN_DEBUG")
        flags += [gencode(a) for a in archs]
        if folder is not None:
            flags += with_nvshmem(nvcc, folder)

        def compile_one(source: str) -> str:
            made = str(objects / (source.replace("/", "_") + ".o"))
            command = [nvcc, *flags, "-c", str(ROOT / source), "-o", made]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            report = f"{source}\n{done.stdout}{done.stderr}"
            (objects / (source.replace("/", "_") + ".log")).write_text(report)
            if done.returncode:
                raise RuntimeError(f"nvcc failed on {report}\n{HINT}")
            return made

        print(f"deepep_train: {nvcc} for {', '.join('sm_' + a for a in archs)}")
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            made = list(pool.map(compile_one, ext.sources))
        link = [nvcc, "-shared", "-cudart", "static", *library_folders(nvcc), *made, "-o", str(out)]
        if folder is not None:  # the host library is found when the extension is imported: see nvshmem_present.load
            link += [*(gencode(a) for a in archs), "-rdc=true", "-Xcompiler", "-fPIC"]
            link += [f"-L{folder / 'lib'}", "-lnvshmem_device"]
        done = subprocess.run(link, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc failed to link {out.name}\n{done.stdout}{done.stderr}\n{HINT}")


def extensions() -> list[Extension]:
    if os.environ.get("DEEPEP_TRAIN_NO_CUDA") == "1" or find_nvcc() is None:
        print("deepep_train: no nvcc (or DEEPEP_TRAIN_NO_CUDA=1), so the CUDA engines are left out; `doctor` says so too")
        return []
    sources = sorted(str(p.relative_to(ROOT)) for ending in ("*.cu", "*.cpp") for p in (ROOT / "csrc").rglob(ending))
    of_rdma = [name for name in sources if name.startswith("csrc/rdma/")]
    made = [Extension("deepep_train._C", [name for name in sources if name not in of_rdma])]
    if nvshmem() is not None:
        made.append(Extension(RDMA, of_rdma))
    return made


if __name__ == "__main__":  # tests import the rest
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
