"""`doctor`: what this machine offers, which engine a Buffer would take here, and why not another."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepep_train import engines
from deepep_train.cli import doctor_network, live
from deepep_train.cli.launch import run_ranks
from deepep_train.errors import DeepEPError
from deepep_train.version import __version__

OPTIONAL_PACKAGES = ("megatron-core", "transformer-engine", "nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12", "triton")

IBGDA = "ibgda"
_LIVE_SECONDS = 120.0


def add_parser(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("doctor", help=__doc__, description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--brief", action="store_true", help="one line if an engine can be used, everything if none can")
    parser.add_argument(
        "--live", action="store_true", help="besides, exchange small batches between this machine's GPUs and name slow ranks"
    )
    parser.add_argument("--ranks", type=int, help="of --live (default: one for each GPU)")
    parser.add_argument(
        "--need",
        nargs="+",
        default=[],
        choices=[*engines.ENGINES[1:], IBGDA],
        help=f"fail unless these engines can be used, and, for {IBGDA}, GPUs may put over the network themselves",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 if at least one engine can be used, and all that are needed."""
    report = examine()
    report["missing"] = missing(args.need, report)
    usable = [e["name"] for e in report["engines"] if e["usable"]]
    if args.brief and usable and not args.json:
        print(
            f"{report['host']}: {len(report['gpus'])} GPUs, engines {', '.join(usable)}; auto takes {report['auto']['engine']}"
        )
    elif not args.json:
        print(as_text(report), flush=True)
    failure = None
    if args.live:
        try:
            report["live"] = _live(args.ranks or max(1, len(report["gpus"])))
        except DeepEPError as error:
            report["live"], failure = {"failure": str(error)}, error
    if args.json:
        print(json.dumps(report, indent=2))
    elif args.live:
        print("".join(f"{line}\n" for line in live.as_lines(report["live"])), end="")
    if failure is not None:
        raise failure
    for text in report["missing"]:
        print(f"needed, and missing: {text}", file=sys.stderr)
    return 0 if usable and not report["missing"] else 1


def missing(needed: Sequence[str], report: dict[str, Any]) -> list[str]:
    """What of `needed` this machine does not have, and why."""
    why = {engine["name"]: "" if engine["usable"] else engine["reason"] for engine in report["engines"]}
    why[IBGDA] = report["network"]["puts by GPUs"]
    return [f"{name}: {why[name]}" for name in needed if why[name]]


def _live(num_ranks: int) -> dict[str, Any]:
    """What rank 0 has found; nothing in torchrun's other processes."""
    with tempfile.TemporaryDirectory() as folder, _stdout_to_stderr():
        out = Path(folder) / "live.json"
        run_ranks(num_ranks, live.measure, out, deadline=_LIVE_SECONDS)
        return json.loads(out.read_text()) if out.exists() else {}


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Of this process and those that it starts: what libraries print (NCCL_DEBUG) must not stand beside the JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def examine() -> dict[str, Any]:
    """Everything that `doctor` reports, JSON-able. Starts no process group and allocates nothing on a GPU."""
    choice = engines.choose("auto")
    missing = engines.missing_peer_access()
    if choice.name == "nvlink" and missing:
        pairs = ", ".join(f"{a} to {b}" for a, b in missing)
        choice = engines.Choice("collective", [f"nvlink: no peer access from GPU {pairs}, if ranks use them"])
    return {
        "deepep_train": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "host": engines.host_name(),
        "cpus": os.cpu_count(),
        "backends": _backends(),
        "gpus": _gpus(),
        "peer access": {"complete": not missing, "missing": missing},
        "nvcc": _nvcc(),
        "packages": _packages(),
        "network": doctor_network.examine(),
        "engines": [engine._asdict() for engine in engines.survey()],
        "auto": {"engine": choice.name, "reasons": choice.reasons},
        "auto between hosts": _between_hosts(),
    }


def as_text(report: dict[str, Any]) -> str:
    lines = [
        f"deepep_train {report['deepep_train']}, torch {report['torch']}, Python {report['python']}",
        f"host          {report['host']}, {report['cpus']} CPUs",
        f"backends      {', '.join(report['backends']) or 'none: torch was built without distributed'}",
    ]
    for gpu in report["gpus"]:
        lines.append(
            f"GPU {gpu['index']}         {gpu['name']}, sm_{gpu['capability']}, {gpu['memory_gib']} GiB, {gpu['sms']} SMs"
        )
    if not report["gpus"]:
        lines.append("GPUs          none visible to torch")
    for pair in report["peer access"]["missing"]:
        lines.append(f"              no peer access from GPU {pair[0]} to GPU {pair[1]}")
    lines.append(f"nvcc          {report['nvcc'] or 'not found'}")
    lines.extend(f"{name:13s} {version or 'not installed'}" for name, version in report["packages"].items())
    lines.extend(doctor_network.as_lines(report["network"]))
    lines.append("")
    for engine in report["engines"]:
        lines.append(f"{engine['name']:13s} {'usable ' if engine['usable'] else 'no     '} {engine['reason']}")
    lines.append(f"\nBuffer(engine='auto') would take: {report['auto']['engine']}")
    lines.extend(f"  {reason}" for reason in report["auto"]["reasons"] if report["auto"]["engine"] == "collective")
    between = report["auto between hosts"]
    lines.append(f"Between hosts it would take: {between['engine']}")
    lines.extend(f"  {reason}" for reason in between["reasons"])
    return "\n".join(lines)


def _between_hosts() -> dict[str, Any]:
    """What auto takes among several machines like this one."""
    here = engines.whereabouts()
    why = here["no rdma"] or here["no puts"]
    return {"engine": "collective", "reasons": [f"rdma: {why}"]} if why else {"engine": "rdma", "reasons": []}


def _backends() -> list[str]:
    if not dist.is_available():
        return []
    found = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available(), "mpi": dist.is_mpi_available()}
    return [name for name, there in found.items() if there]


def _gpus() -> list[dict[str, Any]]:
    gpus = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        memory = round(p.total_memory / 2**30, 1)
        capability = f"{p.major}{p.minor}"
        gpus.append(
            {"index": index, "name": p.name, "capability": capability, "memory_gib": memory, "sms": p.multi_processor_count}
        )
    return gpus


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None
    path = path or shutil.which("nvcc")
    if path is None:  # setup.py takes the registry's, too
        wheels = [p for site in sys.path for p in Path(site or ".").glob("nvidia/*/bin/nvcc")]
        path = next((found for p in wheels if (found := shutil.which(p))), None)
    if path is None:
        return None
    out = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    release = next((line.split("release ")[1].split(",")[0] for line in out.splitlines() if "release " in line), "unknown")
    return f"{release} at {path}"


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in OPTIONAL_PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
