// One rank's end of its rail: memory in NVSHMEM's symmetric heap, queue pairs, and the launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../low_latency/params.hpp"
#include "params.hpp"

namespace deepep_train::rdma {

// NVSHMEM, started once in a process for one group of ranks.
std::string unique_id();
void start(int device, int rank, int num_ranks, const std::string& id);
// Collective among all ranks that were started, as is `queue_pairs`; never freed.
void* allocate(size_t bytes);
// Where a rank's copy of what `allocate` gave is in this process; throws if it cannot be reached.
void* of_peer(const void* symmetric, int rank);
// int [count], wherever NVSHMEM keeps it.
int* queue_pairs(int count);

struct Failure {
    uint64_t number = 0;
    std::string meeting;
    std::vector<int> ranks;
};

// Its memory lives as long as the process: freeing is a collective call, and a destructor makes none.
class Endpoint {
public:
    // Collective. `segment_bytes`: for the rows of each node, a multiple of 128.
    Endpoint(int device, int rank, int num_ranks, int num_local_ranks, int64_t segment_bytes, int num_qps,
             double timeout_seconds);

    uint64_t send() const { return reinterpret_cast<uint64_t>(end_.send); }
    uint64_t recv() const { return reinterpret_cast<uint64_t>(end_.recv); }
    int64_t segment_bytes() const { return end_.segment_bytes; }
    void rail(const RailParams& p, uint64_t stream) const;
    void sum(const SumParams& p, uint64_t stream) const;
    void put_dispatch(const low_latency::DispatchParams& p, uint64_t stream) const;
    void put_combine(const low_latency::CombineParams& p, uint64_t stream) const;
    void answer(const low_latency::Common& c, bool is_combine, uint64_t stream) const;
    std::optional<Failure> failure() const;

private:
    int device_;
    End end_{};
    Page* page_ = nullptr;
};

}  // namespace deepep_train::rdma
