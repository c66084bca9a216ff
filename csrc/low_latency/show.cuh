// What a rank does with its experts' rows in combine: makes them readable for the ranks that they belong to. Unless they lie in
// memory that peers reach, the valid ones are copied there, one after another, slice by slice.
#pragma once

#include "logfmt.cuh"
#include "space.cuh"

namespace deepep_train::low_latency {

struct Showing {
    int32_t first[kMaxExperts + 1];  // row of every expert among all
    int32_t own[kMaxExperts];        // of an expert's rows, the first of this rank's tokens, and the first behind these
    int32_t behind[kMaxExperts];
};

// By a warp: tells the peers that rows may be pulled as far as `step`; `at`: where they lie, relative to this rank's space.
DT_DEVICE void tell_shown(const CombineParams& p, uint32_t number, uint32_t step, int64_t at, Shown how) {
    for (int peer = threadIdx.x % 32; peer < p.num_ranks; peer += 32) {
        if (is_masked(p, peer)) continue;
        Control* there = control_of(p, peer);
        there->shown_at[p.set][p.rank] = at;
        there->shown_how[p.set][p.rank] = how;
        store_release_sys(&there->shown[p.set].at[p.rank], number * kSteps + step);
    }
}

// By a warp: where the caller's tensor lies, for peers to read it there.
DT_DEVICE void show_in_place(const CombineParams& p, Control* mine, uint32_t number) {
    wait_for_answers(p, mine->shown_to[p.set], mine->pulled[p.set]);
    tell_shown(p, number, kSteps - 1, reinterpret_cast<const char*>(p.y) - space_of(p, p.rank), kSpread);
}

// By a warp: a slice of a row, as it is or in LogFMT.
template <bool kLogfmt>
DT_DEVICE void copy_slice(const char* from, char* to, int start, int row_bytes) {
    Piece<kSliceBytes / 512> part;
    part.load_last(from, start, row_bytes);
    if constexpr (!kLogfmt) {
        part.store(to, start, row_bytes);
    } else {
#pragma unroll
        for (int i = 0; i < kSliceBytes / 512; ++i) {
            const int at = start + i * 512 + threadIdx.x % 32 * 16;
            Logfmt::encode(part.v[i], at < row_bytes ? to + at / 256 * Logfmt::kBytes : nullptr);
        }
    }
}

// By `blocks` blocks. With `kAnnounce`, peers are told of every slice as soon as all warps have copied theirs, and rows of this
// rank's own tokens are left out: it pulls them from the caller's tensor.
template <bool kLogfmt, bool kAnnounce>
DT_DEVICE void show_copies(const CombineParams& p, Control* mine, uint32_t number, int block, int blocks, Showing& shared) {
    const int local = p.num_experts / p.num_ranks, warps = blockDim.x / 32;
    const Layout layout(p);
    char* own = space_of(p, p.rank);
    char* rows = own + layout.rows + p.set * layout.rows_bytes;
    constexpr bool kWithoutOwn = kAnnounce && !kLogfmt;
    if (threadIdx.x == 0) shared.first[0] = 0;
    for (int e = threadIdx.x; e < local; e += blockDim.x) {
        const int count = mine->num_rows[p.set][e];
        shared.first[e + 1] = count;
        if constexpr (kWithoutOwn) {
            const auto* places = reinterpret_cast<const Place*>(own + layout.own_places + p.set * layout.place_bytes);
            const int64_t at = int64_t{e} * p.num_ranks + p.rank;
            shared.own[e] = places[at].begin;
            shared.behind[e] = p.rank + 1 < p.num_ranks ? places[at + 1].begin : count;
        }
    }
    if (threadIdx.x < 32) wait_for_answers(p, mine->shown_to[p.set], mine->pulled[p.set]);
    __syncthreads();
    if (threadIdx.x < 32) sum_up(shared.first + 1, local);
    __syncthreads();
    const int row_bytes = 2 * p.hidden, shown_bytes = kLogfmt ? Logfmt::row_bytes(p.hidden) : row_bytes;
    const int64_t slots = int64_t{p.num_ranks} * p.max_tokens;
    const int total = shared.first[local], slices = slices_of(p), stride = blocks * warps;
    int row = block + static_cast<int>(threadIdx.x / 32) * blocks;
    for (int slice = 0; slice < slices; ++slice, row -= total) {
        for (; row < total; row += stride) {
            int e = 0;  // the last expert that begins at this row or before, and has it
            for (int step = kMaxExperts / 2; step != 0; step /= 2)
                if (e + step < local && shared.first[e + step] <= row) e += step;
            const int index = row - shared.first[e];
            if (kWithoutOwn && index >= shared.own[e] && index < shared.behind[e]) continue;
            const char* from = reinterpret_cast<const char*>(p.y) + (e * slots + index) * row_bytes;
            copy_slice<kLogfmt>(from, rows + int64_t{row} * shown_bytes, slice * kSliceBytes, row_bytes);
        }
        if constexpr (kAnnounce) {
            // A warp that tells comes to the next slice later, and the next is told when all have come there: in order.
            uint32_t last = 0;
            delay_at_random(slice);
            __syncwarp();
            if (threadIdx.x % 32 == 0) {
                __threadfence_system();
                last = add_acq_rel_gpu(&mine->copied[p.set][slice], 1) == static_cast<uint32_t>(stride - 1);
                if (last != 0) mine->copied[p.set][slice] = 0;
            }
            __syncwarp();
            if (__shfl_sync(0xffffffffu, last, 0) != 0)
                tell_shown(p, number, step_of(slice, slices), rows - own, kLogfmt ? kCompactLogfmt : kCompact);
        }
    }
}

// By every thread of the last block of a launch that has shown everything.
DT_DEVICE void note_shown(const CombineParams& p, Control* mine, uint32_t number) {
    for (int peer = threadIdx.x; peer < p.num_ranks; peer += blockDim.x)
        if (!is_masked(p, peer)) mine->shown_to[p.set].at[peer] = number;
    if (threadIdx.x == 0) mine->combines[p.set] = number;
}

}  // namespace deepep_train::low_latency
