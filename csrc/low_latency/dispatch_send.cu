// Dispatch, sending, where receiving is a launch of its own.
#include "../common/check.hpp"
#include "kernels.hpp"
#include "send.cuh"

namespace deepep_train::low_latency {

namespace {

template <typename Row>
__global__ void __launch_bounds__(kSendThreads, 1) dispatch_send_kernel(const __grid_constant__ DispatchParams p) {
    __shared__ Sending shared;
    Control* mine = control_of(p, p.rank);
    if (mine->closed != 0) return;
    send<Row>(p, mine, mine->dispatches[p.set] + 1, shared);
}

}  // namespace

int64_t space_bytes(const Common& c) { return Layout(c).end; }

void launch_dispatch_send(const DispatchParams& p, cudaStream_t stream) {
    if (p.scales == kBf16)
        dispatch_send_kernel<Plain><<<p.num_sms, kSendThreads, 0, stream>>>(p);
    else
        dispatch_send_kernel<Quantized><<<p.num_sms, kSendThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
