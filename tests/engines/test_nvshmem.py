"""NVSHMEM's collective calls under a deadline; they are made up here."""

from __future__ import annotations

import time

import pytest

from deepep_train import PeerTimeoutError
from deepep_train.engines import nvshmem
from deepep_train.engines.peers import Peers


def test_what_a_call_gives_or_raises_is_passed_on() -> None:
    peers = Peers(None, 20)
    assert nvshmem.before_deadline(peers, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        nvshmem.before_deadline(peers, lambda: 1 // 0)
    peers.check()


def test_a_call_that_waits_for_ever_ends_the_buffer() -> None:
    peers, began = Peers(None, 0.1), time.monotonic()
    with pytest.raises(PeerTimeoutError, match=r"collective call within 0\.1 s"):
        nvshmem.before_deadline(peers, lambda: time.sleep(2))
    assert time.monotonic() - began < 1.5
    with pytest.raises(PeerTimeoutError):
        peers.check()
