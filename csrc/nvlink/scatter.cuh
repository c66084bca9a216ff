// One row to many places: what dispatch sends to peers, and what is copied again at a destination.
//
// A warp takes a piece of a row at a time. The copy engine brings it into one of the warp's shared-memory stages and takes it
// from there to every place, one lane a place, so that a row is read once however often it is written. Where the pieces go is
// looked up when they are loaded, two turns before it is needed.
#pragma once

#include "protocol.cuh"

namespace deepep_train::nvlink {

// How rows are cut and how many warps a block has room for; for the launch and the kernel alike.
struct ScatterShape {
    static constexpr int kStages = 4;       // of a warp
    static constexpr int kAhead = 2;        // pieces loaded ahead
    static constexpr int kMaxPiece = 8192;  // bytes
    static constexpr int kMaxWarps = 16;
    static constexpr int kSharedBytes = 220 * 1024;

    int warps = 0;
    int piece_bytes = 0;
    int pieces_per_row = 0;
    int stage_bytes = 0;
    int shared_bytes = 0;

    // `tail_bytes`: what travels with a row's first piece, a multiple of 16.
    explicit ScatterShape(int64_t row_bytes, int64_t tail_bytes = 0) {
        pieces_per_row = static_cast<int>((row_bytes + kMaxPiece - 1) / kMaxPiece);
        piece_bytes = static_cast<int>((row_bytes / 16 + pieces_per_row - 1) / pieces_per_row * 16);
        stage_bytes = static_cast<int>((piece_bytes + tail_bytes + 127) / 128 * 128);
        warps = kSharedBytes / (kStages * (stage_bytes + 8));
        warps = warps > kMaxWarps ? kMaxWarps : warps;
        shared_bytes = warps * kStages * (stage_bytes + 8);
    }
};

// `Work` says what to move:
//   int64_t row(int64_t i)                which row comes as the i-th
//   kRounds                               at most 32 * kRounds places a row
//   int32_t look(int64_t row, int place)  a word that says where; -1: nowhere
//   char* to(int place, int32_t word)     and its address
//   const char* from(int64_t row)
//   void beside(int64_t row, const int32_t (&words)[kRounds])   called once a row by the whole warp, with each lane's words
//   kHasTail                              whether further bytes of a row go the same way, from and to places of their own:
//   uint32_t tail_bytes(), const char* tail_from(int64_t row), char* tail_to(int place, int32_t word)
template <typename Work>
DT_DEVICE void scatter_rows(const Work& work, int64_t num_rows, int64_t row_bytes, const ScatterShape& shape, char* shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
    constexpr int kStages = ScatterShape::kStages, kAhead = ScatterShape::kAhead;
    char* stages = shared + warp * kStages * shape.stage_bytes;
    auto* full = reinterpret_cast<uint64_t*>(shared + shape.warps * kStages * shape.stage_bytes) + warp * kStages;
    if (lane == 0) {
        for (int s = 0; s < kStages; ++s) barrier_init(full + s, 1);
        barrier_init_visible();
    }
    __syncwarp();

    const int64_t units = num_rows * shape.pieces_per_row;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * shape.warps;
    int64_t next = blockIdx.x + static_cast<int64_t>(warp) * gridDim.x;
    int64_t unit_in[kStages];
    int32_t words[kStages][Work::kRounds];
    const auto start_of = [&](int64_t unit) { return unit % shape.pieces_per_row * shape.piece_bytes; };
    const auto size_of = [&](int64_t unit) {
        const int64_t left = row_bytes - start_of(unit);
        return static_cast<uint32_t>(left < shape.piece_bytes ? left : shape.piece_bytes);
    };
    const auto load = [&](int s) {
        unit_in[s] = next;
        if (next >= units) return;
        const int64_t row = work.row(next / shape.pieces_per_row);
#pragma unroll
        for (int r = 0; r < Work::kRounds; ++r) words[s][r] = work.look(row, r * 32 + lane);
        if (lane == 0) {
            uint32_t tail = 0;
            if constexpr (Work::kHasTail) tail = start_of(next) == 0 ? work.tail_bytes() : 0;
            barrier_expect(full + s, size_of(next) + tail);
            bulk_load(stages + s * shape.stage_bytes, work.from(row) + start_of(next), size_of(next), full + s);
            if constexpr (Work::kHasTail)
                if (tail != 0)
                    bulk_load(stages + s * shape.stage_bytes + shape.piece_bytes, work.tail_from(row), tail, full + s);
        }
        next += stride;
    };
#pragma unroll
    for (int s = 0; s < kAhead; ++s) load(s);
#pragma unroll
    for (int s = kAhead; s < kStages; ++s) unit_in[s] = units;
    for (uint32_t parity = 0;; parity ^= 1) {
        bool done = false;
#pragma unroll
        for (int s = 0; s < kStages; ++s) {
            if (done || unit_in[s] >= units) {
                done = true;
                continue;
            }
            // The stage to fill was read by stores kStages - kAhead turns ago; every lane waits for its own.
            bulk_wait_read<kStages - kAhead - 1>();
            __syncwarp();
            load((s + kAhead) % kStages);
            const int64_t unit = unit_in[s], start = start_of(unit);
            barrier_wait(full + s, parity);
#pragma unroll
            for (int r = 0; r < Work::kRounds; ++r) {
                if (words[s][r] == -1) continue;
                const char* stage = stages + s * shape.stage_bytes;
                bulk_store(work.to(r * 32 + lane, words[s][r]) + start, stage, size_of(unit));
                if constexpr (Work::kHasTail)
                    if (start == 0)
                        bulk_store(work.tail_to(r * 32 + lane, words[s][r]), stage + shape.piece_bytes, work.tail_bytes());
            }
            bulk_commit();
            if (start == 0) work.beside(work.row(unit / shape.pieces_per_row), words[s]);
        }
        if (done) break;
    }
    bulk_wait_written();
    fence_async_proxy();
#else
    // Before sm_90 there is no bulk copy engine: a warp reads a row in 16-byte pieces and stores each at every place.
    const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x / 32);
    for (int64_t i = blockIdx.x + static_cast<int64_t>(warp) * gridDim.x; i < num_rows; i += stride) {
        const int64_t row = work.row(i);
        int32_t words[Work::kRounds];
        for (int r = 0; r < Work::kRounds; ++r) {
            words[r] = work.look(row, r * 32 + lane);
            for (unsigned left = __ballot_sync(0xffffffffu, words[r] != -1); left != 0; left &= left - 1) {
                const int l = __ffs(left) - 1;
                char* to = work.to(r * 32 + l, __shfl_sync(0xffffffffu, words[r], l));
                for (int64_t at = lane * 16; at < row_bytes; at += 512) store_row(to + at, load_row(work.from(row) + at));
                if constexpr (Work::kHasTail) {
                    char* tail = work.tail_to(r * 32 + l, __shfl_sync(0xffffffffu, words[r], l));
                    for (int64_t at = lane * 16; at < work.tail_bytes(); at += 512)
                        store_row(tail + at, load_row(work.tail_from(row) + at));
                }
            }
        }
        work.beside(row, words);
    }
#endif
}

}  // namespace deepep_train::nvlink
