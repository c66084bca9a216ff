// Combine, sending: makes this rank's experts' rows readable for the ranks that they belong to. Unless they lie in memory that
// peers reach, the valid ones are copied there, one after another.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "logfmt.cuh"
#include "space.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 1024;

// By a warp: tells the peers of this node that rows may be pulled; `at`: where in the arena they lie, if they are spread.
DT_DEVICE void tell_shown(const CombineParams& p, uint32_t number, int64_t at, Shown how) {
    for (int peer = threadIdx.x % 32; peer < p.num_ranks; peer += 32) {
        if (is_masked(p, peer) || !is_local(p, peer)) continue;
        Control* there = control_of(p, peer);
        there->shown_at[p.set][p.rank] = at;
        store_release_sys(&there->shown[p.set].at[p.rank], uint64_t{how} << 32 | number);
    }
}

// By a block: the row of every expert among all, which `copy_columns` needs, and that the peers have pulled what was copied
// before.
DT_DEVICE void prepare_copies(const CombineParams& p, Control* mine, int32_t (&first)[kMaxExperts + 1]) {
    const int local = p.num_experts / p.num_ranks;
    if (threadIdx.x == 0) first[0] = 0;
    for (int e = threadIdx.x; e < local; e += blockDim.x) first[e + 1] = mine->num_rows[p.set][e];
    if (threadIdx.x < 32) wait_for_answers(p, mine->shown_to[p.set], mine->pulled[p.set]);
    __syncthreads();
    if (threadIdx.x < 32) sum_up(first + 1, local);
    __syncthreads();
}

// By a warp: kVectors * 512 bytes, from `start` on, of every row numbered `row`, `row` + `stride`, ..., as they are or in
// LogFMT; `row` becomes the first for the columns behind these.
template <bool kLogfmt, int kVectors>
DT_DEVICE void copy_columns(const CombineParams& p, const int32_t* first, char* rows, int start, int stride, int& row) {
    const int lane = threadIdx.x % 32, local = p.num_experts / p.num_ranks, total = first[local];
    const int row_bytes = 2 * p.hidden, shown_bytes = kLogfmt ? Logfmt::row_bytes(p.hidden) : row_bytes;
    const int slots = p.num_ranks * p.max_tokens;
    for (; row < total; row += stride) {
        int e = 0;  // the last expert that begins at this row or before, and has it
        for (int step = kMaxExperts / 2; step != 0; step /= 2)
            if (e + step < local && first[e + step] <= row) e += step;
        Piece<kVectors> part;
        part.load_last(reinterpret_cast<const char*>(p.y) + (int64_t{e} * slots + row - first[e]) * row_bytes, start,
                       row_bytes);
        char* to = rows + int64_t{row} * shown_bytes;
        if constexpr (!kLogfmt) {
            part.store(to, start, row_bytes);
        } else {
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const int at = start + i * 512 + lane * 16;
                Logfmt::encode(part.v[i], at < row_bytes ? to + at / 256 * Logfmt::kBytes : nullptr);
            }
        }
    }
    row -= total;
}

template <bool kLogfmt>
__global__ void __launch_bounds__(kThreads, 1) combine_send_kernel(const __grid_constant__ CombineParams p) {
    __shared__ int32_t first[kMaxExperts + 1];
    Control* mine = own_control(p);
    const uint32_t number = mine->combines[p.set] + 1;
    if (mine->closed != 0) return;
    if (p.zero_copy == 0) {
        prepare_copies(p, mine, first);
        const Layout layout(p);
        char* rows = own_space(p) + layout.rows + p.set * layout.rows_bytes;
        int row = blockIdx.x + threadIdx.x / 32 * gridDim.x;
        constexpr int kVectors = kLogfmt ? 4 : 8;
        for (int start = 0; start < 2 * p.hidden; start += kVectors * 512)
            copy_columns<kLogfmt, kVectors>(p, first, rows, start, gridDim.x * (kThreads / 32), row);
    }
    if (!is_last_block(mine, p, kCombineSend)) return;
    if (threadIdx.x < 32) {
        if (p.zero_copy != 0) {
            wait_for_answers(p, mine->shown_to[p.set], mine->pulled[p.set]);
            tell_shown(p, number, reinterpret_cast<const char*>(p.y) - arena_of(p, p.rank), kSpread);
        } else {
            tell_shown(p, number, 0, kLogfmt ? kCompactLogfmt : kCompact);
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
