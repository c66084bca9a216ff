// What the ranks of one NVLink domain share, and how they meet: see docs/kernels.md.
//
// A rank's arena begins with a `Control`, which peers write and only its owner reads. Operations of a buffer run one after
// another, in the same order on every rank, and each takes the next epoch. An epoch passes two meetings:
//   ready  "my tensor of this operation lies at these offsets, and may be written (dispatch) or read (combine)";
//   done   "I have written everything I send you" (dispatch), "I have read everything of yours" (combine).
// A rank leaves an operation only after every peer's `done` (an exchange of counts, which has one meeting, after every peer's
// counts), so nobody is ever more than one operation ahead of anybody: data words alternate between two slots and are never
// overwritten before they are read, and flags only ever grow.
#pragma once

#include <cstdint>

#include "../common/check.hpp"
#include "../common/ptx.cuh"

namespace deepep_train::nvlink {

constexpr int kMaxRanks = 64;
constexpr int kMaxExperts = 4096;
constexpr int kMaxTopK = 32;
constexpr int kRankRounds = kMaxRanks / 32;  // a warp's lanes stand for the ranks, in so many rounds
constexpr int kOffsets = 5;                  // x (or y), scales (or partial sums), indices (or rows), weights, source tokens

// What a rank says of its arguments: that they are fine, that it raises for them, or that its topk_idx has an index out of
// range or counts beside it that are not its own.
enum Arguments : int64_t { kArgumentsFine = 0, kArgumentsWrong = 1, kMiscounted = 2 };

// A rank's part in an exchange of counts.
struct Counts {
    int64_t status;     // Arguments
    int64_t signature;  // hash of what the ranks must agree on
    int64_t bound;      // num_worst_tokens
    int32_t per_rank[kMaxRanks];
    int32_t per_expert[kMaxExperts];
};

// What a rank tells a peer when it is ready.
struct Ready {
    uint64_t signature;
    int64_t offsets[kOffsets];  // in bytes, from the arena's start; the first negative: this rank does not take part
};
constexpr int64_t kRefusesArguments = -1;
constexpr int64_t kRefusesMemory = -2;  // offsets[1]: bytes that its arena lacks room for
constexpr int64_t kRefusesRail = -3;    // its exchange with other nodes, whose rows these would be, has failed

struct Control {
    // Written by peer p at index p.
    alignas(128) uint32_t counted_flag[kMaxRanks];
    alignas(128) uint32_t ready_flag[kMaxRanks];
    alignas(128) uint32_t done_flag[kMaxRanks];
    alignas(128) uint64_t blames[kMaxRanks];  // the ranks that p gave up on
    alignas(128) Ready ready[2][kMaxRanks];
    alignas(128) Counts counts[2][kMaxRanks];
    // Written by any peer that has failed, 1 + its cause: nobody need wait for the deadline again.
    alignas(128) uint32_t alarm;
    // Written by the owner's kernels.
    alignas(128) uint32_t epoch;  // of the last operation finished
    uint32_t arrived;             // blocks that have finished the current one
    uint32_t failed;              // sticky
};

enum Operation : uint32_t { kCount = 0, kDispatch = 1, kCombine = 2 };
enum Meeting : uint32_t { kMeetCounted = 0, kMeetReady = 1, kMeetDone = 2 };

// Why an operation did not take place.
enum Cause : uint32_t {
    kMissing = 0,     // peers did not come in time
    kMismatched = 1,  // peers are in another call
    kBlamed = 2,      // a peer has failed and blames these ranks
    kOverflow = 3,    // more rows would arrive at these ranks than num_worst_tokens
    kBadCounts = 4,   // these ranks' arguments of a dispatch with num_worst_tokens are wrong or differ
    kRefused = 5,     // these ranks, not all, refused to take part
    kAstray = 6       // a peer has failed and says that these ranks are in another call
};

// Page-locked host memory through which kernels tell the CPU.
struct HostPage {
    // A count exchange's result; `ticket` is written last.
    volatile uint32_t ticket;
    volatile uint32_t counts_bad;  // some rank's status or signature is not like ours
    volatile int32_t num_received;
    volatile int64_t rows[kMaxRanks];          // of each rank's received tensor, padding counted in
    volatile int64_t bound[kMaxRanks];         // num_worst_tokens of each rank
    volatile int32_t per_expert[kMaxExperts];  // rows for each local expert, padding counted in
    // The first failure; `failed` is written last.
    volatile uint32_t failed;
    volatile uint32_t failed_epoch;
    volatile uint32_t failed_operation;
    volatile uint32_t failed_meeting;
    volatile uint32_t failed_cause;
    volatile uint64_t failed_ranks;  // bit p: peer p
    // With kRefused: what the fullest arena had no room for; 0: wrong arguments; -1: the rail. With kBadCounts: bit p, if peer
    // p has said kMiscounted.
    volatile int64_t refused_bytes;
};

// One rank's view of its domain, passed to every kernel by value.
struct Domain {
    int rank;
    int num_ranks;
    uint64_t timeout_ns;
    // Whether a peer that did not come may be told so. Under MPS a store to a process that was killed is an error of this one.
    bool tells_missing;
    // Whether the code that runs here uses the bulk copy engine, and with it dynamic shared memory.
    bool has_bulk_copies;
    char* const* peers;  // [num_ranks] arenas as this process maps them, in device memory
    HostPage* host;

    DT_DEVICE Control* control(int r) const { return reinterpret_cast<Control*>(peers[r]); }
};

// Has `flag` reached `epoch`? Flags grow and may wrap.
DT_DEVICE bool reached(uint32_t flag, uint32_t epoch) { return static_cast<int32_t>(flag - epoch) >= 0; }

// By one thread.
DT_DEVICE void record_failure(const Domain& d, uint32_t epoch, Operation operation, Meeting meeting, Cause cause,
                              uint64_t ranks, int64_t bytes = 0) {
    Control* mine = d.control(d.rank);
    if (atomicExch(&mine->failed, 1u) != 0) return;  // the first failure explains the others
    d.host->refused_bytes = bytes;
    d.host->failed_epoch = epoch;
    d.host->failed_operation = operation;
    d.host->failed_meeting = meeting;
    d.host->failed_cause = cause;
    d.host->failed_ranks = ranks;
    __threadfence_system();
    d.host->failed = 1;
    __threadfence_system();
    // What every rank finds out by itself, or has just been told, need not be told.
    if (cause != kMissing && cause != kMismatched) return;
    for (int peer = 0; peer < d.num_ranks; ++peer) {
        // A rank that is only late must be told as well: it may read from here what is about to be overwritten.
        if (peer == d.rank || ((ranks >> peer & 1) != 0 && !d.tells_missing)) continue;
        Control* there = d.control(peer);
        there->blames[d.rank] = ranks;
        store_release_sys(&there->alarm, 1 + static_cast<uint32_t>(cause));
    }
}

// Has a peer raised the alarm?
DT_DEVICE bool is_alarmed(const Control* mine) { return load_acquire_sys(&mine->alarm) != 0; }

// By one thread, after an alarm: the ranks that peers have given up on, or found in another call.
DT_DEVICE void record_alarm(const Domain& d, uint32_t epoch, Operation operation, Meeting meeting) {
    uint64_t blamed = 0;
    for (int peer = 0; peer < d.num_ranks; ++peer)
        blamed |= *reinterpret_cast<const volatile uint64_t*>(&d.control(d.rank)->blames[peer]);
    const bool is_astray = load_acquire_sys(&d.control(d.rank)->alarm) == 1 + kMismatched;
    record_failure(d, epoch, operation, meeting, is_astray ? kAstray : kBlamed, blamed);
}

// Waits, with one warp, until every peer's flag has reached `epoch`; the warp's lanes share the peers. Returns false, after
// recording who is missing, if the deadline passes, a peer raises the alarm, or a peer's flag among `others` (null: none)
// reaches the epoch instead: that peer is in another call.
DT_DEVICE bool wait_for_flags(const Domain& d, const uint32_t* flags, const uint32_t* others, uint32_t epoch,
                              Operation operation, Meeting meeting) {
    const Control* mine = d.control(d.rank);
    const int lane = threadIdx.x % 32;
    const uint64_t start = global_timer();
    uint64_t missing = 0, elsewhere = 0;
    bool alarmed = false;
    delay_at_random(epoch);
    for (int base = 0; base < d.num_ranks; base += 32) {
        const int peer = base + lane;
        bool here = peer >= d.num_ranks, astray = false;
        for (uint32_t polls = 0; !here && !astray; ++polls) {
            here = reached(load_acquire_sys(flags + peer), epoch);
            if (here || polls % 64 != 63) continue;
            astray = others != nullptr && reached(load_acquire_sys(others + peer), epoch);
            alarmed = is_alarmed(mine);
            if (alarmed || global_timer() - start > d.timeout_ns) break;
        }
        // A peer that raised the alarm may have come first: look once more.
        if (!here) here = reached(load_acquire_sys(flags + peer), epoch);
        missing |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, !here)) << base;
        elsewhere |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, !here && astray)) << base;
    }
    alarmed = __any_sync(0xffffffffu, alarmed);
    __syncwarp();  // what other lanes have acquired, this one may read
    if (missing == 0) return true;
    if (lane == 0) {
        if (elsewhere != 0)
            record_failure(d, epoch, operation, meeting, kMismatched, elsewhere);
        else if (alarmed)
            record_alarm(d, epoch, operation, meeting);
        else
            record_failure(d, epoch, operation, meeting, kMissing, missing);
    }
    __syncwarp();
    return false;
}

}  // namespace deepep_train::nvlink
