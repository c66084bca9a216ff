// Begin and end of an operation that many blocks work on: the meetings of protocol.cuh.
#pragma once

#include "params.hpp"
#include "protocol.cuh"

namespace deepep_train::nvlink {

// How many rows a dispatch sends or a combine makes.
template <typename Params>
DT_DEVICE int tokens_of(const Params& p) {
    if (p.num_tokens_at == 0) return p.num_tokens;
    const int there = *reinterpret_cast<const int32_t*>(p.num_tokens_at);
    return there < p.num_tokens ? there : p.num_tokens;
}

// The rows that an operation takes, in their order.
struct Rows {
    int first = 0;
    int count;
    int all;

    template <typename Params>
    DT_DEVICE explicit Rows(const Params& p) : count(tokens_of(p)), all(count) {
        if (p.parts.at == 0) return;
        const auto* at = reinterpret_cast<const int32_t*>(p.parts.at);
        const int end = p.parts.first + p.parts.count;
        first = at[p.parts.first];
        count = (end <= p.parts.num_parts ? at[end] : all + at[end - p.parts.num_parts]) - first;
    }
    DT_DEVICE int64_t operator()(int64_t i) const {
        i += first;
        return i < all ? i : i - all;
    }
};

DT_DEVICE bool has_failed(const Control* mine) { return *reinterpret_cast<const volatile uint32_t*>(&mine->failed) != 0; }

DT_DEVICE void tell_ready(const Domain& d, int peer, uint64_t signature, const int64_t (&own)[kOffsets], uint32_t epoch,
                          bool rail_failed = false) {
    Control* there = d.control(peer);
    Ready* word = &there->ready[epoch % 2][d.rank];
    word->signature = signature;
    for (int i = 0; i < kOffsets; ++i) word->offsets[i] = i == 0 && rail_failed ? kRefusesRail : own[i];
    store_release_sys(&there->ready_flag[d.rank], epoch);
}

// With one warp: waits for every peer's ready word and compares. Returns whether the operation can take place.
DT_DEVICE bool all_ready(const Domain& d, Operation operation, uint64_t signature, uint32_t epoch) {
    const Control* mine = d.control(d.rank);
    const int lane = threadIdx.x % 32;
    if (!wait_for_flags(d, mine->ready_flag, mine->counted_flag, epoch, operation, kMeetReady)) return false;
    uint64_t mismatched = 0, refused = 0;
    for (int base = 0; base < d.num_ranks; base += 32) {
        const int peer = base + lane;
        bool other = false, refuses = false;
        if (peer < d.num_ranks) {
            const Ready* word = &mine->ready[epoch % 2][peer];
            refuses = word->offsets[0] < 0;
            other = !refuses && word->signature != signature;
        }
        mismatched |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, other)) << base;
        refused |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, refuses)) << base;
    }
    const uint64_t all = d.num_ranks == 64 ? ~0ull : (1ull << d.num_ranks) - 1;
    if (refused == all) return false;  // everybody raises for itself, and is in step with everybody
    if (refused != 0) {
        if (lane == 0) {
            int64_t bytes = 0;
            for (int peer = 0; peer < d.num_ranks; ++peer) {
                const Ready* word = &mine->ready[epoch % 2][peer];
                if (word->offsets[0] == kRefusesRail && bytes == 0) bytes = -1;
                if (word->offsets[0] == kRefusesMemory && word->offsets[1] > bytes) bytes = word->offsets[1];
            }
            record_failure(d, epoch, operation, kMeetReady, kRefused, refused, bytes);
        }
        __syncwarp();
        return false;
    }
    if (mismatched == 0) return true;
    if (lane == 0) record_failure(d, epoch, operation, kMeetReady, kMismatched, mismatched);
    __syncwarp();
    return false;
}

// Called by every thread of every block. Block 0 tells the peers where this rank's tensors lie; every block waits until all
// peers have told theirs, and gets them in `offsets` (shared memory, [num_ranks][kOffsets]). Returns false if the operation
// cannot take place; the reason has been recorded. `rail_failed`, if it is there: whether this rank must refuse, since what it
// has to send, or will have to do with it, depends on other nodes.
DT_DEVICE bool begin_operation(const Domain& d, Operation operation, uint64_t signature, const int64_t (&own)[kOffsets],
                               uint32_t epoch, int64_t* offsets, uint64_t rail_failed) {
    __shared__ bool go;
    const Control* mine = d.control(d.rank);
    const bool whole = !has_failed(mine);
    delay_at_random(epoch);
    if (blockIdx.x == 0 && whole) {
        const bool refuses = rail_failed != 0 && *reinterpret_cast<const volatile uint32_t*>(rail_failed) != 0;
        for (int peer = threadIdx.x; peer < d.num_ranks; peer += blockDim.x)
            tell_ready(d, peer, signature, own, epoch, refuses);
    }
    if (threadIdx.x < 32) {
        const bool fine = whole && all_ready(d, operation, signature, epoch);
        for (int peer = threadIdx.x; fine && peer < d.num_ranks; peer += 32)
            for (int i = 0; i < kOffsets; ++i) offsets[peer * kOffsets + i] = mine->ready[epoch % 2][peer].offsets[i];
        if (threadIdx.x == 0) go = fine;
    }
    __syncthreads();
    // The copy engine is about to read what peers wrote, and overwrite what they read, by ordinary accesses.
    fence_async_proxy();
    return go;
}

// Called by every thread of every block, after its own writes and reads are complete. The block that comes last tells every
// peer, waits for every peer, and closes the epoch; the others are free to leave, and their SMs to do something else. If the
// operation failed, that block fills its outputs with NaN.
DT_DEVICE void end_operation(const Domain& d, Operation operation, uint32_t epoch, bool took_place, const Outputs& outputs) {
    __shared__ bool last, good;
    Control* mine = d.control(d.rank);
    delay_at_random(epoch);
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = add_acq_rel_gpu(&mine->arrived, 1) == gridDim.x - 1;
        // Another block may have given up where this one did not: then there is nothing to announce.
        good = took_place && !has_failed(mine);
    }
    __syncthreads();
    if (!last) return;
    if (good) {
        delay_at_random(epoch + 1);
        for (int peer = threadIdx.x; peer < d.num_ranks; peer += blockDim.x)
            store_release_sys(&d.control(peer)->done_flag[d.rank], epoch);
        __syncthreads();
        if (threadIdx.x < 32) {
            bool fine = wait_for_flags(d, mine->done_flag, nullptr, epoch, operation, kMeetDone);
            // Peers that gave up on this rank may have overwritten what it was still reading.
            if (fine && is_alarmed(mine)) {
                if (threadIdx.x == 0) record_alarm(d, epoch, operation, kMeetDone);
                fine = false;
            }
            if (threadIdx.x == 0) good = fine;
        }
    }
    __syncthreads();
    if (!good)
        for (int i = 0; i < kOffsets; ++i)
            for (int64_t at = threadIdx.x * 4; at < outputs.bytes[i]; at += blockDim.x * 4)
                *reinterpret_cast<uint32_t*>(outputs.address[i] + at) = 0xffffffffu;
    if (threadIdx.x == 0) {
        mine->arrived = 0;
        mine->epoch = epoch;
    }
}

}  // namespace deepep_train::nvlink
