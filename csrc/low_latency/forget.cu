// A peer that is taken in again owes no answer to what it was sent before. One that has not been left out does.
#include <cstddef>

#include "../common/check.hpp"
#include "kernels.hpp"
#include "space.cuh"

namespace deepep_train::low_latency {

namespace {

__global__ void forget_kernel(const __grid_constant__ Common c, const int peer) {
    if (!is_masked(c, peer)) return;
    Control* mine = own_control(c);
    const int set = threadIdx.x;
    mine->sent_to[set].at[peer] = static_cast<uint32_t>(load_acquire_sys(&mine->taken[set].at[peer]));
    mine->shown_to[set].at[peer] = static_cast<uint32_t>(load_acquire_sys(&mine->pulled[set].at[peer]));
    if (!is_local(c, peer)) return;
    // Where it was masked in the middle of a combine, some slices have been counted there, and some have not.
    Control* there = control_of(c, peer);
    const uint32_t count = mine->sliced_to[set].at[peer] * kCombineInSlices;
    for (int slice = 0; slice < kMaxSlices; ++slice) {
        store_release_sys(&there->slices_shown[set].at[c.rank][slice], count);
        store_release_sys(&there->slices_pulled[set].at[c.rank][slice], count);
    }
}

}  // namespace

void launch_forget(const Common& c, int peer, cudaStream_t stream) {
    forget_kernel<<<1, 2, 0, stream>>>(c, peer);
    DT_CUDA(cudaGetLastError());
}

int64_t control_bytes() { return sizeof(Control); }
int64_t closed_offset() { return offsetof(Control, closed); }

}  // namespace deepep_train::low_latency
