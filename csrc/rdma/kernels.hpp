// The rdma engine's launches. Each is asynchronous on `stream` and throws if it cannot be launched.
#pragma once

#include <cuda_runtime_api.h>

#include "../low_latency/params.hpp"
#include "params.hpp"

namespace deepep_train::rdma {

void launch_rail(const End& end, const RailParams& p, cudaStream_t stream);
void launch_sum(const End& end, const SumParams& p, cudaStream_t stream);

// Of the low-latency calls: what follows dispatch's and combine's sending, and either's receiving.
void launch_put_dispatch(const Pairs& pairs, const low_latency::DispatchParams& p, cudaStream_t stream);
void launch_put_combine(const Pairs& pairs, const low_latency::CombineParams& p, cudaStream_t stream);
void launch_answer(const Pairs& pairs, const low_latency::Common& c, bool is_combine, cudaStream_t stream);

}  // namespace deepep_train::rdma
