// Dispatch, receiving, where sending was a launch of its own.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "receive.cuh"

namespace deepep_train::low_latency {

namespace {

constexpr int kThreads = 768;

__global__ void __launch_bounds__(kThreads, 1) dispatch_receive_kernel(const __grid_constant__ DispatchParams p) {
    __shared__ Receiving shared;
    Control* mine = control_of(p, p.rank);
    if (mine->closed != 0) return;
    receive(p, mine, mine->dispatches[p.set], shared);
}

}  // namespace

void launch_dispatch_receive(const DispatchParams& p, cudaStream_t stream) {
    dispatch_receive_kernel<<<p.num_sms, kThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
