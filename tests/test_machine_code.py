"""What the kernels' memory orders compile to, for sm_90; no GPU is needed. On one GPU a single L2 hides wrong orders, so the
instructions themselves are looked at."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
from needs import need_built, need_cuobjdump, need_nvcc
from test_kernels_compile import over_nvshmem


class Body:
    """A function's instructions in order, without their predicates, and which may follow which.

    `is_sure`: whether it is executed by whoever comes to it, by no predicate.
    """

    def __init__(self, sass: str) -> None:
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?(\S.*?)\s*;", sass, re.M)
        self.code = [text for _, _, text in lines]
        self.is_sure = [not predicate for _, predicate, _ in lines]
        at = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
        self._next: list[list[int]] = []
        for i, one in enumerate(self.code):
            name, *operands = one.split()
            to = [i + 1] if i + 1 < len(lines) else []
            if self.is_sure[i] and (name.startswith(("EXIT", "RET")) or (name == "BRA" and len(operands) == 1)):
                to = []
            if name.startswith(("BRA", "CALL.REL", "WARPSYNC.COLLECTIVE")):  # CALL.ABS: of another function
                to.append(at[int(operands[-1], 16)])
            self._next.append(to)

    def find(self, pattern: str) -> list[int]:
        return [i for i, one in enumerate(self.code) if re.match(pattern, one)]

    def reached(self, starts: list[int], without: list[int]) -> set[int]:
        """Whatever a thread may come to from behind `starts` that executes none of `without`, lanes and blocks being what they
        may: an instruction is missing here only if every way to it leads through `without`."""
        sure = {i for i in without if self.is_sure[i]}
        found: set[int] = set()
        left = [n for i in starts for n in self._next[i]]
        while left:
            i = left.pop()
            if i not in found and i not in sure:
                found.add(i)
                left += self._next[i]
        return found

    def proxy_fences(self) -> list[int]:
        """Those of `fence.proxy.async`: an mbarrier's initialization has one of its own, before it."""
        return [i for i in self.find(r"FENCE\.VIEW\.ASYNC") if not self.code[i + 1].startswith("SYNCS.EXCH")]


@cache
def bodies(extension: str) -> dict[str, Body]:
    """Of this library's functions, by name."""
    built = need_built(extension)
    command = [need_cuobjdump(), "--dump-sass", "-arch", "sm_90", built]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", sass, re.S)
    assert found, f"{built} holds no code for sm_90; TORCH_CUDA_ARCH_LIST may have left it out"
    return {name: Body(sass) for name, sass in found if "deepep_train" in name}


def whole(kernel: str, extension: str = "_C") -> list[Body]:
    found = [body for name, body in bodies(extension).items() if kernel in name]
    assert found, f"no {kernel}"
    return found


def of_kernel(kernel: str, extension: str = "_C") -> list[list[str]]:
    return [body.code for body in whole(kernel, extension)]


def has(body: list[str], pattern: str) -> bool:
    return any(re.match(pattern, one) for one in body)


@pytest.mark.parametrize("kernel", ["dispatch_kernel", "combine_kernel", "expand_kernel", "reduce_kernel"])
def test_rows_go_through_the_bulk_copy_engine(kernel: str) -> None:
    assert all(has(body, "UBLKCP") for body in of_kernel(kernel))


def test_nothing_is_read_through_the_non_coherent_path() -> None:
    for name, body in bodies("_C").items():
        assert not has(body.code, r"LDG?\S*\.CONSTANT"), name


def test_nothing_but_nvshmems_addresses_is_read_so_between_nodes() -> None:
    """It reads where a peer's memory begins, words of 64 bits that never change."""
    for name, body in bodies("_rdma").items():
        so_read = [one for one in body.code if re.match(r"LDG?\S*\.CONSTANT", one)]
        if over_nvshmem(name):
            assert all(one.startswith("LDG.E.64.CONSTANT") for one in so_read), name
        else:
            assert not so_read, name


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
COUNTED, READY, DONE, ALARM = "", r"\+0x100", r"\+0x200", r"\+0x20a900"
FLAGS = {
    "dispatch_kernel": (READY, DONE, ALARM),
    "combine_kernel": (READY, DONE, ALARM),
    "count_kernel": (COUNTED, ALARM),
    "refuse_kernel": (READY, ALARM),
}
FAILED = r"\+0x4410"  # in the `HostPage`
FENCE = r"MEMBAR\.(ALL|SC)\.SYS"


def stores(body: list[str], at: str = "") -> list[int]:
    return [i for i, one in enumerate(body) if re.match(rf"STG?\.E\.STRONG\.SYS \S+\[\w+\.64{at}\]", one)]


def is_released(body: list[str], store: int) -> bool:
    """A fence is before it, which nothing separates from the store but what belongs to it."""
    return has(body[store - 4 : store], FENCE)


@pytest.mark.parametrize("kernel", FLAGS)
def test_flags_are_raised_by_a_release(kernel: str) -> None:
    for body in of_kernel(kernel):
        for flag in FLAGS[kernel]:
            raised = stores(body, flag)
            if flag == COUNTED:  # the same pattern finds what the CPU gets, of which the last is the ticket
                raised = [i for i in raised[:-1] if is_released(body, i)]
            assert raised, f"the flag at {flag or 0} is not raised"
            assert all(is_released(body, i) for i in raised), f"the flag at {flag or 0} is raised without order"


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


@pytest.mark.parametrize("kernel", FLAGS)
def test_the_cpu_is_told_last_that_the_domain_has_failed(kernel: str) -> None:
    for body in of_kernel(kernel):
        failed = stores(body, FAILED)
        assert failed
        assert all(is_released(body, i) for i in failed), "the CPU may find `failed` without what has"


def test_the_cpu_is_told_last_that_the_counts_are_there() -> None:
    """By one thread: its fence counts for what the others wrote if it comes behind the barrier."""
    (body,) = whole("count_kernel")
    ticket, barrier = stores(body.code)[-1], body.find(r"BAR\.SYNC")[-1]
    assert is_released(body.code, ticket), "the CPU may find the ticket without the counts"
    assert body.find(FENCE)[-2] > barrier, "the fence orders one thread's counts"  # the last is behind the ticket


@pytest.mark.parametrize("kernel", ["dispatch_kernel", "combine_kernel"])
def test_blocks_join_behind_a_fence_of_the_whole_system(kernel: str) -> None:
    """The last block raises the flags for what all blocks have written; every thread has executed one."""
    for body in whole(kernel):
        joins = body.find(r"ATOMG\.E\.ADD\.STRONG\.GPU")
        assert joins
        for join in joins:
            barrier = max(i for i in body.find(r"BAR\.SYNC") if i < join)
            assert has(body.code[barrier - 8 : barrier], FENCE), "blocks join without a fence"
        assert not body.reached([0], without=body.find(FENCE)) & set(joins), "some threads pass the fence by"


@pytest.mark.parametrize("kernel", ["dispatch_kernel", "combine_kernel"])
def test_bulk_accesses_are_ordered_behind_the_meeting(kernel: str) -> None:
    """What peers wrote is read by bulk copies, and what they read is overwritten by them: every thread that comes from the
    flags to the copy engine has executed a fence between the two."""
    for body in whole(kernel):
        polls, bulk = body.find(rf"LDG?\.E\.STRONG\.SYS \w+, \S+\[\w+\.64{READY}\]"), set(body.find("UBLKCP"))
        assert bulk & body.reached(polls, without=[]), "this test does not follow the kernel"
        assert not bulk & body.reached(polls, without=body.proxy_fences()), "some threads pass the fence by"


@pytest.mark.parametrize("kernel", ["dispatch_kernel", "expand_kernel"])
def test_bulk_stores_are_written_before_they_are_announced(kernel: str) -> None:
    """`wait_group` is `wait_group.read` (DEPBAR: shared memory has been read) and an invalidation of L1 behind it; the waits on
    the way, which only free a stage, have none. Every thread that has stored in bulk comes through the last wait, and then
    through a fence between the two kinds of accesses, before it joins or ends."""
    for body in whole(kernel):
        waits, bulk = body.find("DEPBAR.LE SB0"), body.find(r"UBLKCP\.G\.S")
        final = [i for i in waits if body.code[i].endswith("0x0")]
        assert len(final) == 1
        assert [body.code[i + 1].startswith("CCTL.IVALL") for i in waits] == [i in final for i in waits]
        assert bulk
        ends = set(body.find(r"ATOMG\.E\.ADD|EXIT"))
        assert ends & body.reached(bulk, without=[]), "this test does not follow the kernel"
        assert not ends & body.reached(bulk, without=final), "some threads do not wait"
        assert not ends & body.reached(final, without=body.proxy_fences()), "some threads pass the fence by"
        assert not set(bulk) & body.reached(final, without=[])


# Between nodes (csrc/rdma) ---------------------------------------------------------------------------------------------------

JOIN = r"ATOMG\.E\.ADD\.STRONG\.GPU"
POLL = r"LDG\.E\.64\.STRONG\.SYS"  # of *ready* and *arrived*; NVSHMEM's headers have such loads, too
# What NVSHMEM's headers make of a put and of a signal to memory that can be reached; beside it is a call, for what cannot.
PUT, SIGNAL = r"LDG\.E\.128 |ATOM\.E\.ADD\.64\.STRONG\.SYS", r"ST\.E\.64\.STRONG\.SYS"


def is_acquired(body: list[str], poll: int) -> bool:
    """What L1 holds is invalid behind it."""
    return body[poll + 1].startswith("CCTL.IVALL")


def test_what_the_rail_says_is_polled_by_an_acquire() -> None:
    (refuse,), (rail,) = whole("refuse_kernel", "_rdma"), whole("rail_kernel", "_rdma")
    assert refuse.find(POLL)
    assert all(is_acquired(refuse.code, i) for i in refuse.find(POLL)), "*ready* is polled without order"
    (join,) = rail.find(JOIN)
    before, behind = ([i for i in rail.find(POLL) if (i > join) == is_behind] for is_behind in (False, True))
    assert behind, "the last block waits for nothing"
    ours = [i for i in behind if is_acquired(rail.code, i)]  # NVSHMEM's own wait asks again, once ours has seen it come
    assert not set(behind) - set(ours) & rail.reached([join], without=ours), "rows may be read before they came"
    assert set(behind) <= rail.reached([join], without=[]), "this test does not follow the kernel"
    assert any(is_acquired(rail.code, i) for i in before), "rows may be put before their place is free"


@pytest.mark.parametrize(("kernel", "packed"), [("rail_kernel", r"STG\.E\.128"), ("put_combine_kernel", r"STG\.E\.NA\.128")])
def test_rows_are_put_behind_a_fence_of_the_whole_system(kernel: str, packed: str) -> None:
    """The card, and other lanes, read what a lane has packed."""
    (body,) = whole(kernel, "_rdma")
    (join, *_), puts = body.find(JOIN), set(body.find(PUT))
    stored = [i for i in body.find(packed) if i < join]  # the rail's behind it are NaN for rows that have not come
    assert puts & body.reached(stored, without=[]), "this test does not follow the kernel"
    assert not puts & body.reached(stored, without=body.find(FENCE)), "some lanes pass the fence by"


@pytest.mark.parametrize("kernel", ["rail_kernel", "put_dispatch_kernel", "put_combine_kernel"])
def test_blocks_join_by_a_release_and_an_acquire_between_nodes(kernel: str) -> None:
    (body,) = of_kernel(kernel, "_rdma")
    joins = [i for i, one in enumerate(body) if re.match(JOIN, one)]
    assert joins
    for join in joins:
        assert has(body[join - 6 : join], r"MEMBAR\.ALL\.GPU"), "a block joins without what it has done"
        assert is_acquired(body, join), "the last block may miss what the others have done"


@pytest.mark.parametrize("kernel", ["put_dispatch_kernel", "put_combine_kernel", "answer_kernel"])
def test_flags_for_other_nodes_follow_a_fence_of_the_whole_system(kernel: str) -> None:
    """Behind all that they announce: the join of the blocks, or the launch before."""
    (body,) = whole(kernel, "_rdma")
    starts = body.find(JOIN) or [0]
    flags = {i for i in body.find(SIGNAL) if i > starts[0]}
    assert flags & body.reached(starts, without=[]), "this test does not follow the kernel"
    assert not flags & body.reached(starts, without=body.find(FENCE)), "a flag may overtake what it announces"


@pytest.mark.parametrize("kernel", ["rail_kernel", "refuse_kernel", "digest_kernel"])
def test_the_cpu_is_told_last_that_the_rail_has_failed(kernel: str) -> None:
    """`failed` of the page (csrc/rdma/params.hpp)."""
    for body in of_kernel(kernel, "_rdma"):
        failed = stores(body, r"\+0x8")
        assert failed
        assert all(is_released(body, i) for i in failed), "the CPU may find `failed` without what has"


def test_bits_of_rows_that_came_are_read_from_memory() -> None:
    """While L1 may still hold what lay there before."""
    (body,) = of_kernel("find_slots_kernel", "_rdma")
    assert has(body, r"LDG?\.E\.STRONG\.SYS")


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
