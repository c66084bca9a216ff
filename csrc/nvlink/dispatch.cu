// Dispatch into rank layout: every row goes once, from shared memory straight to its final place at each destination.
//
// A warp takes a piece of a token's row at a time. The copy engine brings it into one of the warp's shared-memory stages and
// takes it from there to every destination, one lane a destination, so a row is read once however often it is sent.
#include "kernels.hpp"

#include "../common/check.hpp"
#include "meeting.cuh"

namespace deepep_train::nvlink {

namespace {

constexpr int kStages = 4;       // shared-memory stages of a warp
constexpr int kAhead = 2;        // pieces loaded ahead
constexpr int kMaxPiece = 8192;  // bytes; longer rows travel in pieces
constexpr int kSharedBytes = 220 * 1024;
constexpr int kMaxWarps = 16;

struct Shape {
    int warps;
    int piece_bytes;
    int pieces_per_row;
    int shared_bytes;
};

// As many warps as the stages leave room for.
Shape shape_for(int64_t row_bytes) {
    Shape s{};
    s.pieces_per_row = static_cast<int>((row_bytes + kMaxPiece - 1) / kMaxPiece);
    s.piece_bytes = static_cast<int>((row_bytes / 16 + s.pieces_per_row - 1) / s.pieces_per_row * 16);
    const int stage = (s.piece_bytes + 127) / 128 * 128;
    s.warps = kSharedBytes / (kStages * stage + kStages * 8);
    s.warps = s.warps > kMaxWarps ? kMaxWarps : s.warps;
    s.shared_bytes = s.warps * kStages * (stage + 8);
    return s;
}

// Indices, weights and scales of token t for its destination `there`; the warp's lanes share the words.
DT_DEVICE void send_small(const DispatchParams& p, const Domain& d, const int64_t* offsets, int t, int destination,
                          int64_t row) {
    const int lane = threadIdx.x % 32;
    char* arena = d.peers[destination];
    const int64_t* at = offsets + destination * kOffsets;
    if (p.scale_words != 0) {
        const auto* from = reinterpret_cast<const uint32_t*>(p.scales) + t * p.scale_row_stride;
        auto* to = reinterpret_cast<uint32_t*>(arena + at[1]) + row * p.scale_words;
        for (int i = lane; i < p.scale_words; i += 32) to[i] = from[i * p.scale_word_stride];
    }
    if (p.send_sources != 0 && lane == 0) reinterpret_cast<int32_t*>(arena + at[4])[row] = t;
    if (p.topk_idx != 0 && lane < p.top_k) {
        const int64_t pick = static_cast<int64_t>(t) * p.top_k + lane;
        const int64_t e = reinterpret_cast<const int64_t*>(p.topk_idx)[pick];
        const int64_t first = static_cast<int64_t>(destination) * p.num_local_experts;
        const bool local = e >= first && e < first + p.num_local_experts;
        reinterpret_cast<int64_t*>(arena + at[2])[row * p.top_k + lane] = local ? e - first : -1;
        if (p.topk_weights != 0) {
            const float w = reinterpret_cast<const float*>(p.topk_weights)[pick];
            reinterpret_cast<float*>(arena + at[3])[row * p.top_k + lane] = local ? w : 0.0f;
        }
    }
}

// The row that token t takes at `destination`, or -1.
DT_DEVICE int64_t row_at(const DispatchParams& p, const Domain& d, int64_t t, int destination) {
    if (destination >= d.num_ranks) return -1;
    const int index = reinterpret_cast<const int32_t*>(p.send_index)[t * d.num_ranks + destination];
    return index < 0 ? -1 : index + reinterpret_cast<const int32_t*>(p.send_base)[destination];
}

__device__ void send_rows(const DispatchParams& p, const Domain& d, const int64_t* offsets, int piece_bytes, int pieces_per_row,
                          char* shared) {
#if __CUDA_ARCH__ >= 900
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int stage_bytes = (piece_bytes + 127) / 128 * 128;
    char* stages = shared + warp * kStages * stage_bytes;
    auto* full = reinterpret_cast<uint64_t*>(shared + warps * kStages * stage_bytes) + warp * kStages;
    if (lane == 0) {
        for (int s = 0; s < kStages; ++s) barrier_init(full + s, 1);
        barrier_init_visible();
    }
    __syncwarp();

    const int64_t units = static_cast<int64_t>(p.num_tokens) * pieces_per_row;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
    const int64_t begin = blockIdx.x + static_cast<int64_t>(warp) * gridDim.x;
    const auto piece_size = [&](int64_t unit) {
        const int64_t start = unit % pieces_per_row * piece_bytes;
        return static_cast<uint32_t>(p.row_bytes - start < piece_bytes ? p.row_bytes - start : piece_bytes);
    };
    const auto load = [&](int64_t unit, int stage) {
        const char* from =
            reinterpret_cast<const char*>(p.x) + unit / pieces_per_row * p.row_bytes + unit % pieces_per_row * piece_bytes;
        barrier_expect(full + stage, piece_size(unit));
        bulk_load(stages + stage * stage_bytes, from, piece_size(unit), full + stage);
    };
    if (lane == 0)
        for (int i = 0; i < kAhead; ++i)
            if (begin + i * stride < units) load(begin + i * stride, i);

    int turn = 0;
    for (int64_t unit = begin; unit < units; unit += stride, ++turn) {
        const int64_t next = unit + kAhead * stride;
        if (next < units) {
            // The stage to fill was read by stores kStages - kAhead turns ago; every lane waits for its own.
            bulk_wait_read<kStages - kAhead - 1>();
            __syncwarp();
            if (lane == 0) load(next, (turn + kAhead) % kStages);
        }
        const int64_t t = unit / pieces_per_row, start = unit % pieces_per_row * piece_bytes;
        const char* stage = stages + turn % kStages * stage_bytes;
        barrier_wait(full + turn % kStages, turn / kStages % 2);
        for (int base = 0; base < d.num_ranks; base += 32) {
            const int destination = base + lane;
            const int64_t row = row_at(p, d, t, destination);
            if (row >= 0)
                bulk_store(d.peers[destination] + offsets[destination * kOffsets] + row * p.row_bytes + start, stage,
                           piece_size(unit));
            if (start == 0 && (p.scale_words != 0 || p.send_sources != 0))
                for (unsigned to = __ballot_sync(0xffffffffu, row >= 0); to != 0; to &= to - 1) {
                    const int from_lane = __ffs(to) - 1;
                    send_small(p, d, offsets, t, base + from_lane, __shfl_sync(0xffffffffu, row, from_lane));
                }
        }
        bulk_commit();
    }
    bulk_wait_written();
    fence_async_proxy();
#else
    // Before sm_90 there is no bulk copy engine: a warp reads a row in 16-byte pieces and stores each at every destination.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
    for (int64_t t = blockIdx.x + static_cast<int64_t>(warp) * gridDim.x; t < p.num_tokens; t += stride)
        for (int base = 0; base < d.num_ranks; base += 32) {
            const int64_t row = row_at(p, d, t, base + lane);
            for (unsigned to = __ballot_sync(0xffffffffu, row >= 0); to != 0; to &= to - 1) {
                const int destination = base + __ffs(to) - 1;
                const int64_t at = __shfl_sync(0xffffffffu, row, __ffs(to) - 1);
                const char* from = reinterpret_cast<const char*>(p.x) + t * p.row_bytes;
                char* there = d.peers[destination] + offsets[destination * kOffsets] + at * p.row_bytes;
                for (int64_t i = lane * 16; i < p.row_bytes; i += 512) store_row(there + i, load_row(from + i));
                send_small(p, d, offsets, t, destination, at);
            }
        }
#endif
}

__global__ void __launch_bounds__(kMaxWarps * 32, 1)
    dispatch_kernel(const __grid_constant__ Domain d, const __grid_constant__ DispatchParams p, int piece_bytes,
                    int pieces_per_row) {
    extern __shared__ __align__(128) char shared[];
    __shared__ int64_t offsets[kMaxRanks * kOffsets];
    const uint32_t epoch = d.control(d.rank)->epoch + 1;
    const bool go = begin_operation(d, kDispatch, p.signature, p.offsets, epoch, offsets);
    if (go) send_rows(p, d, offsets, piece_bytes, pieces_per_row, shared);
    end_operation(d, kDispatch, epoch, go);
}

}  // namespace

void launch_dispatch(const Domain& d, const DispatchParams& p, cudaStream_t stream) {
    const Shape s = shape_for(p.row_bytes);
    DT_CUDA(cudaFuncSetAttribute(dispatch_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
    dispatch_kernel<<<p.num_sms, s.warps * 32, s.shared_bytes, stream>>>(d, p, s.piece_bytes, s.pieces_per_row);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::nvlink
