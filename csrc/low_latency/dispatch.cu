// Dispatch in one launch, for calls without a hook.

#include "../common/check.hpp"
#include "kernels.hpp"
#include "receive.cuh"
#include "send.cuh"

namespace deepep_train::low_latency {

namespace {

template <typename Row>
__global__ void __launch_bounds__(kSendThreads, 1) dispatch_both_kernel(const __grid_constant__ DispatchParams p) {
    __shared__ union Shared {
        Sending sending;
        Receiving receiving;
    } shared;
    Control* mine = control_of(p, p.rank);
    if (mine->closed != 0) return;
    const uint32_t number = mine->dispatches[p.set] + 1;
    send<Row>(p, mine, number, shared.sending);
    __syncthreads();
    receive(p, mine, number, shared.receiving);
}

}  // namespace

void launch_dispatch(const DispatchParams& p, cudaStream_t stream) {
    if (p.scales == kBf16)
        dispatch_both_kernel<Plain><<<p.num_sms, kSendThreads, 0, stream>>>(p);
    else
        dispatch_both_kernel<Quantized><<<p.num_sms, kSendThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
