#include "endpoint.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "../common/check.hpp"
#include "../common/on_device.hpp"
#include "kernels.hpp"

namespace deepep_train::rdma {

Endpoint::Endpoint(int device, int rank, int num_ranks, int num_local_ranks, int64_t segment_bytes, int num_qps,
                   double timeout_seconds, uint64_t node_failed)
    : device_(device) {
    const int nodes = num_ranks / num_local_ranks;
    if (nodes > kMaxNodes) throw std::invalid_argument("more than " + std::to_string(kMaxNodes) + " nodes");
    DT_CUDA(cudaSetDevice(device));
    end_.node = rank / num_local_ranks;
    end_.num_nodes = nodes;
    end_.num_local_ranks = num_local_ranks;
    end_.rail = rank % num_local_ranks;
    end_.timeout_ns = static_cast<uint64_t>(std::clamp(timeout_seconds, 1e-6, 1e9) * 1e9);
    resize(segment_bytes);
    const size_t words = sizeof(uint64_t) * kMaxNodes;
    end_.ready = static_cast<uint64_t*>(allocate(3 * words));
    end_.arrived = end_.ready + 2 * kMaxNodes;
    DT_CUDA(cudaMemset(end_.ready, 0, 3 * words));

    char* own = nullptr;
    DT_CUDA(cudaMalloc(&own, words + 256));
    DT_CUDA(cudaMemset(own, 0, words + 256));
    end_.seen = reinterpret_cast<uint64_t*>(own);
    end_.number = reinterpret_cast<uint64_t*>(own + words);
    end_.joined = reinterpret_cast<uint32_t*>(own + words + 64);
    end_.failed = reinterpret_cast<uint32_t*>(own + words + 128);
    end_.put_bytes = reinterpret_cast<uint64_t*>(own + words + 192);
    end_.node_failed = reinterpret_cast<uint32_t*>(node_failed);
    end_.num_qps = num_qps;
    DT_CUDA(cudaMalloc(&end_.qps, sizeof(int) * num_qps));
    DT_CUDA(cudaMemcpy(end_.qps, queue_pairs(num_qps), sizeof(int) * num_qps, cudaMemcpyDefault));
    void* page = nullptr;
    DT_CUDA(cudaHostAlloc(&page, sizeof(Page), cudaHostAllocMapped | cudaHostAllocPortable));
    std::memset(page, 0, sizeof(Page));
    page_ = static_cast<Page*>(page);
    void* device_page = nullptr;
    DT_CUDA(cudaHostGetDevicePointer(&device_page, page, 0));
    end_.page = static_cast<Page*>(device_page);
    DT_CUDA(cudaDeviceSynchronize());
}

void Endpoint::rail(const RailParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_rail(end_, p, as_stream(stream));
}

void Endpoint::resize(int64_t segment_bytes) {
    DT_CUDA(cudaSetDevice(device_));
    auto* both = static_cast<char*>(allocate(2 * segment_bytes * end_.num_nodes));
    end_.segment_bytes = segment_bytes;
    end_.send = both;
    end_.recv = both + segment_bytes * end_.num_nodes;
}

void Endpoint::refuse(bool for_good, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_refuse(end_, for_good, as_stream(stream));
}

void Endpoint::sum(const SumParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_sum(end_, p, as_stream(stream));
}

void Endpoint::tell(const TellParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_tell(p, as_stream(stream));
}

void Endpoint::digest(const DigestParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_digest(end_, p, as_stream(stream));
}

void Endpoint::pack_words(const PackParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_pack_words(p, as_stream(stream));
}

void Endpoint::find_slots(const SlotParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_find_slots(p, as_stream(stream));
}

void Endpoint::unpack_words(const UnpackParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_unpack_words(end_, p, as_stream(stream));
}

void Endpoint::move_weights(const WeightParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_move_weights(end_, p, as_stream(stream));
}

void Endpoint::put_dispatch(const low_latency::DispatchParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_put_dispatch({end_.qps, end_.num_qps}, p, as_stream(stream));
}

void Endpoint::put_combine(const low_latency::CombineParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_put_combine({end_.qps, end_.num_qps}, p, as_stream(stream));
}

void Endpoint::answer(const low_latency::Common& c, bool is_combine, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_answer({end_.qps, end_.num_qps}, c, is_combine, as_stream(stream));
}

std::optional<Failure> Endpoint::failure() const {
    if (page_->failed == 0) return std::nullopt;
    std::atomic_thread_fence(std::memory_order_acquire);
    Failure f;
    f.number = page_->number;
    static const char* const causes[] = {"none",    "their readiness", "their rows", "mismatched",
                                         "refused", "gave up",         "node",       "counts"};
    f.cause = causes[page_->cause];
    for (int n = 0; n < end_.num_nodes; ++n)
        if (page_->at_fault[n] != 0) f.ranks.push_back(n * end_.num_local_ranks + end_.rail);
    return f;
}

}  // namespace deepep_train::rdma
