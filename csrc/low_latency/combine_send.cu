// Combine, sending: makes this rank's experts' rows readable for the ranks that they belong to. Unless they lie in memory that
// peers reach, the valid ones are copied there, one after another.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "logfmt.cuh"
#include "space.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;

// By a warp: a piece of a row, as it is.
DT_DEVICE void copy(const char* from, char* to, int start, int row_bytes) {
    Piece<4> part;
    part.load(from, start, row_bytes);
    part.store(to, start, row_bytes);
}

// And in LogFMT.
DT_DEVICE void encode(const char* from, char* to, int start, int row_bytes) {
    Piece<4> part;
    part.load(from, start, row_bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int at = start + i * 512 + threadIdx.x % 32 * 16;
        Logfmt::encode(part.v[i], at < row_bytes ? to + at / 256 * Logfmt::kBytes : nullptr);
    }
}

template <bool kLogfmt>
__global__ void __launch_bounds__(kThreads, 1) combine_send_kernel(const __grid_constant__ CombineParams p) {
    __shared__ int32_t first[kMaxExperts + 1];  // row of every expert among all
    Control* mine = control_of(p, p.rank);
    if (mine->closed != 0) return;
    const uint32_t number = mine->combines[p.set] + 1;
    const int local = p.num_experts / p.num_ranks;
    if (threadIdx.x == 0) first[0] = 0;
    for (int e = threadIdx.x; e < local; e += kThreads) first[e + 1] = mine->num_rows[p.set][e];
    if (threadIdx.x < 32) wait_for_answers(p, mine->shown_to[p.set], mine->pulled[p.set]);
    __syncthreads();
    if (threadIdx.x < 32) sum_up(first + 1, local);
    __syncthreads();
    const Layout layout(p);
    char* own = space_of(p, p.rank);
    char* rows = own + layout.rows + p.set * layout.rows_bytes;
    if (p.zero_copy == 0) {
        const int row_bytes = 2 * p.hidden, pieces = Piece<4>::in(row_bytes);
        const int shown_bytes = kLogfmt ? Logfmt::row_bytes(p.hidden) : row_bytes;
        const int64_t slots = int64_t{p.num_ranks} * p.max_tokens;
        const int64_t units = int64_t{first[local]} * pieces, stride = int64_t{gridDim.x} * kWarps;
        for (int64_t unit = blockIdx.x + static_cast<int64_t>(threadIdx.x / 32) * gridDim.x; unit < units; unit += stride) {
            const int row = static_cast<int>(unit / pieces);
            const int start = static_cast<int>(unit % pieces) * Piece<4>::kBytes;
            int e = 0;  // the last expert that begins at this row or before, and has it
            for (int step = kMaxExperts / 2; step != 0; step /= 2)
                if (e + step < local && first[e + step] <= row) e += step;
            const char* from = reinterpret_cast<const char*>(p.y) + (e * slots + row - first[e]) * row_bytes;
            char* to = rows + int64_t{row} * shown_bytes;
            if constexpr (kLogfmt)
                encode(from, to, start, row_bytes);
            else
                copy(from, to, start, row_bytes);
        }
    }
    if (!is_last_block(mine, p, kCombineSend)) return;
    const int64_t at = (p.zero_copy != 0 ? reinterpret_cast<const char*>(p.y) : rows) - own;
    for (int peer = threadIdx.x; peer < p.num_ranks; peer += kThreads) {
        if (is_masked(p, peer)) continue;
        Control* there = control_of(p, peer);
        there->shown_at[p.set][p.rank] = at;
        there->shown_how[p.set][p.rank] = p.zero_copy != 0 ? kSpread : kLogfmt ? kCompactLogfmt : kCompact;
        store_release_sys(&there->shown[p.set].at[p.rank], number * kSteps + kSteps - 1);
        mine->shown_to[p.set].at[peer] = number;
    }
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
