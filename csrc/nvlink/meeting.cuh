// Begin and end of an operation that many blocks work on: the meetings of protocol.cuh.
#pragma once

#include "protocol.cuh"

namespace deepep_train::nvlink {

// Called by every thread of every block. Block 0 tells the peers where this rank's tensors lie; every block waits until all
// peers have told theirs, and gets them in `offsets` (shared memory, [num_ranks][kOffsets]). Returns false if the operation
// cannot take place; the reason has been recorded.
DT_DEVICE bool begin_operation(const Domain& d, Operation operation, uint64_t signature, const int64_t (&own)[kOffsets],
                               uint32_t epoch, int64_t* offsets) {
    __shared__ bool go;
    Control* mine = d.control(d.rank);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (blockIdx.x == 0 && mine->failed == 0)
        for (int peer = threadIdx.x; peer < d.num_ranks; peer += blockDim.x) {
            Control* there = d.control(peer);
            Ready* word = &there->ready[epoch % 2][d.rank];
            word->signature = signature;
            for (int i = 0; i < kOffsets; ++i) word->offsets[i] = own[i];
            store_release_sys(&there->ready_flag[d.rank], epoch);
        }
    if (warp == 0) {
        bool fine = mine->failed == 0 && wait_for_flags(d, mine->ready_flag, epoch, operation, kMeetReady);
        uint64_t mismatched = 0, refused = 0;
        for (int base = 0; fine && base < d.num_ranks; base += 32) {
            const int peer = base + lane;
            bool other = false, refuses = false;
            if (peer < d.num_ranks) {
                const Ready* word = &mine->ready[epoch % 2][peer];
                other = word->signature != signature;
                refuses = word->offsets[0] < 0;
                for (int i = 0; i < kOffsets; ++i) offsets[peer * kOffsets + i] = word->offsets[i];
            }
            mismatched |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, other)) << base;
            refused |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, refuses)) << base;
        }
        if (fine && (mismatched | refused) != 0) {
            fine = false;
            if (lane == 0) record_failure(d, epoch, operation, kMeetReady, 0, mismatched, refused);
        }
        if (lane == 0) go = fine;
    }
    __syncthreads();
    return go;
}

// Called by every thread of every block, after its own writes and reads are complete. The block that comes last tells every
// peer, waits for every peer, and closes the epoch; the others are free to leave, and their SMs to do something else.
DT_DEVICE void end_operation(const Domain& d, Operation operation, uint32_t epoch, bool took_place) {
    __shared__ bool last;
    Control* mine = d.control(d.rank);
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0) last = add_acq_rel_gpu(&mine->arrived, 1) == gridDim.x - 1;
    __syncthreads();
    if (!last) return;
    if (took_place) {
        for (int peer = threadIdx.x; peer < d.num_ranks; peer += blockDim.x)
            store_release_sys(&d.control(peer)->done_flag[d.rank], epoch);
        if (threadIdx.x < 32) wait_for_flags(d, mine->done_flag, epoch, operation, kMeetDone);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mine->arrived = 0;
        mine->epoch = epoch;
    }
}

}  // namespace deepep_train::nvlink
