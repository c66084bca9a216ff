// Dispatch in two launches, or, without a hook between them, in one.
#include "../common/check.hpp"
#include "dispatch_receive.cuh"
#include "dispatch_send.cuh"
#include "kernels.hpp"

namespace deepep_train::low_latency {

namespace {

#ifndef DT_R
#define DT_R 1024
#endif
constexpr int kSenders = 1024, kReceivers = DT_R, kBoth = 768;  // threads; both take more registers

template <typename Row>
__global__ void __launch_bounds__(kSenders, 1) dispatch_send_kernel(const __grid_constant__ DispatchParams p) {
    __shared__ Sending shared;
    Control* mine = own_control(p);
    const uint32_t number = mine->dispatches[p.set] + 1;
    if (mine->closed == 0) send_rows<Row, kSenders>(p, mine, number, shared);
}

__global__ void __launch_bounds__(kReceivers, 1) dispatch_receive_kernel(const __grid_constant__ DispatchParams p) {
    __shared__ Receiving shared;
    Control* mine = own_control(p);
    if (threadIdx.x == 0) shared.number = mine->dispatches[p.set];
    if (mine->closed != 0) return;
    __syncthreads();
    receive_rows<kReceivers>(p, shared);
}

// All of its blocks run at once, so that none that waits keeps another from sending.
template <typename Row>
__global__ void __launch_bounds__(kBoth, 1) dispatch_kernel(const __grid_constant__ DispatchParams p) {
    __shared__ Sending sending;
    __shared__ Receiving receiving;
    Control* mine = own_control(p);
    const uint32_t number = mine->dispatches[p.set] + 1;
    if (mine->closed != 0) return;
    if (threadIdx.x == 0) receiving.number = number;
    send_rows<Row, kBoth>(p, mine, number, sending);
    receive_rows<kBoth>(p, receiving);
}

}  // namespace

int64_t space_bytes(const Common& c) { return Layout(c).end; }

void launch_dispatch_send(const DispatchParams& p, cudaStream_t stream) {
    if (p.scales == kBf16)
        dispatch_send_kernel<Plain><<<p.num_sms, kSenders, 0, stream>>>(p);
    else
        dispatch_send_kernel<Quantized><<<p.num_sms, kSenders, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

void launch_dispatch_receive(const DispatchParams& p, cudaStream_t stream) {
    dispatch_receive_kernel<<<p.num_sms, kReceivers, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

void launch_dispatch(const DispatchParams& p, cudaStream_t stream) {
    if (p.scales == kBf16)
        dispatch_kernel<Plain><<<p.num_sms, kBoth, 0, stream>>>(p);
    else
        dispatch_kernel<Quantized><<<p.num_sms, kBoth, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::low_latency
