// The rdma engine's launches. Each is asynchronous on `stream` and throws if it cannot be launched.
#pragma once

#include <cuda_runtime_api.h>

#include "../low_latency/params.hpp"
#include "fresh.hpp"
#include "params.hpp"

namespace deepep_train::rdma {

void launch_rail(const End& end, const RailParams& p, cudaStream_t stream);
void launch_refuse(const End& end, bool for_good, cudaStream_t stream);
void launch_sum(const End& end, const SumParams& p, cudaStream_t stream);

// Of a fresh dispatch.
void launch_tell(const TellParams& p, cudaStream_t stream);
void launch_digest(const End& end, const DigestParams& p, cudaStream_t stream);
void launch_pack_words(const PackParams& p, cudaStream_t stream);
void launch_find_slots(const SlotParams& p, cudaStream_t stream);
void launch_unpack_words(const End& end, const UnpackParams& p, cudaStream_t stream);
void launch_move_weights(const End& end, const WeightParams& p, cudaStream_t stream);

// Of the low-latency calls: what follows dispatch's and combine's sending, and either's receiving.
void launch_put_dispatch(const Pairs& pairs, const low_latency::DispatchParams& p, cudaStream_t stream);
void launch_put_combine(const Pairs& pairs, const low_latency::CombineParams& p, cudaStream_t stream);
void launch_answer(const Pairs& pairs, const low_latency::Common& c, bool is_combine, cudaStream_t stream);

}  // namespace deepep_train::rdma
