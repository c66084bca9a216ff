// Combine, receiving, where sending was a launch of its own.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "pull.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 640;

__global__ void __launch_bounds__(kThreads, 1) combine_receive_kernel(const __grid_constant__ CombineParams p) {
    __shared__ Pulling shared;
    Control* mine = control_of(p, p.rank);
    if (mine->closed != 0) return;
    const uint32_t number = mine->combines[p.set];
    pull_all<false>(p, mine, number, blockIdx.x, gridDim.x, shared);
    if (is_last_block(mine, p, kCombineReceive, gridDim.x)) tell_pulled(p, mine, number);
}

}  // namespace

void launch_combine_receive(const CombineParams& p, cudaStream_t stream) {
    combine_receive_kernel<<<p.num_sms, kThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
