// Many rows to one sum: what combine pulls from peers, and what a rank adds up before it is pulled.
//
// A warp takes a piece of an output row at a time. The copy engine brings the pieces of all its rows into a ring of
// shared-memory slots, as far ahead as the ring has room; the warp adds them in float32, in order, and rounds once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "protocol.cuh"

namespace deepep_train::nvlink {

struct GatherShape {
    static constexpr int kSlotBytes = 2048;
    static constexpr int kSlots = 6;  // of a warp
    static constexpr int kWarps = 16;
    static constexpr int kSharedBytes = kWarps * kSlots * (kSlotBytes + 8);
};

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

// Which piece of which row a warp is at. Counted on rather than divided: a 64-bit division takes a hundred cycles.
struct PieceCursor {
    int64_t row;
    int piece;
    int rows_on, pieces_on;  // one step

    DT_DEVICE PieceCursor(int64_t begin, int64_t stride, int pieces_per_row)
        : row(begin / pieces_per_row),
          piece(static_cast<int>(begin % pieces_per_row)),
          rows_on(static_cast<int>(stride / pieces_per_row)),
          pieces_on(static_cast<int>(stride % pieces_per_row)) {}

    DT_DEVICE void advance(int pieces_per_row) {
        row += rows_on;
        piece += pieces_on;
        if (piece < pieces_per_row) return;
        piece -= pieces_per_row;
        ++row;
    }
};

// `Work` says what to add:
//   int64_t row(int64_t i)                     which row is made as the i-th
//   kRounds                                    at most 32 * kRounds rows a sum
//   int32_t look(int64_t row, int i)           a word that says where the i-th of them is; -1: nowhere
//   const char* from(int i, int32_t word)      and its address
//   const char* bias(int64_t row, int which)   which = 0, 1; null: none
//   char* to(int64_t row)
template <typename T, typename Work>
DT_DEVICE void gather_rows(const Work& work, int64_t num_rows, int64_t row_bytes, char* shared) {
    using V = Vector<T>;
    constexpr int kRounds = Work::kRounds;
    constexpr int kVectors = GatherShape::kSlotBytes / 512;  // of a lane, in a slot
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int pieces_per_row = static_cast<int>((row_bytes + GatherShape::kSlotBytes - 1) / GatherShape::kSlotBytes);
    const int64_t stride = static_cast<int64_t>(gridDim.x) * warps;
    const PieceCursor begin(blockIdx.x + static_cast<int64_t>(warp) * gridDim.x, stride, pieces_per_row);
    const auto start_of = [](const PieceCursor& at) { return static_cast<int64_t>(at.piece) * GatherShape::kSlotBytes; };
    const auto size_of = [&](const PieceCursor& at) {
        const int64_t left = row_bytes - start_of(at);
        return static_cast<int>(left < GatherShape::kSlotBytes ? left : GatherShape::kSlotBytes);
    };
#if __CUDA_ARCH__ >= 900
    constexpr uint32_t kSlots = GatherShape::kSlots;
    char* slots = shared + warp * kSlots * GatherShape::kSlotBytes;
    auto* full = reinterpret_cast<uint64_t*>(shared + warps * kSlots * GatherShape::kSlotBytes) + warp * kSlots;
    if (lane < kSlots) barrier_init(full + lane, 1);
    barrier_init_visible();
    __syncwarp();

    // Loading: the unit whose rows are asked for next, and the words of that one and those behind it, which take a while to
    // come.
    constexpr int kAhead = 3;
    PieceCursor next = begin, looked = begin;
    int32_t ahead[kAhead][kRounds];
    const char* source[kRounds];
    int index[kRounds];  // this lane's row is the index-th of the sum; -1: none
    int size = 0, count = 0, asked = 0;
    uint32_t issued = 0, consumed = 0;  // slots
    uint32_t opened = 0, closed = 0;    // units
    int counts = 0;                     // lane i: rows of unit number i (mod 32)
    const auto look = [&](int32_t (&words)[kRounds]) {
#pragma unroll
        for (int r = 0; r < kRounds; ++r)
            words[r] = looked.row < num_rows ? work.look(work.row(looked.row), r * 32 + lane) : -1;
        looked.advance(pieces_per_row);
    };
#pragma unroll
    for (int a = 0; a < kAhead; ++a) look(ahead[a]);
    const auto fill = [&]() {
        while (issued - consumed < kSlots) {
            if (asked == count) {
                if (next.row >= num_rows || opened - closed == 32) return;
                count = asked = 0;
                size = size_of(next);
#pragma unroll
                for (int r = 0; r < kRounds; ++r) {
                    const bool here = ahead[0][r] != -1;
                    const unsigned mask = __ballot_sync(0xffffffffu, here);
                    index[r] = here ? count + __popc(mask & ((1u << lane) - 1)) : -1;
                    source[r] = here ? work.from(r * 32 + lane, ahead[0][r]) + start_of(next) : nullptr;
                    count += __popc(mask);
                }
                if (lane == opened % 32) counts = count;
                ++opened;
                next.advance(pieces_per_row);
#pragma unroll
                for (int a = 0; a + 1 < kAhead; ++a)
#pragma unroll
                    for (int r = 0; r < kRounds; ++r) ahead[a][r] = ahead[a + 1][r];
                look(ahead[kAhead - 1]);
                continue;
            }
            const int room = static_cast<int>(kSlots - (issued - consumed));
            const int now = count - asked < room ? count - asked : room;
#pragma unroll
            for (int r = 0; r < kRounds; ++r)
                if (index[r] >= asked && index[r] < asked + now) {
                    const uint32_t slot = (issued + index[r] - asked) % kSlots;
                    barrier_expect(full + slot, size);
                    bulk_load(slots + slot * GatherShape::kSlotBytes, source[r], size, full + slot);
                }
            issued += now;
            asked += now;
        }
    };
#endif
    for (PieceCursor unit = begin; unit.row < num_rows; unit.advance(pieces_per_row)) {
        const int64_t row = work.row(unit.row), start = start_of(unit);
        const int bytes = size_of(unit);
        float sum[kVectors][V::kSize] = {};
        for (int which = 0; which < 2; ++which)
            if (const char* bias = work.bias(row, which))
#pragma unroll
                for (int v = 0; v < kVectors; ++v)
                    if (v * 512 + lane * 16 < bytes) V::add(sum[v], load_row(bias + start + v * 512 + lane * 16));
#if __CUDA_ARCH__ >= 900
        fill();
        const int rows = __shfl_sync(0xffffffffu, counts, closed % 32);
        for (int i = 0; i < rows; ++i) {
            if (issued == consumed) fill();
            const uint32_t slot = consumed % kSlots;
            barrier_wait(full + slot, consumed / kSlots % 2);
            const char* piece = slots + slot * GatherShape::kSlotBytes + lane * 16;
            uint4 bits[kVectors];
#pragma unroll
            for (int v = 0; v < kVectors; ++v) bits[v] = *reinterpret_cast<const uint4*>(piece + v * 512);
            __syncwarp();
            ++consumed;
            // Bytes behind the end of a short piece are of no row; they are added to sums that nobody stores.
#pragma unroll
            for (int v = 0; v < kVectors; ++v) V::add(sum[v], bits[v]);
        }
        ++closed;
#else
        for (int r = 0; r < kRounds; ++r) {
            const int32_t word = work.look(row, r * 32 + lane);
            for (unsigned left = __ballot_sync(0xffffffffu, word != -1); left != 0; left &= left - 1) {
                const int l = __ffs(left) - 1;
                const char* from = work.from(r * 32 + l, __shfl_sync(0xffffffffu, word, l)) + start;
#pragma unroll
                for (int v = 0; v < kVectors; ++v)
                    if (v * 512 + lane * 16 < bytes) V::add(sum[v], load_row(from + v * 512 + lane * 16));
            }
        }
#endif
        char* to = work.to(row) + start;
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
            if (v * 512 + lane * 16 < bytes) store_row(to + v * 512 + lane * 16, V::round(sum[v]));
    }
}

}  // namespace deepep_train::nvlink
