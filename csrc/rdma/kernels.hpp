// The rdma engine's launches. Each is asynchronous on `stream` and throws if it cannot be launched.
#pragma once

#include <cuda_runtime_api.h>

#include "params.hpp"

namespace deepep_train::rdma {

void launch_rail(const End& end, const RailParams& p, cudaStream_t stream);
void launch_refuse(const End& end, bool for_good, cudaStream_t stream);
void launch_sum(const End& end, const SumParams& p, cudaStream_t stream);

}  // namespace deepep_train::rdma
