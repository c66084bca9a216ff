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
    if (p.zero_copy == 0) show_copies<kLogfmt, false>(p, mine, number, blockIdx.x, gridDim.x, shared);
    if (!is_last_block(mine, p, kCombineSend, gridDim.x)) return;
    if (threadIdx.x < 32) {
        const Layout layout(p);
        const Shown how = kLogfmt ? kCompactLogfmt : kCompact;
        if (p.zero_copy != 0)
            show_in_place(p, mine, number);
        else
            tell_shown(p, number, kSteps - 1, layout.rows + p.set * layout.rows_bytes, how);
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
