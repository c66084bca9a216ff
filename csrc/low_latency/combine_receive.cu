// Combine, receiving, where sending was a launch of its own.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "pull.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 768;
constexpr int kWarps = kThreads / 32;

template <bool kLogfmt>
__global__ void __launch_bounds__(kThreads, 1)
    combine_receive_kernel(const __grid_constant__ CombineParams p, const int splits) {
    __shared__ Sources sources;
    Control* mine = control_of(p, p.rank);
    if (mine->closed != 0) return;
    const uint32_t number = mine->combines[p.set];
    if (threadIdx.x < 32) sources.wait(p, mine, number, kSteps - 1);
    __syncthreads();
    const Place* places = places_of(p, Layout(p));
    const int64_t units = int64_t{p.num_tokens} * splits, stride = int64_t{gridDim.x} * kWarps;
    for (int64_t unit = blockIdx.x + static_cast<int64_t>(threadIdx.x / 32) * gridDim.x; unit < units; unit += stride) {
        const int64_t t = unit / splits;
        const Picks picks(p, sources, places, t);
        if constexpr (kLogfmt)
            pull_decoded(p, picks, t, static_cast<int>(unit % splits), splits);
        else
            pull(p, picks, t, static_cast<int>(unit % splits), splits);
    }
    if (is_last_block(mine, p, kCombineReceive)) tell_pulled(p, sources.came, number);
}

}  // namespace

void launch_combine_receive(const CombineParams& p, cudaStream_t stream) {
    // A warp a unit, if rows are long enough for so many.
    const int warps = p.num_sms * kWarps, pieces = (2 * p.hidden + 511) / 512;
    int splits = p.num_tokens == 0 ? 1 : (warps + p.num_tokens - 1) / p.num_tokens;
    splits = splits < pieces ? splits : pieces;
    if (p.logfmt != 0)
        combine_receive_kernel<true><<<p.num_sms, kThreads, 0, stream>>>(p, splits);
    else
        combine_receive_kernel<false><<<p.num_sms, kThreads, 0, stream>>>(p, splits);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
