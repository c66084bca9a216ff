// Dispatch: every row goes once to each destination, from shared memory straight to its final place there, and with it what
// belongs to its token. In expert layout the place is the token's first row; expand.cu copies it to the others.
#include "kernels.hpp"

#include "../common/check.hpp"
#include "meeting.cuh"
#include "scatter.cuh"

namespace deepep_train::nvlink {

namespace {

// `kTail`: scales are whole rows of 16-byte pieces, and travel as a part of their rows.
template <bool kTail>
struct Send {
    static constexpr int kRounds = kRankRounds;
    static constexpr bool kHasTail = kTail;
    const Domain& d;
    const DispatchParams& p;
    const int64_t* offsets;  // [num_ranks][kOffsets]
    const Rows taken;

    DT_DEVICE int64_t row(int64_t i) const { return taken(i); }
    DT_DEVICE int32_t look(int64_t t, int rank) const {
        return rank < d.num_ranks ? reinterpret_cast<const int32_t*>(p.send_row)[t * d.num_ranks + rank] : -1;
    }
    DT_DEVICE const char* from(int64_t t) const {
        return p.row_from != 0 ? reinterpret_cast<const char* const*>(p.row_from)[t]
                               : reinterpret_cast<const char*>(p.x) + t * p.row_bytes;
    }
    DT_DEVICE char* at(int rank, int what) const { return d.peers[rank] + offsets[rank * kOffsets + what]; }
    DT_DEVICE char* to(int rank, int32_t row) const { return at(rank, 0) + row * p.row_bytes; }

    DT_DEVICE uint32_t tail_bytes() const { return static_cast<uint32_t>(p.scale_words) * 4; }
    DT_DEVICE const char* tail_from(int64_t t) const { return reinterpret_cast<const char* const*>(p.scales_from)[t]; }
    DT_DEVICE char* tail_to(int rank, int32_t row) const { return at(rank, 1) + row * static_cast<int64_t>(tail_bytes()); }

    DT_DEVICE void beside(int64_t t, const int32_t (&rows)[kRounds]) const {
        if ((kTail || p.scale_words == 0) && p.send_sources == 0) return;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            if (r * 32 >= d.num_ranks) break;
            const int rank_here = r * 32 + lane;
            const int slot_here =
                rank_here < d.num_ranks ? reinterpret_cast<const int32_t*>(p.send_slot)[t * d.num_ranks + rank_here] : -1;
            if (p.send_sources != 0 && slot_here >= 0)
                reinterpret_cast<int32_t*>(at(rank_here, 4))[slot_here] = static_cast<int32_t>(t);
            for (unsigned to = __ballot_sync(0xffffffffu, rows[r] != -1); to != 0; to &= to - 1) {
                const int l = __ffs(to) - 1;
                const int64_t slot = __shfl_sync(0xffffffffu, slot_here, l);
                if (!kTail) send_scales(t, r * 32 + l, slot);
                send_picks(t, r * 32 + l, slot);
            }
        }
    }

    DT_DEVICE void send_scales(int64_t t, int rank, int64_t slot) const {
        const auto* words = reinterpret_cast<const uint32_t*>(p.scales) + t * p.scale_row_stride;
        auto* there = reinterpret_cast<uint32_t*>(at(rank, 1)) + slot * p.scale_words;
        for (int i = threadIdx.x % 32; i < p.scale_words; i += 32) there[i] = words[i * p.scale_word_stride];
    }

    DT_DEVICE void send_picks(int64_t t, int rank, int64_t slot) const {
        const int k = threadIdx.x % 32;
        if (p.topk_idx == 0 || k >= p.top_k) return;
        const int64_t pick = t * p.top_k + k, there = slot * p.top_k + k;
        const int64_t e = reinterpret_cast<const int64_t*>(p.topk_idx)[pick] - static_cast<int64_t>(rank) * p.num_local_experts;
        const bool local = e >= 0 && e < p.num_local_experts;
        const float w = p.topk_weights != 0 ? reinterpret_cast<const float*>(p.topk_weights)[pick] : 0.0f;
        if (p.pick_row == 0) {
            reinterpret_cast<int64_t*>(at(rank, 2))[there] = local ? e : -1;
            if (p.topk_weights != 0) reinterpret_cast<float*>(at(rank, 3))[there] = local ? w : 0.0f;
        } else {
            const int32_t row = local ? reinterpret_cast<const int32_t*>(p.pick_row)[pick] : -1;
            reinterpret_cast<int32_t*>(at(rank, 2))[there] = row;
            if (p.topk_weights != 0 && local) reinterpret_cast<float*>(at(rank, 3))[row] = w;
        }
    }
};

template <bool kTail>
__global__ void __launch_bounds__(ScatterShape::kMaxWarps * 32, 1)
    dispatch_kernel(const __grid_constant__ Domain d, const __grid_constant__ DispatchParams p,
                    const __grid_constant__ ScatterShape shape) {
    extern __shared__ __align__(128) char shared[];
    __shared__ int64_t offsets[kMaxRanks * kOffsets];
    const uint32_t epoch = d.control(d.rank)->epoch + 1;
    const bool go = begin_operation(d, kDispatch, p.signature, p.offsets, epoch, offsets, p.rail_failed);
    if (go) {
        const Send<kTail> send{d, p, offsets, Rows(p)};
        scatter_rows(send, send.taken.count, p.row_bytes, shape, shared);
    }
    Outputs outputs;
    for (int i = 0; i < kOffsets; ++i) {
        outputs.address[i] = d.peers[d.rank] + p.offsets[i];
        outputs.bytes[i] = p.sizes[i];
    }
    end_operation(d, kDispatch, epoch, go, outputs);
}

// Takes part in an operation only to say that this rank cannot.
__global__ void __launch_bounds__(32, 1)
    refuse_kernel(const __grid_constant__ Domain d, Operation operation, int64_t reason, int64_t bytes) {
    const int64_t own[kOffsets] = {reason, bytes, 0, 0, 0};
    Control* mine = d.control(d.rank);
    const uint32_t epoch = mine->epoch + 1;
    delay_at_random(epoch);
    if (mine->failed == 0) {
        for (int peer = threadIdx.x; peer < d.num_ranks; peer += 32) tell_ready(d, peer, 0, own, epoch);
        __syncwarp();
        all_ready(d, operation, 0, epoch);
    }
    if (threadIdx.x == 0) mine->epoch = epoch;
}

}  // namespace

CodeHere code_here() {
    cudaFuncAttributes attributes;
    DT_CUDA(cudaFuncGetAttributes(&attributes, dispatch_kernel<false>));
    const bool has_bulk_copies = attributes.ptxVersion >= 90;
    return {has_bulk_copies, static_cast<int>(attributes.sharedSizeBytes) + (has_bulk_copies ? ScatterShape::kSharedBytes : 0)};
}

void allow_memory_for_dispatch() {
    allow_shared_bytes(dispatch_kernel<false>, ScatterShape::kSharedBytes);
    allow_shared_bytes(dispatch_kernel<true>, ScatterShape::kSharedBytes);
}

void launch_dispatch(const Domain& d, const DispatchParams& p, cudaStream_t stream) {
    const bool has_tail = p.scales_from != 0;
    const ScatterShape shape(p.row_bytes, has_tail ? p.scale_words * 4 : 0);
    const int shared_bytes = d.has_bulk_copies ? shape.shared_bytes : 0;
    const auto kernel = has_tail ? dispatch_kernel<true> : dispatch_kernel<false>;
    kernel<<<p.num_sms, shape.warps * 32, shared_bytes, stream>>>(d, p, shape);
    DT_CUDA(cudaGetLastError());
}

void launch_refuse(const Domain& d, Operation operation, int64_t reason, int64_t bytes, cudaStream_t stream) {
    refuse_kernel<<<1, 32, 0, stream>>>(d, operation, reason, bytes);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::nvlink
