// Combine, receiving: every rank pulls its tokens' rows from their experts' ranks and adds weight * row in float32, over k in
// ascending order, rounding once.
#include <cuda_bf16.h>

#include "../common/check.hpp"
#include "kernels.hpp"
#include "space.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 768;
constexpr int kWarps = kThreads / 32;
constexpr int kTogether = 8;  // rows that are loaded at once

// Eight bf16 values; product and sum are rounded each, as torch does it.
DT_DEVICE void add(float (&sum)[8], uint4 bits, float weight) {
    const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum[2 * i] = __fadd_rn(sum[2 * i], __fmul_rn(weight, __uint_as_float(words[i] << 16)));
        sum[2 * i + 1] = __fadd_rn(sum[2 * i + 1], __fmul_rn(weight, __uint_as_float(words[i] & 0xffff0000u)));
    }
}

DT_DEVICE uint32_t rounded(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

__global__ void __launch_bounds__(kThreads, 1)
    combine_receive_kernel(const __grid_constant__ CombineParams p, const int splits) {
    __shared__ uint64_t came_ranks;
    __shared__ const char* rows_of[kMaxRanks];  // null: a rank that has nothing of ours
    __shared__ int how[kMaxRanks];
    Control* mine = control_of(p, p.rank);
    if (mine->closed != 0) return;
    const uint32_t number = mine->combines[p.set], dispatch = mine->dispatches[p.set];
    if (threadIdx.x < 32) {
        const uint64_t came = wait_for_peers(p, mine->shown[p.set], mine->decided[p.set][1], number, p.wait_ns);
        if (threadIdx.x == 0) came_ranks = came;
        for (int peer = threadIdx.x; peer < p.num_ranks; peer += 32) {
            const bool has = is_in(came, peer) && mine->placed[p.set].at[peer] == dispatch;
            rows_of[peer] = has ? space_of(p, peer) + mine->shown_at[p.set][peer] : nullptr;
            how[peer] = mine->shown_how[p.set][peer];
        }
    }
    __syncthreads();
    const Layout layout(p);
    const int lane = threadIdx.x % 32, local = p.num_experts / p.num_ranks, row_bytes = 2 * p.hidden;
    const int64_t slots = int64_t{p.num_ranks} * p.max_tokens;
    const auto* places = reinterpret_cast<const Place*>(space_of(p, p.rank) + layout.places + p.set * layout.place_bytes);
    const int64_t units = int64_t{p.num_tokens} * splits, stride = int64_t{gridDim.x} * kWarps;
    for (int64_t unit = blockIdx.x + static_cast<int64_t>(threadIdx.x / 32) * gridDim.x; unit < units; unit += stride) {
        const int64_t t = unit / splits;
        // Lane k knows where the row of pick k is, and its weight.
        const char* row = nullptr;
        float weight = 0.0f;
        if (lane < p.top_k) {
            const int64_t pick = t * p.top_k + lane, e = reinterpret_cast<const int64_t*>(p.topk_idx)[pick];
            const int index = reinterpret_cast<const int32_t*>(p.pick_index)[pick];
            weight = reinterpret_cast<const float*>(p.topk_weights)[pick];
            const bool valid = e >= 0 && e < p.num_experts && index >= 0;
            const int rank = valid ? static_cast<int>(e) / local : 0;
            if (valid && rows_of[rank] != nullptr) {
                const Place place = places[e];
                row = rows_of[rank] +
                      ((how[rank] == kSpread ? e % local * slots + place.begin : place.compact) + index) * row_bytes;
            }
        }
        for (int start = static_cast<int>(unit % splits) * 512; start < row_bytes; start += splits * 512) {
            const int at = start + lane * 16;
            const bool inside = at < row_bytes;
            float sum[8] = {};
            for (int base = 0; base < p.top_k; base += kTogether) {
                uint4 bits[kTogether];
                unsigned there = 0;
#pragma unroll
                for (int k = 0; k < kTogether; ++k) {
                    const auto from = reinterpret_cast<const char*>(
                        __shfl_sync(0xffffffffu, reinterpret_cast<unsigned long long>(row), (base + k) % 32));
                    if (from == nullptr) continue;
                    there |= 1u << k;
                    if (inside) bits[k] = load_row(from + at);
                }
#pragma unroll
                for (int k = 0; k < kTogether; ++k) {
                    const float w = __shfl_sync(0xffffffffu, weight, (base + k) % 32);
                    if ((there >> k & 1) != 0) add(sum, bits[k], w);
                }
            }
            if (inside)
                store_row(reinterpret_cast<char*>(p.out) + t * row_bytes + at,
                          make_uint4(rounded(sum[0], sum[1]), rounded(sum[2], sum[3]), rounded(sum[4], sum[5]),
                                     rounded(sum[6], sum[7])));
        }
    }
    if (!is_last_block(mine, p, kCombineReceive)) return;
    for (int peer = threadIdx.x; peer < p.num_ranks; peer += kThreads)
        if (is_in(came_ranks, peer)) store_release_sys(&control_of(p, peer)->pulled[p.set].at[p.rank], number);
}

}  // namespace

void launch_combine_receive(const CombineParams& p, cudaStream_t stream) {
    const int warps = p.num_sms * kWarps, pieces = (2 * p.hidden + 511) / 512;
    int splits = p.num_tokens == 0 ? 1 : (warps + p.num_tokens - 1) / p.num_tokens;
    splits = splits < pieces ? splits : pieces;
    combine_receive_kernel<<<p.num_sms, kThreads, 0, stream>>>(p, splits);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
