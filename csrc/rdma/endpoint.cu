#include "endpoint.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "../common/check.hpp"
#include "kernels.hpp"

namespace deepep_train::rdma {

Endpoint::Endpoint(int device, int rank, int num_ranks, int num_local_ranks, int64_t segment_bytes, int num_qps,
                   double timeout_seconds)
    : device_(device) {
    const int nodes = num_ranks / num_local_ranks;
    if (nodes > kMaxNodes) throw std::invalid_argument("more than " + std::to_string(kMaxNodes) + " nodes");
    DT_CUDA(cudaSetDevice(device));
    end_.node = rank / num_local_ranks;
    end_.num_nodes = nodes;
    end_.num_local_ranks = num_local_ranks;
    end_.rail = rank % num_local_ranks;
    end_.timeout_ns = static_cast<uint64_t>(std::max(timeout_seconds, 1e-6) * 1e9);
    end_.segment_bytes = segment_bytes;
    end_.send = static_cast<char*>(allocate(segment_bytes * nodes));
    end_.recv = static_cast<char*>(allocate(segment_bytes * nodes));
    const size_t words = sizeof(uint64_t) * kMaxNodes;
    end_.ready = static_cast<uint64_t*>(allocate(2 * words));
    end_.arrived = end_.ready + kMaxNodes;
    DT_CUDA(cudaMemset(end_.ready, 0, 2 * words));

    char* own = nullptr;
    DT_CUDA(cudaMalloc(&own, words + 256));
    DT_CUDA(cudaMemset(own, 0, words + 256));
    end_.seen = reinterpret_cast<uint64_t*>(own);
    end_.number = reinterpret_cast<uint64_t*>(own + words);
    end_.joined = reinterpret_cast<uint32_t*>(own + words + 64);
    end_.failed = reinterpret_cast<uint32_t*>(own + words + 128);
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
    launch_rail(end_, p, reinterpret_cast<cudaStream_t>(stream));
}

void Endpoint::sum(const SumParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_sum(end_, p, reinterpret_cast<cudaStream_t>(stream));
}

void Endpoint::put_dispatch(const low_latency::DispatchParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_put_dispatch({end_.qps, end_.num_qps}, p, reinterpret_cast<cudaStream_t>(stream));
}

void Endpoint::put_combine(const low_latency::CombineParams& p, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_put_combine({end_.qps, end_.num_qps}, p, reinterpret_cast<cudaStream_t>(stream));
}

void Endpoint::answer(const low_latency::Common& c, bool is_combine, uint64_t stream) const {
    DT_CUDA(cudaSetDevice(device_));
    launch_answer({end_.qps, end_.num_qps}, c, is_combine, reinterpret_cast<cudaStream_t>(stream));
}

std::optional<Failure> Endpoint::failure() const {
    if (page_->failed == 0) return std::nullopt;
    std::atomic_thread_fence(std::memory_order_acquire);
    Failure f;
    f.number = page_->number;
    f.meeting = page_->meeting == 0 ? "their readiness" : "their rows";
    for (int n = 0; n < end_.num_nodes; ++n)
        if (page_->missing[n] != 0) f.ranks.push_back(n * end_.num_local_ranks + end_.rail);
    return f;
}

}  // namespace deepep_train::rdma
