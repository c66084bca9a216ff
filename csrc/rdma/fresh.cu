// Launches of fresh.cuh's kernels.
#include "fresh.cuh"

#include <algorithm>
#include <stdexcept>

#include "../common/check.hpp"
#include "kernels.hpp"

namespace deepep_train::rdma {

namespace {

constexpr int kThreads = 1024, kFewer = 256;

__global__ void __launch_bounds__(kThreads, 1) tell_kernel(const __grid_constant__ TellParams p) { tell(p); }
__global__ void __launch_bounds__(kThreads, 1)
    digest_kernel(const __grid_constant__ End end, const __grid_constant__ DigestParams p) {
    digest(end, p);
}
__global__ void __launch_bounds__(kFewer) pack_words_kernel(const __grid_constant__ PackParams p) { pack_words(p); }
__global__ void __launch_bounds__(kThreads, 1) find_slots_kernel(const __grid_constant__ SlotParams p) { find_slots(p); }
__global__ void __launch_bounds__(kFewer)
    unpack_words_kernel(const __grid_constant__ End end, const __grid_constant__ UnpackParams p) {
    unpack_words(end, p);
}
__global__ void __launch_bounds__(kFewer)
    move_weights_kernel(const __grid_constant__ End end, const __grid_constant__ WeightParams p) {
    move_weights(end, p);
}

// Of kFewer threads, one for each of `work` as far as that goes.
int blocks_for(int64_t work) { return static_cast<int>(std::clamp<int64_t>((work + kFewer - 1) / kFewer, 1, 256)); }

}  // namespace

void launch_tell(const TellParams& p, cudaStream_t stream) {
    tell_kernel<<<p.num_nodes + 1, kThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

void launch_digest(const End& end, const DigestParams& p, cudaStream_t stream) {
    if (p.num_experts > Digest::kMostExperts) throw std::invalid_argument("more experts than 4096");
    digest_kernel<<<1, kThreads, 0, stream>>>(end, p);
    DT_CUDA(cudaGetLastError());
}

void launch_pack_words(const PackParams& p, cudaStream_t stream) {
    pack_words_kernel<<<blocks_for(int64_t{p.num_tokens} * p.num_nodes), kFewer, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

void launch_find_slots(const SlotParams& p, cudaStream_t stream) {
    find_slots_kernel<<<p.num_nodes * p.num_local_ranks, kThreads, 0, stream>>>(p);
    DT_CUDA(cudaGetLastError());
}

void launch_unpack_words(const End& end, const UnpackParams& p, cudaStream_t stream) {
    unpack_words_kernel<<<blocks_for(p.capacity * (p.top_k + 1)), kFewer, 0, stream>>>(end, p);
    DT_CUDA(cudaGetLastError());
}

void launch_move_weights(const End& end, const WeightParams& p, cudaStream_t stream) {
    move_weights_kernel<<<blocks_for(p.num_picks), kFewer, 0, stream>>>(end, p);
    DT_CUDA(cudaGetLastError());
}

}  // namespace deepep_train::rdma
