// What the ranks of one NVLink domain share, and how they meet: see docs/kernels.md.
//
// A rank's arena begins with a `Control`, which peers write and only its owner reads. Operations of a buffer run one after
// another on its stream, in the same order on every rank, and each takes the next epoch. An epoch passes two meetings:
//   ready  "my tensor of this operation lies at these offsets, and may be written (dispatch) or read (combine)";
//   done   "I have written everything I send you" (dispatch), "I have read everything of yours" (combine).
// A rank leaves an operation only after every peer's `done`, so nobody is ever more than one operation ahead of anybody: data
// words alternate between two slots and are never overwritten before they are read, and flags only ever grow.
#pragma once

#include <cstdint>

#include "../common/ptx.cuh"

namespace deepep_train::nvlink {

constexpr int kMaxRanks = 64;
constexpr int kMaxExperts = 4096;
constexpr int kMaxTopK = 32;
constexpr int kOffsets = 5;  // x (or y), scales, indices, weights, source tokens

// A rank's part in an exchange of counts.
struct Counts {
    int64_t status;     // 0, or 1 if this rank's arguments are wrong
    int64_t signature;  // hash of what the ranks must agree on
    int64_t bound;      // num_worst_tokens
    int32_t per_rank[kMaxRanks];
    int32_t per_expert[kMaxExperts];
};

// What a rank tells a peer when it is ready.
struct Ready {
    uint64_t signature;
    int64_t offsets[kOffsets];  // in bytes, from the arena's start; negative: this rank cannot take part
};

struct Control {
    // Written by peer p at index p.
    alignas(128) uint32_t counted_flag[kMaxRanks];
    alignas(128) uint32_t ready_flag[kMaxRanks];
    alignas(128) uint32_t done_flag[kMaxRanks];
    alignas(128) Ready ready[2][kMaxRanks];
    alignas(128) Counts counts[2][kMaxRanks];
    // Written by the owner's kernels.
    alignas(128) uint32_t epoch;  // of the last operation finished
    uint32_t arrived;             // blocks that have finished the current one
    uint32_t failed;              // sticky
};

// Page-locked host memory through which kernels tell the CPU.
struct HostPage {
    // A count exchange's result; `ticket` is written last.
    volatile uint32_t ticket;
    volatile uint32_t counts_bad;  // some rank's status or signature is not like ours
    volatile int32_t num_received;
    volatile int32_t per_rank[kMaxRanks][kMaxRanks];  // rows from [source] to [destination]
    volatile int32_t per_expert[kMaxExperts];         // rows for each local expert
    volatile int64_t bound[kMaxRanks];
    // The first failure; `failed` is written last.
    volatile uint32_t failed;
    volatile uint32_t failed_epoch;
    volatile uint32_t failed_operation;
    volatile uint32_t failed_meeting;
    volatile uint64_t missing;     // bit p: peer p did not come
    volatile uint64_t mismatched;  // bit p: peer p is in another call
    volatile uint64_t refused;     // bit p: peer p could not take part
};

enum Operation : uint32_t { kCount = 0, kDispatch = 1, kCombine = 2 };
enum Meeting : uint32_t { kMeetCounted = 0, kMeetReady = 1, kMeetDone = 2 };

// One rank's view of its domain, passed to every kernel by value.
struct Domain {
    int rank;
    int num_ranks;
    uint64_t timeout_ns;
    char* const* peers;  // [num_ranks] arenas as this process maps them, in device memory
    HostPage* host;

    DT_DEVICE Control* control(int r) const { return reinterpret_cast<Control*>(peers[r]); }
};

// Has `flag` reached `epoch`? Flags grow and may wrap.
DT_DEVICE bool reached(uint32_t flag, uint32_t epoch) { return static_cast<int32_t>(flag - epoch) >= 0; }

DT_DEVICE void record_failure(const Domain& d, uint32_t epoch, Operation operation, Meeting meeting, uint64_t missing,
                              uint64_t mismatched, uint64_t refused) {
    Control* mine = d.control(d.rank);
    if (atomicExch(&mine->failed, 1u) != 0) return;  // the first failure explains the others
    d.host->failed_epoch = epoch;
    d.host->failed_operation = operation;
    d.host->failed_meeting = meeting;
    d.host->missing = missing;
    d.host->mismatched = mismatched;
    d.host->refused = refused;
    __threadfence_system();
    d.host->failed = 1;
    __threadfence_system();
}

// Waits, with one warp, until every peer's flag has reached `epoch`; the warp's lanes share the peers. Returns false, after
// recording who is missing, if the deadline passes or this rank has failed before.
DT_DEVICE bool wait_for_flags(const Domain& d, const uint32_t* flags, uint32_t epoch, Operation operation, Meeting meeting) {
    const int lane = threadIdx.x % 32;
    const uint64_t start = global_timer();
    uint64_t missing = 0;
    for (int base = 0; base < d.num_ranks; base += 32) {
        const int peer = base + lane;
        bool here = peer >= d.num_ranks;
        while (!here) {
            here = reached(load_acquire_sys(flags + peer), epoch);
            if (!here && global_timer() - start > d.timeout_ns) break;
        }
        missing |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, !here)) << base;
    }
    __syncwarp();
    if (missing == 0) return true;
    if (lane == 0) record_failure(d, epoch, operation, meeting, missing, 0, 0);
    __syncwarp();
    return false;
}

}  // namespace deepep_train::nvlink
