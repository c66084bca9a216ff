// The nvlink engine's launches. Each is asynchronous on `stream` and throws if it cannot be launched.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/check.hpp"
#include "params.hpp"

namespace deepep_train::nvlink {

struct Domain;
enum Operation : uint32_t;

// The code that the current device would run; throws if this build has none for it.
struct CodeHere {
    bool has_bulk_copies;   // before sm_90 there is no bulk copy engine
    int most_shared_bytes;  // of a block, of whatever kernel
};
CodeHere code_here();

// Lets blocks have the shared memory that code with bulk copies takes; once for each device, before the first launch.
void allow_memory_for_dispatch();
void allow_memory_for_expand();
void allow_memory_for_combine();
template <typename Kernel>
void allow_shared_bytes(Kernel* kernel, int most) {
    DT_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

void launch_layout(const LayoutParams& p, cudaStream_t stream);
void launch_count(const Domain& d, const CountParams& p, cudaStream_t stream);
void launch_place(const PlaceParams& p, cudaStream_t stream);
void launch_dispatch(const Domain& d, const DispatchParams& p, cudaStream_t stream);
void launch_refuse(const Domain& d, Operation operation, int64_t reason, int64_t bytes, cudaStream_t stream);
void launch_arrange(const Domain& d, const ArrangeParams& p, cudaStream_t stream);
void launch_expand(const Domain& d, const ExpandParams& p, cudaStream_t stream);
void launch_scales(const Domain& d, const ScalesParams& p, cudaStream_t stream);
void launch_reduce(const Domain& d, const ReduceParams& p, cudaStream_t stream);
void launch_combine(const Domain& d, const CombineParams& p, cudaStream_t stream);

}  // namespace deepep_train::nvlink
