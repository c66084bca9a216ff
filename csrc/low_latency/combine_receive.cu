// Combine, receiving: see pull.cuh.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "pull.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 640;
constexpr int kNear = 4;  // neighbouring parts of a row are pulled by neighbouring warps

__global__ void __launch_bounds__(kThreads, 1) combine_receive_kernel(const __grid_constant__ CombineParams p) {
    __shared__ Pulling shared;
    Control* mine = own_control(p);
    const uint32_t number = mine->combines[p.set];
    if (mine->closed != 0) return;
    if (threadIdx.x < 32) find_rows(p, mine, number, blockIdx.x == 0 ? p.wait_ns : 0, true, shared);
    __syncthreads();
    const Items items(p);
    const int lane = threadIdx.x % 32, groups = ((items.parts + items.shares - 1) / items.shares + kNear - 1) / kNear;
    for (int first = blockIdx.x; first < items.all; first += kBatch * gridDim.x) {
        const int count = items.from(first), units = groups * count * kNear;
        find_picks(p, items, first, count, shared);
        // What was copied last is in the caches, and is pulled first.
        for (int unit = units - 1 - static_cast<int>(threadIdx.x / 32); unit >= 0; unit -= kThreads / 32) {
            const int item = unit / kNear % count;
            const int part = shared.share[item] + (unit / kNear / count * kNear + unit % kNear) * items.shares;
            if (part >= items.parts) continue;
            const int at = part * kPart + lane * 16;
            if (shared.coded != 0)
                pull_part<true>(p, shared.picks[item], shared.token[item], at, 0, 0, evict_first());
            else
                pull_part<false>(p, shared.picks[item], shared.token[item], at, 0, 0, evict_first());
        }
        __syncthreads();
    }
    if (is_last_block(mine, p, kCombineReceive)) tell_pulled(p, mine, number);
}

}  // namespace

void launch_combine_receive(const CombineParams& p, cudaStream_t stream) {
    combine_receive_kernel<<<p.num_sms, kThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
