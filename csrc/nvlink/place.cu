// After the counts: which row of which rank every token and every pick takes. Nothing is decided by timing.
//
// Rank layout: send_slot = the destination's first slot for this rank + the token's number among this rank's.
// Expert layout: besides, pick_row = the expert group's first row for this rank + the pick's number among this rank's picks of
// that expert, counted by token, then by k. The tokens are cut into chunks; one kernel counts each chunk's picks, the next
// starts each chunk where the chunks before it end and numbers its picks in order, 32 at a time.
#include "kernels.hpp"

#include "../common/check.hpp"
#include "protocol.cuh"

namespace deepep_train::nvlink {

namespace {

constexpr int kThreads = 256;

DT_DEVICE int chunk_size(int num_tokens) { return (num_tokens + kChunks - 1) / kChunks; }

DT_DEVICE int expert_of(const PlaceParams& p, int64_t pick) {
    const int64_t e = reinterpret_cast<const int64_t*>(p.topk_idx)[pick];
    return e >= 0 && e < p.num_experts ? static_cast<int>(e) : -1;
}

__global__ void __launch_bounds__(kThreads) slot_kernel(const __grid_constant__ PlaceParams p) {
    const auto* index = reinterpret_cast<const int32_t*>(p.send_index);
    const auto* base = reinterpret_cast<const int32_t*>(p.send_base);
    const int64_t all = static_cast<int64_t>(p.num_tokens) * p.num_ranks;
    for (int64_t i = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; i < all;
         i += gridDim.x * static_cast<int64_t>(kThreads))
        reinterpret_cast<int32_t*>(p.send_slot)[i] = index[i] < 0 ? -1 : index[i] + base[i % p.num_ranks];
}

__global__ void __launch_bounds__(kThreads) chunk_kernel(const __grid_constant__ PlaceParams p) {
    __shared__ int counts[kMaxExperts];
    for (int e = threadIdx.x; e < p.num_experts; e += kThreads) counts[e] = 0;
    __syncthreads();
    const int size = chunk_size(p.num_tokens) * p.top_k;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * size, all = static_cast<int64_t>(p.num_tokens) * p.top_k;
    for (int64_t i = first + threadIdx.x; i < first + size && i < all; i += kThreads) {
        const int e = expert_of(p, i);
        if (e >= 0) atomicAdd(&counts[e], 1);
    }
    __syncthreads();
    auto* out = reinterpret_cast<int32_t*>(p.chunk_counts) + static_cast<int64_t>(blockIdx.x) * p.num_experts;
    for (int e = threadIdx.x; e < p.num_experts; e += kThreads) out[e] = counts[e];
}

__global__ void __launch_bounds__(kThreads) pick_kernel(const __grid_constant__ PlaceParams p) {
    __shared__ int next_row[kMaxExperts];
    const auto* counts = reinterpret_cast<const int32_t*>(p.chunk_counts);
    for (int e = threadIdx.x; e < p.num_experts; e += kThreads) {
        int row = reinterpret_cast<const int32_t*>(p.expert_base)[e];
#pragma unroll 8
        for (int c = 0; c < blockIdx.x; ++c) row += counts[static_cast<int64_t>(c) * p.num_experts + e];
        next_row[e] = row;
    }
    __syncthreads();

    const int size = chunk_size(p.num_tokens), local = p.num_experts / p.num_ranks;
    const int64_t token = static_cast<int64_t>(blockIdx.x) * size;
    const int64_t end = token + size < p.num_tokens ? token + size : p.num_tokens;
    auto* pick_row = reinterpret_cast<int32_t*>(p.pick_row);
    auto* pick_rank = reinterpret_cast<int32_t*>(p.pick_rank);
    if (threadIdx.x < 32)
        for (int64_t base = token * p.top_k; base < end * p.top_k; base += 32) {
            const int64_t pick = base + threadIdx.x;
            const int e = pick < end * p.top_k ? expert_of(p, pick) : -1;
            const unsigned same = __match_any_sync(0xffffffffu, e);
            const int before = __popc(same & ((1u << threadIdx.x) - 1));
            const int row = e < 0 ? -1 : next_row[e] + before;
            __syncwarp();
            if (e >= 0 && before == 0) next_row[e] += __popc(same);
            __syncwarp();
            if (pick < end * p.top_k) {
                pick_row[pick] = row;
                if (p.pick_rank != 0) pick_rank[pick] = e < 0 ? -1 : e / local;
            }
        }
    if (p.send_index == 0) return;
    __syncthreads();

    // Experts' groups ascend, so a token's first row at a rank is its smallest.
    for (int64_t i = token * p.num_ranks + threadIdx.x; i < end * p.num_ranks; i += kThreads) {
        const int64_t t = i / p.num_ranks;
        const int rank = static_cast<int>(i % p.num_ranks);
        int first = -1, rows = 0;
        for (int64_t pick = t * p.top_k; pick < (t + 1) * p.top_k; ++pick)
            if (pick_rank[pick] == rank) {
                first = rows == 0 || pick_row[pick] < first ? pick_row[pick] : first;
                ++rows;
            }
        const int index = reinterpret_cast<const int32_t*>(p.send_index)[i];
        const int slot = index < 0 ? -1 : index + reinterpret_cast<const int32_t*>(p.send_base)[rank];
        reinterpret_cast<int32_t*>(p.send_slot)[i] = slot;
        reinterpret_cast<int32_t*>(p.send_row)[i] = first;
        reinterpret_cast<int32_t*>(p.pull_row)[i] = rows > 1 ? -2 - slot : first;
    }
}

}  // namespace

void launch_place(const PlaceParams& p, cudaStream_t stream) {
    if (p.num_tokens == 0) return;
    if (p.expert_base == 0) {
        slot_kernel<<<64, kThreads, 0, stream>>>(p);
    } else {
        chunk_kernel<<<kChunks, kThreads, 0, stream>>>(p);
        DT_CUDA(cudaGetLastError());
        pick_kernel<<<kChunks, kThreads, 0, stream>>>(p);
    }
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::nvlink
