"""Models of protocols, of which spin searches all interleavings."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NEEDED = [
    pytest.mark.skipif(shutil.which("spin") is None, reason="spin is not installed (Debian's package spin)"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="spin's verifier needs gcc"),
]


def search(model: str, where: Path, *defines: str) -> tuple[int, str]:
    """Errors that an exhaustive search finds, and what it prints.

    Args:
        model: a file beside this one.
        where: a folder for the verifier.
    """
    spin = ["spin", "-a", *(f"-D{d}" for d in defines), str(Path(__file__).with_name(model))]
    subprocess.run(spin, cwd=where, check=True, capture_output=True, text=True, timeout=60)
    compiler = ["gcc", "-O2", "-w", "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c"]
    subprocess.run(compiler, cwd=where, check=True, capture_output=True, text=True, timeout=60)
    out = subprocess.run(
        ["./pan", "-m100000", "-w24"], cwd=where, check=False, capture_output=True, text=True, timeout=200
    ).stdout
    found = re.search(r"errors: (\d+)", out)
    assert found, out
    assert "max search depth too small" not in out and "out of memory" not in out, out
    return int(found.group(1)), out


def assert_safe(model: str, where: Path, *defines: str) -> str:
    """No interleaving breaks an assertion; gives what the search prints."""
    errors, out = search(model, where, *defines)
    assert errors == 0, out
    return out


def assert_found_out(model: str, where: Path, violated: str, *defines: str) -> None:
    """Some interleaving breaks an assertion about `violated`, a pattern."""
    errors, out = search(model, where, *defines)
    assert errors > 0
    assert re.search(r"pan:1: assertion violated .*" + violated, out), out


def assert_nothing_unreached(out: str) -> None:
    unreached = re.findall(r"^\s+\S+\.pml:\d+, state \d+, \"(?!-end-)(.+)\"$", out, re.MULTILINE)
    assert not unreached, f"the search never came to {unreached}"
