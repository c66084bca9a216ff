// A receiving kernel is launched so that its blocks come as those of the kernel before it leave (programmatic dependent
// launch), which saves the pause between the two. What the earlier kernel has written it may read once it has waited for it.
#pragma once

#include <cuda_runtime.h>

#include "../common/check.hpp"
#include "../common/ptx.cuh"

namespace deepep_train::low_latency {

// Before sm_90 there is nothing of the kind, and launches follow each other.
DT_DEVICE void wait_for_launches_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DT_DEVICE void let_launches_behind_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// `kernel` must begin with `wait_for_launches_before`.
template <typename Params>
void launch_behind(void (*kernel)(Params), int blocks, int threads, cudaStream_t stream, const Params& p) {
    cudaFuncAttributes code;
    DT_CUDA(cudaFuncGetAttributes(&code, kernel));
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;  // what runs here is compiled for this
    DT_CUDA(cudaLaunchKernelEx(&config, kernel, p));
}

}  // namespace deepep_train::low_latency
