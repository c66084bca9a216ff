// Where every token goes: counts, and each token's place among the rows for a rank. One block a rank, and one for experts, each
// reading all choices; nothing is decided by timing.
#include "kernels.hpp"

#include "../common/check.hpp"
#include "protocol.cuh"

namespace deepep_train::nvlink {

namespace {

constexpr int kThreads = 1024;
constexpr int kAtOnce = 8;  // choices that a thread asks memory for before it looks at the first

struct View {
    const int64_t* topk_idx;
    int32_t* per_rank;
    int32_t* per_expert;
    bool* in_rank;
    int32_t* send_index;
    int32_t* out_of_range;
};

// Whether this lane's token, `token` + lane, has a pick in [first, last). The warp reads its 32 tokens' picks side by side, a
// bit for each.
__device__ bool picks_any(const View& v, const LayoutParams& p, int64_t token, int first, int last, uint32_t* bits) {
    const int lane = threadIdx.x % 32;
    const int64_t begin = token * p.top_k, end = static_cast<int64_t>(p.num_tokens) * p.top_k;
    __syncwarp();
    for (int word = 0; word < p.top_k; word += kAtOnce) {
        int64_t chosen[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int64_t pick = begin + (word + i) * 32 + lane;
            chosen[i] = word + i < p.top_k && pick < end ? v.topk_idx[pick] : -1;
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const unsigned inside = __ballot_sync(0xffffffffu, chosen[i] >= first && chosen[i] < last);
            if (lane == 0 && word + i < p.top_k) bits[word + i] = inside;
        }
    }
    __syncwarp();
    const int bit = lane * p.top_k;  // a token's bits may lie in two words
    const uint64_t two = bits[bit / 32] | static_cast<uint64_t>(bits[bit / 32 + 1]) << 32;
    return (two >> bit % 32 & ((uint64_t{1} << p.top_k) - 1)) != 0;
}

__device__ void count_rank(const View& v, const LayoutParams& p, int rank) {
    __shared__ int warp_hits[kThreads / 32];
    __shared__ uint32_t bits[kThreads / 32][kMaxTopK + 1];  // the last is read, but none of its bits is used
    const int first = rank * (p.num_experts / p.num_ranks), last = first + p.num_experts / p.num_ranks;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int total = 0;
    for (int base = 0; base < p.num_tokens; base += kThreads) {
        const int t = base + threadIdx.x;
        const bool hit = picks_any(v, p, base + warp * 32, first, last, bits[warp]);
        const unsigned hits = __ballot_sync(0xffffffffu, hit);
        if (lane == 0) warp_hits[warp] = __popc(hits);
        __syncthreads();
        int before = total, all = 0;
        for (int w = 0; w < kThreads / 32; ++w) {
            before += w < warp ? warp_hits[w] : 0;
            all += warp_hits[w];
        }
        if (t < p.num_tokens) {
            const int64_t at = static_cast<int64_t>(t) * p.num_ranks + rank;
            v.in_rank[at] = hit;
            v.send_index[at] = hit ? before + __popc(hits & ((1u << lane) - 1)) : -1;
        }
        total += all;
        __syncthreads();
    }
    if (threadIdx.x == 0) v.per_rank[rank] = total;
}

__device__ void count_experts(const View& v, const LayoutParams& p) {
    __shared__ int counts[kMaxExperts];
    __shared__ int bad;
    for (int e = threadIdx.x; e < p.num_experts; e += kThreads) counts[e] = 0;
    if (threadIdx.x == 0) bad = 0;
    __syncthreads();
    const int64_t picks = static_cast<int64_t>(p.num_tokens) * p.top_k;
    for (int64_t base = threadIdx.x; base < picks; base += kThreads * kAtOnce) {
        int64_t chosen[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) chosen[i] = base + i * kThreads < picks ? v.topk_idx[base + i * kThreads] : -1;
#pragma unroll
        for (const int64_t e : chosen) {
            if (e >= 0 && e < p.num_experts)
                atomicAdd(&counts[e], 1);
            else if (e != -1)
                bad = 1;
        }
    }
    __syncthreads();
    for (int e = threadIdx.x; e < p.num_experts; e += kThreads) v.per_expert[e] = counts[e];
    if (threadIdx.x == 0) *v.out_of_range = bad;
}

__global__ void __launch_bounds__(kThreads, 1) layout_kernel(const View v, const LayoutParams p) {
    if (blockIdx.x < p.num_ranks)
        count_rank(v, p, blockIdx.x);
    else
        count_experts(v, p);
}

}  // namespace

void launch_layout(const LayoutParams& p, cudaStream_t stream) {
    const View v{reinterpret_cast<const int64_t*>(p.topk_idx),
                 reinterpret_cast<int32_t*>(p.num_tokens_per_rank),
                 reinterpret_cast<int32_t*>(p.num_tokens_per_expert),
                 reinterpret_cast<bool*>(p.is_token_in_rank),
                 reinterpret_cast<int32_t*>(p.send_index),
                 reinterpret_cast<int32_t*>(p.out_of_range)};
    layout_kernel<<<p.num_ranks + 1, kThreads, 0, stream>>>(v, p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::nvlink
