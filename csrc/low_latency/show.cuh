// What a rank does with its experts' rows in combine: makes them readable for the ranks that they belong to. Unless they lie in
// memory that peers reach, the valid ones are copied there, one after another.
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

// By a block: what `copy_columns` needs, and that the peers have pulled what was copied before.
DT_DEVICE void prepare_copies(const CombineParams& p, Control* mine, Showing& shared) {
    const int local = p.num_experts / p.num_ranks;
    const Layout layout(p);
    const auto* places = reinterpret_cast<const Place*>(space_of(p, p.rank) + layout.own_places + p.set * layout.place_bytes);
    if (threadIdx.x == 0) shared.first[0] = 0;
    for (int e = threadIdx.x; e < local; e += blockDim.x) {
        const int count = mine->num_rows[p.set][e];
        const int64_t at = int64_t{e} * p.num_ranks + p.rank;
        shared.first[e + 1] = count;
        shared.own[e] = places[at].begin;
        shared.behind[e] = p.rank + 1 < p.num_ranks ? places[at + 1].begin : count;
    }
    if (threadIdx.x < 32) wait_for_answers(p, mine->shown_to[p.set], mine->pulled[p.set]);
    __syncthreads();
    if (threadIdx.x < 32) sum_up(shared.first + 1, local);
    __syncthreads();
}

// By a warp: kVectors * 512 bytes, from `start` on, of every row numbered `row`, `row` + `stride`, ..., as they are or in
// LogFMT; `row` becomes the first for the columns behind these. `kWithoutOwn`: but not of the rows of this rank's tokens.
template <bool kLogfmt, bool kWithoutOwn, int kVectors>
DT_DEVICE void copy_columns(const CombineParams& p, const Showing& shared, char* rows, int start, int stride, int& row) {
    constexpr int kTogether = (kLogfmt ? 4 : 8) / kVectors;
    const int lane = threadIdx.x % 32, local = p.num_experts / p.num_ranks, total = shared.first[local];
    const int row_bytes = 2 * p.hidden, shown_bytes = kLogfmt ? Logfmt::row_bytes(p.hidden) : row_bytes;
    const int slots = p.num_ranks * p.max_tokens;
    while (row < total) {
        int found = -1;  // where the row numbered `row` + lane * `stride` is, of all slots
        if (lane < kTogether && row + lane * stride < total) {
            const int mine = row + lane * stride;
            int e = 0;  // the last expert that begins at this row or before, and has it
            for (int step = kMaxExperts / 2; step != 0; step /= 2)
                if (e + step < local && shared.first[e + step] <= mine) e += step;
            const int index = mine - shared.first[e];
            if (!kWithoutOwn || index < shared.own[e] || index >= shared.behind[e]) found = e * slots + index;
        }
        int from[kTogether];
        Piece<kVectors> parts[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            from[i] = __shfl_sync(0xffffffffu, found, i);
            if (from[i] >= 0)
                parts[i].load_last(reinterpret_cast<const char*>(p.y) + int64_t{from[i]} * row_bytes, start, row_bytes);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            char* to = rows + int64_t{row} * shown_bytes;
            if (from[i] >= 0) {
                if constexpr (!kLogfmt) {
                    parts[i].store(to, start, row_bytes);
                } else {
#pragma unroll
                    for (int j = 0; j < kVectors; ++j) {
                        const int at = start + j * 512 + lane * 16;
                        Logfmt::encode(parts[i].v[j], at < row_bytes ? to + at / 256 * Logfmt::kBytes : nullptr);
                    }
                }
            }
            if (row < total) row += stride;
        }
    }
    row -= total;
}

// By every thread of the last block of a launch that has shown everything.
DT_DEVICE void note_shown(const CombineParams& p, Control* mine, uint32_t number) {
    for (int peer = threadIdx.x; peer < p.num_ranks; peer += blockDim.x)
        if (!is_masked(p, peer)) mine->shown_to[p.set].at[peer] = number;
    if (threadIdx.x == 0) mine->combines[p.set] = number;
}

}  // namespace deepep_train::low_latency
