// Combine, sending: makes this rank's experts' rows readable for the ranks that they belong to. Unless they lie in memory that
// peers reach, the valid ones are copied there, one after another.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "logfmt.cuh"
#include "space.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 1024;

struct Showing {
    int32_t first[kMaxExperts + 1];  // row of every expert among all
};

// By a warp: tells the peers that rows may be pulled; `at`: where they lie, relative to this rank's space.
DT_DEVICE void tell_shown(const CombineParams& p, uint32_t number, int64_t at, Shown how) {
    for (int peer = threadIdx.x % 32; peer < p.num_ranks; peer += 32) {
        if (is_masked(p, peer)) continue;
        Control* there = control_of(p, peer);
        there->shown_at[p.set][p.rank] = at;
        there->shown_how[p.set][p.rank] = how;
        store_release_sys(&there->shown[p.set].at[p.rank], number);
    }
}

// By a block: what `copy_columns` needs, and that the peers have pulled what was copied before.
DT_DEVICE void prepare_copies(const CombineParams& p, Control* mine, Showing& shared) {
    const int local = p.num_experts / p.num_ranks;
    if (threadIdx.x == 0) shared.first[0] = 0;
    for (int e = threadIdx.x; e < local; e += blockDim.x) shared.first[e + 1] = mine->num_rows[p.set][e];
    if (threadIdx.x < 32) wait_for_answers(p, mine->shown_to[p.set], mine->pulled[p.set]);
    __syncthreads();
    if (threadIdx.x < 32) sum_up(shared.first + 1, local);
    __syncthreads();
}

// By a warp: kVectors * 512 bytes, from `start` on, of every row numbered `row`, `row` + `stride`, ..., as they are or in
// LogFMT; `row` becomes the first for the columns behind these.
template <bool kLogfmt, int kVectors>
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
            found = e * slots + mine - shared.first[e];
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

template <bool kLogfmt>
__global__ void __launch_bounds__(kThreads, 1) combine_send_kernel(const __grid_constant__ CombineParams p) {
    __shared__ Showing shared;
    Control* mine = control_of(p, p.rank);
    if (mine->closed != 0) return;
    const uint32_t number = mine->combines[p.set] + 1;
    const Layout layout(p);
    const int64_t copies = layout.rows + p.set * layout.rows_bytes;
    if (p.zero_copy == 0) {
        prepare_copies(p, mine, shared);
        int row = blockIdx.x + threadIdx.x / 32 * gridDim.x;
        constexpr int kVectors = kLogfmt ? 4 : 8;
        for (int start = 0; start < 2 * p.hidden; start += kVectors * 512)
            copy_columns<kLogfmt, kVectors>(p, shared, space_of(p, p.rank) + copies, start, gridDim.x * (kThreads / 32), row);
    }
    if (!is_last_block(mine, p, kCombineSend)) return;
    if (threadIdx.x < 32) {
        if (p.zero_copy != 0) {
            wait_for_answers(p, mine->shown_to[p.set], mine->pulled[p.set]);
            tell_shown(p, number, reinterpret_cast<const char*>(p.y) - space_of(p, p.rank), kSpread);
        } else {
            tell_shown(p, number, copies, kLogfmt ? kCompactLogfmt : kCompact);
        }
    }
    __syncthreads();
    for (int peer = threadIdx.x; peer < p.num_ranks; peer += kThreads)
        if (!is_masked(p, peer)) mine->shown_to[p.set].at[peer] = number;
    if (threadIdx.x == 0) mine->combines[p.set] = number;
}

}  // namespace

void launch_combine_send(const CombineParams& p, cudaStream_t stream) {
    const int blocks = p.zero_copy != 0 ? 1 : p.num_sms;
    if (p.logfmt != 0)
        combine_send_kernel<true><<<blocks, kThreads, 0, stream>>>(p);
    else
        combine_send_kernel<false><<<blocks, kThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
