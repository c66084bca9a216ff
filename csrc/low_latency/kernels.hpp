// The low-latency engine's launches. Each is asynchronous on `stream` and throws if it cannot be launched.
#pragma once

#include <cuda_runtime_api.h>

#include "params.hpp"

namespace deepep_train::low_latency {

// Bytes of a rank's space; those at its start that must be 0 before the first call; and where among these is the word that,
// if it is not 0, makes every kernel of this rank return at once.
int64_t space_bytes(const Common& c);
int64_t control_bytes();
int64_t closed_offset();

void launch_dispatch_send(const DispatchParams& p, cudaStream_t stream);
void launch_dispatch_receive(const DispatchParams& p, cudaStream_t stream);
void launch_combine_send(const CombineParams& p, cudaStream_t stream);
void launch_combine_receive(const CombineParams& p, cudaStream_t stream);
// Both phases in one launch, slice by slice: for rows of a multiple of `kSlice` bytes, as they are, of ranks that share a GPU
// and run at the same time; `most_tokens`: that `num_sms` blocks take.
void launch_combine_slices(const CombineParams& p, cudaStream_t stream);
int most_tokens_in_slices(int num_sms);
void launch_forget(const Common& c, int peer, cudaStream_t stream);

}  // namespace deepep_train::low_latency
