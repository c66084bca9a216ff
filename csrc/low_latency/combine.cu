// Combine in one launch, for calls without a hook: some blocks copy rows slice by slice, the others pull each slice when all
// ranks have copied it, while the caches hold it. Copies have room of their own, so that copying waits for nobody.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "pull.cuh"
#include "show.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 640;

template <bool kLogfmt>
__global__ void __launch_bounds__(kThreads, 1) combine_both_kernel(const __grid_constant__ CombineParams p, const int copiers) {
    __shared__ union {
        Showing showing;
        Pulling pulling;
    } shared;
    Control* mine = control_of(p, p.rank);
    if (mine->closed != 0) return;
    const int block = blockIdx.x, blocks = gridDim.x;
    const uint32_t number = mine->combines[p.set] + 1;
    if (copiers == 0 && block == 0 && threadIdx.x < 32) show_in_place(p, mine, number);
    if (block < copiers)
        show_copies<kLogfmt, true>(p, mine, number, block, copiers, shared.showing);
    else
        pull_all<true>(p, mine, number, block - copiers, blocks - copiers, shared.pulling);
    if (!is_last_block(mine, p, kCombineSend, blocks)) return;
    note_shown(p, mine, number);
    tell_pulled(p, mine, number);
}

}  // namespace

void launch_combine(const CombineParams& p, cudaStream_t stream) {
    // Half of the SMs for each: a guess, not measured yet.
    const int copiers = p.zero_copy != 0 ? 0 : p.num_sms / 2;
    if (p.zero_copy == 0 && copiers == 0) {
        launch_combine_send(p, stream);
        launch_combine_receive(p, stream);
        return;
    }
    if (p.logfmt != 0)
        combine_both_kernel<true><<<p.num_sms, kThreads, 0, stream>>>(p, copiers);
    else
        combine_both_kernel<false><<<p.num_sms, kThreads, 0, stream>>>(p, copiers);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
