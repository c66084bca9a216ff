// At the destination, after a dispatch: the rows that were not sent. In expert layout a token's further rows, copies of its
// first; the padding, zero. With num_worst_tokens the rows behind the last.
#include "kernels.hpp"

#include "../common/check.hpp"
#include "protocol.cuh"
#include "scatter.cuh"

namespace deepep_train::nvlink {

namespace {

constexpr int kThreads = 256;

// Appends `n` where `wanted`, with one atomic of the warp, whose lanes all come here.
DT_DEVICE void append(uint64_t list, uint64_t length, bool wanted, int64_t n) {
    const int lane = threadIdx.x % 32;
    const unsigned all = __ballot_sync(0xffffffffu, wanted);
    int first = 0;
    if (lane == 0 && all != 0) first = atomicAdd(reinterpret_cast<int32_t*>(length), __popc(all));
    first = __shfl_sync(0xffffffffu, first, 0);
    if (wanted) reinterpret_cast<int32_t*>(list)[first + __popc(all & ((1u << lane) - 1))] = static_cast<int32_t>(n);
}

// The rows of every token in ascending order, whose row each is, and the lists of tokens to sum. `width` lanes take a token, a
// power of two that top-k fits into.
__global__ void __launch_bounds__(kThreads)
    arrange_kernel(const __grid_constant__ Domain d, const __grid_constant__ ArrangeParams p, int width) {
    if (d.control(d.rank)->failed != 0) return;  // rows_of is not what it should be, nor need num_received fit
    const int lane = threadIdx.x % 32, k = lane % width, tokens = 32 / width;
    const unsigned mine = (0xffffffffu >> (32 - width)) << (lane - k);
    const int num_received = *reinterpret_cast<const int32_t*>(p.num_received);
    const bool lists = p.several != 0;
    const int64_t own_first = lists ? *reinterpret_cast<const int32_t*>(p.own_first) : 0;
    const int64_t own_end = lists ? own_first + *reinterpret_cast<const int32_t*>(p.num_own) : 0;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads / 32 * tokens;
    for (int64_t base = (blockIdx.x * kThreads + threadIdx.x) / 32 * tokens; base < num_received; base += step) {
        const int64_t n = base + lane / width;
        const bool is_token = n < num_received;
        auto* rows = reinterpret_cast<int32_t*>(p.rows_of) + n * p.top_k;
        const int row = is_token && k < p.top_k ? rows[k] : -1;
        const unsigned valid = __ballot_sync(0xffffffffu, row >= 0) & mine;
        const int count = __popc(valid);
        int place = row >= 0 ? 0 : count + __popc(~valid & mine & ((1u << lane) - 1));
        for (int i = 0; i < p.top_k; ++i) {
            const int other = __shfl_sync(0xffffffffu, row, i, width);
            if (row >= 0 && other >= 0 && other < row) ++place;
        }
        if (is_token && k < p.top_k) rows[place] = row;
        if (row >= 0) reinterpret_cast<int32_t*>(p.row_slot)[row] = static_cast<int32_t>(n);
        if (!lists) continue;
        const bool speaks = is_token && k == 0;
        append(p.several, p.num_several, speaks && count > 1, n);
        append(p.summed, p.num_summed, speaks && (count > 1 || n < own_first || n >= own_end), n);
    }
}

// A token's first row to its others, or, from elsewhere, to all; `row` numbers the tokens that have several.
struct Copy {
    static constexpr int kRounds = 1;
    static constexpr bool kHasTail = false;
    const ExpandParams& p;

    DT_DEVICE int64_t row(int64_t i) const { return i; }
    DT_DEVICE int64_t token(int64_t row) const {
        return p.several == 0 ? row : reinterpret_cast<const int32_t*>(p.several)[row];
    }
    DT_DEVICE const int32_t* rows(int64_t row) const {
        return reinterpret_cast<const int32_t*>(p.rows_of) + token(row) * p.top_k;
    }
    DT_DEVICE int32_t look(int64_t row, int i) const {
        const int k = p.source == 0 ? i + 1 : i;
        return k < p.top_k ? rows(row)[k] : -1;
    }
    DT_DEVICE const char* from(int64_t row) const {
        if (p.source != 0) return reinterpret_cast<const char*>(p.source) + token(row) * p.row_bytes;
        return reinterpret_cast<const char*>(p.x) + rows(row)[0] * p.row_bytes;
    }
    DT_DEVICE char* to(int, int32_t row) const { return reinterpret_cast<char*>(p.x) + row * p.row_bytes; }
    DT_DEVICE void beside(int64_t, const int32_t (&)[kRounds]) const {}
};

// Zeroes rows that stand for nothing; a warp takes a row.
__device__ void clear_rows(const ExpandParams& p, int first_warp, int num_warps) {
    const int lane = threadIdx.x % 32;
    const bool expert = p.rows_of != 0;
    const int64_t first = expert ? 0 : *reinterpret_cast<const int32_t*>(p.num_received);
    for (int64_t m = first + first_warp; m < p.num_rows; m += num_warps) {
        if (expert && reinterpret_cast<const int32_t*>(p.row_slot)[m] >= 0) continue;
        char* row = reinterpret_cast<char*>(p.x) + m * p.row_bytes;
        for (int64_t i = lane * 16; i < p.row_bytes; i += 512) *reinterpret_cast<uint4*>(row + i) = uint4{0, 0, 0, 0};
        const int width = expert ? 1 : p.top_k;
        if (p.weights != 0 && lane < width) reinterpret_cast<float*>(p.weights)[m * width + lane] = 0.0f;
        if (p.indices != 0 && lane < width) reinterpret_cast<int64_t*>(p.indices)[m * width + lane] = -1;
        if (p.scales != 0)
            for (int i = lane; i < p.scale_words; i += 32) reinterpret_cast<uint32_t*>(p.scales)[m * p.scale_words + i] = 0;
    }
}

__global__ void __launch_bounds__(ScatterShape::kMaxWarps * 32, 1)
    expand_kernel(const __grid_constant__ Domain d, const __grid_constant__ ExpandParams p,
                  const __grid_constant__ ScatterShape shape) {
    extern __shared__ __align__(128) char shared[];
    if (d.control(d.rank)->failed != 0) {  // x is NaN, as soon as it is so here
        const int64_t bytes = p.source == 0 ? 0 : p.num_rows * p.row_bytes, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
        for (int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 16; at < bytes; at += step * 16)
            *reinterpret_cast<uint4*>(p.x + at) = uint4{~0u, ~0u, ~0u, ~0u};
        return;
    }
    const int warps = blockDim.x / 32;
    clear_rows(p, static_cast<int>(threadIdx.x / 32 * gridDim.x + blockIdx.x), static_cast<int>(gridDim.x) * warps);
    if (p.rows_of != 0) scatter_rows(Copy{p}, *reinterpret_cast<const int32_t*>(p.num_several), p.row_bytes, shape, shared);
}

}  // namespace

void allow_memory_for_expand() { allow_shared_bytes(expand_kernel, ScatterShape::kSharedBytes); }

void launch_arrange(const Domain& d, const ArrangeParams& p, cudaStream_t stream) {
    if (p.num_rows == 0) return;
    DT_CUDA(cudaMemsetAsync(reinterpret_cast<void*>(p.row_slot), 0xff, sizeof(int32_t) * p.num_rows, stream));  // -1
    int width = 1;
    while (width < p.top_k) width *= 2;
    arrange_kernel<<<p.num_sms * 4, kThreads, 0, stream>>>(d, p, width);
    DT_CUDA(cudaGetLastError());
}

void launch_expand(const Domain& d, const ExpandParams& p, cudaStream_t stream) {
    const ScatterShape shape(p.row_bytes);
    const int shared_bytes = d.has_bulk_copies ? shape.shared_bytes : 0;
    expand_kernel<<<p.num_sms, shape.warps * 32, shared_bytes, stream>>>(d, p, shape);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::nvlink
