// Combine from rank layout: every rank pulls its tokens' rows out of the peers' memory and sums them, in float32, from the
// biases on, by ascending rank, rounding once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.hpp"

#include "../common/check.hpp"
#include "meeting.cuh"

namespace deepep_train::nvlink {

namespace {

constexpr int kThreads = 512;
constexpr int kTogether = 8;  // rows whose loads are in flight at once; more ranks take further rounds

// 16 bytes of a row as floats, and back.
template <typename T>
struct Vector {
    static constexpr int kSize = 16 / sizeof(T);

    static DT_DEVICE void add(float (&sum)[kSize], uint4 bits) {
        T values[kSize];
        *reinterpret_cast<uint4*>(values) = bits;
#pragma unroll
        for (int i = 0; i < kSize; ++i) sum[i] += static_cast<float>(values[i]);
    }

    static DT_DEVICE uint4 round(const float (&sum)[kSize]) {
        T values[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i) values[i] = static_cast<T>(sum[i]);
        return *reinterpret_cast<uint4*>(values);
    }
};

template <typename T>
__device__ void sum_rows(const Domain& d, const CombineParams& p, const int64_t* offsets) {
    using V = Vector<T>;
    const int lane = threadIdx.x % 32;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
    for (int64_t t = blockIdx.x + static_cast<int64_t>(threadIdx.x / 32) * gridDim.x; t < p.num_tokens; t += stride) {
        // Which ranks hold a row of this token, and where; lane r (and r + 32) knows of rank r.
        const auto* index = reinterpret_cast<const int32_t*>(p.send_index) + t * d.num_ranks;
        const auto* base = reinterpret_cast<const int32_t*>(p.send_base);
        int64_t row[2] = {-1, -1};
        uint64_t holders = 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = half * 32 + lane;
            if (r < d.num_ranks && index[r] >= 0) row[half] = index[r] + base[r];
            holders |= static_cast<uint64_t>(__ballot_sync(0xffffffffu, row[half] >= 0)) << (half * 32);
        }
        const int64_t out_at = t * p.row_bytes;
        for (int64_t column = lane * 16; column - lane * 16 < p.row_bytes; column += 512) {
            const bool inside = column < p.row_bytes;
            float sum[V::kSize] = {};
            if (inside && p.bias_0 != 0) V::add(sum, load_row(reinterpret_cast<const char*>(p.bias_0) + out_at + column));
            if (inside && p.bias_1 != 0) V::add(sum, load_row(reinterpret_cast<const char*>(p.bias_1) + out_at + column));
            uint64_t left = holders;
            while (left != 0) {
                uint4 bits[kTogether];
                int count = 0;
#pragma unroll
                for (int i = 0; i < kTogether; ++i) {
                    if (left == 0) continue;
                    const int r = __ffsll(static_cast<long long>(left)) - 1;
                    left &= left - 1;
                    const int64_t at = __shfl_sync(0xffffffffu, r < 32 ? row[0] : row[1], r % 32);
                    if (inside) bits[i] = load_row(d.peers[r] + offsets[r * kOffsets] + at * p.row_bytes + column);
                    count = i + 1;
                }
#pragma unroll
                for (int i = 0; i < kTogether; ++i)
                    if (i < count && inside) V::add(sum, bits[i]);
            }
            if (inside) store_row(reinterpret_cast<char*>(p.out) + out_at + column, V::round(sum));
        }
        if (p.out_weights != 0) {
            float sum = 0.0f;
            for (uint64_t left = holders; left != 0; left &= left - 1) {
                const int r = __ffsll(static_cast<long long>(left)) - 1;
                const int64_t at = __shfl_sync(0xffffffffu, r < 32 ? row[0] : row[1], r % 32);
                if (lane < p.top_k) {
                    const auto* weights = reinterpret_cast<const volatile float*>(d.peers[r] + offsets[r * kOffsets + 3]);
                    sum += weights[at * p.top_k + lane];
                }
            }
            if (lane < p.top_k) reinterpret_cast<float*>(p.out_weights)[t * p.top_k + lane] = sum;
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    combine_kernel(const __grid_constant__ Domain d, const __grid_constant__ CombineParams p) {
    __shared__ int64_t offsets[kMaxRanks * kOffsets];
    const uint32_t epoch = d.control(d.rank)->epoch + 1;
    const bool go = begin_operation(d, kCombine, p.signature, p.offsets, epoch, offsets);
    if (go) sum_rows<T>(d, p, offsets);
    end_operation(d, kCombine, epoch, go);
}

}  // namespace

void launch_combine(const Domain& d, const CombineParams& p, cudaStream_t stream) {
    const auto kernel = p.dtype == 0   ? combine_kernel<__nv_bfloat16>
                        : p.dtype == 1 ? combine_kernel<__half>
                                       : combine_kernel<float>;
    kernel<<<p.num_sms, kThreads, 0, stream>>>(d, p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::nvlink
