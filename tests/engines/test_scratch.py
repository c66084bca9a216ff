"""Memory that is kept from call to call: whose it is, and in which modes it may be written to."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from deepep_train.engines.scratch import Scratch


def test_one_purpose_has_one_memory_that_grows() -> None:
    scratch, like = Scratch(), torch.empty(0, dtype=torch.bfloat16)
    first = scratch.empty("sent", (4, 8), like)
    assert (first.shape, first.dtype) == ((4, 8), torch.bfloat16)
    assert scratch.empty("sent", (2, 3), like.float()).data_ptr() == first.data_ptr()
    assert scratch.empty("received", (4, 8), like).data_ptr() != first.data_ptr()
    assert scratch.num_bytes() == 2 * 64
    assert scratch.empty("sent", (40, 8), like).numel() == 320
    assert scratch.num_bytes() == 640 + 64
    assert scratch.empty("sent", (0, 8), like).shape == (0, 8)
    scratch.clear()
    assert scratch.num_bytes() == 0


def test_threads_have_memory_of_their_own() -> None:
    scratch, like = Scratch(), torch.empty(0)
    here = scratch.empty("sent", (16,), like).fill_(1.0)
    with ThreadPoolExecutor(1) as pool:
        there = pool.submit(lambda: scratch.empty("sent", (16,), like).fill_(2.0)).result()
    assert there.data_ptr() != here.data_ptr()
    assert (here == 1.0).all()


def test_memory_made_in_inference_mode_is_written_to_outside() -> None:
    scratch, like = Scratch(), torch.empty(0)
    with torch.inference_mode():
        scratch.empty("sent", (4,), like).fill_(1.0)
    torch.index_select(torch.arange(8.0), 0, torch.tensor([3, 1, 2, 0]), out=scratch.empty("sent", (4,), like))
    assert scratch.empty("sent", (4,), like).tolist() == [3.0, 1.0, 2.0, 0.0]
