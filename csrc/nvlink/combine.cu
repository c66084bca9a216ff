// Combine: every rank pulls its tokens' rows out of the peers' memory and sums them, in float32, from the biases on, by
// ascending rank, rounding once. From expert layout, a token's rows at one rank are summed there first, the same way.
#include "kernels.hpp"

#include "../common/check.hpp"
#include "gather.cuh"
#include "meeting.cuh"

namespace deepep_train::nvlink {

namespace {

// The rows that a received token has here; `row` numbers the tokens to sum.
struct Local {
    static constexpr int kRounds = 1;
    const ReduceParams& p;

    DT_DEVICE int64_t row(int64_t i) const { return i; }
    DT_DEVICE int64_t token(int64_t row) const { return p.tokens == 0 ? row : reinterpret_cast<const int32_t*>(p.tokens)[row]; }
    DT_DEVICE int32_t look(int64_t row, int i) const {
        return i < p.top_k ? reinterpret_cast<const int32_t*>(p.rows_of)[token(row) * p.top_k + i] : -1;
    }
    DT_DEVICE const char* from(int, int32_t word) const { return reinterpret_cast<const char*>(p.y) + word * p.row_bytes; }
    DT_DEVICE const char* bias(int64_t, int) const { return nullptr; }
    DT_DEVICE char* to(int64_t row) const { return reinterpret_cast<char*>(p.partials) + token(row) * p.row_bytes; }
};

constexpr int kAllSummed = 2;  // which offset says that a rank's rows are all among its partial sums

// A token's rows, one at each rank that it was sent to.
struct Pull {
    static constexpr int kRounds = kRankRounds;
    const Domain& d;
    const CombineParams& p;
    const int64_t* offsets;  // [num_ranks][kOffsets]
    const Rows taken;

    DT_DEVICE int64_t row(int64_t i) const { return taken(i); }
    DT_DEVICE int32_t look(int64_t t, int rank) const {
        if (rank >= d.num_ranks) return -1;
        if (rank == d.rank || offsets[rank * kOffsets + kAllSummed] == 0)
            return reinterpret_cast<const int32_t*>(p.pull_row)[t * d.num_ranks + rank];
        const int slot = reinterpret_cast<const int32_t*>(p.send_slot)[t * d.num_ranks + rank];
        return slot < 0 ? -1 : -2 - slot;
    }
    DT_DEVICE const char* at(int rank, int what) const { return d.peers[rank] + offsets[rank * kOffsets + what]; }
    DT_DEVICE const char* from(int rank, int32_t word) const {
        if (word < 0) return at(rank, 1) + (-2 - static_cast<int64_t>(word)) * p.row_bytes;
        return (rank == d.rank ? reinterpret_cast<const char*>(p.y) : at(rank, 0)) + word * p.row_bytes;
    }
    DT_DEVICE const char* bias(int64_t t, int which) const {
        const uint64_t all = which == 0 ? p.bias_0 : p.bias_1;
        return all == 0 ? nullptr : reinterpret_cast<const char*>(all) + t * p.row_bytes;
    }
    DT_DEVICE char* to(int64_t t) const { return reinterpret_cast<char*>(p.out) + t * p.row_bytes; }
};

DT_DEVICE float load_weight(const char* weights, int64_t i) { return reinterpret_cast<const volatile float*>(weights)[i]; }

// The weights that came back with the rows, a thread a pick.
__device__ void sum_weights(const Pull& pull) {
    const CombineParams& p = pull.p;
    const int64_t all = static_cast<int64_t>(p.num_tokens) * p.top_k, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += step) {
        float sum = 0.0f;
        if (p.pick_row != 0) {
            const int row = reinterpret_cast<const int32_t*>(p.pick_row)[i];
            if (row >= 0) sum += load_weight(pull.at(reinterpret_cast<const int32_t*>(p.pick_rank)[i], 3), row);
        } else {
            const auto* slots = reinterpret_cast<const int32_t*>(p.send_slot) + i / p.top_k * pull.d.num_ranks;
            for (int rank = 0; rank < pull.d.num_ranks; ++rank)
                if (slots[rank] >= 0)
                    sum += load_weight(pull.at(rank, 3), static_cast<int64_t>(slots[rank]) * p.top_k + i % p.top_k);
        }
        reinterpret_cast<float*>(p.out_weights)[i] = sum;
    }
}

template <typename T>
__global__ void __launch_bounds__(GatherShape::kWarps * 32, 1)
    reduce_kernel(const __grid_constant__ Domain d, const __grid_constant__ ReduceParams p) {
    extern __shared__ __align__(128) char shared[];
    if (d.control(d.rank)->failed != 0) return;
    gather_rows<T>(Local{p}, *reinterpret_cast<const int32_t*>(p.num_tokens), p.row_bytes, shared);
}

template <typename T>
__global__ void __launch_bounds__(GatherShape::kWarps * 32, 1)
    combine_kernel(const __grid_constant__ Domain d, const __grid_constant__ CombineParams p) {
    extern __shared__ __align__(128) char shared[];
    __shared__ int64_t offsets[kMaxRanks * kOffsets];
    const uint32_t epoch = d.control(d.rank)->epoch + 1;
    const bool go = begin_operation(d, kCombine, p.signature, p.offsets, epoch, offsets, p.rail_failed);
    if (go) {
        const Pull pull{d, p, offsets, Rows(p)};
        if (p.out_weights != 0) sum_weights(pull);
        gather_rows<T>(pull, pull.taken.count, p.row_bytes, shared);
    }
    Outputs outputs;
    outputs.address[0] = reinterpret_cast<char*>(p.out);
    outputs.bytes[0] = tokens_of(p) * p.row_bytes;
    outputs.address[1] = reinterpret_cast<char*>(p.out_weights);
    outputs.bytes[1] = p.out_weights == 0 ? 0 : static_cast<int64_t>(p.num_tokens) * p.top_k * 4;
    end_operation(d, kCombine, epoch, go, outputs);
}

template <typename Params>
using Kernel = void (*)(Domain, Params);

// By params.hpp's number of the dtype.
constexpr Kernel<ReduceParams> kReduceKernels[] = {reduce_kernel<__nv_bfloat16>, reduce_kernel<__half>, reduce_kernel<float>};
constexpr Kernel<CombineParams> kCombineKernels[] = {combine_kernel<__nv_bfloat16>, combine_kernel<__half>,
                                                     combine_kernel<float>};

template <typename Params>
void launch(Kernel<Params> kernel, const Domain& d, const Params& p, cudaStream_t stream) {
    const int shared_bytes = d.has_bulk_copies ? GatherShape::kSharedBytes : 0;
    kernel<<<p.num_sms, GatherShape::kWarps * 32, shared_bytes, stream>>>(d, p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace

void allow_memory_for_combine() {
    for (const auto kernel : kReduceKernels) allow_shared_bytes(kernel, GatherShape::kSharedBytes);
    for (const auto kernel : kCombineKernels) allow_shared_bytes(kernel, GatherShape::kSharedBytes);
}

void launch_reduce(const Domain& d, const ReduceParams& p, cudaStream_t stream) {
    launch(kReduceKernels[p.dtype], d, p, stream);
}

void launch_combine(const Domain& d, const CombineParams& p, cudaStream_t stream) {
    launch(kCombineKernels[p.dtype], d, p, stream);
}

}  // namespace deepep_train::nvlink
