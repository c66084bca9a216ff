"""What `doctor --live` says of what its ranks have measured, which is made up here."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from deepep_train import DeepEPError
from deepep_train.cli import doctor
from deepep_train.waits import Waits

MEASURED = {
    "engine": "low_latency",
    "dispatch": Waits([1e3, 9e4], [1])._asdict(),
    "combine": Waits([1e3, 2e3], [])._asdict(),
    "given up": [1],
}


def run(monkeypatch: pytest.MonkeyPatch, ranks: Any, **args: bool) -> int:
    monkeypatch.setattr(doctor, "run_ranks", ranks)
    return doctor.run(Namespace(**{"json": False, "brief": False, "live": True, "ranks": 2, "need": []} | args))


def measure(_: int, __: Any, out: Path, deadline: float) -> None:
    os.write(1, b"what some library prints\n")
    out.write_text(json.dumps(MEASURED))


def fail(*_: Any, **__: Any) -> None:
    raise DeepEPError("rank 1 failed first")


def test_text(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, measure, brief=True) == 0
    _, dispatch, combine, given_up = capfd.readouterr().out.splitlines()
    assert dispatch == "live, dispatch: us a call that the others waited for each rank: 1.0, 90.0; slow: rank 1"
    assert combine.endswith("1.0, 2.0; no rank stands out") and given_up.endswith("rank [1]")


def test_json(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, measure, json=True) == 0
    said = capfd.readouterr()
    assert json.loads(said.out)["live"] == MEASURED and "some library" in said.err


def test_ranks_that_fail_leave_the_rest_of_the_json(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DeepEPError):
        run(monkeypatch, fail, json=True)
    found = json.loads(capfd.readouterr().out)
    assert found["live"] == {"failure": "rank 1 failed first"} and found["engines"]
