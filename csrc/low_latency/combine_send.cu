// Combine, sending, where receiving is a launch of its own.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "show.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 1024;
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
            copy_columns<kLogfmt, false, kVectors>(p, shared, space_of(p, p.rank) + copies, start, gridDim.x * (kThreads / 32),
                                                   row);
    }
    if (!is_last_block(mine, p, kCombineSend)) return;
    if (threadIdx.x < 32) {
        if (p.zero_copy != 0) {
            wait_for_answers(p, mine->shown_to[p.set], mine->pulled[p.set]);
            tell_shown(p, number, kSteps - 1, reinterpret_cast<const char*>(p.y) - space_of(p, p.rank), kSpread);
        } else {
            tell_shown(p, number, kSteps - 1, copies, kLogfmt ? kCompactLogfmt : kCompact);
        }
    }
    __syncthreads();
    note_shown(p, mine, number);
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
