"""What the kernels' memory orders compile to, for sm_90; no GPU is needed. On one GPU a single L2 hides wrong orders, so the
instructions themselves are looked at."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from needs import need_built, need_cuobjdump, need_nvcc


@cache
def instructions() -> dict[str, list[str]]:
    """By function: its instructions in order, without predicates and encodings."""
    built = need_built("_C")
    command = [need_cuobjdump(), "--dump-sass", "-arch", "sm_90", built]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(\S.*?)\s*;", re.M)
    found = re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.S)
    assert found, f"{built} holds no code for sm_90; TORCH_CUDA_ARCH_LIST may have left it out"
    return {name: line.findall(body) for name, body in found}


def of_kernel(kernel: str) -> list[list[str]]:
    bodies = [body for name, body in instructions().items() if kernel in name]
    assert bodies, f"no {kernel}"
    return bodies


def has(body: list[str], pattern: str) -> bool:
    return any(re.match(pattern, one) for one in body)


@pytest.mark.parametrize("kernel", ["dispatch_kernel", "combine_kernel", "expand_kernel", "reduce_kernel"])
def test_rows_go_through_the_bulk_copy_engine(kernel: str) -> None:
    assert all(has(body, "UBLKCP") for body in of_kernel(kernel))


def test_nothing_is_read_through_the_non_coherent_path() -> None:
    for name, body in instructions().items():
        assert not has(body, r"LDG?\S*\.CONSTANT"), name


LOW_LATENCY = [f"{operation}_{phase}_kernel" for operation in ("dispatch", "combine") for phase in ("send", "receive")]


@pytest.mark.parametrize("kernel", ["dispatch_kernel", "combine_kernel", "count_kernel", "refuse_kernel", *LOW_LATENCY])
def test_flags_are_polled_and_raised_for_the_whole_system(kernel: str) -> None:
    for body in of_kernel(kernel):
        assert has(body, r"LD\S*\.STRONG\.SYS"), "no flag is polled with .sys scope"
        assert has(body, r"ST\S*\.STRONG\.SYS"), "no flag is raised with .sys scope"
        assert has(body, r"MEMBAR\S*\.SYS"), "there is no fence before the flags"
        narrow = [one for one in body if re.match(r"(LD|ST)\S*\.STRONG\.GPU", one)]
        assert not narrow, "flags of the whole system are all that is polled and raised; blocks count by atomics"


# Where a peer's flags lie in its `Control` (csrc/nvlink/protocol.cuh), by kernel: those that it raises and polls.
COUNTED, READY, DONE = "", r"\+0x100", r"\+0x200"
FLAGS = {
    "dispatch_kernel": (READY, DONE),
    "combine_kernel": (READY, DONE),
    "count_kernel": (COUNTED,),
    "refuse_kernel": (READY,),
}
FENCE = r"MEMBAR\.(ALL|SC)\.SYS"


@pytest.mark.parametrize("kernel", FLAGS)
def test_flags_are_raised_by_a_release(kernel: str) -> None:
    """Behind a fence, which nothing separates from the store but what belongs to it."""
    for body in of_kernel(kernel):
        for flag in FLAGS[kernel]:
            stores = [i for i, one in enumerate(body) if re.match(rf"STG?\.E\.STRONG\.SYS \S+\[\w+\.64{flag}\]", one)]
            assert any(has(body[i - 4 : i], FENCE) for i in stores), f"the flag at {flag or 0} is raised without order"


@pytest.mark.parametrize("kernel", FLAGS)
def test_flags_are_polled_by_an_acquire(kernel: str) -> None:
    """What L1 holds is invalid behind it."""
    for body in of_kernel(kernel):
        for flag in FLAGS[kernel]:
            polls = [i for i, one in enumerate(body) if re.match(rf"LDG?\.E\.STRONG\.SYS \w+, \S+\[\w+\.64{flag}\]", one)]
            assert polls, f"the flag at {flag or 0} is not polled"
            acquired = [body[i + 1].startswith("CCTL.IVALL") for i in polls]
            # `failed`, this rank's own, is read without order from no offset that this pattern could tell from a flag's.
            assert all(acquired) or (flag == COUNTED and any(acquired)), f"the flag at {flag or 0} is polled without order"


@pytest.mark.parametrize("kernel", ["dispatch_kernel", "combine_kernel"])
def test_blocks_join_behind_a_fence_of_the_whole_system(kernel: str) -> None:
    """The last block raises the flags for what all blocks have written."""
    for body in of_kernel(kernel):
        joins = [i for i, one in enumerate(body) if one.startswith("ATOMG.E.ADD.STRONG.GPU")]
        assert joins
        for join in joins:
            barrier = max(i for i, one in enumerate(body[:join]) if one.startswith("BAR.SYNC"))
            assert has(body[barrier - 8 : barrier], FENCE), "blocks join without a fence"


# In dispatch and combine one stands behind the meeting: what peers wrote is read by bulk copies, and what they read is
# overwritten by them. The others are the pipelines' own.
PROXY_FENCES = {"dispatch_kernel": 6, "combine_kernel": 2, "expand_kernel": 5, "reduce_kernel": 1}


@pytest.mark.parametrize("kernel", PROXY_FENCES)
def test_no_fence_between_ordinary_and_bulk_accesses_is_missing(kernel: str) -> None:
    for body in of_kernel(kernel):
        assert sum(one.startswith("FENCE.VIEW.ASYNC") for one in body) >= PROXY_FENCES[kernel]


@pytest.mark.parametrize("kernel", ["dispatch_kernel", "expand_kernel"])
def test_bulk_stores_are_written_before_they_are_announced(kernel: str) -> None:
    """`wait_group` is `wait_group.read` (DEPBAR: shared memory has been read) and an invalidation of L1 behind it; the waits on
    the way, which only free a stage, have none. After the last wait nothing is stored in bulk any more."""
    for body in of_kernel(kernel):
        waits = [i for i, one in enumerate(body) if one.startswith("DEPBAR.LE SB0")]
        final = [i for i in waits if body[i].endswith("0x0")]
        assert len(final) == 1
        assert [body[i + 1].startswith("CCTL.IVALL") for i in waits] == [i in final for i in waits]
        assert max(i for i, one in enumerate(body) if one.startswith("UBLKCP.G.S")) < final[0]


def test_that_test_tells_the_two_waits_apart(tmp_path: Path) -> None:
    nvcc, tool = need_nvcc(), need_cuobjdump()
    source = """__global__ void f(char* g) {
        extern __shared__ char s[];
        unsigned a = __cvta_generic_to_shared(s);
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 64;" ::"l"(g), "r"(a) : "memory");
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        asm volatile("cp.async.bulk.wait_groupKIND 0;" ::: "memory");
        g[100] = 1;
    }"""
    followed = {}
    for kind in ("", ".read"):
        (tmp_path / "a.cu").write_text(source.replace("KIND", kind))
        subprocess.run([nvcc, "-arch=sm_90", "-cubin", "a.cu", "-o", "a.cubin"], cwd=tmp_path, check=True)
        sass = subprocess.run([tool, "--dump-sass", "a.cubin"], cwd=tmp_path, capture_output=True, text=True, check=True)
        followed[kind] = bool(re.search(r"DEPBAR\.LE SB0[^\n]*\n[^\n]*\n[^\n]*CCTL\.IVALL", sass.stdout))
    assert followed == {"": True, ".read": False}
