"""`python -m deepep_train`: exit codes, machine-readable output, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PNG = b"\x89PNG"


def _run(*args: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deepep_train", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_doctor_names_engines_and_reasons() -> None:
    done = _run("doctor")
    assert done.returncode == 0, done.stderr
    for engine in ("nvlink", "rdma", "low_latency", "collective"):
        assert engine in done.stdout
    assert "Buffer(engine='auto') would take:" in done.stdout
    assert "NVSHMEM 3.8 or later" in done.stdout or "NVSHMEM       NVSHMEM 3." in done.stdout
    report = json.loads(_run("doctor", "--json").stdout)
    assert {e["name"]: e["usable"] for e in report["engines"]}["collective"]
    assert all(e["reason"] for e in report["engines"])
    assert report["auto"]["engine"] in {e["name"] for e in report["engines"] if e["usable"]}


def test_doctor_fails_where_what_is_needed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVSHMEM_IB_ENABLE_IBGDA", raising=False)
    assert _run("doctor", "--need", "collective").returncode == 0
    done = _run("doctor", "--need", "collective", "ibgda", "--json")
    assert done.returncode == 1
    (missing,) = json.loads(done.stdout)["missing"]
    assert missing.startswith("ibgda: NVSHMEM_IB_ENABLE_IBGDA=1 is not set")
    assert f"needed, and missing: {missing}" in done.stderr


def test_doctors_json_has_what_ranks_have_measured() -> None:
    done = _run("doctor", "--json", "--live", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["live"]
    if found["engine"] == "low_latency":
        assert len(found["dispatch"]["by_rank"]) == len(found["combine"]["by_rank"]) == 2
    else:
        assert "nvlink: " in found["obstacle"]


SMALL = ("--num-tokens", "64", "--hidden", "32", "--num-experts", "8", "--num-topk", "2", "--iterations", "2")


@pytest.mark.parametrize("launcher", ["spawn", "torchrun"])
def test_bench_writes_table_json_and_plot(tmp_path: Path, launcher: str) -> None:
    if launcher == "spawn":
        done = _run("bench", *SMALL, "--num-processes", "2", "--out", str(tmp_path))
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        command = [*torchrun, "deepep_train", "bench", *SMALL, "--dtype", "bfloat16", "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "bench.json").read_text())
    assert result["ranks"] == 2 and result["work"]["num_tokens"] == 64
    names = [t["name"] for t in result["timings_ms"]]
    assert names == ["plain all-to-all", "rank layout", "expert layout"]
    for t in result["timings_ms"]:
        assert t["total"] > 0 and t["name"] in done.stdout
    # Top-2 of 8 experts on 2 ranks: a token needs each other rank at most once, the plain path once per expert.
    assert result["timings_ms"][1]["rows_crossing"] < result["timings_ms"][0]["rows_crossing"]
    assert (tmp_path / "bench.png").read_bytes().startswith(PNG)


WRONG = {
    "bench --num-experts 7": "--num-experts 7",
    "bench --num-tokens 0": "--num-tokens",
    "bench --num-topk 99": "--num-topk 99",
    "bench --num-processes 0": "--num-processes 0",
    "bench --dtype int8": "int8",
    "bench --frobnicate": "--frobnicate",
    "dance": "dance",
}
# One after another in one process, for importing torch takes longer than all of them.
EACH = """
import contextlib, io, json, runpy, sys
told = {}
for line in sys.argv[1:]:
    sys.argv, said = ["deepep_train", *line.split()], io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            runpy.run_module("deepep_train", run_name="__main__")
        except SystemExit as end:
            told[line] = end.code, said.getvalue()
print(json.dumps(told))
"""


def test_bad_arguments_end_in_one_line() -> None:
    done = subprocess.run([sys.executable, "-c", EACH, *WRONG], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    for line, named in WRONG.items():
        code, said = told[line]
        assert code == 2, line
        assert named in said.splitlines()[-1], line
    alone = _run("dance")
    assert alone.returncode == 2 and alone.stderr == told["dance"][1]


def test_bench_of_a_megatron_layer(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core", reason="megatron-core is not installed (it needs Python 3.12)")
    small = ("--tokens", "32", "--hidden", "32", "--experts", "4", "--top-k", "2", "--iterations", "1")
    done = _run("bench", "--megatron", *small, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "bench_megatron.json").read_text())
    assert report["ratio"] == pytest.approx(report["step_ms"]["deepep_train"] / report["step_ms"]["alltoall"], rel=0.01)
    assert f"{report['step_ms']['alltoall']:.1f} ms" in done.stdout
